"""What a pipeline's loop decides by the value of its timestep, and what it draws.

The steps of a window are run together and have no one timestep, so Python can neither branch on it nor make a number of it, and
random numbers drawn in the loop's body would belong to a round, not to a step. Both are seen in the source. What a loop does
only under a condition of its own (an option, an input) may never happen, and is said to be conditional.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DRAWS = re.compile(
    r"randn_tensor|(np|numpy|random|torch)\.(.*\.)?(randn|rand|randint|randperm|normal|uniform|choice)(_like)?"
    r"|torch\.(bernoulli|multinomial|poisson)|.*\.(normal|uniform|bernoulli|exponential|random)_"
)
"""Functions that draw random numbers."""

OF_VALUES = re.compile(r"(torch|math|np|numpy)\.(?!is_).*|float|int|bool|min|max|abs|round|sum")
"""Functions whose value is made of their arguments' values; what methods of the pipeline make of them is not known."""

NUMBERS = re.compile(r"float|int|bool|min|max|round")
"""Those that need one value."""

OF_KINDS = re.compile(r"shape|dtype|device|ndim|dim|size|numel|is_\w+")
"""Attributes and methods of a tensor that do not look at its values."""


@dataclass(frozen=True)
class Finding:
    """A statement, or the head of one, that lanes cannot follow; `conditional`: whether it may never happen."""

    text: str
    conditional: bool


def decisions(loop: ast.For, numbers: set[str]) -> Iterator[Finding]:
    """Where a loop needs the value of its timestep; `numbers`: names that count its rounds."""
    values = _timesteps(loop, numbers)

    def needs(node: ast.AST) -> bool:
        match node:
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.Assert(test=test):
                return _follows(test, values)
            case ast.BoolOp(values=parts):
                return any(_follows(one, values) for one in parts)
            case ast.Call(func=ast.Attribute(value=value, attr="item" | "tolist" | "numpy")):
                return _follows(value, values)
            case ast.Call(func=ast.Name(id=name), args=arguments) if NUMBERS.fullmatch(name):
                return any(_follows(one, values) for one in arguments)
        return False

    for node, text, conditional in _walk(loop, values | numbers):
        if needs(node):
            # what stands first in `a or b` is looked at, the rest if need be
            later = isinstance(node, ast.BoolOp) and not _follows(node.values[0], values)
            yield Finding(text, conditional or later)


def draws(loop: ast.For, numbers: set[str]) -> Iterator[Finding]:
    """Where a loop draws random numbers of its own."""
    for node, text, conditional in _walk(loop, _timesteps(loop, numbers) | numbers):
        if isinstance(node, ast.Call) and DRAWS.fullmatch(ast.unparse(node.func)):
            yield Finding(text, conditional)


def _timesteps(loop: ast.For, numbers: set[str]) -> set[str]:
    """Names that always hold the loop's timestep, or something made of its value."""
    called, target = ast.unparse(loop.iter), loop.target
    if called.startswith("range("):
        return set()
    if isinstance(target, ast.Tuple) and "enumerate(" in called:
        target = target.elts[-1]
    found = _names(target) - numbers
    while True:
        more = {
            name
            for node, _, conditional in _walk(loop, found | numbers)
            if isinstance(node, ast.Assign) and not conditional and _follows(node.value, found)
            for target in node.targets
            if isinstance(target, ast.Name | ast.Tuple)
            for name in _names(target)
        }
        if more <= found:
            return found
        found |= more


def _names(part: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}


def _follows(value: ast.expr | None, names: set[str]) -> bool:
    """Whether an expression's value is always made of these names' values."""
    match value:
        case ast.Name(id=name):
            return name in names
        case ast.Attribute(value=inner, attr=name):
            return OF_KINDS.fullmatch(name) is None and _follows(inner, names)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            if isinstance(function, ast.Attribute) and _follows(function.value, names):
                return OF_KINDS.fullmatch(function.attr) is None
            name = ast.unparse(function)
            parts = [*arguments, *(one.value for one in keywords)]
            return OF_VALUES.fullmatch(name) is not None and _any(parts, names)
        case ast.Compare(left=left, ops=ops, comparators=others):
            return not all(isinstance(one, ast.Is | ast.IsNot) for one in ops) and _any([left, *others], names)
        case ast.BinOp(left=one, right=other) | ast.Subscript(value=one, slice=other):
            return _any([one, other], names)
        case ast.UnaryOp(operand=inner) | ast.Starred(value=inner):
            return _follows(inner, names)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return _any(parts, names)
        case ast.BoolOp(values=[first, *_]):
            return _follows(first, names)  # what comes after it may not be looked at
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _follows(test, names) or (_follows(body, names) and _follows(orelse, names))
    return False


def _any(parts: list[ast.expr], names: set[str]) -> bool:
    return any(_follows(one, names) for one in parts)


def _walk(loop: ast.For, own: set[str]) -> Iterator[tuple[ast.AST, str, bool]]:
    """The nodes of a loop's body, the statement that each is part of, and whether it may never be run.

    A condition on the loop's `own` counters alone is met at some step.
    """

    def settled(test: ast.AST) -> bool:
        return bool(_names(test) & own) and not any(isinstance(node, ast.BoolOp) for node in ast.walk(test))

    def visit(node: ast.AST, text: str, conditional: bool) -> Iterator[tuple[ast.AST, str, bool]]:
        match node:
            case ast.If(test=head) | ast.While(test=head) | ast.For(iter=head):
                text = " ".join(ast.unparse(head).split())
            case ast.stmt() if not isinstance(node, ast.With | ast.Try | ast.FunctionDef):
                text = " ".join(ast.unparse(node).split())
        yield node, text, conditional
        for child, conditions in _children(node):
            yield from visit(child, text, conditional or not all(map(settled, conditions)))

    for statement in loop.body:
        yield from visit(statement, "", False)


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
        case ast.Lambda() | ast.FunctionDef() | ast.comprehension() | ast.ExceptHandler():
            yield from ((child, [node]) for child in ast.iter_child_nodes(node))
        case _:
            yield from ((child, []) for child in ast.iter_child_nodes(node))
