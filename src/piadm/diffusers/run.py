"""One call of a pipeline: the solver, driven by the pipeline's own loop."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from piadm.certificate import EXACT, Certificate
from piadm.diffusers.lanes import Lanes, Network, Values
from piadm.diffusers.probing import Probe, UnsupportedError, clipped, probe
from piadm.diffusers.scheduler import SchedulerNoise, out_of_lanes
from piadm.diffusers.slices import Slices
from piadm.errors import NonFiniteError
from piadm.fills import Jump
from piadm.noise import GeneratorLike, read_generators
from piadm.propagators import Secant
from piadm.ranks import Ranks
from piadm.result import Result
from piadm.solver import Solver, State
from piadm.speculative import SpeculativeSolver
from piadm.tables import Table


@dataclass(frozen=True, eq=False)
class Settings:
    """How pipelines are run; see `parallelize`."""

    window: int | None
    tolerance: float
    mean: float | Tensor
    variance: float | Tensor
    threshold: float | None
    max_memory: float | None
    ranks: Ranks | None


@dataclass(frozen=True)
class Opening:
    """The next `size` steps, but `first` in the first round."""

    size: int
    first: int

    def check(self, table: Table) -> None:
        """Fits every table."""

    def advance(self, table: Table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        return ready, (ready + (self.size if rounds else self.first)).clamp(max=len(table))


@dataclass(frozen=True)
class Together(Opening):
    """Likewise, but the same steps for all samples: a lane has one timestep for the whole batch."""

    def advance(self, table: Table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        return super().advance(table, rounds, ready.min().expand_as(ready))


class Run:
    """What happens between the first iteration of a pipeline's loop and its end.

    Every iteration is a round of the solver on a window of steps. In the first one the pipeline holds the starting state and
    nothing else. Where the scheduler draws no noise, this one state serves all steps of the first window, stretched to their
    levels if the pipeline asks its scheduler to scale it: were the data Gaussian, that would be their state. Where it draws
    noise, a pipeline reads its timesteps more than once, or the window must fit in memory, of which only the starting state
    tells, the first iteration is an ordinary one of a single step.

    Arguments:
        settings: Window, tolerance and the data's moments.
        once: Whether the pipeline is known to loop over its timesteps once, so that the first iteration can have lanes.
        expected: Options that `step` will be given, as far as the call's arguments tell.
        scheduler: The user's; it is not changed.
        tables: Tables probed in earlier calls.
        checked: Names of networks whose lanes were compared with a single evaluation in earlier calls.
        generator: What the pipeline was called with.
        slices: How networks are called.
    """

    def __init__(
        self,
        settings: Settings,
        scheduler: Any,
        tables: dict[Any, Probe],
        checked: set[Any],
        generator: GeneratorLike,
        once: bool,
        expected: dict[str, Any],
        slices: Slices,
    ) -> None:
        self.once, self.expected, self.slices = once, expected, slices
        self.settings, self.base, self.tables, self.checked = settings, type(scheduler), tables, checked
        self.generators = [one for one in read_generators(generator) if one is not None]
        self.lanes: Lanes | None = None
        self.scheduler: Any = None  # the one in lanes, set by who installs it
        self.plain: Any = None  # a plain one, once the loop has begun
        self.interrupted: Callable[[], bool] = lambda: False
        self.finished: Callable[[int, int], None] = lambda steps, total: None
        self.state: State | None = None
        self.first = 1  # steps of the first round
        self.stretched = False
        self.result: Result | None = None
        self.started = time.perf_counter()
        self.network_seconds = 0.0
        self.residuals: list[Tensor] = []
        self.windows: list[tuple[int, int]] = []

    # What the scheduler asks

    def rounds(self, times: Tensor) -> Iterator[Tensor]:
        """Timesteps for the loop: the first one, then one round after the other with the window's."""
        if self.state is not None:
            raise UnsupportedError(
                "the pipeline loops over its timesteps a second time: give the call that holds the loop to piadm by itself"
            )
        self.times, self.plain = times, out_of_lanes(self.scheduler, self.base)
        self.first = self._first_round()
        if self.first > 1:
            yield self._lanes.hide(self._lane_times())
        else:
            for t in times:  # a pipeline that only reads its timesteps never steps
                yield t
                if self.state is not None:
                    break
        while self.state is not None and not self.state.done and not self.interrupted():
            before = self.state.rounds
            yield self._lanes.hide(self._lane_times())
            if self.state.rounds == before and not self.interrupted():
                raise UnsupportedError("the pipeline's loop went around without scheduler.step: piadm needs one step each time")

    def scale(self, sample: Tensor, plain: Callable[[], Tensor]) -> Tensor:
        if not self.looping:
            return plain()
        factor = self._of_lanes(self.probe.scaling)
        if self.state is None:
            self.stretched = True
            factor = factor * self._stretch()
        return sample * self._lanes.hide(factor.to(sample.device, sample.dtype))

    def noised(self, original: Tensor, noise: Tensor, plain: Callable[[], Tensor]) -> Tensor:
        if self.state is None:
            return plain()
        if self.state.done:
            return original
        alpha, sigma = (
            self._lanes.hide(self._of_lanes(level).to(original.device, original.dtype))
            for level in (self.probe.table.alpha, self.probe.table.sigma)
        )
        return alpha * original + sigma * noise

    def step(self, output: Tensor, sample: Tensor, options: dict[str, Any]) -> Any:
        """One round: the pipeline's output for every lane in, the states of the next window out."""
        as_object = bool(options.pop("return_dict", True))
        if self.state is not None and not all(map(torch.equal, self.random, self._random())):
            raise UnsupportedError(
                "random numbers were drawn inside the pipeline's loop, by other than its scheduler: they would depend on the "
                "window, not on the step (networks left in training mode do that, too: call .eval())"
            )
        if self.plain is None:
            raise UnsupportedError(
                "`pipe` steps its scheduler without going over `scheduler.timesteps` itself: a window of steps takes the place "
                "of each timestep there, so an index or a list of numbers in its stead cannot be followed"
            )
        if self.state is None:

            def begin(values: Values) -> list[Tensor]:
                # the sample has lanes if it is what the scheduler scaled, as in DiT's pipeline; the first is the start
                first, start = (value[0] if has else value for value, has in values)
                self._open(first, start, options)
                return [torch.zeros(self._lanes.width)]

            self._lanes.beneath(begin, output, sample)
            assert self.state is not None
        (prediction,) = self._lanes.beneath(self._round, output, sample)
        self._report()
        self.note_random()
        if self.state.done:
            states = self._front()
            prediction = self.last_prediction
        else:
            states = self._lanes.hide(self._returned)
        values = {name: states if place == 0 else prediction for place, name in enumerate(self.probe.fields)}
        return self.probe.output(**values) if as_object else tuple(values.values())

    # What callbacks see

    def place(self) -> tuple[int, Tensor]:
        """The last finished step and its timestep."""
        assert self.state is not None
        step = int(self.state.start.min()) - 1
        return step, self.times[step]

    def shown(self, name: str, value: Any) -> Any:
        """A tensor of the loop without its lanes: for `latents` the last finished state, else the first lane's."""
        if name == "latents":
            return self._front()
        if not isinstance(value, Tensor) or not self.looping:
            return value
        held: list[Tensor] = []

        def run(values: Values) -> list[Tensor]:
            held.extend(one[0] if has else one for one, has in values)
            return [torch.zeros(self._lanes.width)]

        self._lanes.beneath(run, value)
        return held[0]

    def partial(self) -> Tensor:
        """What an interrupted run returns: the newest prediction of the sample."""
        assert self.state is not None
        return self.solver.prediction(self.state).reshape(self.shape).to(self.dtype)

    def note_random(self) -> None:
        """From here to the next step nobody may draw random numbers."""
        self.random = self._random()

    def _random(self) -> list[Tensor]:
        states = [torch.get_rng_state(), *(one.get_state() for one in self.generators)]
        return states if self.device.type != "cuda" else [*states, torch.cuda.get_rng_state(self.device)]

    # What the networks ask

    @property
    def looping(self) -> bool:
        """Whether there may be lanes now."""
        if self.lanes is None:
            return False
        return self.first > 1 if self.state is None else not self.state.done

    def call(self, network: Network, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a module of the pipeline."""
        lanes = self.lanes
        if lanes is None:
            return network.forward(*args, **kwargs)
        if not self.looping:
            out = lanes.plainly(lambda: network.forward(*args, **kwargs))
            if self.plain is not None and self.state is None:
                self.slices.answered(out)
            return out
        started = time.perf_counter()
        key = (network.name, len(args), *sorted(kwargs))
        out, hidden = network(lanes, self._live, key not in self.checked, args, kwargs)
        if hidden:
            self.checked.add(key)
        self.network_seconds += time.perf_counter() - started
        return out

    # The solver

    def _open(self, output: Tensor, sample: Tensor, options: dict[str, Any]) -> None:
        if output.shape != sample.shape:
            raise UnsupportedError(
                f"`scheduler.step` is given an output of shape {tuple(output.shape)} for a state of shape "
                f"{tuple(sample.shape)}: a learned variance makes the noise depend on the network, and such steps are no "
                "table; use DDIMScheduler"
            )
        self.probe = self._table(options)
        self.shape, self.dtype, self.device = tuple(sample.shape), sample.dtype, sample.device
        dtype = torch.promote_types(sample.dtype, torch.float32)
        noise = SchedulerNoise(self.plain, self.probe, output, sample, options, dtype)
        self.options = options
        self.solver = self._solver(noise, len(sample))
        self.rows = self.probe.table.cast(sample.device, dtype)
        x = sample.to(dtype).reshape(len(sample), -1)
        self.slices.open(self.probe.table, x, self._lanes.width)
        self.state = self.solver.init(x)
        if self.first > 1:
            stretch = self._stretch() if self.stretched else torch.ones(self.first)
            whole = self.state.x.clone()
            whole[:-1, 0] = stretch.to(x)[:, None, None] * x
            self.state = replace(self.state, x=whole)
        self._returned = sample.expand(self.first, *sample.shape)
        self._pinned: dict[int, tuple[Tensor, Tensor]] = {}

    def _table(self, options: Mapping[str, Any]) -> Probe:
        """The scheduler's table for options of `step`; those that are its defaults make no difference."""
        defaults = {one.name: one.default for one in inspect.signature(self.base.step).parameters.values()}
        computing = {
            name: value
            for name, value in options.items()
            if name != "generator" and value != defaults.get(name) and value is not None
        }
        key = self._key(computing)
        if key not in self.tables:
            self.tables[key] = probe(self.plain, self.times, computing)
        return self.tables[key]

    def _first_round(self) -> int:
        """Steps of the first round."""
        if not self.once or self.settings.threshold is not None or self.settings.max_memory is not None:
            return 1
        self.probe = self._table({name: value for name, value in self.expected.items() if value is not None})
        return 1 if self.probe.table.stochastic else min(self._lanes.width, len(self.probe.table))

    def _stretch(self) -> Tensor:
        r"""$\sqrt{α_m^2 v + σ_m^2}$ of the first window's steps, in units of the first one's."""
        v = float(torch.as_tensor(self.settings.variance).double().mean())
        table = self.probe.table
        spread = (table.alpha**2 * v + table.sigma**2)[: self.first].sqrt()
        return spread / spread[0]

    def _solver(self, noise: SchedulerNoise, samples: int) -> Solver:
        mean, variance, tolerance = self.settings.mean, self.settings.variance, self.settings.tolerance
        table, size = self.probe.table, self._lanes.width
        if self.settings.threshold is None:
            window = Together(size, self.first)
            return Solver(table, noise, Secant(variance), window, Jump(mean, variance), tolerance, variance)
        if samples > 1:
            raise UnsupportedError(
                f"`exact` is True for a batch of {samples}: samples of an exact run finish steps one by one, but a pipeline "
                "has one timestep for the whole batch; call it once for each sample"
            )
        if not table.stochastic:
            raise UnsupportedError(
                f"`exact` is True but {self.base.__name__} draws no noise with these settings, so there is no law to be exact "
                "in: use DDPMScheduler, EulerAncestralDiscreteScheduler or DDIMScheduler with eta=1, or leave `exact` out"
            )
        policies = Secant(variance), Opening(size, self.first), Jump(mean, variance), tolerance, variance
        return SpeculativeSolver(table, noise, *policies, threshold=self.settings.threshold)

    def _key(self, computing: Mapping[str, Any]) -> Any:
        config = repr(sorted((name, repr(value)) for name, value in dict(self.plain.config).items()))
        start = getattr(self.plain, "begin_index", None)
        sigmas = getattr(self.plain, "sigmas", None)
        levels = tuple(sigmas.tolist()) if isinstance(sigmas, Tensor) else None
        return self.base, config, tuple(self.times.tolist()), start, levels, repr(sorted(computing.items()))

    def _round(self, values: Values) -> list[Tensor]:
        live = len(self._returned)
        width = self._lanes.width
        output, sample = (value if has else value.expand(width, *value.shape) for value, has in values)
        return [self._lanes.padded(self._update(output[:live], sample[:live], live))]

    def _update(self, output: Tensor, sample: Tensor, live: int) -> Tensor:
        """A round, from the network's outputs and the states they belong to, both `(live, S, *event)`; the x0 predictions."""
        assert self.state is not None
        state, dtype = self.state, self.solver.noise.dtype
        flat = (live, self.shape[0], -1)
        x, g = state.x[:-1, 0], output.to(dtype).reshape(flat)
        changed = sample != self._returned if state.rounds else torch.zeros_like(sample, dtype=torch.bool)
        if bool(changed.any()):
            changed = changed.reshape(flat)
            if self.settings.threshold is not None:
                raise UnsupportedError(
                    "`exact` is True but the pipeline changes the state after scheduler.step, as inpainting does: what it puts "
                    "there is no step with noise, so there is no law to be exact in; leave `exact` out"
                )
            x = torch.where(changed, sample.to(dtype).reshape(flat), x)
            whole = state.x.clone()
            whole[:-1, 0] = x
            state = replace(state, x=whole)
        P, Q = (self._of_lanes(one).to(x).reshape(-1, 1, 1) for one in (self.probe.on_state, self.probe.on_output))
        f = self._clipped(P * x + Q * g, live)
        self.last_prediction = f[-1].reshape(self.shape).to(self.dtype)
        shown = f.reshape(live, *self.shape).to(self.dtype)
        if bool(changed.any()):
            f = self._pin(state, f, changed, live)
        try:
            self.state = self.solver.update(state, f.flatten(0, 1))
        except NonFiniteError as error:
            error.x = error.x.reshape(self.shape)
            raise
        residual = self.state.residual.nan_to_num(-1.0).amax(1)
        self.residuals.append(residual.masked_fill(residual < 0, torch.nan))
        self.windows.append(self.state.window)
        if not self.state.done:
            self._returned = self.state.x[:-1, 0].reshape(-1, *self.shape).to(self.dtype)
        return shown

    def _clipped(self, x0: Tensor, live: int) -> Tensor:
        kappa = self.probe.clipping
        if kappa is None:
            return x0
        rows = x0.reshape(live * self.shape[0], *self.shape[1:])
        each = self._of_lanes(kappa).to(x0).repeat_interleave(self.shape[0]).reshape(-1, *[1] * (len(self.shape) - 1))
        return clipped(self.plain, rows, each).reshape(x0.shape)

    def _pin(self, state: State, f: Tensor, changed: Tensor, live: int) -> Tensor:
        """$f$ with which a step lands on what the pipeline will put into its result: the known part of an inpainted state.

        Raises:
            UnsupportedError: if what the pipeline puts there depends on what the step returned.
        """
        first = int(state.start[0])
        x = state.x[:-1, 0]
        for lane in range(live):
            known = self._pinned.get(first + lane)
            now = changed[lane], x[lane]
            if known is not None:
                both = known[0] & now[0]
                if not torch.allclose(known[1][both], now[1][both], rtol=1e-3, atol=1e-3):
                    raise UnsupportedError(
                        "the pipeline changes the state after scheduler.step in a way that depends on the state: piadm follows "
                        "pipelines that overwrite a fixed part of it, as inpainting with a binary mask does"
                    )
                now = known[0] | now[0], torch.where(now[0], now[1], known[1])
            self._pinned[first + lane] = now
        for step in [step for step in self._pinned if step < first]:
            del self._pinned[step]
        rows = self.rows.take((first + torch.arange(live, device=x.device))[:, None])
        without = rows.step(state.x[:-1], torch.zeros_like(f), state.noise)[:, 0]
        B = rows.B[:, 0].expand_as(f)
        out = f.clone()
        for lane in range(live - 1):
            mask, target = self._pinned[first + lane + 1]
            pinned = (target - without[lane]) / B[lane]
            out[lane] = torch.where(mask & pinned.isfinite(), pinned, f[lane])
        return out

    def _report(self) -> None:
        assert self.state is not None
        self.finished(int(self.state.start.min()), len(self.probe.table))
        if not self.state.done:
            return
        state = self.state
        self.result = Result(
            samples=self._front(),
            steps=len(self.probe.table),
            rounds=state.rounds,
            evaluations=float(state.evaluations.double().mean()),
            residuals=tuple(self.residuals),
            windows=tuple(self.windows),
            converged=True,
            error=state.error,
            certificate=Certificate.of(self.probe.table, state.nats, state.drift, rigorous=False)
            if self.settings.threshold is None
            else EXACT,
            seconds=time.perf_counter() - self.started,
            network_seconds=self.network_seconds,
            acceptance=self.solver.acceptance(state),
        )

    def _front(self) -> Tensor:
        """The last finished state, as the pipeline would hold it."""
        assert self.state is not None
        return self.state.finished().reshape(self.shape).to(self.dtype)

    @property
    def _lanes(self) -> Lanes:
        assert self.lanes is not None
        return self.lanes

    def _lane_times(self) -> Tensor:
        return self._of_lanes(self.times)

    def _of_lanes(self, values: Tensor) -> Tensor:
        """Entries of the window's steps, one for each live lane."""
        first = 0 if self.state is None else int(self.state.start[0])
        return values[first : first + self._live]

    @property
    def _live(self) -> int:
        return self.first if self.state is None else len(self.state.x) - 1
