r"""When a step is finished: an estimate of what accepting it costs the final sample.

A round leaves the defect $δ_m = (J^*_m - J_m) d_m$ in step $m$, where $J^*$ is the network's own Jacobian along the change
$d_m$ that the round made. The next round would show it; the last two evaluations already tell its size,

$$ ‖δ_m‖ ≈ ρ_m ‖d_m‖, \qquad ρ_m = ‖ΔΦ_m - J_m Δx_m‖ / ‖Δx_m‖ , $$

and a step evaluated once takes $ρ_m = ‖J_m - G_m‖ + ‖G_m - A_m‖$, which holds a Gaussian model $G$ of the step to be wrong
by as much as the network contributes. A $D$-th of that is added where a step was evaluated twice, too: of the $D$ numbers of
its pair a secant fits one whatever the network is. The model's variance is the one that explains $‖Δf‖ / ‖Δx‖$ at the last step
evaluated twice, none later than the step it judges: the changes lie where the data varies most, so it is far above the mean
variance of correlated data such as images. Before there is such a step it is the greatest possible, the trace of the data's
covariance.

A defect is carried to the final sample in proportion to the spread of the states,
$w_m = \sqrt{α_M^2 v + σ_M^2} / \sqrt{α_{m+1}^2 v + σ_{m+1}^2}$, as the probability flow of Gaussian data carries it. (Ancestral
sampling forgets more; taking credit for that broke promises where the data has several modes.) The defects of one round add
up, those of different rounds are independent and add in quadrature: with $E$ the estimate for what was accepted before, the
steps up to $m$ are accepted while

$$ E^2 + \Big( \text{SAFETY} \sum_{j \le m} w_j ρ_j ‖d_j‖ \Big)^2 \le τ^2 \frac{m + 1}{M}. $$

An estimate, calibrated on the embedded networks, not a bound: near the boundary between two modes or points of the data an
error of any size may choose the other one.


The device measures norms, all else is done on the host: step after step, until one is not accepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from operator import mul

import torch
from torch import Tensor

from piadm.certificate import information
from piadm.propagators import Pair
from piadm.tables import Rows, Table

SAFETY = 32.0
"""Kept every promise on the embedded networks, and 95 % on exact denoisers of 100 narrow modes, whose samples near a boundary
no constant saves: four times less kept 90 % in a tenth fewer rounds (docs/benchmarks.md)."""

CAUTION = 8.0
"""What estimated defects are multiplied by in the certificate, where no sample's own promise is at stake. In runs accepted with
a `SAFETY` of 8 it kept the estimate above what an audit measured in 48 of 48 on `digits`, in 46 of 48 on a mixture."""

ByLane = list[list[float]]
"""Numbers of lanes and samples, `[lane][sample]`."""

Spent = tuple[float, float, float]
r"""What accepted steps are estimated to cost: the final sample $E$, the certificate $\sum_m ‖δ_m‖^2 / (2 C_m^2)$, and the part
of $E$ that the certificate leaves out."""


def mean_variance(variance: float | Tensor) -> float:
    """The data's per coordinate, given that of each or of all; times their number it is the trace of the covariance."""
    return float(_believable(variance).mean())


def _believable(variance: float | Tensor) -> Tensor:
    """As a tensor; a variance of 0 throughout, which would call every error nothing, is taken for 1."""
    v = torch.as_tensor(variance, dtype=torch.float64, device="cpu")
    return v if bool((v > 0).any()) else torch.ones_like(v)


class Account:
    """What a sample's steps cost, worked out as far as somebody asks.

    Arguments:
        past: Before the window.
        further: After each of its steps; by default nothing is added.
    """

    def __init__(self, past: Spent, further: Iterator[Spent] | None = None) -> None:
        self._after, self._further = [past], repeat(past) if further is None else further

    def after(self, steps: int) -> Spent:
        """What so many of the window's steps cost, and those before."""
        while len(self._after) <= steps:
            self._after.append(next(self._further))
        return self._after[steps]


@dataclass(frozen=True, eq=False)
class Changes:
    """What a round changed, and how steps and network answered to the change between their last two evaluations.

    Attributes:
        size: $‖d_m‖$, by lane and sample.
        model: $J - A$ averaged over coordinates, `[lane][row][column][sample]`, of one sample if it is the same in all.
        scatter: What that leaves out, rms over coordinates, by lane and sample; `None` where $J$ is the same in all.
        seen: Whether there are two evaluations, in the first lanes.
        gram: `Pair.gram` there.
    """

    size: ByLane
    model: list[list[list[list[float]]]]
    scatter: ByLane | None
    seen: list[list[bool]]
    gram: list[list[list[list[float]]]]

    @classmethod
    def of(cls, rows: Rows, jacobian: Tensor, change: Tensor, pair: Pair | None) -> Changes:
        """Measures, given $J$ as `(W, k, k, S|1, D|1)` and $d$ of all but the first lane, as `(W - 1, k, S, D)`."""
        model, scatter = jacobian - rows.A, None
        mean = model[..., 0] if model.shape[-1] == 1 else model.mean(-1)
        if model.shape[-1] > 1:
            away = torch.linalg.vector_norm(model - mean.unsqueeze(-1), dim=(1, 2, 4))
            scatter = (away / math.sqrt(model.shape[-1])).tolist()
        seen, gram = ([], []) if pair is None else (pair.seen.tolist(), pair.gram.tolist())
        size = [[0.0] * change.shape[2], *norm(change).tolist()]
        return cls(size, mean.tolist(), scatter, seen, gram)

    def misfit(self, lane: int, sample: int, reach: list[float], gain: float, size: float) -> float:
        r"""$ρ_m$, given the step's $B_m$, a Gaussian model's gain and $D$."""
        entries = self.model[lane]
        own = sample if len(entries[0][0]) > 1 else 0
        scatter = 0.0 if self.scatter is None else self.scatter[lane][own]
        gram = self.gram[lane][sample] if self.known(lane, sample) else None
        away, far, wrong, moved = scatter * scatter, 0.0, 0.0, 0.0
        for i, b in enumerate(reach):
            row, network = [entry[own] for entry in entries[i]], gain * b
            far += network * network
            away += (row[0] - network) * (row[0] - network)
            for one in row[1:]:
                away += one * one
            if gram is not None:
                error = (*row, -b)
                moved += gram[i][i]
                for one, line in zip(error, gram, strict=True):
                    wrong += one * sum(map(mul, error, line))
        unseen = math.sqrt(away) + math.sqrt(far)
        return math.sqrt(max(wrong, 0.0) / moved) + scatter + unseen / size if moved > 0 else unseen

    def known(self, lane: int, sample: int) -> bool:
        """Whether a lane has two evaluations."""
        return lane < len(self.seen) and self.seen[lane][sample]


@dataclass(frozen=True, eq=False)
class Rule:
    """The stopping rule for a table.

    Arguments:
        table: The steps.
        variance: The data's per coordinate, a number or of one sample's size.
        tolerance: $τ$.
    """

    table: Table
    variance: float | Tensor
    tolerance: float

    @cached_property
    def _weights(self) -> list[float]:
        """$w_m$, what an error of $x_{m+1}$ is worth in the final sample, rms over coordinates."""
        v = _believable(self.variance).reshape(1, -1)
        spread = self.table.alpha[1:, None] ** 2 * v + self.table.sigma[1:, None] ** 2
        weights: list[float] = (spread[-1] / spread).mean(1).sqrt().tolist()
        return weights

    @cached_property
    def _information(self) -> list[float]:
        """$1/(2 C_m^2)$ by step, 0 where the certificate says nothing."""
        known = information(self.table)
        return [0.0] * len(self.table) if known is None else known.tolist()

    @cached_property
    def _levels(self) -> tuple[list[float], list[float], list[list[float]]]:
        """$α$ and $σ$ of the states evaluated, and $B_m$."""
        return self.table.alpha.tolist(), self.table.sigma.tolist(), self.table.B.tolist()

    @cached_property
    def _mean_variance(self) -> float:
        return mean_variance(self.variance)

    def accepted(self, account: Account, first: int, count: int) -> int:
        """How many of a sample's `count` steps from `first` on are finished; an estimate that is NaN accepts nothing."""
        accepted = min(count, 1)
        while accepted < count:
            error = account.after(accepted + 1)[0]
            if not error <= self.tolerance * math.sqrt((first + accepted + 1) / len(self.table)):
                break
            accepted += 1
        return accepted

    def within(self, step: int, nats: float, target: float) -> bool:
        """Whether the steps up to one, whose divergence is `nats`, are within their share of the `target`."""
        return nats <= target * (step + 1) / len(self.table) and self._information[step] > 0

    def nats(self, step: int, defect: float) -> float:
        """What a defect of a norm adds to the divergence."""
        return self._information[step] * defect * defect

    def spending(
        self, past: Spent, first: int, defects: Iterable[float], numbers: int, safety: float, caution: float
    ) -> Iterator[Spent]:
        """What a sample's steps cost, after each one from `first` on, given their defects' norms.

        Estimated defects are multiplied by `safety` for the sample's error, by `caution` for the law's. `numbers`: $k D$.
        """
        error = nats = drift = 0.0
        for step, defect in enumerate(defects, first):
            cost = safety * self._weights[step] * defect / math.sqrt(numbers)
            error += cost
            if self._information[step] > 0:
                nats += self.nats(step, caution * defect)
            else:
                drift += cost
            yield math.hypot(past[0], error), past[1] + nats, math.hypot(past[2], drift)

    def defects(self, changes: Changes, sample: int, first: int, past: float, size: float) -> Iterator[float]:
        r"""$ρ_m ‖d_m‖$ of a sample's steps from `first` on, to be found in the lanes from 0 on.

        Arguments:
            changes: What the round did.
            sample: Which one.
            first: Its first step.
            past: The variance at the last step of the round before, for steps that the window had not reached then.
            size: $D$.
        """
        alphas, sigmas, reaches = self._levels
        found = math.nan
        for lane, moved in enumerate(changes.size):
            # up to each step, so that none is judged by noise drawn after it, which the certificate forbids
            told = self._explained(changes, lane, sample, first + lane)
            found = found if math.isnan(told) else told
            variance = found
            if math.isnan(found):
                variance = self._mean_variance * size if changes.known(lane, sample) else past
            alpha, sigma = alphas[first + lane], sigmas[first + lane]
            gain = alpha * variance / (alpha * alpha * variance + sigma * sigma)
            # a model that overflowed says nothing against a state that did not change
            still = moved[sample] == 0
            yield 0.0 if still else changes.misfit(lane, sample, reaches[first + lane], gain, size) * moved[sample]

    def last_variance(self, changes: Changes, sample: int, first: int, count: int, past: float, size: float) -> float:
        """The variance at the last of `count` steps, as `defects` has it."""
        for lane in reversed(range(count)):
            told = self._explained(changes, lane, sample, first + lane)
            if not math.isnan(told):
                return told
        return self._mean_variance * size if count > 0 and changes.known(count - 1, sample) else past

    def _explained(self, changes: Changes, lane: int, sample: int, step: int) -> float:
        r"""$v$ with $α v / (α^2 v + σ^2) = ‖Δf‖ / ‖Δx‖$ in a lane evaluated twice; NaN where that tells nothing."""
        if not changes.known(lane, sample):
            return math.nan
        gram, alpha, sigma = changes.gram[lane][sample], self._levels[0][step], self._levels[1][step]
        if not (gram[0][0] > 0 and alpha > 0):
            return math.nan
        gain = math.sqrt(gram[-1][-1] / gram[0][0])
        # a gain of 1/α or more is that of a boundless variance
        variance = gain * sigma * sigma / (alpha * max(1 - alpha * gain, 1e-3))
        return variance if 0 < variance < math.inf else math.nan


def norm(values: Tensor) -> Tensor:
    """Over components and coordinates of `(W, k, S, D)`, shape `(W, S)`."""
    size: Tensor = torch.linalg.vector_norm(values, dim=(1, 3))
    return size


def rms(values: Tensor) -> Tensor:
    """Root mean square over components and coordinates of `(W, k, S, D)`, shape `(W, S)`."""
    return norm(values) / math.sqrt(values.shape[1] * values.shape[3])
