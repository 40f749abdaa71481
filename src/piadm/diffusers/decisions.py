"""What a pipeline's loop decides by the value of its timestep, what of it the scheduler is given, and what the loop draws.

The steps of a window are run together and have no one timestep, so Python can neither branch on it nor make a number of it, the
scheduler's table has no options that differ from step to step, and random numbers drawn in a round would belong to it, not to a
step. All are seen in the source. What happens only under a condition of the pipeline's own (an option, an input) may never
happen, and is said to be conditional.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import inf

DRAWS = re.compile(
    r"randn_tensor|(np|numpy|random|torch)\.(.*\.)?(randn|rand|randint|randperm|normal|uniform|choice)(_like)?"
    r"|torch\.(bernoulli|multinomial|poisson)|.*\.(normal|uniform|bernoulli|exponential|random)_"
)
"""Functions that draw random numbers."""

OF_VALUES = re.compile(r"(torch|math|np|numpy)\.(?!is_).*|float|int|bool|min|max|abs|round|sum")
"""Functions whose value is made of their arguments' values; what methods of the pipeline make of them is not known."""

NUMBERS = re.compile(r"float|int|bool|min|max|round|range|torch\.(arange|full)|(math|np|numpy)\..*")
"""Those that need one value; `torch.tensor` is seen to (`piadm.diffusers.literals`)."""

OF_KINDS = re.compile(r"shape|dtype|device|ndim|dim|size|numel|nelement|element_size|stride|layout|requires_grad|is_\w+")
"""Attributes and methods of a tensor that do not look at its values."""


@dataclass(frozen=True)
class Part:
    """Statements that each round runs.

    Attributes:
        body: The statements.
        given: Names that hold the loop's timestep before them.
        numbers: Names that count the loop's rounds.
        conditional: Whether they may never be run.
        place: What the text of findings in them begins with.
        stepped: The line of `scheduler.step` in the loop; infinite elsewhere.
    """

    body: Sequence[ast.stmt]
    given: frozenset[str]
    numbers: frozenset[str] = frozenset()
    conditional: bool = False
    place: str = ""
    stepped: float = inf

    @classmethod
    def of_loop(cls, loop: ast.For, numbers: Iterable[str]) -> Part:
        """The body of a loop over timesteps; `numbers`: names that count its rounds."""
        called, target, counted = ast.unparse(loop.iter), loop.target, frozenset(numbers)
        if isinstance(target, ast.Tuple) and "enumerate(" in called:
            target = target.elts[-1]
        given = frozenset() if called.startswith("range(") else _names(target) - counted
        stepped = min((node.lineno for node in ast.walk(loop) if isinstance(node, ast.Call) and _steps(node)), default=inf)
        return cls(loop.body, given, counted, stepped=stepped)

    @cached_property
    def nodes(self) -> tuple[tuple[ast.AST, str, bool], ...]:
        """Its nodes, each with the text of the statement that it is part of, and whether it may never be run."""
        text = cache(lambda whole: self.place + " ".join(ast.unparse(whole).split()))
        found = _walk(self.body, self.timesteps | self.numbers)
        return tuple((node, text(whole), self.conditional or conditional) for node, whole, conditional in found)

    @cached_property
    def timesteps(self) -> frozenset[str]:
        """Names that hold the loop's timestep, or something made of its value, wherever they are read."""
        found, before = self.given, None
        while found != before:
            before, assigned = found, self._assigned(found)
            found = found | {name for names, follow, conditional in assigned if follow and not conditional for name in names}
        before = None
        while found != before:
            before, found = found, found - {name for names, follow, _ in self._assigned(found) if not follow for name in names}
        return found

    @cached_property
    def generators(self) -> frozenset[str]:
        """Names of generators of random numbers that are made here."""
        made = (node for one in self.body for node in ast.walk(one) if isinstance(node, ast.Assign))
        return frozenset[str]().union(*(_names(one.targets[0]) for one in made if "Generator(" in ast.unparse(one.value)))

    def _assigned(self, found: frozenset[str]) -> Iterator[tuple[frozenset[str], bool, bool]]:
        """Names that are assigned to, whether what is made of these names, and whether that may never be run."""
        for node, _, conditional in _walk(self.body, found | self.numbers):
            match node:
                case ast.Assign(targets=targets, value=value):
                    pass
                case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
                    targets = [target]
                case ast.AugAssign(target=target, op=op, value=other):
                    targets, value = [target], ast.BinOp(target, op, other)
                case _:
                    continue
            follow = follows(value, found)
            yield from ((_names(one), follow, conditional) for one in targets if isinstance(one, ast.Name | ast.Tuple))


def decisions(part: Part) -> Iterator[str]:
    """Statements that always need the value of the timestep."""
    return _always(part, _needs)


def _always(part: Part, meant: Callable[[ast.AST, Part], bool]) -> Iterator[str]:
    """Statements with a node that is meant, which are run whatever the conditions are; one for both arms of an `if`."""
    for node, text, conditional in part.nodes:
        if conditional:
            continue
        if meant(node, part):
            yield text
        elif isinstance(node, ast.If):
            arms = (replace(part, body=arm, given=part.timesteps, conditional=False) for arm in (node.body, node.orelse))
            one, other = (next(_always(arm, meant), None) for arm in arms)
            if one is not None and other is not None:
                yield one


def _needs(node: ast.AST, part: Part) -> bool:
    values = part.timesteps
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.Assert(test=test):
            return follows(test, values)
        case ast.BoolOp(values=[first, *_]):
            return follows(first, values)  # the rest is looked at if need be
        case ast.Call(func=ast.Attribute(value=value, attr="item" | "tolist" | "numpy")):
            return follows(value, values)
        case ast.Call(func=function, args=arguments):
            return NUMBERS.fullmatch(ast.unparse(function)) is not None and _any(arguments, values)
    return False


def options(part: Part) -> Iterator[str]:
    """What a scheduler's step is always given of the timestep besides the timestep."""
    for node, _, conditional in part.nodes:
        if not conditional and isinstance(node, ast.Call) and _steps(node):
            given = (one for one in node.keywords if one.arg != "timestep" and follows(one.value, part.timesteps))
            yield from (part.place + ast.unparse(one) for one in given)


def _steps(call: ast.Call) -> bool:
    return ast.unparse(call.func).endswith("scheduler.step")


def belated(part: Part) -> Iterator[str]:
    """Statements that always noise something to the timestep of a step that has been taken."""
    return _always(part, _noises_late)


def _noises_late(node: ast.AST, part: Part) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="add_noise" | "scale_noise"), args=arguments, keywords=keywords):
            return node.lineno > part.stepped and _any([*arguments, *(one.value for one in keywords)], part.timesteps)
    return False


def draws(part: Part) -> Iterator[str]:
    """Statements that always draw random numbers, not through the scheduler, nor from a generator made anew in each round."""
    return _always(part, _drawn)


def _drawn(node: ast.AST, part: Part) -> bool:
    if not isinstance(node, ast.Call) or not DRAWS.fullmatch(ast.unparse(node.func)):
        return False
    return part.generators.isdisjoint(ast.unparse(one.value) for one in node.keywords if one.arg == "generator")


def _names(target: ast.AST) -> frozenset[str]:
    """Names that an assignment to a target binds."""
    return frozenset(one.id for one in ast.walk(target) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))


def follows(value: ast.expr | None, names: frozenset[str]) -> bool:
    """Whether an expression's value is always made of these names' values."""
    match value:
        case ast.Name(id=name):
            return name in names
        case ast.Attribute(value=inner, attr=name):
            return OF_KINDS.fullmatch(name) is None and follows(inner, names)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            if isinstance(function, ast.Attribute) and follows(function.value, names):
                return OF_KINDS.fullmatch(function.attr) is None
            name = ast.unparse(function)
            parts = [*arguments, *(one.value for one in keywords)]
            return OF_VALUES.fullmatch(name) is not None and _any(parts, names)
        case ast.Compare(left=left, ops=ops, comparators=others):
            return not all(isinstance(one, ast.Is | ast.IsNot) for one in ops) and _any([left, *others], names)
        case ast.BinOp(left=one, right=other) | ast.Subscript(value=one, slice=other):
            return _any([one, other], names)
        case ast.UnaryOp(operand=inner) | ast.Starred(value=inner):
            return follows(inner, names)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return _any(parts, names)
        case ast.BoolOp(values=[first, *_]):
            return follows(first, names)  # what comes after it may not be looked at
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return follows(test, names) or (follows(body, names) and follows(orelse, names))
    return False


def _any(parts: list[ast.expr], names: frozenset[str]) -> bool:
    return any(follows(one, names) for one in parts)


def _walk(body: Sequence[ast.stmt], own: frozenset[str]) -> Iterator[tuple[ast.AST, ast.AST, bool]]:
    """The nodes of some statements, the statement or the head of one that each is part of, and whether it may never be run.

    A condition on the value of the loop's `own` counters is met at some step. What comes after a `return` that may be met, as
    some condition has led there, may never be run.
    """
    left = False

    def settled(test: ast.AST) -> bool:
        several = any(isinstance(one, ast.BoolOp) for one in ast.walk(test))
        return not several and isinstance(test, ast.expr) and follows(test, own)

    def visit(node: ast.AST, whole: ast.AST, conditional: bool) -> Iterator[tuple[ast.AST, ast.AST, bool]]:
        nonlocal left
        before = left
        match node:
            case ast.If(test=head) | ast.While(test=head) | ast.For(iter=head):
                whole = head
            case ast.stmt() if not isinstance(node, ast.With | ast.Try | ast.FunctionDef):
                whole = node
        yield node, whole, conditional or left
        for child, conditions in _children(node):
            yield from visit(child, whole, conditional or not all(map(settled, conditions)))
        left = isinstance(node, ast.Return) or (left if not isinstance(node, ast.FunctionDef) else before)

    for statement in body:
        yield from visit(statement, statement, False)


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, Sequence[ast.AST]]]:
    """The parts of a node, each with the conditions under which it is run."""
    match node:
        case ast.If(test=head, body=body, orelse=other) | ast.While(test=head, body=body, orelse=other):
            yield head, []
            yield from ((child, [head]) for child in [*body, *other])
        case ast.IfExp(test=head, body=one, orelse=two):
            yield from ((head, []), (one, [head]), (two, [head]))
        case ast.BoolOp(values=values):
            yield from ((child, values[:place]) for place, child in enumerate(values))
        case ast.For(iter=head, body=body):
            yield head, []
            yield from ((child, [head]) for child in body)
        case ast.Lambda() | ast.FunctionDef() | ast.comprehension() | ast.ExceptHandler() | ast.match_case():
            yield from ((child, [node]) for child in ast.iter_child_nodes(node))
        case _:
            yield from ((child, []) for child in ast.iter_child_nodes(node))
