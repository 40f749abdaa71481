r"""Samplers: a denoiser and a scheme, run sequentially or in parallel.

Every sampler is called as `sampler(shape, generator=…, noise=None, **condition)` and returns a `Result`. With one seed they
draw the same starting state and the same $ξ_m$, so `Parallel` returns what `Sequential` returns, to its tolerance.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from piadm.certificate import EXACT, Certificate, information
from piadm.denoiser import DenoiserLike, check_condition, check_denoiser, spread
from piadm.errors import NonFiniteError, require, require_count, require_positive
from piadm.executors import MicroBatch
from piadm.fills import Fill, Jump
from piadm.inputs import check_moments, check_noise, read_home, read_shape
from piadm.memory import divide, lane_bytes, limit, row_bytes
from piadm.noise import GeneratorLike, Noise
from piadm.progress import progress_bar
from piadm.propagators import Propagator, Secant
from piadm.result import Result
from piadm.schemes import Scheme
from piadm.solver import Request, Solver, State
from piadm.tables import Table
from piadm.tuning import Guarded, Tuner, sizes, timing
from piadm.windows import Sliding, Window

Callback = Callable[[int, tuple[int, int], Tensor], None]


class _Sampler:
    """What all samplers share: reading the arguments of a call."""

    _policies: tuple[object, ...] = ()

    def __init__(self, denoiser: DenoiserLike, scheme: Scheme) -> None:
        check_denoiser(denoiser)
        if isinstance(scheme, type) or not callable(scheme):
            raise TypeError(f"`scheme` is {scheme!r}: give an instance such as piadm.DDPM(steps=1000)")
        self.denoiser, self.scheme = denoiser, scheme
        self.table = scheme(denoiser.schedule)
        denoiser.check(self.table.times)

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


class Audit:
    """The defects of accepted steps, measured as they leave the window.

    Such a call depends on no answer of the next round, and could share its call. In one of its own it leaves the rows of
    that round, and so the samples, as they are without an audit, to the last bit.
    """

    def __init__(self, solver: Solver, network: _Network, samples: int) -> None:
        self.solver, self.network, self.calls = solver, network, 0
        self.steps = torch.zeros(samples, dtype=torch.long)
        self.nats: Tensor | float = 0.0
        self.drift: Tensor | float = 0.0

    def __call__(self, left: State) -> None:
        nats, drift = self.solver.measure(left, self.network(self.solver.request(left)))
        self.nats, self.drift = self.nats + nats, self.drift + drift
        self.calls, self.steps = self.calls + 1, self.steps + left.stop - left.start


class Sequential(_Sampler):
    """One network call after the other: a plain loop, and the oracle that every parallel run is held against.

    Arguments:
        denoiser: The denoiser.
        scheme: The steps, such as `DDPM(steps=1000)`.
    """

    @torch.no_grad()
    def __call__(
        self,
        shape: Sequence[int],
        *,
        generator: GeneratorLike = None,
        noise: Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        **condition: Any,
    ) -> Result:
        """Draws samples; arguments, result and errors are those of `Parallel`."""
        started = time.perf_counter()
        event, source, x = self._begin(shape, generator, noise, condition)
        network = _Network(self.denoiser, event, len(x), condition)
        table, samples = self.table, len(x)
        rows, times = table.cast(x.device, x.dtype), table.times.to(x.device)
        x = torch.cat([x[None], x.new_zeros(table.components - 1, *x.shape)])[None]
        with progress_bar(len(table), progress) as show:
            for m in range(len(table)):
                f = network(Request(x[0, 0], times[m].expand(samples), torch.arange(samples)))
                if not bool(f.isfinite().all()):
                    bad = (~f.isfinite().all(-1)).nonzero().flatten().tolist()
                    raise NonFiniteError(m, m + 1, bad, torch.full((samples,), m), x[0, 0].reshape(samples, *event))
                xi = source(m, m + 1) if table.stochastic else None
                x = rows.take(torch.tensor([[m]], device=x.device)).step(x, f[None], xi)
                show(m + 1, m + 1, 0.0)
                if callback is not None:
                    callback(m + 1, (m, m + 1), x.new_zeros(1))
        return Result(
            samples=x[0, 0].reshape(samples, *event),
            steps=len(table),
            rounds=len(table),
            evaluations=float(len(table)),
            residuals=(),
            windows=(),
            converged=True,
            error=x.new_zeros(samples),
            certificate=EXACT,
            seconds=time.perf_counter() - started,
            network_seconds=network.seconds,
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
            row more for every step, in one round more. By default where the certificate has a divergence and rounds are fixed
            in advance; elsewhere its defects are the stopping rule's estimates, at no cost. Never changes the samples.
        max_memory: Bytes that a run may take besides the network's weights, or a fraction of the device's memory (`0.5`).
            Rounds are cut into calls that fit, by the measured cost of a row, and so is the window `"auto"`; one that was
            given and does not fit is refused. See `piadm.memory`.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before any network call (`max_memory`: after three rows).
        NonFiniteError: if the network returns NaN or infinity; the finished steps are on the exception.
    """

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
            limit(max_memory, torch.device("cpu"))
        self.max_memory = max_memory
        self.tolerance, self.max_rounds = tolerance, max_rounds
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
        **condition: Any,
    ) -> Result:
        """Draws samples.

        Arguments:
            shape: `(batch, *event)`.
            generator: Source of the seed, on the network's device; or one per sample.
            noise: The starting state in units of its standard deviation, of shape `shape`; drawn by default.
            callback: Called after every round as `callback(round, window, residuals)`: counted from 1, first step and one
                past the last over all samples, rms defect of every step there (the largest over samples).
            progress: Whether to show a progress bar.
            condition: Passed to the network; tensors whose first dimension is the batch are repeated along the window.
        """
        if self._tuner is not None or self.max_memory is not None:
            return self._fitted(shape, generator, noise, callback, progress, condition)
        started = time.perf_counter()
        event, source, x = self._begin(shape, generator, noise, condition)
        network = _Network(self.denoiser, event, len(x), condition)
        solver = self._solver(source)
        state, residuals, windows = solver.init(x), [], []
        audit = Audit(solver, network, len(x))
        with progress_bar(len(self.table), progress) as show:
            while not state.done and state.rounds != self.max_rounds:
                try:
                    state = solver.update(state, network(solver.request(state)))
                except NonFiniteError as error:
                    error.x = error.x.reshape(len(x), *event)
                    raise
                if state.left is not None:
                    audit(state.left)
                residual = state.residual.nan_to_num(-1.0).amax(1)
                residual = residual.masked_fill(residual < 0, torch.nan)
                residuals.append(residual)
                windows.append(state.window)
                show(int(state.start.min()), state.rounds, residual)
                if callback is not None:
                    callback(state.rounds, state.window, residual)
        # of a sample cut short nothing is known beyond its accepted steps
        short = state.start.to(x.device) < len(self.table)
        return Result(
            samples=(state.finished() if state.done else solver.prediction(state)).reshape(len(x), *event),
            steps=len(self.table),
            rounds=state.rounds,
            evaluations=float(state.evaluations.double().mean()),
            residuals=tuple(residuals),
            windows=tuple(windows),
            converged=state.done,
            error=state.error.masked_fill(short, torch.inf),
            certificate=self._certificate(state, audit, short),
            seconds=time.perf_counter() - started,
            network_seconds=network.seconds,
            acceptance=solver.acceptance(state),
        )

    def _fitted(
        self,
        shape: Sequence[int],
        generator: GeneratorLike,
        noise: Tensor | None,
        callback: Callback | None,
        progress: bool,
        condition: dict[str, Any],
    ) -> Result:
        """A run in the window, and in calls, that fit in memory, and of those the fastest if that is asked for."""
        shape, home, dtype = self._read(shape, generator, noise, condition)
        samples, steps = shape[0], len(self.table)
        trial = _Trial(self.table, _Network(self.denoiser, shape[1:], samples, condition), home, dtype)
        largest = min(getattr(self.window, "size", None) or steps, steps)
        most = None
        if self.max_memory is not None:
            room, lane = limit(self.max_memory, home), lane_bytes(self.table, trial.start)
            fitting, most = divide(room, row_bytes(trial, home), lane, largest)
            fits = self._tuner is not None or fitting == largest
            right = f"give at most {fitting}, or max_memory of about {2 * largest * lane} bytes"
            require(fits, "window", largest, f"does not fit in max_memory={self.max_memory}: {right}")
            largest = fitting
        chosen = copy.copy(self)
        chosen._tuner = chosen.max_memory = None
        choice = None
        if self._tuner is not None:
            key = (shape, most, dtype, home, torch.get_num_threads(), *sorted(condition))
            measured = timing(self.denoiser, key, trial, sizes(samples, steps, most), steps)
            choice = self._tuner.choose(measured, steps, samples, largest, most)
            most = choice.rows
            price = measured.at(choice.window * samples, most) / measured.at(samples, most)
            chosen.window = Guarded(choice.window, price)
        if most is not None and most < samples * largest:
            chosen.denoiser = MicroBatch(self.denoiser, most)
        sampler = chosen if choice is None or choice.window > 1 else Sequential(chosen.denoiser, self.scheme)
        result = sampler(shape, generator=generator, noise=noise, callback=callback, progress=progress, **condition)
        if self._tuner is not None and choice is not None and choice.window > 1 and result.converged:
            self._tuner.learn(steps, choice.window, result.rounds, result.seconds - result.network_seconds)
        return replace(result, choice=choice)

    def _solver(self, noise: Noise) -> Solver:
        policies = self.propagator, self.window, self.fill, self.tolerance, self.denoiser.variance
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
