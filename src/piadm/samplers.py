r"""Samplers: a denoiser and a scheme, run sequentially or in parallel.

Every sampler is called as `sampler(shape, generator=…, noise=None, **condition)` and returns a `Result`. With one seed they
draw the same starting state and the same $ξ_m$, so `Parallel` returns what `Sequential` returns, to its tolerance.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from piadm.certificate import EXACT, Certificate, information
from piadm.checkpoint import Audit, Checkpoint, load
from piadm.denoiser import DenoiserLike, check_condition, check_denoiser, spread
from piadm.driver import Keeper, Place, rounds
from piadm.errors import NonFiniteError, require, require_count, require_positive
from piadm.executors import Executor, MicroBatch, in_slices, layers
from piadm.fills import Fill, Jump
from piadm.fingerprint import fingerprint
from piadm.fixed import FixedBatch
from piadm.inputs import check_moments, check_noise, read_home, read_shape
from piadm.memory import divide, lane_bytes, require_fit, require_limit, row_bytes
from piadm.merged import MergingSolver
from piadm.merging import MergedTable, first_grid, merge
from piadm.noise import GeneratorLike, Noise
from piadm.progress import progress_bar
from piadm.propagators import Gaussian, Propagator, Secant
from piadm.repeatable import ask_again
from piadm.replicas import Replicas
from piadm.result import Result
from piadm.schemes import Scheme
from piadm.sharded import Sharded, sharding
from piadm.solver import Request, Solver, State, all_finite
from piadm.stopping import mean_variance
from piadm.tables import Table
from piadm.tuning import Guarded, Tuner, sizes, timing
from piadm.windows import Sliding, Window, width

Callback = Callable[[int, tuple[int, int], Tensor], None]


class _Sampler:
    """What all samplers share: reading the arguments of a call, and of a checkpoint."""

    _kind: str
    _policies: tuple[object, ...] = ()

    def __init__(self, denoiser: DenoiserLike, scheme: Scheme) -> None:
        check_denoiser(denoiser)
        if isinstance(scheme, type) or not callable(scheme):
            raise TypeError(f"`scheme` is {scheme!r}: give an instance such as piadm.DDPM(steps=1000)")
        self.denoiser, self.scheme = denoiser, scheme
        self.table = scheme(denoiser.schedule)
        denoiser.check(self.table.times)
        self._executor = in_slices(denoiser)
        self._repeatable = False  # whether the network was found to give one answer to one question

    def _read(
        self, shape: Sequence[int], generator: GeneratorLike, noise: Tensor | None, condition: dict[str, Any]
    ) -> tuple[tuple[int, ...], torch.device, torch.dtype]:
        """The samples' shape, and where and in which dtype their states live; says what is wrong with the arguments."""
        shape = read_shape(shape, self.denoiser.event_shape)
        check_condition(condition, shape[0])
        for owner in (self.denoiser, *self._policies):
            check_moments(owner, shape[1:])
        home, dtype = read_home(self.denoiser, generator, noise)
        if noise is not None:
            check_noise(noise, shape, home)
        return shape, home, dtype

    def _begin(
        self, shape: Sequence[int], generator: GeneratorLike, noise: Tensor | None, condition: dict[str, Any]
    ) -> tuple[tuple[int, ...], Noise, Tensor]:
        """The event's shape, the driving noise, and starting states `(S, D)`."""
        shape, home, dtype = self._read(shape, generator, noise, condition)
        size = math.prod(shape[1:])
        source = Noise(generator, shape[0], size, self.table.components, home, dtype)
        x = source.start() if noise is None else noise.to(dtype).reshape(shape[0], size)
        return shape[1:], source, x * self.table.scale

    def _identity(self, condition: Mapping[str, Any]) -> dict[str, str]:
        """What a run is made of, in fingerprints."""
        taken = {name for layer in layers(self.denoiser) if isinstance(layer, Executor) for name in layer.takes}
        told = {name: value for name, value in condition.items() if name not in taken}
        parts = {"sampler": self._kind, "scheme": self.table, "denoiser": self.denoiser, "conditions": told}
        return {name: fingerprint(part) for name, part in parts.items()}

    def _reopen(self, checkpoint: Checkpoint | Place, condition: dict[str, Any]) -> tuple[Checkpoint, Noise]:
        """The run that a checkpoint holds, and its noise."""
        run = checkpoint if isinstance(checkpoint, Checkpoint) else load(checkpoint)
        device = self.denoiser.device or torch.device(run.device)
        run.check(self._identity(condition), device)
        samples, size = run.shape[0], math.prod(run.shape[1:])
        return run.to(device), Noise.from_seeds(run.seeds, samples, size, self.table.components, device, run.state.x.dtype)

    def _keeper(self, run: Checkpoint, source: Noise, condition: dict[str, Any], path: Place | None, pause: float) -> Keeper:
        shards = sharding(self.denoiser)
        leads = shards is None or shards.rank == 0
        return Keeper(run, lambda: source.seeds, lambda: self._identity(condition), path, pause, leads)


def _conclude(run: Checkpoint, result: Callable[[Tensor], Result], samples: Tensor) -> Result:
    """The result of a run that is over, or what is to be said of the samples that failed.

    `samples`: those of the others, shape `(n, D)`.
    """
    complete = result(samples.reshape(-1, *run.shape[1:])) if len(samples) else None
    if not run.failures and complete is not None:
        return complete
    first = min(run.failures, key=lambda failure: failure.round)
    rows = sorted(failure.sample for failure in run.failures)
    raise NonFiniteError(first.step, first.round, rows, run.finished, run.x, complete)


class _Network:
    """The denoiser as the solver sees it: flat rows in, flat rows out, timed."""

    def __init__(self, denoiser: DenoiserLike, event: tuple[int, ...], samples: int, condition: dict[str, Any]) -> None:
        self.denoiser, self.event, self.samples, self.condition = denoiser, event, samples, condition
        self.seconds = 0.0

    def __call__(self, request: Request) -> Tensor:
        started = time.perf_counter()
        condition = spread(self.condition, request.sample, self.samples)
        f = self.denoiser(request.x.reshape(-1, *self.event), request.t, **condition)
        if f.is_cuda:
            torch.cuda.synchronize(f.device)
        self.seconds += time.perf_counter() - started
        return f.reshape(request.x.shape)


class _Trial:
    """A network call of any number of rows, on states of the run's first step: how long it takes, what memory."""

    def __init__(self, table: Table, network: _Network, home: torch.device, dtype: torch.dtype) -> None:
        size, source = math.prod(network.event), torch.Generator(home).manual_seed(0)
        self.start = table.scale * torch.randn(network.samples, size, generator=source, device=home, dtype=dtype)
        self.times, self.network = table.times.to(home), network

    @torch.no_grad()
    def __call__(self, rows: int) -> None:
        sample = torch.arange(rows) % len(self.start)
        self.network(Request(self.start[sample.to(self.start.device)], self.times[:1].expand(rows), sample))


class Sequential(_Sampler):
    """One network call after the other: a plain loop, and the oracle that every parallel run is held against.

    Arguments:
        denoiser: The denoiser.
        scheme: The steps, such as `DDPM(steps=1000)`.
    """

    _kind = "sequential"

    @torch.no_grad()
    def __call__(
        self,
        shape: Sequence[int],
        *,
        generator: GeneratorLike = None,
        noise: Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        checkpoint: Place | None = None,
        checkpoint_seconds: float = 30.0,
        **condition: Any,
    ) -> Result:
        """Draws samples; arguments, result and errors are those of `Parallel`."""
        started = time.perf_counter()
        event, source, x = self._begin(shape, generator, noise, condition)
        run = Checkpoint.begin(State.begin(x, self.table, self.denoiser.variance), (len(x), *event), len(self.table), started)
        return self._loop(run, source, condition, callback, progress, checkpoint, checkpoint_seconds)

    @torch.no_grad()
    def resume(
        self,
        checkpoint: Checkpoint | Place,
        *,
        callback: Callback | None = None,
        progress: bool = False,
        checkpoint_seconds: float = 30.0,
        **condition: Any,
    ) -> Result:
        """Goes on with an interrupted run; arguments, result and errors are those of `Parallel.resume`."""
        run, source = self._reopen(checkpoint, condition)
        path = None if isinstance(checkpoint, Checkpoint) else checkpoint
        return self._loop(run, source, condition, callback, progress, path, checkpoint_seconds)

    def _loop(
        self,
        run: Checkpoint,
        source: Noise,
        condition: dict[str, Any],
        callback: Callback | None,
        progress: bool,
        path: Place | None,
        pause: float,
    ) -> Result:
        event, device, table, stochastic = run.shape[1:], run.state.x.device, self.table, self.table.stochastic
        network = _Network(self._executor, event, run.shape[0], condition)
        clock = run.clock()
        columns, times = table.cast(device, run.state.x.dtype), table.times.to(device)
        with self._keeper(run, source, condition, path, pause) as keep, progress_bar(len(table), progress) as show:
            for m in range(run.state.rounds, len(table)):
                if not len(run.alive):
                    break
                f = network(Request(run.state.x[0, 0], times[m].expand(len(run.alive)), run.alive))
                xi = source(m, m + 1)[:, :, run.alive.to(device)] if stochastic else None
                x = columns.cut(m, m + 1).step(run.state.x, f[None], xi)
                if not all_finite(x):
                    good = x.isfinite().all(-1).all(1)[0]
                    run, x = run.without((~good).nonzero().flatten().tolist(), m), x[:, :, good]
                start = torch.full((len(run.alive),), m + 1)
                state = replace(run.state, start=start, stop=start, evaluations=start, x=x, rounds=m + 1)
                run = replace(run, state=replace(state, done=m + 1 == len(table))).timed(clock, network.seconds)
                keep(run)
                show(m + 1, m + 1, 0.0)
                if callback is not None:
                    callback(m + 1, (m, m + 1), x.new_zeros(1))
        return _conclude(run, self._result(run), run.state.x[0, 0])

    def _result(self, run: Checkpoint) -> Callable[[Tensor], Result]:
        return lambda samples: Result(
            samples=samples,
            steps=len(self.table),
            rounds=len(self.table),
            evaluations=float(len(self.table)),
            residuals=(),
            windows=(),
            converged=True,
            error=samples.new_zeros(len(samples)),
            certificate=EXACT,
            seconds=run.seconds,
            network_seconds=run.network_seconds,
        )


class Parallel(_Sampler):
    r"""All steps of a window at once, refined round by round until they are the sequential sample to `tolerance`.

    Arguments:
        denoiser: The denoiser.
        scheme: The steps, such as `DDPM(steps=1000)`.
        propagator: The linear model $J$ of a step; `Secant` with the denoiser's variance by default.
        window: How many steps are iterated at once (a `Sliding` window), or a `Window`, or `None` for all. A round evaluates
            up to batch × window rows in one call; `piadm.MicroBatch` cuts it up. `"auto"` times the network once at several
            numbers of rows and takes the window and the rows in a call with which the run is predicted to be fastest; where
            that is one step at a time, it is the sequential sampler. See `piadm.tuning`.
        tolerance: $τ$, the promised rms distance per coordinate, in data units, from the sequential sample with the same
            noise. The rule is an estimate, stated in `piadm.stopping`. Windows with a fixed number of rounds ignore it.
        max_rounds: Ends the run early; the samples are then the newest predictions of $x_0$ and `converged` is `False`.
        fill: What unvisited states hold; `Jump` with the denoiser's mean and variance by default.
        target_kl: Replaces `tolerance`: a step is accepted for its measured defect, within its share of this divergence from
            the sequential law, in nats. Every sample keeps to it, so the certificate is rigorous and at most `target_kl`.
        audit: Whether the network is evaluated at the accepted states too, so that the certificate's defects are measured: a
            row more for every step, in a call more after each round in which steps leave the window. By default where the
            certificate has a divergence and rounds are fixed in advance; elsewhere its defects are the stopping rule's
            estimates, at no cost. Never changes the samples.
        max_memory: Bytes that a run may take besides the network's weights, or a fraction of the device's memory (`0.5`).
            Rounds are cut into calls that fit, by the measured cost of a row, and so is the window `"auto"`; one that was
            given and does not fit is refused. A few rows are evaluated in each run to see. See `piadm.memory`.
        merge: Whether steps may share an evaluation where the tolerance allows it: a window then holds so many evaluated steps
            and all between them. See `piadm.merging`. Every step is evaluated with `target_kl` or `audit`, in a window of 1 or
            one that does not slide, with another propagator than `Secant` or `Gaussian` or another fill than `Jump`, on schemes
            of several components, and where merging would leave more than 70 % of the steps.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before any network call (`max_memory`: after a few rows).
        NonFiniteError: if the network returns NaN or infinity for some samples, once the others are complete; these and the
            finished steps are on the exception. It does so only where the sequential run would break too.
    """

    _kind = "parallel"
    _settings: tuple[str, ...] = ("propagator", "window", "fill", "tolerance", "target_kl", "audit", "merge")

    def __init__(
        self,
        denoiser: DenoiserLike,
        scheme: Scheme,
        *,
        propagator: Propagator | None = None,
        window: int | Window | Literal["auto"] | None = 32,
        tolerance: float = 1e-2,
        max_rounds: int | None = None,
        fill: Fill | None = None,
        target_kl: float | None = None,
        audit: bool | None = None,
        max_memory: float | None = None,
        merge: bool = True,
    ) -> None:
        super().__init__(denoiser, scheme)
        require_positive("tolerance", tolerance, "tolerance=1e-2")
        if max_rounds is not None:
            require_count("max_rounds", max_rounds, "max_rounds=100")
        self.propagator: Propagator = Secant(denoiser.variance) if propagator is None else propagator
        self.fill: Fill = Jump(denoiser.mean, denoiser.variance) if fill is None else fill
        self._tuner = Tuner() if window == "auto" else None
        window = None if window == "auto" else window
        self.window: Window = Sliding(window) if window is None or isinstance(window, int) else window
        if max_memory is not None:
            require_limit(max_memory)
        if max_memory is not None or self._tuner is not None:
            asked = "window" if max_memory is None else "max_memory"
            given = "auto" if max_memory is None else max_memory
            several = [layer for layer in layers(denoiser) if isinstance(layer, Replicas) and len(layer.devices) > 1]
            others = [layer for layer in layers(denoiser) if isinstance(layer, FixedBatch | Sharded)]
            hides = next(iter(others if max_memory is None else others + several), None)
            remedy = (
                f"is measured by calls of some rows, which {type(hides).__name__} makes others of: give a window and MicroBatch"
            )
            require(hides is None, asked, given, remedy)
        self.max_memory = max_memory
        self.tolerance, self.max_rounds, self.merge = tolerance, max_rounds, merge
        wanted = {"propagator": ("check", "jacobian"), "window": ("check", "advance"), "fill": ("model",)}
        for name, methods in wanted.items():
            policy = getattr(self, name)
            if isinstance(policy, type) or not all(hasattr(policy, method) for method in methods):
                plain = "an integer, None for all steps, 'auto', or " if name == "window" else ""
                named = " and ".join(f"`{method}`" for method in methods)
                raise TypeError(f"`{name}` is {policy!r}: give {plain}an instance with {named}, see piadm.{name}s")
        self.propagator.check(self.table)
        self.window.check(self.table)
        self._policies = (self.propagator, self.fill)
        bounded, adaptive = information(self.table) is not None, isinstance(self.window, Sliding)
        if target_kl is not None:
            require_positive("target_kl", target_kl, "target_kl=0.01")
            require(bounded, "target_kl", target_kl, "steps without noise have no divergence: use DDPM, or give a tolerance")
            require(adaptive, "target_kl", target_kl, f"{self.window} has a number of rounds of its own: give window=32")
        self.target_kl = target_kl
        measured = bounded and not adaptive if audit is None else audit
        self.audit = measured and target_kl is None  # which measures as it goes

    def __repr__(self) -> str:
        goal = f"tolerance={self.tolerance:g}" if self.target_kl is None else f"target_kl={self.target_kl:g}"
        how = f"propagator={self.propagator}, window={self.window if self._tuner is None else 'auto'!r}, {goal}"
        how += "" if self.merge else ", merge=False"
        return f"{type(self).__name__}({self.denoiser!r}, {self.scheme!r}, {how})"

    @torch.no_grad()
    def __call__(
        self,
        shape: Sequence[int],
        *,
        generator: GeneratorLike = None,
        noise: Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        checkpoint: Place | None = None,
        checkpoint_seconds: float = 30.0,
        **condition: Any,
    ) -> Result:
        """Draws samples.

        Whatever exception leaves this call, Ctrl-C included, holds the last complete round as `.checkpoint`: see `resume`.

        Arguments:
            shape: `(batch, *event)`.
            generator: Source of the seed, on the network's device; or one per sample.
            noise: The starting state in units of its standard deviation, of shape `shape`; drawn by default.
            callback: Called after every round as `callback(round, window, residuals)`: counted from 1, first step and one
                past the last over all samples, rms defect of every step there (the largest over samples).
            progress: Whether to show a progress bar.
            checkpoint: A file in which the run is kept: written between rounds, when an exception ends it, and at its end.
            checkpoint_seconds: How long to wait between rounds before it is written again; 0 writes after each.
            condition: Passed to the network; tensors whose first dimension is the batch are repeated along the window.
        """
        if self._tuner is not None or self.max_memory is not None:
            rest = {
                "callback": callback,
                "progress": progress,
                "checkpoint": checkpoint,
                "checkpoint_seconds": checkpoint_seconds,
            }
            return self._fitted(shape, generator, noise, rest, condition)
        started = time.perf_counter()
        event, source, x = self._begin(shape, generator, noise, condition)
        run = Checkpoint.begin(self._solver(source).init(x), (len(x), *event), len(self.table), started)
        run = replace(run, measured=self.window if isinstance(self.window, Guarded) else None)
        return self._drive(run, source, condition, callback, progress, checkpoint, checkpoint_seconds)

    @torch.no_grad()
    def resume(
        self,
        checkpoint: Checkpoint | Place,
        *,
        callback: Callback | None = None,
        progress: bool = False,
        checkpoint_seconds: float = 30.0,
        **condition: Any,
    ) -> Result:
        """Goes on with an interrupted run, and returns bit for bit what it would have returned (on the same kind of device).

        The denoiser, scheme, policies and conditions must be those of the run; the executor, `max_rounds`, and how often to
        write may be others. Seeds and starting state are in the checkpoint.

        Arguments:
            checkpoint: The `.checkpoint` of an exception, or a file, which is then kept up to date.
            callback: As in a call.
            progress: Likewise.
            checkpoint_seconds: Likewise.
            condition: Likewise.

        Raises:
            ValueError: for a file that is truncated or no checkpoint, and for a checkpoint of another run; it says why.
        """
        if self._tuner is not None or self.max_memory is not None:
            known = checkpoint if isinstance(checkpoint, Checkpoint) else load(checkpoint)
            home = self.denoiser.device or torch.device(known.device)
            network = _Network(self._executor, known.shape[1:], known.shape[0], condition)
            _, most = self._room(_Trial(self.table, network, home, known.state.x.dtype))
            sampler = self._cut(self.window if self._tuner is None else known.measured, most)
            how: dict[str, Any] = {"callback": callback, "progress": progress, "checkpoint_seconds": checkpoint_seconds}
            return sampler.resume(checkpoint, **how, **condition)
        run, source = self._reopen(checkpoint, condition)
        path = None if isinstance(checkpoint, Checkpoint) else checkpoint
        return self._drive(run, source, condition, callback, progress, path, checkpoint_seconds)

    def _identity(self, condition: Mapping[str, Any]) -> dict[str, str]:
        parts = {name: getattr(self, name) for name in self._settings}
        return {**super()._identity(condition), **{name: fingerprint(part) for name, part in parts.items()}}

    def _drive(
        self,
        run: Checkpoint,
        source: Noise,
        condition: dict[str, Any],
        callback: Callback | None,
        progress: bool,
        path: Place | None,
        pause: float,
    ) -> Result:
        network, solver = _Network(self._executor, run.shape[1:], run.shape[0], condition), self._solver(source)
        with self._keeper(run, source, condition, path, pause) as keep, progress_bar(len(self.table), progress) as show:
            for run in rounds(run, solver, network, self.max_rounds):  # noqa: B020 (each run is made from the one before)
                keep(run)
                if not self._repeatable and bool(run.state.seen.any()):
                    ask_again(run, self.table.times, network, self.denoiser.schedule, self.denoiser.dtype)
                    self._repeatable = True
                if not len(run.alive):  # nothing was left for this round
                    break
                show(int(run.finished.min()), run.state.rounds, run.residuals[-1])
                if callback is not None:
                    callback(run.state.rounds, run.windows[-1], run.residuals[-1])
        state = run.state
        return _conclude(run, self._result(run, solver), state.finished() if state.done else solver.prediction(state))

    def _result(self, run: Checkpoint, solver: Solver) -> Callable[[Tensor], Result]:
        state = run.state
        # of a sample cut short nothing is known beyond its accepted steps
        short = state.reached < len(self.table)
        return lambda samples: Result(
            samples=samples,
            steps=len(self.table),
            rounds=state.rounds,
            evaluations=float(state.evaluations.double().mean()),
            residuals=run.residuals,
            windows=run.windows,
            converged=state.done,
            error=state.error.masked_fill(short, torch.inf).to(samples),
            certificate=self._certificate(state, run.audit, short),
            seconds=run.seconds,
            network_seconds=run.network_seconds,
            acceptance=solver.acceptance(state),
        )

    def _fitted(
        self,
        shape: Sequence[int],
        generator: GeneratorLike,
        noise: Tensor | None,
        rest: dict[str, Any],
        condition: dict[str, Any],
    ) -> Result:
        """A run in the window, and in calls, that fit in memory, and of those the fastest if that is asked for."""
        shape, home, dtype = self._read(shape, generator, noise, condition)
        samples, steps = shape[0], len(self.table)
        evaluated = len(self.merged or self.table)
        trial = _Trial(self.table, _Network(self._executor, shape[1:], samples, condition), home, dtype)
        largest, most = self._room(trial)
        choice, window = None, self.window
        if self._tuner is not None:
            tried = sizes(samples, steps, most)
            key = (shape, tuple(tried), dtype, home, torch.get_num_threads(), *sorted(condition))
            measured = timing(self.denoiser, key, trial, tried, steps)
            choice = self._tuner.choose(measured, steps, evaluated, samples, largest, most)
            most = choice.rows
            window = Guarded(choice.window, measured.at(choice.window * samples, most) / measured.at(samples, most))
        one_by_one = choice is not None and choice.window == 1 and self.max_rounds is None
        sampler = self._cut(None if one_by_one else window, most)
        result = sampler(shape, generator=generator, noise=noise, **rest, **condition)
        self._repeatable = self._repeatable or sampler._repeatable
        if self._tuner is not None and choice is not None and choice.window > 1 and result.converged:
            self._tuner.learn(evaluated, choice.window, result.rounds, result.seconds - result.network_seconds)
        return replace(result, choice=choice)

    def _room(self, trial: _Trial) -> tuple[int, int | None]:
        """The largest window, and the most rows in a call (`None`: any number), that fit in memory."""
        evaluated = self.merged or self.table
        widest = width(self.window, evaluated)
        if self.max_memory is None:
            return widest, None
        home = trial.start.device
        lane, row = lane_bytes(evaluated, trial.start), row_bytes(trial, home)
        fitting, most = divide(self.max_memory, home, row, lane, widest)
        if self._tuner is None:
            require_fit(width(self.window, self.table), widest, fitting, row, lane, self.max_memory)
        return fitting, most

    def _cut(self, window: Window | None, rows: int | None) -> Parallel | Sequential:
        """This sampler with a window that is known (`None`: one step after the other), and so many rows in a call."""
        executor = self._executor if rows is None else MicroBatch(self.denoiser, rows)
        if window is None:
            return Sequential(executor, self.scheme)
        if self.merged is not None and self.max_memory is not None and isinstance(window, Sliding):
            # cutting merged steps may not widen it
            window = replace(window, size=min(window.size or len(self.merged), len(self.merged)))
        chosen = copy.copy(self)
        chosen._tuner = chosen.max_memory = None
        chosen.window, chosen._executor = window, executor
        return chosen

    @cached_property
    def merged(self) -> MergedTable | None:
        """The merged steps to begin with; `None` where every step is evaluated."""
        window, usual = self.window, isinstance(self.propagator, Secant | Gaussian) and isinstance(self.fill, Jump)
        measured = self.target_kl is not None or self.audit
        if measured or not (self.merge and usual and isinstance(window, Sliding) and window.size != 1):
            return None
        variance = mean_variance(self.denoiser.variance)
        grid = first_grid(self.table, variance, self.tolerance)
        return None if grid is None else merge(self.table, grid, variance)

    def _solver(self, noise: Noise) -> Solver:
        policies = self.propagator, self.window, self.fill, self.tolerance, self.denoiser.variance
        if self.merged is not None:
            return MergingSolver(self.table, noise, *policies, first=self.merged, mean=self.denoiser.mean)
        return Solver(self.table, noise, *policies, target_kl=self.target_kl, keep=self.audit)

    def _certificate(self, state: State, audit: Audit, short: Tensor) -> Certificate:
        measured: Audit | State = audit if self.audit else state
        return Certificate.of(
            self.table,
            torch.where(short, torch.inf, measured.nats),
            torch.where(short, torch.inf, measured.drift),
            rigorous=self.audit or self.target_kl is not None,
            calls=audit.calls,
            evaluations=float(audit.steps.double().mean()),
        )
