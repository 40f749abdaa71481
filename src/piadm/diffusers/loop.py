"""What a pipeline's loop does with its step number, with the value of its timestep, and with random numbers.

Lanes run the body of a pipeline's loop once a round for all steps of the window, so nothing in it may depend on the number of
the step other than through the timestep. The number is an integer of Python's, which no tensor can stand in for; so the
source is read. Counting for progress bars and callbacks is harmless, other uses are not. In the same reading decisions by the
timestep's value, and draws of random numbers, are found (`piadm.diffusers.decisions`), also in what the loop calls of the
pipeline's own (`piadm.diffusers.methods`).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from piadm.diffusers.decisions import belated, decisions, draws, options
from piadm.diffusers.methods import Function, parts, source
from piadm.diffusers.probing import UnsupportedError

HARMLESS = (
    r"\bi (==|<) len\((self\.)?(scheduler\.)?\w*timesteps\w*\) - 1",  # is this the last step: see the noise below
    r"\(?i \+ 1\)? > num_warmup_steps",
    r"\(i \+ 1\) % (self\.)?scheduler\.order == 0",
    r"\bi % callback_steps == 0",
    r"step_idx = i // getattr\((self\.)?scheduler, 'order', 1\)",
    r"callback(_on_step_end)?\((self, )?i, .*\)",
    r"noise_timestep = timesteps\[i \+ 1\]",  # goes to add_noise or scale_noise, which use the lanes' own levels
    r"timesteps\[i - 1\] if i > 0 else None",  # for CogVideoXDPMScheduler, which is refused
    r"cache_context_kwargs = \{.*\}",  # for caches of the transformer, which are refused while enabled
)


@dataclass(frozen=True)
class Guard:
    """Something that is harmless while an option, of the pipeline's call or of its configuration, has a certain value.

    Attributes:
        pattern: What it looks like, in the loop or, after the name of a method and a colon, there.
        argument: The option.
        harmless: Its value.
        or_less: Whether lesser values are harmless, too.
        idle: Whether it never happens in a call of the pipeline with these options, whatever this one is.
        effect: What happens else.
    """

    pattern: str
    argument: str
    harmless: Any
    or_less: bool = False
    idle: Callable[[Any, Mapping[str, Any]], bool] = lambda pipe, options: False
    effect: str = "does something at certain steps and not at others"

    def check(self, pipe: Any, options: Mapping[str, Any]) -> None:
        """Raises `UnsupportedError` if the option has another value."""
        given = options.get(self.argument, self.harmless)
        values = given if isinstance(given, list | tuple) and given else [given]
        if all(map(self._spares, values)) or self.idle(pipe, options):
            return
        shown = _short(" ".join(repr(given).split()))
        raise UnsupportedError(
            f"`{self.argument}` is {shown}: {type(pipe).__name__} then {self.effect}, but those of a window are run together; "
            f"give `{self.argument}={self.harmless!r}`"
        )

    def _spares(self, value: Any) -> bool:
        if value is None or self.harmless is None:
            return value is self.harmless
        return bool(value == self.harmless) or (self.or_less and bool(value < self.harmless))


def _unguided(pipe: Any, options: Mapping[str, Any]) -> bool:
    """Whether UniDiffuser makes an image or a text of nothing, of which there is no guidance."""
    names = inspect.signature(pipe._infer_mode).parameters
    return pipe._infer_mode(**{name: options.get(name) for name in names}) in ("img", "text")


GUARDS = (
    Guard(r"controlnet_keep\[i\]", "control_guidance_start", 0.0),
    Guard(r"controlnet_keep\[i\]", "control_guidance_end", 1.0),
    Guard(r"should_skip_layers = .*", "skip_guidance_layers", None),
    Guard(r"do_classifier_free_truncation = .*", "cfg_trunc_ratio", 1.0),
    Guard(r"i < int\(num_inference_steps \* adapter_conditioning_factor\)", "adapter_conditioning_factor", 1.0),
    Guard(r"_guidance_scale = .*t\.item\(\)", "use_dynamic_cfg", False),
    Guard(r"boundary_timestep is None or t >= boundary_timestep", "boundary_ratio", None),
    Guard(
        r"_get_pag_scale: signal_scale < 0",
        "pag_adaptive_scale",
        0.0,
        or_less=True,
        idle=lambda pipe, options: options.get("pag_scale") == 0,
    ),
    Guard(
        r"_get_noise_pred: (img_vae|img_clip|text)_T = randn_tensor",
        "guidance_scale",
        1.0,
        or_less=True,
        idle=_unguided,
        effect="draws random numbers of its own at every step",
    ),
    Guard(
        r"gligen_inpaint_latent_with_noise = .*randn_like",
        "gligen_inpaint_image",
        None,
        effect="draws random numbers of its own at every step",
    ),
    Guard(
        r"\bstore_processor\.attention_probs",
        "sag_scale",
        0.0,
        or_less=True,
        effect="looks, at every step, at what its network kept of that step alone",
    ),
)


def check_loop(pipeline: type) -> list[Guard]:
    """Reads a pipeline's class; returns the options that its configuration and the arguments of its calls must leave alone.

    Raises:
        UnsupportedError: if a loop that steps the scheduler uses its step number in a way that lanes cannot follow, or if it or
            what it calls of the pipeline's own needs its timestep's value, gives the scheduler an option made of the timestep,
            or draws random numbers.
    """
    guards: list[Guard] = []
    loops = list(_loops(pipeline))
    if not loops:
        raise UnsupportedError(
            f"`pipe` is a {pipeline.__name__}, in whose source no `for` loop with `scheduler.step(` is found: whether its "
            "steps depend on more than the timestep cannot be told; step the scheduler in a loop over its timesteps, in a file"
        )
    for loop, number in ((each, number) for _, each in loops for number in _numbers(each)):
        for text in _uses(loop, number):
            found = [guard for guard in GUARDS if re.search(guard.pattern, text)]
            guards += found
            rest = text
            for pattern in (*HARMLESS, *(guard.pattern for guard in found)):
                rest = re.sub(pattern, "", rest)
            if re.search(r"\bi\b", rest):
                raise UnsupportedError(
                    f"`pipe` is a {pipeline.__name__}, whose loop uses the number of the step, `{_short(text)}`: the steps of "
                    "a window are run together, so only the timestep may tell them apart"
                )
    for method, loop in loops:
        if not any(inner is not loop for inner in _within(loop)):
            guards += _unfollowed(pipeline, method, loop)
    return list(dict.fromkeys(guards))


def _unfollowed(pipeline: type, method: Function, loop: ast.For) -> Iterator[Guard]:
    """Options that keep a loop from what lanes cannot follow; what no option keeps it from is refused."""
    because = {
        decisions: "needs the value of its timestep, `{}`: the steps of a window are run together and have no one value",
        options: "gives `scheduler.step` an option that differs from step to step, `{}`: the steps of a window are run "
        "together, by a table that tells them apart by their timesteps",
        belated: "noises something to its timestep after `scheduler.step`, `{}`: the states there are the next round's, "
        "at other timesteps",
        draws: "draws random numbers, `{}`: they would depend on the window, not on the step; draw them before the loop",
    }
    every = list(parts(pipeline, method, loop, _numbers(loop)))
    for look, reason in because.items():
        for text in (one for part in every for one in look(part)):
            if not any(re.search(guard.pattern, text) for guard in GUARDS):
                raise UnsupportedError(f"`pipe` is a {pipeline.__name__}, whose loop {reason.format(_short(text))}")
    texts = {text for part in every for _, text, _ in part.nodes}
    yield from (guard for guard in GUARDS if any(re.search(guard.pattern, text) for text in texts))


def mentioned(pipeline: type) -> set[str]:
    """Attributes of a pipeline that its loops and what they call mention, their networks among them."""
    return {
        node.attr
        for method, loop in _loops(pipeline)
        for part in parts(pipeline, method, loop, _numbers(loop))
        for node, _, _ in part.nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def loops_once(pipeline: type) -> bool:
    """Whether the one method that steps the scheduler is seen to go over its timesteps in one loop and nowhere else."""
    stepping = [
        node
        for _, node in _methods(pipeline)
        if any(isinstance(one, ast.For) and "scheduler.step(" in ast.unparse(one) for one in ast.walk(node))
    ]
    if len(stepping) != 1:
        return False
    over = [one.iter for one in ast.walk(stepping[0]) if isinstance(one, ast.For | ast.comprehension)]
    return sum("timesteps" in ast.unparse(one) for one in over) == 1


def _methods(pipeline: type) -> Iterator[tuple[Function, ast.FunctionDef]]:
    """A class's methods that step a scheduler, and their sources."""
    for _, method in inspect.getmembers(pipeline, inspect.isfunction):
        function = inspect.unwrap(method)
        definition = source(function)
        if definition is not None and "scheduler.step(" in ast.unparse(definition):
            yield function, definition


def _loops(pipeline: type) -> Iterator[tuple[Function, ast.For]]:
    """Loops that step a scheduler, and which of a class's methods they are in."""
    for method, definition in _methods(pipeline):
        for loop in _within(definition):
            yield method, loop


def _within(part: ast.AST) -> Iterator[ast.For]:
    for node in ast.walk(part):
        if isinstance(node, ast.For) and "scheduler.step(" in ast.unparse(node):
            yield node


def _numbers(loop: ast.For) -> Iterator[str]:
    """Names that count a loop's rounds: given by `enumerate` or `range`, or increased by one number each time."""
    called = ast.unparse(loop.iter.func) if isinstance(loop.iter, ast.Call) else ""
    first = loop.target.elts[0] if isinstance(loop.target, ast.Tuple) and called == "enumerate" else loop.target
    if called == "enumerate" and isinstance(first, ast.Name):
        yield first.id
    if any(inner is not loop for inner in _within(loop)):
        return  # one that counts whole runs
    if called == "range" and isinstance(first, ast.Name):
        yield first.id
    yield from {name for node in ast.walk(loop) if (name := _counted(node)) is not None}


def _counted(node: ast.AST) -> str | None:
    """The name that a statement counts up or down."""
    match node:
        case ast.AugAssign(target=ast.Name(id=name), value=ast.Constant(value=int())):
            return name
        case ast.Assign(
            targets=[ast.Name(id=name)], value=ast.BinOp(left=ast.Name(id=same), right=ast.Constant(value=int()))
        ) if name == same:
            return name
    return None


def _uses(loop: ast.For, number: str) -> Iterator[str]:
    """The smallest statements, and the heads of compound ones, that mention the step number; it is renamed `i`."""
    for node in ast.walk(loop):
        if _counted(node) == number:
            continue
        match node:
            case ast.If() | ast.While():
                part: ast.AST = node.test
            case ast.For() if node is not loop:
                part = node.iter
            case ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Expr() | ast.Return():
                part = node
            case _:
                continue
        if any(isinstance(leaf, ast.Name) and leaf.id == number for leaf in ast.walk(part)):
            yield re.sub(rf"\b{number}\b", "i", " ".join(ast.unparse(part).split()))


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
