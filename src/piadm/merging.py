r"""Merged steps: several steps of a table that share one evaluation of the network.

Where the network has little new to say from one step to the next, evaluating it at each is a waste: a scheme of 1000 steps is
mostly such steps. With the denoiser modelled as $f(x) = e + L_m x$, $L$ that of Gaussian data, a step is
$x_{m+1} = J_m x_m + B_m e + C_m ξ_m$, $J_m = A_m + B_m L_m$, and only the *remainder* $e_m = f(x_m, t_m) - L_m x_m$ has to be
known along the way. From one *anchor* $a$ to the next, $b$, it is extrapolated on a line through its last two values,

$$ \hat e_m = e_a + \frac{m - a}{a - a'} (e_a - e_{a'}), \qquad a \le m < b, $$

$a'$ being the anchor before. The steps between are then one affine map, worked out once, with $P_m = J_{b-1} \cdots J_{m+1}$:

$$ x_b = P_{a-1} x_a + β e_a + γ (e_a - e_{a'}) + c\, ξ, \quad β = \sum_m P_m B_m, \; γ = \sum_m P_m B_m \frac{m-a}{a-a'}, \;
   c\, ξ = \sum_m P_m C_m ξ_m . $$

The noise $ξ \sim N(0, I)$ is made of that of the steps, so the result stays the sequential sample of the same seed. It is a
two-step exponential integrator on the anchors, as DPM-Solver++(2M) (arXiv 2211.01095) is, but of the *sequential scheme*, with
its noise, in place of the differential equation. As a table its states have two components, $x$ and a multiple of $e_{a'}$.

**What it costs** is seen one anchor later. Extrapolated to $a$ itself the remainder misses by
$p_a = e_a - e_{a'} - \frac{a - a'}{a' - a''} (e_{a'} - e_{a''})$, and the next merged step's $\hat e$ will miss by as much,
relative to its length. The miss grows from nothing along the way, so that it shifts $x_b$ by $\frac{5}{12} β ‖p‖$ where $e$ is
smooth, and by $0.54\, β ‖p‖$ where the noise makes it rough: `MISSED` stands for both. What that is worth in the final sample
is told by the data's variance $u$ along the miss (`Worth`), estimated by $⟨p, f - μ⟩^2 / ‖p‖^2$: early misses lie where data
vary most, and matter; late ones lie where data hardly vary, and are forgotten. Shifts are added with their directions, which
noise makes differ, and which are alike without it.

A merged step is held to its part of `SHARE` $τ^2$ by what the anchors before it missed, before its own noise is drawn. One that
is above it is cut into pieces.

**Where anchors are put first.** In $ℓ = \log(α^2 v / σ^2)$ they are $δ e^{κ |ℓ - ℓ_0|}$ apart, $κ$ = `SPREAD`, $ℓ_0$ =
`CENTRE`, and at most `WIDEST`: far from where samples are decided the network says less that is new. $δ$ follows from $τ$ by
what misses came to on the embedded networks and a mixture (docs/benchmarks.md); what they come to in a run decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from piadm.noise import NoiseSource
from piadm.placement import Indices, Numbers
from piadm.tables import Table, gaussian_gain

SHARE = 0.7
"""The part of $τ^2$ that merged steps may take."""

CENTRE, SPREAD, WIDEST = -1.0, 0.3, 1.0
"""$ℓ_0$, $κ$, and the most that two anchors may be apart in $ℓ$."""

GROWTH = 2
"""How many times its predecessor's length a merged step may have: a line through two values is not to be believed far on."""

ROUGH, SMOOTH = 0.65, 0.6
r"""To begin with, a merged step that is $d e^{κ |ℓ - ℓ_0|}$ wide in $ℓ$ is expected to cost `ROUGH` $\sqrt v\, d^{3/2}$ with
noise and `SMOOTH` $\sqrt v\, d^3$ without. The former is what `digits` and `fashion` came to, and a quarter: where anchors are
so far apart that some merged steps have to be cut, runs take longer than that saves."""

MISSED = 0.5
"""What an error that grows from nothing to $β ‖p‖$ comes to, in these units."""

AT_ONCE = 32
"""How many steps' noise is held at once to be mixed."""

WORTHWHILE = 0.7
"""Merging that leaves more than this part of the steps is not begun."""


@dataclass(frozen=True)
class Grid:
    """Where the network is evaluated.

    Arguments:
        anchors: The steps, rising from 0 to $M$, which ends the last merged step.
    """

    anchors: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.anchors) - 1

    def split(self, pieces: Mapping[int, int]) -> Grid:
        """With some merged steps cut into so many pieces, and those after them as far as they are too long for that."""
        found = list(self.anchors[:1])
        for row, last in enumerate(self.anchors[1:]):
            first, before = found[-1], found[-1] - found[-2] if row else last
            count = min(last - first, max(pieces.get(row, 1), -(-(last - first) // (GROWTH * before))))
            found += [first + (last - first) * piece // count for piece in range(1, count + 1)]
        return Grid(tuple(found))


def levels(table: Table, variance: float) -> list[float]:
    """$ℓ$ of every state, finite, shape `(M + 1,)`."""
    ratio = (table.alpha.square() * variance / table.sigma.square().clamp(min=1e-300)).clamp(1e-26, 1e26)
    found: list[float] = ratio.log().tolist()
    return found


def first_grid(table: Table, variance: float, tolerance: float) -> Grid | None:
    """The anchors to begin with; `None` where merging does not apply or does not pay.

    Arguments:
        table: Of one component and one block, the noise falling throughout; others have no anchors.
        variance: $v$.
        tolerance: $τ$.
    """
    known = levels(table, variance)
    falls = all(a <= b for a, b in pairwise(known))
    if table.components > 1 or len(table.blocks) > 2 or not falls:
        return None
    low, high = 1e-4, 4.0
    for _ in range(16):
        middle = math.sqrt(low * high)
        fits = expected(lay(known, middle), known, variance, table.stochastic) <= math.sqrt(SHARE) * tolerance
        low, high = (middle, high) if fits else (low, middle)
    grid = lay(known, low)
    return grid if len(grid) <= WORTHWHILE * len(table) else None


def expected(grid: Grid, levels: list[float], variance: float, stochastic: bool) -> float:
    """What the misses of a grid come to on data of variance $v$, rms."""
    total = 0.0
    for a, b in pairwise(grid.anchors):
        if b - a > 1:
            width = (levels[b] - levels[a]) * math.exp(-SPREAD * _far(levels[a], levels[b]))
            total += width**3 if stochastic else width**6
    return (ROUGH if stochastic else SMOOTH) * math.sqrt(variance * total)


def _far(first: float, last: float) -> float:
    """How far both of two levels are from `CENTRE`."""
    return min(abs(first - CENTRE), abs(last - CENTRE))


def lay(levels: list[float], pace: float) -> Grid:
    """Anchors $δ e^{κ |ℓ - ℓ_0|}$ apart in $ℓ$, for a pace of $δ$. Merging begins where there is a line to extrapolate."""
    end = len(levels) - 1
    found = list(range(min(3, end + 1)))
    while found[-1] < end:
        a = b = found[-1]
        longest = min(end, a + GROWTH * (a - found[-2]))
        b += 1
        while b < longest:
            if levels[b + 1] - levels[a] > min(WIDEST, pace * math.exp(SPREAD * _far(levels[a], levels[b + 1]))):
                break
            b += 1
        found.append(b)
    return Grid(tuple(found))


@dataclass(frozen=True, eq=False)
class MergedTable(Table):
    r"""The rows of merged steps, `R` of them, on states $(x, s_r e_{a'})$.

    Arguments:
        ends: Where each one ends, int64, shape `(R,)`.
        lengths: How many steps each one is, int64, shape `(R,)`.
        mixing: $P_m C_m / c$ of every step, shape `(M,)`.
        gain: $L$ at the anchors, shape `(R,)`.
        memory: $s_r$, shape `(R,)`.
        reach: $|β|$ of merged steps, 0 for single ones, shape `(R,)`.
        nats: Likewise what $\sum_m ‖δ_m‖^2 / (2 C_m^2)$ grows by for each $‖p‖^2$.
    """

    ends: Tensor = field(kw_only=True)
    lengths: Tensor = field(kw_only=True)
    mixing: Tensor = field(kw_only=True)
    gain: Tensor = field(kw_only=True)
    memory: Tensor = field(kw_only=True)
    reach: Tensor = field(kw_only=True)
    nats: Tensor = field(kw_only=True)

    @cached_property
    def grid(self) -> Grid:
        """Where they are."""
        return Grid((0, *self.ends.tolist()))

    @property
    def share(self) -> Tensor:
        return self.ends.double() / self.ends[-1]

    @property
    def noise_scale(self) -> Tensor:
        """$c$: that the second component has no noise of its own, being known before the step, takes nothing from it."""
        return self.C[:, 0, 0]


class Worth:
    r"""What an error of a state is worth in the final sample, by the data's variance $u$ along its direction.

    The probability flow of Gaussian data carries it by $w = \sqrt{(α_M^2 u + σ_M^2) / (α^2 u + σ^2)}$. Ancestral sampling
    forgets some of it and leaves $w ρ$, with $ρ = w α / α_M$ the correlation of the state with the final one; other schemes
    leave $w ρ^θ$.

    Arguments:
        table: The steps.
        variance: $v$, at which $θ$ is found.

    Attributes:
        forgets: $θ$: 1 for ancestral sampling, 0 for the probability flow.
    """

    def __init__(self, table: Table, variance: float) -> None:
        self._alpha, self._noise = table.alpha.numpy(), table.sigma.square().numpy()
        flow, correlation = (float(values[0]) for values in self._parts(np.zeros(1, int), np.array([variance])))
        gain = gaussian_gain(table.alpha[:-1], table.sigma[:-1], variance)
        carried = float((table.A[:, 0, 0] + table.B[:, 0] * gain).clamp(min=1e-12).log().sum())
        lost = min(math.log(max(correlation, 1e-300)), -1e-9)
        self.forgets = min(max((carried - math.log(flow)) / lost, 0.0), 1.0)

    def _parts(self, states: Indices, variance: Numbers) -> tuple[Numbers, Numbers]:
        """$w$ and $ρ$."""
        alpha, noise = self._alpha[states], self._noise[states]
        flow: Numbers = np.sqrt((self._alpha[-1] ** 2 * variance + self._noise[-1]) / (alpha**2 * variance + noise))
        correlation: Numbers = np.minimum(alpha / self._alpha[-1] * flow, 1.0)
        return flow, correlation

    def __call__(self, states: Indices, variance: Numbers) -> Numbers:
        """Of errors in states of the table, by number, along directions of some variance; both of one shape."""
        flow, correlation = self._parts(states, variance)
        out: Numbers = flow * correlation**self.forgets
        return out


def merge(table: Table, grid: Grid, variance: float) -> MergedTable:
    """The table of a grid's merged steps; `variance`: $v$."""
    gain = gaussian_gain(table.alpha[:-1], table.sigma[:-1], variance)
    A, B, C = table.A[:, 0, 0], table.B[:, 0], table.C[:, 0, 0]
    jacobian, b, c = (A + B * gain).tolist(), B.tolist(), C.tolist()
    mixing = [0.0] * len(table)
    rows: list[tuple[float, ...]] = []
    for row, (first, last) in enumerate(pairwise(grid.anchors)):
        before = first - grid.anchors[row - 1] if row else 0
        whole, beta, gamma, noise, nats = 1.0, 0.0, 0.0, 0.0, 0.0
        for m in reversed(range(first, last)):
            ahead = (m - first) / (last - first)
            beta += whole * b[m]
            gamma += whole * b[m] * (m - first) / before if before else 0.0
            mixing[m] = whole * c[m]
            noise += mixing[m] ** 2
            nats += ahead * b[m] ** 2 / (2 * c[m] ** 2) if c[m] > 0 else 0.0
            whole *= jacobian[m]
        noise = math.sqrt(noise)
        for m in range(first, last):
            mixing[m] = mixing[m] / noise if noise > 0 else 0.0
        rows.append((whole, beta, gamma, noise, nats))
    J, β, γ, scale, divergence = torch.tensor(rows, dtype=torch.float64).unbind(1)
    anchors = torch.tensor(grid.anchors)
    lengths, L = anchors.diff(), gain[anchors[:-1]]
    # what a state remembers is measured by what it does to the next one, so that an error of it counts as one of that
    memory = torch.where(γ != 0, γ, 1e-3 * β.abs().clamp(min=1e-6))
    passed = torch.cat([memory[1:], memory.new_zeros(1)])
    noise_in = torch.zeros(len(rows), 2, 2, dtype=torch.float64)
    noise_in[:, 0, 0] = scale
    return MergedTable(
        torch.stack([J - (β + γ) * L, -γ / memory, -passed * L, torch.zeros_like(L)], 1).reshape(-1, 2, 2),
        torch.stack([β + γ, passed], 1),
        noise_in,
        table.times[anchors[:-1]],
        table.alpha[anchors],
        table.sigma[anchors],
        table.scale,
        ends=anchors[1:],
        lengths=lengths,
        mixing=torch.tensor(mixing, dtype=torch.float64),
        gain=L,
        memory=memory,
        reach=torch.where(lengths == 1, 0.0, β.abs()),
        nats=torch.where(lengths == 1, 0.0, divergence),
    )


class MergedNoise:
    """What the steps' noise comes to in merged steps.

    Arguments:
        noise: $ξ_m$.
        table: The merged steps.
    """

    def __init__(self, noise: NoiseSource, table: MergedTable) -> None:
        self.device, self.dtype, self._noise = noise.device, noise.dtype, noise
        self._mixing = table.mixing.to(noise.device, noise.dtype)[:, None, None]
        self._ends, self._lengths = table.ends.tolist(), table.lengths.tolist()

    def __call__(self, first: int, last: int) -> Tensor:
        """Of the merged steps from `first` up to but excluding `last`, shape `(last - first, 2, S, D)`; the second is 0."""
        whole = None
        for rows, start, lengths in self._stretches(first, last):
            stop = start + sum(lengths)
            steps = self._noise(start, stop)[:, 0] * self._mixing[start:stop]
            mixed = torch.segment_reduce(steps, "sum", lengths=torch.tensor(lengths, device=self.device))
            whole = mixed.new_zeros(last - first, 2, *mixed.shape[1:]) if whole is None else whole
            whole[rows[0] - first : rows[1] - first, 0] += mixed
        return torch.empty(0) if whole is None else whole

    def _stretches(self, first: int, last: int) -> Iterator[tuple[tuple[int, int], int, list[int]]]:
        """Merged steps, or a piece of one, of at most `AT_ONCE` steps together: which, their first step, and their lengths."""
        start, row, lengths = self._ends[first] - self._lengths[first], first, list[int]()
        for one in range(first, last):
            left = self._lengths[one]
            while left > 0:
                length = min(left, AT_ONCE)
                if sum(lengths) + length > AT_ONCE:
                    yield (row, row + len(lengths)), start, lengths
                    start, row, lengths = start + sum(lengths), one, []
                lengths.append(length)
                left -= length
        yield (row, row + len(lengths)), start, lengths
