"""Pipelines, whole: `parallelize` and `parallel`."""

from __future__ import annotations

import copy
import inspect
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from piadm.certificate import EXACT
from piadm.denoiser import require_moments
from piadm.diffusers.lanes import Lanes, Network, check_mode
from piadm.diffusers.loop import check_loop, loops_once, mentioned
from piadm.diffusers.probing import Probe, UnsupportedError, check_scheduler, probe
from piadm.diffusers.progress import Bar
from piadm.diffusers.run import Entangled, Run, Settings
from piadm.diffusers.scheduler import in_lanes, recorded
from piadm.diffusers.slices import Slices
from piadm.errors import require, require_count, require_positive
from piadm.memory import require_limit
from piadm.noise import read_generators
from piadm.ranks import Ranks
from piadm.result import Result
from piadm.speculative import THRESHOLD

BATCHES = ("prompt", "generator", "class_labels", "image")
"""Arguments of pipelines that may be a list of one for each sample."""


def parallelize(
    pipe: Any,
    *,
    window: int | None = 32,
    tolerance: float = 1e-2,
    mean: float | Tensor = 0.0,
    variance: float | Tensor = 1.0,
    exact: bool = False,
    max_memory: float | None = None,
    ranks: Ranks | None = None,
) -> Parallelized:
    r"""A diffusers pipeline that samples in parallel across time, called as the pipeline itself is.

    It returns what `pipe(...)` returns, for the same arguments and generator, to `tolerance`, in fewer rounds of network calls.
    The pipeline is not changed; during a call its scheduler is replaced and its networks are wrapped, and both are put back.

    Arguments:
        pipe: A pipeline with a `scheduler` and a loop over its timesteps.
        window: How many steps are evaluated at once; `None` for all. A round calls the network with window × batch rows (twice
            that with guidance), and memory grows with it. 1 is the pipeline's own sequential run, bit for bit.
        tolerance: $τ$, the rms distance per coordinate of the final latents from the sequential ones that the stopping rule
            (`piadm.stopping`) aims at.
        mean: Mean of the latents (a guess costs rounds).
        variance: Variance of the latents per coordinate, about 1 for latent diffusion, 0.3 for pixels in [-1, 1] (a bad
            guess costs rounds and misleads the stopping rule).
        exact: Whether samples are to have exactly the law of the sequential run, as `piadm.Exact` does it, in place of being
            within `tolerance` of its sample: for schedulers that draw noise. A step whose noise the network does not see
            (half of KDPM2 ancestral's, SA-Solver's outside of its `tau_func`) costs a round.
        max_memory: Bytes that a call's rounds may take besides the networks' weights, or a fraction of the device's memory
            (`0.5`). Networks are called for as many steps of the window at once as fit, by their measured cost (of four steps,
            once for each shape), and the first step is taken alone; a window whose states do not fit is refused. See
            `piadm.memory`. With or without it, a network that runs out of memory is called for half as many steps from then
            on, which is said in a warning. Text encoders, decoding and a window of 1 take what they take.
        ranks: `piadm.Ranks()`, for several processes (`torchrun`), each with the pipeline on a device of its own: all make the
            same call, with generators of one seed, each evaluates its share of the window's steps, and all get the image.

    Raises:
        UnsupportedError: (a `ValueError`) for a pipeline or scheduler that cannot be run in parallel, with the reason, before
            any work where it can be known.
        ValueError, TypeError: for arguments that do not fit.
        RankError: from a call, if another rank died, fell silent or raised an error.
        NonFiniteError: from a call, if the network returns NaN or infinity.
    """
    require(
        not isinstance(window, str), "window", window, "pipelines are not timed: give a number of steps, for example window=32"
    )
    if window is not None:
        require_count("window", window, "window=32")
    require_positive("tolerance", tolerance, "tolerance=1e-2")
    require_moments(mean, variance)
    if max_memory is not None:
        require_limit(max_memory)
    if not isinstance(ranks, Ranks | None):
        raise TypeError(f"`ranks` is {ranks!r}: give piadm.Ranks(), or piadm.Ranks(group)")
    return Parallelized(pipe, Settings(window, tolerance, mean, variance, THRESHOLD if exact else None, max_memory, ranks))


class Parallelized:
    """A pipeline in parallel; made by `parallelize`. Attributes that are not its own are the pipeline's.

    Attributes:
        pipe: The pipeline.
        last_result: The `Result` of the last call: final latents, rounds, evaluations, residuals; `None` before,
            and after a call that an exception or an interruption ended.
    """

    pipe: Any
    last_result: Result | None

    def __init__(self, pipe: Any, settings: Settings) -> None:
        name = type(pipe).__name__
        if not callable(pipe) or not hasattr(pipe, "components"):
            raise TypeError(f"`pipe` is a {name}: give a diffusers pipeline, for example StableDiffusionPipeline")
        if getattr(pipe, "scheduler", None) is None:
            raise UnsupportedError(f"`pipe` is a {name}, which has no `scheduler`: there are no steps to run in parallel")
        self.pipe, self.settings, self.last_result = pipe, settings, None
        self._guards = [] if settings.window == 1 else check_loop(type(pipe))
        self._once, self._looped = loops_once(type(pipe)), mentioned(type(pipe))
        self._check(getattr(pipe, "config", {}))
        self._own = type(pipe).__call__  # which `parallel` takes the place of
        self._tables: dict[Any, Probe] = {}
        self._checked: set[Any] = set()
        self._separate: dict[Any, bool] = {}
        self._entangled = False
        self._costs: dict[Hashable, int] = {}
        self._found: dict[str, int] = {}
        self._probe_early()

    def __repr__(self) -> str:
        return f"Parallelized({type(self.pipe).__name__}, window={self.settings.window}, tolerance={self.settings.tolerance:g})"

    def __getattr__(self, name: str) -> Any:
        if name in ("pipe", "settings"):
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the pipeline with these arguments and returns what it returns."""
        return self._call(self._own, args, kwargs)

    def _probe_early(self) -> None:
        """Reads and runs the scheduler's table for a few steps, so that one without a table is refused at once."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        dynamic = scheduler.config.get("use_dynamic_shifting", False)
        scheduler.set_timesteps(4, **({"mu": 0.5} if dynamic else {}))
        probe(scheduler, scheduler.timesteps)

    def _check(self, options: Mapping[str, Any]) -> None:
        """Raises `UnsupportedError` for what can be known of a call with these options before any work."""
        pipe = self.pipe
        check_scheduler(pipe.scheduler)
        if self.settings.window == 1:
            return  # the pipeline itself
        for guard in self._guards:
            guard.check(pipe, options)
        for part, module in pipe.components.items():
            if getattr(module, "is_cache_enabled", False):
                raise UnsupportedError(
                    f"`pipe.{part}` has a cache enabled, which reuses what it computed at the step before: call "
                    f"pipe.{part}.disable_cache() first"
                )
            if part in self._looped and isinstance(module, nn.Module):
                check_mode(module, part)

    def _call(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pipe, self.last_result = self.pipe, None
        bound = inspect.signature(call).bind(pipe, *args, **kwargs)
        named = _named(bound)
        self._check({**_defaults(bound.signature), **getattr(pipe, "config", {}), **named})
        if self.settings.window == 1:
            return self._sequentially(call, bound)
        generators = [one for one in read_generators(named.get("generator")) if one is not None]
        rewind = _rewinder(generators)
        try:
            return self._in_parallel(call, bound)
        except Entangled:
            self._entangled = True
        rewind()
        return self._in_parallel(call, inspect.signature(call).bind(pipe, *args, **kwargs))

    def _in_parallel(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        pipe, name = self.pipe, type(self.pipe).__name__
        named = _named(bound)
        takes = named.keys() & inspect.signature(pipe.scheduler.step).parameters
        expected = {one: named[one] for one in takes if one in ("eta", "use_clipped_model_output")}
        generator = named.get("generator")
        slices = Slices(self.settings.max_memory, self._costs, self._found, self.settings.ranks)
        known = self._tables, self._checked, self._separate, self._entangled
        run = Run(self.settings, pipe.scheduler, *known, generator, self._once, expected, slices)
        width = self._width(bound)
        held: list[Any] = []

        def body(lane: Tensor) -> Tensor:
            run.lanes = Lanes(lane, width)
            held.append(call(*bound.args, **bound.kwargs))
            return lane

        with _installed(pipe, run):
            _wrap_callbacks(pipe, run, bound)
            try:
                torch.vmap(body, randomness="same")(torch.arange(width))
            except RuntimeError as error:
                if run.looping and "vmap" in str(error):
                    raise UnsupportedError(
                        f"`pipe` is a {name}, whose loop decides something by the value of the timestep or the state, or "
                        "writes it into a tensor of its own: the steps of a window are run together and have no one value "
                        f"({str(error).split('.')[0]})"
                    ) from error
                raise
        self.last_result = run.result
        return held[0]

    def _sequentially(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """A window of one step: the pipeline itself."""
        started, seen = time.perf_counter(), [torch.zeros(1)]
        steps = 0

        def record(sample: Tensor) -> None:
            nonlocal steps
            steps += 1
            seen[0] = sample

        with _replaced(self.pipe, "scheduler", recorded(self.pipe.scheduler, record)):
            out = call(*bound.args, **bound.kwargs)
        self.last_result = Result(
            samples=seen[0],
            steps=steps,
            rounds=steps,
            evaluations=float(steps),
            residuals=(),
            windows=(),
            converged=True,
            error=torch.zeros(len(seen[0])),
            certificate=EXACT,
            seconds=time.perf_counter() - started,
            network_seconds=float("nan"),
        )
        return out

    def _width(self, bound: inspect.BoundArguments) -> int:
        """Lanes to provide: one for every step in the window of any sample, which are at most all steps."""
        bound = inspect.BoundArguments(bound.signature, bound.arguments.copy())
        bound.apply_defaults()
        lists = [bound.arguments.get(one) for one in ("timesteps", "sigmas")]
        asked = [2 * len(one) for one in lists if one is not None]
        number = bound.arguments.get("num_inference_steps")
        # more steps than any scheduler makes of `num_inference_steps`
        total = max([*asked, 2 * number if isinstance(number, int) else 0, 2]) + 10
        window = self.settings.window
        return total if window is None else max(window, min(total, window * samples_of(bound.arguments)))


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**bound.arguments, **bound.arguments.get("kwargs", {})}


def _defaults(signature: inspect.Signature) -> dict[str, Any]:
    """What arguments are that a call leaves out."""
    return {one.name: one.default for one in signature.parameters.values() if one.default is not one.empty}


def samples_of(arguments: Mapping[str, Any]) -> int:
    """About how many samples a call asks for; where the arguments do not tell, samples far ahead of others wait for them."""
    several = [value for name, value in arguments.items() if re.fullmatch(r"num_\w+_per_prompt", name)]
    counts = [arguments.get("batch_size"), *(len(arguments[name]) for name in BATCHES if isinstance(arguments.get(name), list))]
    counts += [len(value) for value in arguments.values() if isinstance(value, Tensor) and value.ndim > 1]
    return max(count for count in [1, *counts] if isinstance(count, int)) * max(
        (count for count in several if isinstance(count, int)), default=1
    )


def _rewinder(generators: list[torch.Generator]) -> Callable[[], None]:
    """A function that puts these generators, and torch's own, back to where they are now."""
    states, own = [one.get_state() for one in generators], torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def rewind() -> None:
        torch.set_rng_state(own)
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return rewind


@contextmanager
def parallel(pipe: Any, **settings: Any) -> Iterator[Parallelized]:
    """Within the context, `pipe(...)` itself runs in parallel; afterwards the pipeline is exactly as before.

    Arguments:
        pipe: The pipeline.
        settings: Those of `parallelize`.

    Yields:
        The `Parallelized` pipeline, whose `last_result` is that of the last call.
    """
    made = parallelize(pipe, **settings)
    own = type(pipe)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return made._call(own.__call__, args, kwargs)

    members = {"__call__": wraps(own.__call__)(call), "__module__": own.__module__, "__qualname__": own.__qualname__}
    pipe.__class__ = type(own.__name__, (own,), {**members, "last_result": property(lambda self: made.last_result)})
    try:
        yield made
    finally:
        pipe.__class__ = own


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of one object, past its class's own `__setattr__`, and puts back what was there."""
    before = vars(owner).get(name, _ABSENT)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        # a hook that took our place meanwhile, as offloading does after a call, keeps it
        if vars(owner).get(name) is value:
            if before is _ABSENT:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, before)


_ABSENT = object()


@contextmanager
def _installed(pipe: Any, run: Run) -> Iterator[None]:
    """The run's scheduler, networks and progress bar, in the pipeline's place."""
    run.scheduler = in_lanes(pipe.scheduler, run)
    run.interrupted = lambda: bool(getattr(pipe, "_interrupt", False))
    before = dict(vars(pipe))
    with ExitStack() as stack:
        stack.enter_context(run.body)
        stack.enter_context(_replaced(pipe, "scheduler", run.scheduler))
        for name, module in pipe.components.items():
            if isinstance(module, nn.Module):
                # a module compiled in place is called past its forward
                compiled = getattr(module, "_compiled_call_impl", None)
                entry = "forward" if compiled is None else "_compiled_call_impl"
                stack.enter_context(_replaced(module, entry, _in_lanes(run, getattr(module, entry), name)))
        if hasattr(pipe, "progress_bar"):
            stack.enter_context(_replaced(pipe, "progress_bar", _progress(pipe.progress_bar, run)))
        try:
            yield
        except BaseException:
            # what the pipeline noted of its unfinished call goes too: its current timestep has lanes
            vars(pipe).clear()
            vars(pipe).update(before)
            raise


def _in_lanes(run: Run, forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    network = Network(forward, name, run.slices)

    def call(*args: Any, **kwargs: Any) -> Any:
        return run.call(network, args, kwargs)

    return wraps(forward)(call) if hasattr(forward, "__name__") else call


def _progress(original: Callable[..., Any], run: Run) -> Callable[..., Bar]:
    def progress_bar(iterable: Any = None, total: int | None = None, **options: Any) -> Bar:
        bar = original(total=len(iterable) if iterable is not None else total, **options)
        made = Bar(bar, lambda: run.state is not None, iterable)
        run.finished = made.finished
        return made

    return progress_bar


def _wrap_callbacks(pipe: Any, run: Run, bound: inspect.BoundArguments) -> None:
    """The user's callbacks see plain tensors: the last finished step and its state."""
    given = bound.arguments
    extra = given.get("kwargs", {})
    for held in (given, extra if isinstance(extra, dict) else {}):
        if held.get("callback_on_step_end") is not None:
            held["callback_on_step_end"] = _on_step_end(held["callback_on_step_end"], run)
        if held.get("callback") is not None:
            held["callback"] = _legacy(held["callback"], run)


def _on_step_end(callback: Callable[..., Any], run: Run) -> Callable[..., dict[str, Any]]:
    def call(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        shown = {name: run.shown(name, value) for name, value in tensors.items()}
        with run.aside():
            returned = callback(pipe, *run.place(), dict(shown)) or {}
        run.note_random()
        for name, value in returned.items():
            if name in shown and value is not shown[name]:
                raise UnsupportedError(
                    f"`callback_on_step_end` returned another {name!r}: piadm runs the steps of a window together, so a "
                    "callback may look at a step or interrupt the run, not change it"
                )
        return {"latents": run.partial()} if run.interrupted() else {}

    return call


def _legacy(callback: Callable[..., Any], run: Run) -> Callable[..., None]:
    def call(step: int, timestep: Any, latents: Tensor) -> None:
        shown = run.shown("latents", latents)
        with run.aside():
            callback(*run.place(), shown)
        run.note_random()

    return call
