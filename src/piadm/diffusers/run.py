"""One call of a pipeline: the solver, driven by the pipeline's own loop."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
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


class Entangled(Exception):
    """A pipeline mixes the samples of its batch, so the run has to be made again with all of them at the same steps."""


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
    """The next `size` steps of every sample, but `first` in the first round, on at most `lanes` different steps in all."""

    size: int
    first: int
    lanes: int

    def check(self, table: Table) -> None:
        """Fits every table."""

    def advance(self, table: Table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        stop = (ready + (self.size if rounds else self.first)).clamp(max=len(table))
        if len(steps_between(ready, stop)) > self.lanes:  # those that are far ahead wait
            stop = stop.minimum(ready.min() + self.lanes).maximum(ready)
        return ready, stop


@dataclass(frozen=True)
class Together(Opening):
    """Likewise, but the same steps for all samples, whose rows the network does not keep apart."""

    def advance(self, table: Table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        return super().advance(table, rounds, ready.min().expand_as(ready))


def steps_between(start: Tensor, stop: Tensor) -> Tensor:
    """The steps that lie in the window of any sample, in order."""
    inside = torch.zeros(int(stop.max()), dtype=torch.bool)
    for first, last in zip(start.tolist(), stop.tolist(), strict=True):
        inside[first:last] = True
    return inside.nonzero().flatten()


class Run:
    """What happens between the first iteration of a pipeline's loop and its end.

    Every iteration is a round of the solver on a window of steps. In the first one the pipeline holds the starting state and
    nothing else. Where the scheduler draws no noise, this one state serves all steps of the first window, stretched to their
    levels if the pipeline asks its scheduler to scale it: were the data Gaussian, that would be their state. Where it draws
    noise, a pipeline reads its timesteps more than once, or the window must fit in memory, of which only the starting state
    tells, the first iteration is an ordinary one of a single step.

    The solver holds for every sample its own window, `(W, S)`; the pipeline holds lanes, one for every step in any of them.

    Arguments:
        settings: Window, tolerance and the data's moments.
        once: Whether the pipeline is known to loop over its timesteps once, so that the first iteration can have lanes.
        expected: Options that `step` will be given, as far as the call's arguments tell.
        scheduler: The user's; it is not changed.
        tables: Tables probed in earlier calls.
        checked: Names of networks whose lanes were compared with a single evaluation in earlier calls.
        separate: Whether networks answer each sample of a batch by itself, as far as earlier calls found out.
        entangled: Whether the pipeline is known to mix the samples of a batch by itself.
        generator: What the pipeline was called with.
        slices: How networks are called.
    """

    def __init__(
        self,
        settings: Settings,
        scheduler: Any,
        tables: dict[Any, Probe],
        checked: set[Any],
        separate: dict[Any, bool],
        entangled: bool,
        generator: GeneratorLike,
        once: bool,
        expected: dict[str, Any],
        slices: Slices,
    ) -> None:
        self.once, self.expected, self.slices = once, expected, slices
        self.settings, self.base, self.tables, self.checked = settings, type(scheduler), tables, checked
        self.separate, self.entangled = separate, entangled
        self._asked: dict[Any, tuple[Network, tuple[Any, ...], dict[str, Any]]] = {}  # in the first round
        self._active: Tensor | None = None  # which samples are evaluated in which lanes; None for all in all
        self._parted = False  # whether there was a round in which not all were
        self._finite = True  # all answers of that round
        self.generators = [one for one in read_generators(generator) if one is not None]
        self.lanes: Lanes | None = None
        self.body = ExitStack()  # what the body of the loop runs in; who installs the run closes it, however the loop is left
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
        for t in self._rounds(times):
            self.body.close()
            self.body.enter_context(self._lanes.literals)
            yield t
        self.body.close()

    def _rounds(self, times: Tensor) -> Iterator[Tensor]:
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

    def aside(self) -> AbstractContextManager[None]:
        """What they run in: not what the loop's body runs in."""
        return self._lanes.literals.aside()

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
        key = (network.name, len(args), *sorted(kwargs))
        opening = self.plain is not None and self.state is None

        def note(plain_args: tuple[Any, ...], plain_kwargs: dict[str, Any]) -> None:
            self._asked[key] = network, plain_args, plain_kwargs

        if not self.looping:
            out = lanes.plainly(lambda: network.forward(*args, **kwargs))
            if opening:
                note(args, kwargs)
                self.slices.answered(out)
            return out
        started = time.perf_counter()
        check, told = key not in self.checked, note if opening else None
        network.watched = self._active is not None and not self._parted
        out, hidden = network(lanes, self._live, self._active, check, args, kwargs, told)
        self._finite &= network.finite
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
        self.noise = SchedulerNoise(self.plain, self.probe, output, sample, options, dtype)
        self.options = options
        self.solver = self._solver(self.noise, len(sample))
        self.columns = self.probe.table.cast(sample.device, dtype)
        x = sample.to(dtype).reshape(len(sample), -1)
        self.slices.open(self.probe.table, x, self._size, self._lanes.width)
        self.state = self.solver.init(x)
        if self.first > 1:
            stretch = self._stretch() if self.stretched else torch.ones(self.first)
            whole = self.state.x.clone()
            whole[:-1, 0] = stretch.to(x)[:, None, None] * x
            self.state = replace(self.state, x=whole)
        self._place(self.state)
        self._returned = sample.expand(self.first, *sample.shape)
        self.last_prediction = torch.zeros_like(sample)
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
        return 1 if self.probe.table.stochastic else min(self._size, len(self.probe.table))

    def _stretch(self) -> Tensor:
        r"""$\sqrt{α_m^2 v + σ_m^2}$ of the first window's steps, in units of the first one's."""
        v = float(torch.as_tensor(self.settings.variance).double().mean())
        table = self.probe.table
        spread = (table.alpha**2 * v + table.sigma**2)[: self.first].sqrt()
        return spread / spread[0]

    def _solver(self, noise: SchedulerNoise, samples: int) -> Solver:
        mean, variance, tolerance = self.settings.mean, self.settings.variance, self.settings.tolerance
        table = self.probe.table
        apart = samples == 1 or (not self.entangled and self._apart(samples))
        self._asked.clear()
        window = (Opening if apart else Together)(self._size, self.first, self._lanes.width)
        if self.settings.threshold is None:
            return Solver(table, noise, Secant(variance), window, Jump(mean, variance), tolerance, variance)
        if not apart:
            raise UnsupportedError(
                f"`exact` is True for a batch of {samples}, which the pipeline or one of its networks does not keep apart: "
                "samples of an exact run finish steps one by one; call it once for each sample"
            )
        if not table.stochastic:
            raise UnsupportedError(
                f"`exact` is True but {self.base.__name__} draws no noise with these settings, so there is no law to be exact "
                "in: use DDPMScheduler, EulerAncestralDiscreteScheduler or DDIMScheduler with eta=1, or leave `exact` out"
            )
        policies = Secant(variance), window, Jump(mean, variance), tolerance, variance
        return SpeculativeSolver(table, noise, *policies, threshold=self.settings.threshold)

    def _apart(self, samples: int) -> bool:
        """Whether every network of the loop answers the samples of a batch one by one."""
        found = []
        for key, (network, args, kwargs) in self._asked.items():
            case = (*key, samples)
            if case not in self.separate:
                self.separate[case] = network.separate(args, kwargs, samples)
            found.append(self.separate[case])
        return all(found)

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
        return [self._lanes.padded(self._update(output[:live], sample[:live]))]

    def _update(self, output: Tensor, sample: Tensor) -> Tensor:
        """A round, from the network's outputs and the states they belong to, both `(live, S, *event)`; the x0 predictions."""
        assert self.state is not None
        state, dtype = self.state, self.solver.noise.dtype
        x, g = state.x[:-1, 0], self._by_sample(output.to(dtype))
        changed = sample != self._returned if state.rounds else torch.zeros_like(sample, dtype=torch.bool)
        pinned = bool(changed.any())
        if pinned:
            if self.settings.threshold is not None:
                raise UnsupportedError(
                    "`exact` is True but the pipeline changes the state after scheduler.step, as inpainting does: what it puts "
                    "there is no step with noise, so there is no law to be exact in; leave `exact` out"
                )
            x = torch.where(self._by_sample(changed), self._by_sample(sample.to(dtype)), x)
            whole = state.x.clone()
            whole[:-1, 0] = x
            state = replace(state, x=whole)
        self._untangled(g)
        P, Q = (one.to(x)[self._steps, None] for one in (self.probe.on_state, self.probe.on_output))
        f = self._clipped(P * x + Q * g)
        shown = self._by_lane(f)
        self._remember(f)
        if pinned:
            f = self._pin(state, f, changed, sample.to(dtype))
        try:
            self.state = self.solver.update(state, torch.where(self._inside[..., None], f, 0.0).flatten(0, 1))
        except NonFiniteError as error:
            error.x = error.x.reshape(self.shape)
            raise
        residual = self.state.residual.nan_to_num(-1.0).amax(1)
        self.residuals.append(residual.masked_fill(residual < 0, torch.nan))
        self.windows.append(self.state.window)
        if not self.state.done:
            self.noise.forget(int(self.state.start.min()))
            self._place(self.state)
            self._returned = self._by_lane(self.state.x[:-1, 0])
        return shown

    def _place(self, state: State) -> None:
        """Which steps the next round's lanes are, and where each sample's own lie among them."""
        total, device = len(self.probe.table), state.x.device
        own = state.placement.steps
        self.steps = steps_between(state.start, state.stop)
        self._steps, self._inside = own.clamp(max=total - 1).to(device), state.placement.valid.to(device)
        lane = torch.searchsorted(self.steps, own.contiguous()).clamp(max=len(self.steps) - 1)
        back = (self.steps[:, None] - state.start).clamp(0, len(own) - 1)  # (live, S)
        active = (self.steps[:, None] >= state.start) & (self.steps[:, None] < state.stop)
        self._lane, self._back = lane.to(device), back.to(device)
        self._active = None if bool(active.all()) else active.to(device)

    def _by_sample(self, values: Tensor) -> Tensor:
        """Values by lane, `(live, S, *event)`, as the solver has them, `(W, S, D)`."""
        values = values.reshape(*values.shape[:2], -1)
        return values.gather(0, self._lane[..., None].expand(-1, -1, values.shape[-1]))

    def _by_lane(self, values: Tensor) -> Tensor:
        """The inverse: `(W, S, D)` as the pipeline has them; where a step is not in a sample's window, the nearest that is."""
        lanes = values.gather(0, self._back[..., None].expand(-1, -1, values.shape[-1]))
        return lanes.reshape(-1, *self.shape).to(self.dtype)

    def _remember(self, f: Tensor) -> None:
        """Keeps the prediction at the last step of each sample."""
        last = (self._steps == len(self.probe.table) - 1) & self._inside
        lane, sample = last.nonzero(as_tuple=True)
        self.last_prediction[sample] = f[lane, sample].reshape(-1, *self.shape[1:]).to(self.dtype)

    def _untangled(self, output: Tensor) -> None:
        """Raises `Entangled` if what was left out of a round comes out in what was not."""
        if self._active is None or self._parted:
            return
        self._parted = True
        if self._finite and not bool(output.isfinite().all(-1)[self._inside].all()):
            raise Entangled

    def _clipped(self, x0: Tensor) -> Tensor:
        kappa = self.probe.clipping
        if kappa is None:
            return x0
        rows = x0.reshape(-1, *self.shape[1:])
        each = kappa.to(x0)[self._steps].reshape(-1, *[1] * (len(self.shape) - 1))
        return clipped(self.plain, rows, each).reshape(x0.shape)

    def _pin(self, state: State, f: Tensor, changed: Tensor, sample: Tensor) -> Tensor:
        """$f$ with which a step lands on what the pipeline will put into its result: the known part of an inpainted state.

        Raises:
            UnsupportedError: if what the pipeline puts there depends on what the step returned.
        """
        size = len(changed), self.shape[0], -1
        for step, mask, target in zip(self.steps.tolist(), changed.reshape(size), sample.reshape(size), strict=True):
            known = self._pinned.get(step)
            now = mask, target
            if known is not None:
                both = known[0] & mask
                if not torch.allclose(known[1][both], target[both], rtol=1e-3, atol=1e-3):
                    raise UnsupportedError(
                        "the pipeline changes the state after scheduler.step in a way that depends on the state: piadm follows "
                        "pipelines that overwrite a fixed part of it, as inpainting with a binary mask does"
                    )
                now = known[0] | mask, torch.where(mask, target, known[1])
            self._pinned[step] = now
        for step in [step for step in self._pinned if step < int(state.start.min())]:
            del self._pinned[step]
        rows = self.columns.take(self._steps)
        without = rows.step(state.x[:-1], torch.zeros_like(f), state.noise)[:, 0]
        nothing = torch.zeros_like(f[0], dtype=torch.bool), torch.zeros_like(f[0])
        after = [self._pinned.get(step, nothing) for step in (self.steps + 1).tolist()]
        masks, targets = (self._by_sample(torch.stack(one)) for one in zip(*after, strict=True))
        pinned = (targets - without) / rows.B[:, 0]
        return torch.where(masks & pinned.isfinite(), pinned, f)

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
            error=state.error.to(state.x),
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
    def _size(self) -> int:
        """Steps in a window."""
        return self._lanes.width if self.settings.window is None else self.settings.window

    @property
    def _lanes(self) -> Lanes:
        assert self.lanes is not None
        return self.lanes

    def _lane_times(self) -> Tensor:
        return self._of_lanes(self.times)

    def _of_lanes(self, values: Tensor) -> Tensor:
        """Entries of the window's steps, one for each live lane."""
        return values[: self.first] if self.state is None else values[self.steps]

    @property
    def _live(self) -> int:
        return self.first if self.state is None else len(self.steps)
