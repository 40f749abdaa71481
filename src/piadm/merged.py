r"""Rounds on merged steps: `Solver` on a table that `piadm.merging` makes, and makes anew where too much was merged.

To whoever drives it, it is a solver of the sequential scheme's own table: steps are counted as there. Within, a window's lanes
are merged steps. Where the stopping rule would accept one that misses by more than its part, it and those like it are cut into
pieces, for all samples, and the window is filled again: new anchors get a remainder $e$ on the line through the two old ones
before, so that nothing depends on later noise, and what the network said at the old ones is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from piadm.errors import NonFiniteError
from piadm.merging import MISSED, SHARE, Grid, MergedNoise, MergedTable, Worth, merge
from piadm.placement import Mask, Numbers
from piadm.solver import Request, Solver, State
from piadm.stopping import mean_variance, norm, on_host, rms
from piadm.tables import Rows, mix

LEFT_OVER = 0.25
"""What rounds leave of errors is held to the stopping rule with this part of its `SAFETY`: merging leaves more. At one final
error `digits`, DDPM 1000, window 128, took 13 to 16 rounds with all of it, 10 to 12 so."""

UNEVEN = 4.0
"""How many times its equal part of what is left a merged step may take, in squares."""

SPENT = 0.8
"""A merged step that is cut when so much of what merging may cost is spent, in squares, ends all merging."""

CHANCE = 0.5
"""By how much more misses are held to be worth where noise decides what becomes of them. Without it 2 of 32 samples of
`fashion`, DDPM 1000, were further off than the tolerance of 0.01, by 1.3 and 2.1 times; with it 1, by 1.8."""

PIECES = 8
"""Into how many pieces a merged step is cut at once, at most."""

LEADING = 0.25
"""The variance along misses before any is known, as a part of all: about what images have along their leading direction (0.29
on Fashion-MNIST, 0.15 on scikit-learn's digits)."""

FADING = 1.5
"""The estimate of the variance along misses is the largest one seen, which falls like this power of $σ^2/α^2$."""


@dataclass(frozen=True, eq=False)
class Merger(State):
    r"""Everything between two rounds. `start`, `stop` and the lanes count merged steps.

    Attributes:
        anchors: As in `piadm.merging.Grid`.
        shifted: By how much merging is estimated to have shifted each final sample, shape `(S, D)`.
        miss: $p$ at its first unfinished step, likewise.
        along: The data's variance along such misses, shape `(S,)`, float64, on the CPU.
        split: Merged steps that miss by too much, and into how many pieces they are to be cut.
        stuck: For which samples the first step of the window is one of them, shape `(S,)`, on the CPU.
    """

    anchors: tuple[int, ...]
    shifted: Tensor
    miss: Tensor
    along: Tensor
    split: tuple[tuple[int, int], ...]
    stuck: Tensor

    @property
    def error(self) -> Tensor:
        return torch.hypot(self.spent[0], self.merging)

    @property
    def merging(self) -> Tensor:
        """What it has cost each sample, rms, shape `(S,)`."""
        return rms(self.shifted[None, None])[0].cpu()

    @property
    def drift(self) -> Tensor:
        """Of noiseless schemes all that merging cost; of others that is in `nats`."""
        return torch.hypot(self.spent[2], self.merging) if self.noise is None else self.spent[2]

    @property
    def reached(self) -> Tensor:
        return torch.tensor(self.anchors)[self.start]

    def step_of(self, lane: Tensor, sample: Tensor) -> Tensor:
        return torch.tensor(self.anchors)[super().step_of(lane, sample)]


@dataclass(frozen=True, eq=False)
class Merged(Solver):
    """The solver of one grid's merged steps.

    Arguments:
        table: Theirs.
        budget: What merging may cost, rms.
        ahead: How many merged steps there were from each step of the scheme on, to begin with, shape `(M + 1,)`.
        worth: What errors are worth in the end.
        mean: The data's, a number or of one sample's size.
    """

    table: MergedTable
    budget: float = field(kw_only=True)
    ahead: Numbers = field(kw_only=True)
    worth: Worth = field(kw_only=True)
    mean: float | Tensor = field(kw_only=True)

    @property
    def _safety(self) -> float:
        return LEFT_OVER * super()._safety

    @cached_property
    def _host(self) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Per row: $β$, the part of what is left that it may take, its length over that before, nats of $‖p‖^2$."""
        lengths = self.table.lengths.double()
        ratio = torch.cat([torch.ones_like(lengths[:1]), lengths[1:] / lengths[:-1]])
        part = np.minimum(UNEVEN / np.maximum(self.ahead[self.table.ends - self.table.lengths], 1), 1)
        return self.table.reach.numpy(), part, ratio.numpy(), self.table.nats.numpy()

    @cached_property
    def _faded(self) -> Numbers:
        """Per row what variances along misses are divided by to be comparable: they fade as the noise does."""
        level = (self.table.alpha[:-1].clamp(min=1e-13) / self.table.sigma[:-1].clamp(min=1e-13)).log()
        faded: Numbers = (2 * FADING * (level - level.max())).exp().numpy()
        return faded

    @cached_property
    def _here(self) -> tuple[Tensor, Tensor]:
        """$L$ and $1/s$ of the rows, where the states live."""
        gain, recall = self.table.gain, 1 / self.table.memory
        return gain.to(self.noise.device, self.noise.dtype), recall.to(self.noise.device, self.noise.dtype)

    def rows(self, start: Tensor, count: int) -> Tensor:
        """Those that `count` lanes from `start` of each sample on hold, `(count, S)`; beyond the end the last one."""
        return (start + torch.arange(count)[:, None]).clamp(max=len(self.table) - 1)

    def gains(self, start: Tensor, count: int) -> Tensor:
        """$L$ of lanes, shape `(count, S, 1)`."""
        return self._here[0][self.rows(start, count).to(self.noise.device)][..., None]

    def recalls(self, start: Tensor, count: int) -> Tensor:
        """$1/s$ of lanes, shape `(count, S, 1)`."""
        return self._here[1][self.rows(start, count).to(self.noise.device)][..., None]

    def remembered(self, start: Tensor, x: Tensor) -> Tensor:
        """$e$ of the rows before those that lanes from `start` on hold, from the states there, `(L, k, S, D)`; `(L, S, D)`."""
        return self.recalls(start, len(x)) * x[:, 1]

    def misses(self, state: Merger, f: Tensor) -> tuple[Tensor, Numbers]:
        """$p$ at the first state of every lane, `(W, S, D)`, and the data's variance along it, `(W, S)`."""
        e = f - self.gains(state.start, len(f)) * state.x[:-1, 0]
        change = e - torch.cat([self.remembered(state.start, state.x[:1]), e[:-1]])
        before = self.rows(state.start - 1, len(f))[1:]
        # no anchor comes before the first, so no change before the second
        ratio = torch.from_numpy(np.where(before.numpy() > 0, self._host[2][before], 0.0)).to(change)
        p = torch.cat([state.miss[None], torch.addcmul(change[1:], -ratio[..., None], change[:-1])])
        size, told = on_host(norm(p[1:, None])), on_host((p[1:] * (f[1:] - self.mean)).sum(-1))
        scale = (self.size or f.shape[-1]) / f.shape[-1]
        with np.errstate(all="ignore"):
            seen = scale * np.square(told / np.where(size > 0, size, np.inf))
            faded = state.placement.of_step(self._faded)
            largest = np.fmax.accumulate(np.concatenate([state.along.numpy()[None], seen]) * faded, 0) / faded
        # one sample may show little of a direction; what is not forgotten is not judged by less than the mean variance
        return p, np.maximum(largest, (1 - self.worth.forgets) * mean_variance(self.variance))

    def _settle(self, state: State, f: Tensor, spent: Numbers, ending: Mask) -> tuple[Tensor, dict[str, Any]]:
        state, placed = _merger(state), state.placement
        accepted, _ = super()._settle(state, f, spent, ending)
        accepted = accepted.minimum(state.stop - state.start)
        (p, along), samples = self.misses(state, f), np.arange(f.shape[1])
        reach, part, ratio, nats = (placed.of_step(values) for values in self._host)
        rows = self.rows(state.start, len(f)).numpy()
        with np.errstate(all="ignore"):
            cost = np.where(
                reach > 0, MISSED * (1 + CHANCE * self.worth.forgets) * reach * ratio * self.worth(rows + 1, along), 0.0
            )
        weight = torch.from_numpy(cost).to(p)[..., None]
        shift = torch.where(weight > 0, weight * p, 0.0)
        shifted = torch.cat([state.shifted[None], shift]).cumsum(0)
        with np.errstate(all="ignore"):
            total = np.square(on_host(rms(shifted[:, None])))
            allowed = part * np.maximum(self.budget**2 - total[:-1], 0)
            within = (total[1:] - total[:-1] <= allowed) | (reach == 0)
            kept = np.logical_and.accumulate(within).sum(0)
            pieces = np.clip(np.ceil(np.cbrt((total[1:] - total[:-1]) / allowed)), 2, PIECES)
        lane, lengths = np.arange(len(f))[:, None], self.table.lengths.numpy()[rows]
        wrong = ~within & (lane >= kept) & (lane < accepted.numpy())
        stuck = wrong[0]
        pieces = np.where(np.isfinite(pieces) & ~(stuck & (lane == 0)), pieces, lengths)
        split: dict[int, int] = {}
        for row, count in zip(rows[wrong].tolist(), pieces[wrong].astype(int).tolist(), strict=True):
            split[row] = max(count, split.get(row, 0))
        if (wrong & (lane == kept) & (total[:-1] > SPENT * self.budget**2)).any():
            split = {row: len(self.table.mixing) for row in range(min(split), len(self.table))}
        accepted = accepted.minimum(torch.from_numpy(kept))
        done = accepted.numpy()
        if self.table.stochastic:
            with np.errstate(all="ignore"):
                nats = np.where(reach > 0, nats * np.square(ratio * on_host(norm(p[:, None]))), 0.0)
                spent[1, 1:] += np.cumsum(nats, 0)
        last = torch.from_numpy(np.minimum(done, len(f) - 1))
        return accepted, {
            "shifted": shifted[accepted, samples],
            "miss": p[last, samples],
            "along": torch.from_numpy(along[last.numpy(), samples]),
            "split": tuple(split.items()),
            "stuck": torch.from_numpy(stuck),
        }


@dataclass(frozen=True, eq=False)
class MergingSolver(Solver):
    """A solver of a table that evaluates some of its steps.

    Arguments:
        first: Those to begin with, merged.
        mean: The data's, a number or of one sample's shape.
    """

    first: MergedTable = field(kw_only=True)
    mean: float | Tensor = field(kw_only=True)

    @cached_property
    def _made(self) -> dict[tuple[int, ...], Merged]:
        return {}

    @cached_property
    def _ahead(self) -> Numbers:
        """Fixed: how many there are by and by depends on later noise."""
        ahead = np.zeros(len(self.table) + 1)
        starts = (self.first.ends - self.first.lengths)[self.first.reach > 0].numpy()
        ahead[starts] = 1
        rest: Numbers = ahead[::-1].cumsum()[::-1]
        return rest

    def _on(self, anchors: tuple[int, ...]) -> Merged:
        """The solver of the merged steps between some anchors; the last one made is kept."""
        if anchors not in self._made:
            self._made.clear()
            variance, mean = mean_variance(self.variance), self.mean
            whole = anchors == self.first.grid.anchors
            table = self.first if whole else merge(self.table, Grid(anchors), variance)
            self._made[anchors] = Merged(
                table,
                MergedNoise(self.noise, table),
                self.propagator,
                self.window,
                self.fill,
                math.sqrt(1 - SHARE) * self.tolerance,
                self.variance,
                size=self.size,
                budget=math.sqrt(SHARE) * self.tolerance,
                ahead=self._ahead,
                worth=Worth(table, variance),
                mean=mean.to(self.noise.device, self.noise.dtype).reshape(-1) if isinstance(mean, Tensor) else mean,
            )
        return self._made[anchors]

    def init(self, x: Tensor) -> Merger:
        anchors, state = self.first.grid.anchors, self._on(self.first.grid.anchors).init(x)
        along = LEADING * mean_variance(self.variance) * (self.size or x.shape[1])
        return Merger(
            **state.parts(),
            anchors=anchors,
            shifted=torch.zeros_like(x),
            miss=torch.zeros_like(x),
            along=torch.full((len(x),), along, dtype=torch.float64),
            split=(),
            stuck=torch.zeros(len(x), dtype=torch.bool),
        )

    def request(self, state: State) -> Request:
        return self._on(_merger(state).anchors).request(state)

    def update(self, state: State, f: Tensor) -> Merger:
        state = _merger(state)
        rows, anchors = self._on(state.anchors), torch.tensor(state.anchors)
        try:
            after = _merger(rows.update(state, f))
        except NonFiniteError as error:
            step, finished = state.anchors[error.step], anchors[error.finished]
            raise NonFiniteError(step, error.round, error.samples, finished, error.x) from None
        first, last = after.window
        residual = after.residual.repeat_interleave(rows.table.lengths[first:last], dim=0)
        after = replace(after, residual=residual, window=(state.anchors[first], state.anchors[last]))
        return self._closer(rows, after) if after.split else after

    def prediction(self, state: State) -> Tensor:
        return self._on(_merger(state).anchors).prediction(state)

    def _closer(self, old: Merged, state: Merger) -> Merger:
        """The state on a grid on which the merged steps that missed by too much are cut into pieces."""
        grid, cut = Grid(state.anchors).split(dict(state.split)), min(dict(state.split))
        new, anchors, laid = self._on(grid.anchors), torch.tensor(state.anchors), torch.tensor(grid.anchors)
        start, samples = torch.searchsorted(laid, anchors[state.start]), torch.arange(len(state.start))
        # lanes before the first row that is cut are as they were
        stays = (state.stop.clamp(max=cut) - state.start).clamp(min=0)
        _, stop = self.window.advance(new.table, state.rounds, start)
        steps = laid[new.rows(start, int((stop - start).max()))]
        # states remember the remainder of the lane before; of the table's last row nothing is
        held, remembered = anchors[old.rows(state.start - 1, len(state.x)).clamp(min=0)], old.remembered(state.start, state.x)
        known = state.stop - state.start - (state.stop == len(old.table)).long()
        fill = _Remainders(_extrapolated(steps, held, known, remembered), new.gains(start, len(steps)))
        # where the row before is closer by now, its remainder is on the line to the next one
        closer = laid.diff()[start + stays - 1] / anchors.diff()[state.start + stays - 1]
        closer = torch.where((start > 0) & (stays == 0) & (known > 0), closer, 1.0).to(remembered)[:, None]
        before = torch.lerp(remembered[(stays + 1).clamp(max=len(state.x) - 1), samples], remembered[stays, samples], closer)
        x = state.x.clone()
        x[stays, 1, samples] = before / new.recalls(start + stays, 1)[0]
        # the variance that the old window's last step showed is later news than the new lanes may hear
        variance = torch.full_like(state.variance, mean_variance(self.variance) * (self.size or x.shape[-1]))
        part = replace(state, start=start, stop=start + stays, variance=variance, anchors=grid.anchors, split=())
        spent = state.spent[:, None].expand(-1, len(steps) + 1, -1).numpy()
        after = replace(new, fill=fill)._advance(part, start, x, spent)
        if bool(state.stuck.any()):
            # the first of the pieces of a first lane is one step, of which all is known: no round passes without a step
            after = new._advance(after, after.start + state.stuck, after.x, spent)
            after, stays = replace(after, stuck=torch.zeros_like(state.stuck)), (stays - state.stuck.long()).clamp(min=0)
        steps = laid[new.rows(after.start, len(after.x) - 1)]
        seen, x_seen, f_seen = _said(after, state, steps, held[1:], stays)
        return replace(after, seen=seen, x_seen=x_seen, f_seen=f_seen)


def _said(after: Merger, state: Merger, steps: Tensor, held: Tensor, stays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`seen`, `x_seen` and `f_seen` at the steps `(W, S)` of a window after a cut, whose lanes held the steps `held`, `(L, S)`.

    What states remember counts as changed only in the first `stays` lanes: beyond them it is of another step.
    """
    seen = torch.zeros_like(steps, dtype=torch.bool)
    lane = torch.zeros_like(steps)
    if len(state.seen):
        same = (steps[:, None] == held[: len(state.seen)]) & state.seen & after.placement.valid[:, None]
        seen, lane = same.any(1), same.long().argmax(1)
    count = int(seen.any(1).nonzero().max()) + 1 if bool(seen.any()) else 0
    x, f = after.x[:count].clone(), after.x[:count, 0]
    if count:
        x[:, 0], f = of_lanes(state.x_seen[:, 0], lane[:count]), of_lanes(state.f_seen, lane[:count])
        first = (torch.arange(count)[:, None] < stays).to(x.device)[..., None]
        x[:, 1] = torch.where(first, of_lanes(state.x_seen[:, 1], lane[:count]), x[:, 1])
    return seen[:count], x, f


def _extrapolated(steps: Tensor, places: Tensor, known: Tensor, e: Tensor) -> Tensor:
    """Remainders at `steps` `(W, S)`, each on the line through the last two before it, shape `(W, S, D)`.

    Arguments:
        steps: Where.
        places: The steps of remainders that are known, the first of them from before the window, `(L + 1, S)`.
        known: How many of the others each sample has, `(S,)`.
        e: The remainders, `(L + 1, S, D)`.
    """
    lane = torch.arange(len(places))[:, None]
    last = ((places <= steps[:, None]) & (lane <= known)).sum(1).sub(1).clamp(min=min(1, len(places) - 1))
    first = (last - 1).clamp(min=0)
    one, two = places.gather(0, first), places.gather(0, last)
    # at the table's beginning there is nothing before the first
    ahead = torch.where(two > one, (steps - two) / (two - one).clamp(min=1), 0.0).to(e)[..., None]
    return torch.lerp(of_lanes(e, last), of_lanes(e, first), -ahead)


def of_lanes(values: Tensor, lanes: Tensor) -> Tensor:
    """Lanes `(W, S)` of values `(L, S, D)`, shape `(W, S, D)`."""
    return values.gather(0, lanes.to(values.device)[..., None].expand(-1, -1, values.shape[-1]))


@dataclass(frozen=True, eq=False)
class _Remainders:
    """A fill by remainders `(W, S, D)`, and $L$, `(W, S, 1)`, of a window's lanes."""

    e: Tensor
    gain: Tensor

    def model(self, rows: Rows, noise: Tensor | None, newest: Tensor | None) -> tuple[Tensor, Tensor]:
        last = slice(len(self.e) - len(rows.A), None)  # the lanes that enter are a window's last ones
        offset = rows.B * self.e[last].unsqueeze(1)
        return rows.jacobian(self.gain[last]), offset if rows.C is None or noise is None else offset + mix(rows.C, noise)


def _merger(state: State) -> Merger:
    if not isinstance(state, Merger):
        raise TypeError(f"`state` is a {type(state).__name__}: give one that this solver's `init` made")
    return state
