r"""The solver: three functions and a state, and it never calls the network.

`init` makes the first state, `request` says which rows the network should see, `update` takes its answers and gives the next
state. Whoever drives it (a sampler, a pipeline, a distributed run, a notebook cell) is a loop of three lines:

    state = solver.init(x)
    while not state.done:
        request = solver.request(state)
        state = solver.update(state, denoise(request.x, request.t))

A round evaluates $f$ at all states of the window, forms $Φ_m(x_m)$, and carries the defects forward with the propagator's $J$.

A sliding window accepts the steps that `piadm.stopping` finds finished, and always the first one: its state is exact relative
to the ones before it, so a run of $M$ steps ends within $M$ rounds whatever the network does.

With `target_kl` a step is accepted for the defect that it is *measured* to have, a round after its state was made: states stay
as they are while $\sum_{j \le m} ‖δ_j‖^2 / (2 C_j^2) \le κ (m + 1)/M$, and the step after them is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from piadm.errors import NonFiniteError
from piadm.fills import Fill
from piadm.noise import NoiseSource
from piadm.placement import Mask, Numbers, Placement, pick, same
from piadm.propagators import Pair, Propagator
from piadm.result import Acceptance
from piadm.stopping import CAUTION, SAFETY, Changes, Rule, mean_variance, norm, on_host
from piadm.sweep import carry, sweep
from piadm.tables import Columns, Rows, Table
from piadm.windows import Window


@dataclass(frozen=True, eq=False)
class Request:
    """What the network is asked for: rows `(R, D)` at times `(R,)`, each belonging to sample `sample[r]`, `(R,)`."""

    x: Tensor
    t: Tensor
    sample: Tensor


@dataclass(frozen=True, eq=False)
class State:
    r"""Everything between two rounds.

    Attributes:
        start: Steps finished, per sample, shape `(S,)`, on the CPU.
        stop: One past the last step of the window, likewise.
        x: Window states, the finished one first, shape `(W + 1, k, S, D)`.
        noise: $ξ_m$ of the window's steps, shape `(W, k, S, D)`; `None` for a deterministic table.
        seen: Whether the window's first lanes, those in which any sample has been evaluated before, have been, shape `(L, S)`,
            on the CPU.
        x_seen: The states last evaluated there, shape `(L, k, S, D)`.
        f_seen: What the network said of them, shape `(L, S, D)`.
        spent: What the accepted steps are estimated to cost: `error`, `nats` and `drift`, shape `(3, S)`, float64, on the CPU.
        variance: The data's along the changes of the window's last step, for the stopping rule, shape `(S,)`, likewise.
        residual: rms of the last round's defects by step of `window`, NaN outside a sample's own, shape `(stop - start, S)`, on
            the CPU.
        window: The `(start, stop)` over all samples which that round iterated.
        rounds: Rounds so far.
        evaluations: Network rows so far, per sample, shape `(S,)`.
        newest: The network's last word on the last step of each sample's window, shape `(S, D)`; `None` before round 1.
        done: Whether every sample has finished every step.
        left: What left the windows in the last round, as a state of its own, if the solver keeps it.
    """

    start: Tensor
    stop: Tensor
    x: Tensor
    noise: Tensor | None
    seen: Tensor
    x_seen: Tensor
    f_seen: Tensor
    spent: Tensor
    variance: Tensor
    residual: Tensor
    window: tuple[int, int]
    rounds: int
    evaluations: Tensor
    newest: Tensor | None
    done: bool
    left: State | None

    @classmethod
    def begin(cls, x: Tensor, table: Table, variance: float | Tensor, size: float | None = None) -> State:
        """No step finished and no step iterated, from starting states of shape `(S, D)`; arguments as of `Solver`."""
        samples = len(x)
        zero = torch.zeros(samples, dtype=torch.long)
        nothing = torch.zeros(samples, dtype=torch.float64)
        first = torch.cat([x[None], x.new_zeros(table.components - 1, *x.shape)])[None]
        return State(
            start=zero,
            stop=zero,
            x=first,
            noise=first[:0] if table.stochastic else None,
            seen=torch.zeros(0, samples, dtype=torch.bool),
            x_seen=first[:0],
            f_seen=first[:0, 0],
            spent=nothing.expand(3, -1),
            variance=torch.full_like(nothing, mean_variance(variance) * (size or x.shape[1])),
            residual=nothing.new_zeros(0, samples),
            window=(0, 0),
            rounds=0,
            evaluations=zero,
            newest=None,
            done=False,
            left=None,
        )

    @cached_property
    def placement(self) -> Placement:
        """Where the window's steps are."""
        return Placement(self.start, self.stop, len(self.x) - 1)

    def parts(self) -> dict[str, Any]:
        """What it is made of, by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @property
    def error(self) -> Tensor:
        """Of the final sample, in rms per coordinate, shape `(S,)`."""
        return self.spent[0]

    @property
    def nats(self) -> Tensor:
        r"""Of the law, $\sum_m ‖δ_m‖^2 / (2 C_m^2)$, shape `(S,)`; see `piadm.certificate`."""
        return self.spent[1]

    @property
    def drift(self) -> Tensor:
        """The part of `error` that the certificate's divergence leaves out, shape `(S,)`."""
        return self.spent[2]

    @property
    def reached(self) -> Tensor:
        """How many of the sequential scheme's steps are finished, per sample, shape `(S,)`, on the CPU."""
        return self.start

    def step_of(self, lane: Tensor, sample: Tensor) -> Tensor:
        """Which of the sequential scheme's steps some lanes of some samples hold; all of one shape, on the CPU."""
        return self.start[sample] + lane

    def finished(self) -> Tensor:
        """The last finished state of every sample, shape `(S, D)`."""
        return self.x[0, 0]


S = TypeVar("S", bound=State)


@dataclass(frozen=True, eq=False)
class Solver:
    """A table, its noise, and the three policies.

    Arguments:
        table: The steps.
        noise: $ξ_m$.
        propagator: The linear model $J$.
        window: Which steps are iterated.
        fill: What unvisited states are filled with.
        tolerance: $τ$, in rms per coordinate; windows with a fixed number of rounds ignore it.
        variance: The data's per coordinate, a number or of one sample's size, for the stopping rule.
        target_kl: $κ$, which takes the tolerance's place.
        keep: Whether states that leave the window stay in `State.left` for a round, so that `measure` can be asked about them.
        size: $D$ of the stopping rule, where the numbers of a state stand for more of their kind (`piadm.gaussian_law`).
    """

    table: Table
    noise: NoiseSource
    propagator: Propagator
    window: Window
    fill: Fill
    tolerance: float
    variance: float | Tensor
    target_kl: float | None = None
    keep: bool = False
    size: float | None = None

    def __post_init__(self) -> None:
        self.propagator.check(self.table)
        self.window.check(self.table)

    @cached_property
    def _columns(self) -> Columns:
        return self.table.cast(self.noise.device, self.noise.dtype)

    @cached_property
    def _times(self) -> Tensor:
        return self.table.times.to(self.noise.device)

    @cached_property
    def _rule(self) -> Rule:
        return Rule(self.table, self.variance, self.tolerance)

    @property
    def _safety(self) -> float:
        """What estimated defects are multiplied by."""
        return SAFETY

    def init(self, x: Tensor) -> State:
        """The state before the first round, from starting states of shape `(S, D)`."""
        empty = State.begin(x, self.table, self.variance, self.size)
        return self._advance(empty, empty.start, empty.x, empty.spent[:, None].numpy())

    def request(self, state: State) -> Request:
        """The rows of the next round."""
        placed, inputs = state.placement, state.x[:-1, 0]
        samples = torch.arange(inputs.shape[1])
        if placed.together:
            times, shape = self._times[placed.low : placed.high, None], (placed.count, len(samples))
            return Request(inputs.flatten(0, 1), times.expand(shape).flatten(), samples.expand(shape).flatten())
        rows = placed.valid.flatten()
        steps = placed.steps.flatten()[rows].to(inputs.device)
        return Request(inputs.flatten(0, 1)[rows.to(inputs.device)], self._times[steps], samples.repeat(placed.count)[rows])

    def update(self, state: State, f: Tensor) -> State:
        """The state after a round, given the network's answers to `request`, shape `(R, D)`.

        What is NaN or infinite beyond a sample's first step may be the iteration's own doing (an expansive network, states
        that overflow): the window is cut before it, and filled anew.

        Raises:
            NonFiniteError: if the sequential run breaks there too: at the first step of a sample's window, whose state is
                exact, or where the window's rounds are over.
        """
        f, x = state.placement.dense(f), state.x
        evaluations = state.evaluations + (state.stop - state.start)
        rows = self._rows_at(state.start, state.placement.count)
        phi = rows.step(x[:-1], f, state.noise)
        ending = state.stop == len(self.table)
        state, f = self._sound(state, f, phi)
        placed, rule, past = state.placement, self._rule, state.spent.numpy()
        again, numbers = len(state.x_seen), x.shape[1] * x.shape[3]
        size = norm(phi - x[1:]).cpu()
        residual = placed.by_step(size / math.sqrt(numbers))
        pair = Pair.between(x[:again] - state.x_seen, f[:again] - state.f_seen, state.seen) if again else None
        kept = None
        if self.target_kl is not None:
            kept = rule.kept(past[1], placed, on_host(size), state.seen.numpy(), self.target_kl)
            still = torch.arange(placed.count)[:, None] < kept
            phi = torch.where(still.to(x.device)[:, None, :, None], x[1:], phi)
            size = size.masked_fill(~still, 0.0)
        jacobian = self.propagator.jacobian(rows, pair)
        new, change = sweep(phi, jacobian, x)
        variance = state.variance.numpy()
        if kept is None:
            changes = Changes.of(rows, jacobian, change, pair)
            defect, variance = rule.defects(changes, placed, variance, self.size or x.shape[-1])
            spent = rule.spent(past, placed, defect, numbers, self._safety, CAUTION)
            accepted, settled = self._settle(state, f, spent, ending.numpy())
        else:
            spent = rule.spent(past, placed, on_host(size), numbers, 1.0, 1.0)
            accepted, settled = kept + 1, {}
        after = replace(
            state,
            x_seen=x[:-1],
            f_seen=f,
            variance=torch.from_numpy(variance),
            residual=residual,
            window=(placed.low, placed.high),
            rounds=state.rounds + 1,
            evaluations=evaluations,
            newest=placed.at_last(f),
            left=None,
            **settled,
        )
        # a finished sample has no lanes; its accepted count of 1 is clamped to the table's end
        after = self._advance(after, (state.start + accepted).minimum(state.stop), new, spent)
        if not self.keep:
            return after
        gone = int((after.start - state.start).max())
        if gone == 0:
            return after
        noise = None if state.noise is None else state.noise[:gone]
        return replace(after, left=replace(state, stop=after.start, x=new[: gone + 1], noise=noise, left=None))

    def _settle(self, state: State, f: Tensor, spent: Numbers, ending: Mask) -> tuple[Tensor, dict[str, Any]]:
        """How many steps of each sample are finished, shape `(S,)`, and entries of the state that this changes.

        Arguments:
            state: Before the round.
            f: The round's answers, `(W, S, D)`.
            spent: What the steps cost, as `Rule.spent` returns it.
            ending: Whose windows have reached the table's end.
        """
        return self._rule.accepted(spent[0], state.placement, ending), {}

    def measure(self, left: State, f: Tensor) -> tuple[Tensor, Tensor]:
        r"""The defects of steps that have left, measured, given the network's answers to `request(left)`.

        Returns:
            Their $\sum_m ‖δ_m‖^2 / (2 C_m^2)$ and what noiseless ones add to `drift`, both of shape `(S,)`; infinite if the
            network is not finite there.
        """
        placed = left.placement
        rows = self._rows_at(left.start, placed.count)
        defect = on_host(norm(rows.step(left.x[:-1], placed.dense(f), left.noise) - left.x[1:]))
        defect = np.where(placed.valid.numpy(), np.nan_to_num(defect, nan=np.inf, posinf=np.inf), 0.0)
        numbers = left.x.shape[1] * left.x.shape[3]
        _, nats, drift = self._rule.spent(np.zeros_like(left.spent), placed, defect, numbers, 1.0, 1.0)[:, -1]
        return torch.from_numpy(nats), torch.from_numpy(drift)

    def prediction(self, state: State) -> Tensor:
        """Finished samples, and for the others the newest prediction of $x_0$ from their window's end, shape `(S, D)`."""
        if state.newest is None:
            return state.finished()
        over = (state.start == len(self.table)).to(state.x.device)
        return torch.where(over[:, None], state.finished(), state.newest)

    def acceptance(self, state: State) -> Acceptance | None:
        """What became of the run's tests; `None` for a solver that makes none."""
        return None

    def _sound(self, state: S, f: Tensor, after: Tensor) -> tuple[S, Tensor]:
        """State and $f$ with each window ending before the first step whose result, `(W, k, S, D)`, is not finite."""
        if all_finite(after):
            return state, f
        good = after.isfinite().all(-1).all(1).cpu() | ~state.placement.valid
        stop = torch.minimum(state.stop, state.start + good.long().cumprod(0).sum(0))
        leaves = self.window.advance(self.table, state.rounds + 1, state.start)[0] > stop
        failed = ((stop == state.start) & (state.start < state.stop)) | leaves
        if bool(failed.any()):
            samples = failed.nonzero().flatten().tolist()
            raise NonFiniteError(int(stop[failed].min()), state.rounds + 1, samples, state.start, state.finished())
        inside = Placement(state.start, stop, len(f)).valid
        state = replace(state, stop=stop, seen=state.seen & inside[: len(state.seen)])
        return state, torch.where(inside.to(f.device)[..., None], f, 0.0)

    def _rows_at(self, start: Tensor, count: int) -> Rows:
        """The rows of `count` steps from `start` on, those beyond the table's end being its last."""
        starts = start.tolist()
        if same(starts) and starts[0] + count <= len(self.table):
            return self._columns.cut(starts[0], starts[0] + count)
        index = (start + torch.arange(count)[:, None]).clamp(max=len(self.table) - 1)
        return self._columns.take(index.to(self.noise.device))

    def _advance(self, state: S, ready: Tensor, x: Tensor, spent: Numbers) -> S:
        """Moves every sample's window to where it belongs and fills the lanes that enter.

        `x`: the swept states, `(W + 1, k, S, D)`; `spent`: what was spent at each of them, `(3, W + 1, S)`.
        """
        start, stop = self.window.advance(self.table, state.rounds, ready)
        old, placed = state.placement, Placement.around(start, stop)
        shift = [after - before for before, after in zip(old.starts, placed.starts, strict=True)]
        known = [before - after for before, after in zip(old.stops, placed.starts, strict=True)]  # lanes that stay
        again = min(max(0, *known), placed.count)
        state = replace(
            state,
            start=start,
            stop=stop,
            spent=torch.from_numpy(spent[:, shift, np.arange(len(shift))]),
            done=min(placed.starts) == len(self.table),
            seen=torch.ones(again, len(known), dtype=torch.bool)
            if same(known)
            else torch.arange(again)[:, None] < torch.tensor(known),
            x_seen=pick(state.x_seen, shift, again),
            f_seen=pick(state.f_seen, shift, again),
        )
        entering = [stays for stays, wide in zip(known, placed.widths, strict=True) if stays < wide]
        first = min(entering, default=placed.count)  # lanes before this one stay in every sample
        count = placed.count - first
        kept = pick(x, shift, first + 1, old.widths)
        noise = None if state.noise is None else pick(state.noise, shift, first)
        if count == 0:
            return replace(state, x=kept, noise=noise)

        stays = None
        if not same(known) or not same(placed.widths):
            lane = torch.arange(first, placed.count)[:, None]
            stays = ((lane < torch.tensor(known)) | (lane >= torch.tensor(placed.widths))).to(x.device)[:, None, :, None]
        drawn = None
        if state.noise is not None and noise is not None:
            low = min(begin + k for begin, k, wide in zip(placed.starts, known, placed.widths, strict=True) if k < wide)
            drawn = pick(self.noise(low, placed.high), [begin + first - low for begin in placed.starts], count)
            if stays is not None:
                drawn = torch.where(stays, pick(state.noise, [by + first for by in shift], count), drawn)
            noise = torch.cat([noise, drawn])
        jacobian, offset = self.fill.model(self._rows_at(start + first, count), drawn, state.newest)
        offset = offset.expand(-1, *x.shape[1:])
        if stays is not None:
            offset = torch.where(stays, pick(x, [by + first + 1 for by in shift], count, old.widths), offset)
            jacobian = torch.where(stays[:, None], 0.0, jacobian)
        entered = carry(jacobian, torch.cat([kept[first:], offset]))
        return replace(state, x=torch.cat([kept[:first], entered]), noise=noise)


def all_finite(values: Tensor) -> bool:
    """Whether all are, by their sum first, which is cheaper and may overflow."""
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())
