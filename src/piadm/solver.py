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

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from piadm.certificate import information
from piadm.errors import NonFiniteError
from piadm.fills import Fill
from piadm.noise import NoiseSource
from piadm.propagators import Pair, Propagator
from piadm.result import Acceptance
from piadm.stopping import CAUTION, SAFETY, apparent_variance, misfit, rms, sensitivity, total_variance
from piadm.sweep import sweep
from piadm.tables import Rows, Table, mix
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
        seen: Per lane, whether `x_seen` and `f_seen` hold an earlier evaluation, shape `(W, S)`.
        x_seen: The states last evaluated, shape `(W, k, S, D)`.
        f_seen: What the network said of them, shape `(W, S, D)`.
        error: What the accepted steps are estimated to cost the final sample, in rms per coordinate, shape `(S,)`.
        nats: What they add to the divergence, $\sum_m ‖δ_m‖^2 / (2 C_m^2)$, shape `(S,)`; see `piadm.certificate`.
        drift: The part of `error` that the certificate's divergence leaves out, shape `(S,)`.
        variance: The data's along the changes of the window's last step, for the stopping rule, shape `(S,)`.
        residual: rms of the last round's defects by step of `window`, NaN outside a sample's own, shape `(stop - start, S)`.
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
    error: Tensor
    nats: Tensor
    drift: Tensor
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
        first = torch.cat([x[None], x.new_zeros(table.components - 1, *x.shape)])[None]
        return State(
            start=zero,
            stop=zero,
            x=first,
            noise=first[:0] if table.stochastic else None,
            seen=torch.zeros(0, samples, dtype=torch.bool, device=x.device),
            x_seen=first[:0],
            f_seen=first[:0, 0],
            error=x.new_zeros(samples),
            nats=x.new_zeros(samples),
            drift=x.new_zeros(samples),
            variance=x.new_full((samples,), total_variance(variance, size or x.shape[1])),
            residual=x.new_zeros(0, samples),
            window=(0, 0),
            rounds=0,
            evaluations=zero,
            newest=None,
            done=False,
            left=None,
        )

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
    def _rows(self) -> Rows:
        return self.table.cast(self.noise.device, self.noise.dtype)

    @cached_property
    def _times(self) -> Tensor:
        return self.table.times.to(self.noise.device)

    @cached_property
    def _weights(self) -> Tensor:
        return sensitivity(self.table, self.variance).to(self.noise.device, self.noise.dtype)

    @cached_property
    def _information(self) -> Tensor:
        """$1/(2 C_m^2)$ by step, 0 where the certificate says nothing."""
        known = information(self.table)
        return torch.zeros_like(self._weights) if known is None else known.to(self.noise.device, self.noise.dtype)

    def init(self, x: Tensor) -> State:
        """The state before the first round, from starting states of shape `(S, D)`."""
        empty = State.begin(x, self.table, self.variance, self.size)
        return self._advance(empty, empty.start, empty.x, x.new_zeros(3, 1, len(x)))

    def request(self, state: State) -> Request:
        """The rows of the next round."""
        steps, valid = self._lanes(state)
        inputs = state.x[:-1, 0]
        samples = torch.arange(inputs.shape[1]).expand_as(valid)
        device = inputs.device
        if bool(valid.all()):
            return Request(inputs.flatten(0, 1), self._times[steps.flatten().to(device)], samples.flatten())
        rows = valid.flatten()
        return Request(
            inputs.flatten(0, 1)[rows.to(device)], self._times[steps.flatten()[rows].to(device)], samples.flatten()[rows]
        )

    def update(self, state: State, f: Tensor) -> State:
        """The state after a round, given the network's answers to `request`, shape `(R, D)`.

        What is NaN or infinite beyond a sample's first step may be the iteration's own doing (an expansive network, states
        that overflow): the window is cut before it, and filled anew.

        Raises:
            NonFiniteError: if the sequential run breaks there too: at the first step of a sample's window, whose state is
                exact, or where the window's rounds are over.
        """
        steps, valid = self._lanes(state)
        count = len(valid)
        device, x = state.x.device, state.x
        evaluations = state.evaluations + valid.sum(0)
        f = dense(f, valid)
        rows = self._rows_at(state.start, count)
        phi = rows.step(x[:-1], f, state.noise)
        state, valid, f = self._sound(state, valid, f, phi)
        inside = valid.to(device)
        low, high = int(state.start.min()), int(state.stop.max())
        defect = rms(phi - x[1:])
        residual = by_step(defect, steps, valid, low, high)
        pair = None
        if state.rounds > 0:
            pair = Pair(x[:-1, 0] - state.x_seen[:, 0], f - state.f_seen, state.seen & inside)
        kept = None
        if self.target_kl is not None:
            kept = self._within(self.target_kl, state, steps, defect, inside)
            phi = torch.where(kept[:, None, :, None], x[1:], phi)
        jacobian = self.propagator.jacobian(rows, pair)
        new = sweep(phi, jacobian, x)
        variance, numbers = state.variance[None], self.size or x.shape[-1]
        if pair is not None:
            variance = apparent_variance(rows, pair, state.variance, total_variance(self.variance, numbers))
        if kept is not None:
            carried = self._spent(state, steps, defect.masked_fill(~kept, 0.0), 1.0, 1.0)
            accepted = kept.long().sum(0).cpu() + 1
        else:
            step = x[:-1] if pair is None else x[:-1] - state.x_seen
            change = rms(new[:-1] - x[:-1])
            # a model that overflowed says nothing against a state that did not change
            size = torch.where(change == 0, 0.0, misfit(rows, jacobian, variance, pair, step, numbers) * change)
            carried = self._spent(state, steps, size.masked_fill(~inside, 0.0), SAFETY, CAUTION)
            share = (steps + 1).to(size) / len(self.table)
            over = ~(carried[0] <= self.tolerance * share.sqrt()) | ~inside  # an estimate that is NaN accepts nothing
            over[0] = False
            accepted = torch.cumprod((~over).long(), 0).sum(0).cpu()
        after = replace(
            state,
            seen=inside,
            x_seen=x[:-1],
            f_seen=f,
            variance=variance[-1],
            residual=residual,
            window=(low, high),
            rounds=state.rounds + 1,
            evaluations=evaluations,
            newest=pick(f, (state.stop - state.start - 1)[None])[0],
            left=None,
        )
        before = torch.stack([state.error, state.nats, state.drift])[:, None]
        # a finished sample has no lanes; its accepted count of 1 is clamped to the table's end
        ready = (state.start + accepted).minimum(torch.full_like(state.start, len(self.table))).minimum(state.stop)
        moved = self._advance(after, ready, new, torch.cat([before, carried], dim=1))
        gone = int((moved.start - state.start).max())
        if not self.keep or gone == 0:
            return moved
        noise = None if state.noise is None else state.noise[:gone]
        return replace(moved, left=replace(state, stop=moved.start, x=new[: gone + 1], noise=noise, left=None))

    def measure(self, left: State, f: Tensor) -> tuple[Tensor, Tensor]:
        r"""The defects of steps that have left, measured, given the network's answers to `request(left)`.

        Returns:
            Their $\sum_m ‖δ_m‖^2 / (2 C_m^2)$ and what noiseless ones add to `drift`, both of shape `(S,)`; infinite if the
            network is not finite there.
        """
        steps, valid = self._lanes(left)
        rows = self._rows_at(left.start, len(valid))
        size = rms(rows.step(left.x[:-1], dense(f, valid), left.noise) - left.x[1:]).nan_to_num(torch.inf, posinf=torch.inf)
        blank = replace(left, error=0 * left.error, nats=0 * left.nats, drift=0 * left.drift)
        _, nats, drift = self._spent(blank, steps, size.masked_fill(~valid.to(size.device), 0.0), 1.0, 1.0)[:, -1]
        return nats, drift

    def _within(self, target: float, state: State, steps: Tensor, defect: Tensor, inside: Tensor) -> Tensor:
        """Which states of the window stay as they are because their measured defects are within the target, `(W, S)`."""
        information = self._information[steps.to(defect.device)]
        nats = state.nats + (information * defect.square() * state.x[0, :, 0].numel()).cumsum(0)
        share = (steps + 1).to(defect) / len(self.table)
        # the state after a step not swept yet may lack that step's noise: its defect looks at what is not drawn yet
        kept = (nats <= target * share) & (information > 0) & state.seen & inside
        return torch.cumprod(kept.long(), 0).bool()

    def _spent(self, state: State, steps: Tensor, size: Tensor, safety: float, caution: float) -> Tensor:
        """`error`, `nats` and `drift` after each step of the window, for defects of rms `size`, `(W, S)`; `(3, W, S)`.

        Estimated ones are multiplied by `safety` for the samples' error, by `caution` for the law's.
        """
        steps = steps.to(size.device)
        information, cost = self._information[steps], safety * self._weights[steps] * size
        nats = torch.where(information > 0, information * (caution * size).square() * state.x[0, :, 0].numel(), 0.0)
        drift = cost.masked_fill(information > 0, 0.0)
        return torch.stack(
            [
                torch.hypot(state.error, cost.cumsum(0)),
                state.nats + nats.cumsum(0),
                torch.hypot(state.drift, drift.cumsum(0)),
            ]
        )

    def prediction(self, state: State) -> Tensor:
        """Finished samples, and for the others the newest prediction of $x_0$ from their window's end, shape `(S, D)`."""
        if state.newest is None:
            return state.finished()
        over = (state.start == len(self.table)).to(state.x.device)
        return torch.where(over[:, None], state.finished(), state.newest)

    def acceptance(self, state: State) -> Acceptance | None:
        """What became of the run's tests; `None` for a solver that makes none."""
        return None

    def _lanes(self, state: State) -> tuple[Tensor, Tensor]:
        """Step of each lane, clamped to the table, and whether it lies in its sample's window; `(W, S)`, on the CPU."""
        count = len(state.x) - 1
        steps = state.start + torch.arange(count)[:, None]
        return steps.clamp(max=len(self.table) - 1), steps < state.stop

    def _sound(self, state: S, valid: Tensor, f: Tensor, after: Tensor) -> tuple[S, Tensor, Tensor]:
        """State, lanes and $f$ with each window ending before the first step whose result, `(W, k, S, D)`, is not finite."""
        if bool(after.sum().isfinite()) or bool(after.isfinite().all()):
            return state, valid, f
        good = after.isfinite().all(-1).all(1).cpu() | ~valid
        stop = torch.minimum(state.stop, state.start + good.long().cumprod(0).sum(0))
        leaves = self.window.advance(self.table, state.rounds + 1, state.start)[0] > stop
        failed = ((stop == state.start) & (state.start < state.stop)) | leaves
        if bool(failed.any()):
            samples = failed.nonzero().flatten().tolist()
            raise NonFiniteError(int(stop[failed].min()), state.rounds + 1, samples, state.start, state.finished())
        state = replace(state, stop=stop)
        valid = self._lanes(state)[1]
        return state, valid, torch.where(valid.to(f.device)[..., None], f, 0.0)

    def _rows_at(self, start: Tensor, count: int) -> Rows:
        shared = _shared(start)
        if shared is not None and shared + count <= len(self.table):
            return self._rows.cut(shared, shared + count)
        index = (start + torch.arange(count)[:, None]).clamp(max=len(self.table) - 1)
        return self._rows.take(index.to(self.noise.device))

    def _advance(self, state: S, ready: Tensor, x: Tensor, carried: Tensor) -> S:
        """Moves every sample's window to where it belongs and fills the lanes that enter.

        `x`: the swept states, `(W + 1, k, S, D)`; `carried`: `error`, `nats` and `drift` at each of them, `(3, W + 1, S)`.
        """
        start, stop = self.window.advance(self.table, state.rounds, ready)
        shift, count = start - state.start, int((stop - start).max())
        known = state.stop - start  # lanes that stay
        lanes = torch.arange(count + 1)[:, None] + shift
        x = pick(x, torch.minimum(lanes, state.stop - state.start))
        noise = None if state.noise is None else pick(state.noise, lanes[:-1])
        error, nats, drift = carried.gather(1, shift.to(x.device).expand(3, 1, -1))[:, 0]
        moved = replace(
            state,
            start=start,
            stop=stop,
            x=x,
            noise=noise,
            error=error,
            nats=nats,
            drift=drift,
            done=bool((start == len(self.table)).all()),
            seen=(torch.arange(count)[:, None] < known).to(x.device),
            x_seen=pick(state.x_seen, lanes[:-1]),
            f_seen=pick(state.f_seen, lanes[:-1]),
        )
        fresh = (lanes[:-1] - shift >= known) & (lanes[:-1] - shift < stop - start)
        if not bool(fresh.any()):
            return moved

        first = int(known[fresh.any(0)].min())  # lanes before this one stay in every sample
        old = ~fresh[first:].to(x.device)
        if noise is not None:
            low, high = int((start + known)[fresh.any(0)].min()), int(stop.max())
            drawn = pick(self.noise(low, high), lanes[first:-1] + state.start - low)
            noise[first:] = torch.where(old[:, None, :, None], noise[first:], drawn) if bool(old.any()) else drawn
        rows = self._rows_at(start + first, count - first)
        jacobian, offset = self.fill.model(rows, None if noise is None else noise[first:], state.newest)
        offset = offset.expand(-1, *x.shape[1:]).clone()
        offset[0] += mix(jacobian[0], x[first])
        if bool(old.any()):
            stays = old[:, None, :, None]
            offset = torch.where(stays, x[first + 1 :], offset)
            jacobian = torch.where(stays[:, None], 0.0, jacobian)
        blank = torch.zeros_like(x[first:])
        blank[0] = x[first]
        x[first:] = sweep(offset, jacobian, blank)
        return moved


def _shared(start: Tensor) -> int | None:
    """The step at which every sample is, `None` if they are at different ones."""
    steps = start.tolist()
    return steps[0] if steps.count(steps[0]) == len(steps) else None


def by_step(values: Tensor, steps: Tensor, valid: Tensor, low: int, high: int) -> Tensor:
    """Values by lane, `(W, S)`, as values by step from `low` to `high`, NaN outside a sample's window."""
    out = values.new_full((high - low + 1, values.shape[1]), torch.nan)
    # samples slide apart; what lies outside a sample's window goes to a row that is cut off
    out.scatter_(0, torch.where(valid, steps - low, high - low).to(values.device), values)
    return out[:-1]


def dense(f: Tensor, valid: Tensor) -> Tensor:
    """Rows of the lanes in a window, `(R, D)`, as one `(W, S, D)`, with zeros in the other lanes."""
    count, samples = valid.shape
    if len(f) < count * samples:
        whole = f.new_zeros(count * samples, f.shape[-1])
        whole[valid.flatten().to(f.device)] = f
        f = whole
    return f.reshape(count, samples, -1)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Entry `index[i, s]` of every sample, clamped: `(L, …, S, D)` to `(n, …, S, D)`; a new tensor."""
    if len(values) == 0:
        return values.new_zeros(len(index), *values.shape[1:])
    index = index.clamp(0, len(values) - 1)
    if index.shape[1] == 1 or bool((index == index[:, :1]).all()):
        return values.index_select(0, index[:, 0].to(values.device))
    shape = (len(index), *[1] * (values.ndim - 3), index.shape[1], 1)
    return values.gather(0, index.to(values.device).reshape(shape).expand(-1, *values.shape[1:]))
