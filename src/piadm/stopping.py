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

Where the window has reached the table's end no step waits for a lane, and errors that are kept make the run longer. There what
is accepted may take the estimate only part of the way from $E^2$ to the right side: the cube of how far $m$ is on the way from
the first step of the window to the last one of all, but at least `ENDING`.

An estimate, calibrated on the embedded networks, not a bound: near the boundary between two modes or points of the data an
error of any size may choose the other one.

The device measures norms and products, a few numbers for each step; what is made of them is made on the host, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from piadm.certificate import information
from piadm.placement import Mask, Numbers, Placement
from piadm.propagators import Pair
from piadm.tables import Rows, Table, mix

SAFETY = 32.0
"""Kept every promise on the embedded networks, and 96 % on exact denoisers of 100 narrow modes, whose samples near a boundary
no constant saves: of all samples it kept 96.5 %, four times less 91 % (docs/benchmarks.md)."""

CAUTION = 8.0
"""What estimated defects are multiplied by in the certificate, where no sample's own promise is at stake. In runs accepted with
a `SAFETY` of 8 it kept the estimate above what an audit measured in 48 of 48 on `digits`, in 46 of 48 on a mixture."""


ENDING = 0.04
"""With all of the way instead, `digits` took 48 rounds where it takes 42, with 2 % fewer evaluations, at one final error (100
steps at once, six runs); where lanes are waited for, a part of it was no better (docs/benchmarks.md)."""


def mean_variance(variance: float | Tensor) -> float:
    """The data's per coordinate, given that of each or of all; times their number it is the trace of the covariance."""
    return float(_believable(variance).mean())


def _believable(variance: float | Tensor) -> Tensor:
    """As a tensor; a variance of 0 throughout, which would call every error nothing, is taken for 1."""
    v = torch.as_tensor(variance, dtype=torch.float64, device="cpu")
    return v if bool((v > 0).any()) else torch.ones_like(v)


@dataclass(frozen=True, eq=False)
class Changes:
    """What a round changed, and how steps and network answered to the change between their last two evaluations.

    Attributes:
        size: $‖d_m‖$, shape `(W, S)`.
        model: $J - A$ averaged over coordinates, shape `(W, k, k, S|1)`.
        scatter: What that leaves out, rms over coordinates, shape `(W, S|1)`.
        seen: Whether there are two evaluations, in the first lanes, shape `(L, S)`.
        gram: `Pair.gram` there, shape `(L, k + 1, k + 1, S)`.
        wrong: $‖ΔΦ - J Δx‖$ there, shape `(L, S)`.
    """

    size: Numbers
    model: Numbers
    scatter: Numbers
    seen: Mask
    gram: Numbers
    wrong: Numbers

    @classmethod
    def of(cls, rows: Rows, jacobian: Tensor, change: Tensor, pair: Pair | None) -> Changes:
        """Measures, given $J$ as `(W, k, k, S|1, D|1)` and $d$ of all but the first lane, as `(W - 1, k, S, D)`."""
        k, samples = change.shape[1:3]
        size = np.zeros((len(change) + 1, samples))
        size[1:] = on_host(norm(change))
        model = jacobian - rows.A
        mean = model[..., 0] if model.shape[-1] == 1 else model.mean(-1)
        scatter = np.zeros((len(mean), 1))
        if model.shape[-1] > 1:
            scatter = on_host(torch.linalg.vector_norm(model - mean.unsqueeze(-1), dim=(1, 2, 4))) / math.sqrt(model.shape[-1])
        if pair is None:
            none = np.ones((0, samples))
            return cls(size, on_host(mean), scatter, none > 0, np.ones((0, k + 1, k + 1, samples)), none)
        again, gram = len(pair.step), on_host(pair.gram).transpose(0, 2, 3, 1)
        # not from the products, whose rounding is far above what is left of them where the model is good
        wrong = mix(model[:again], pair.step).sub_(rows.B[:again] * pair.df.unsqueeze(1))
        return cls(size, on_host(mean), scatter, pair.seen.numpy(), gram, on_host(norm(wrong)))


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
    def _information(self) -> Numbers:
        """$1/(2 C_m^2)$ by step, 0 where the certificate says nothing; shape `(M,)`."""
        known = information(self.table)
        return np.zeros(len(self.table)) if known is None else known.numpy()

    @cached_property
    def _share(self) -> Numbers:
        """$(m + 1)/M$, shape `(M,)`."""
        return self.table.share.numpy()

    @cached_property
    def _weights(self) -> Numbers:
        """$w_m$, what an error of $x_{m+1}$ is worth in the final sample, rms over coordinates; shape `(M,)`."""
        v = _believable(self.variance).reshape(1, -1)
        spread = self.table.alpha[1:, None] ** 2 * v + self.table.sigma[1:, None] ** 2
        return (spread[-1] / spread).mean(1).sqrt().numpy()

    @cached_property
    def _allowance(self) -> Numbers:
        """What the steps up to each may cost the samples, shape `(M,)`."""
        return self.tolerance * np.sqrt(self._share)

    @cached_property
    def _levels(self) -> tuple[Numbers, Numbers, Numbers]:
        """$α$ and $σ^2$ of the states evaluated, shape `(M,)`, and $B_m$, shape `(M, k)`."""
        return self.table.alpha[:-1].numpy(), self.table.sigma[:-1].square().numpy(), self.table.B.numpy()

    @cached_property
    def _mean_variance(self) -> float:
        return mean_variance(self.variance)

    def defects(self, changes: Changes, placed: Placement, past: Numbers, size: float) -> tuple[Numbers, Numbers]:
        """$ρ_m ‖d_m‖$, shape `(W, S)`, and the variance at the window's last step, shape `(S,)`.

        The arguments are those of `_variance_along`.
        """
        with np.errstate(all="ignore"):
            variance = self._variance_along(changes, placed, past, size)
            # a model that overflowed says nothing against a state that did not change
            moved = np.where(changes.size == 0, 0.0, self._misfit(changes, placed, variance, size) * changes.size)
        return moved, variance[-1]

    def _variance_along(self, changes: Changes, placed: Placement, past: Numbers, size: float) -> Numbers:
        r"""$v$ with $α v / (α^2 v + σ^2) = ‖Δf‖ / ‖Δx‖$ at the last step evaluated twice up to each, shape `(W, S)`.

        Up to each, so that no step is judged by noise drawn after it, which the certificate forbids.

        Arguments:
            changes: What the round did.
            placed: Where its lanes are.
            past: The value at the last step of the round before, `(S,)`: for steps that the window had not reached then.
            size: $D$; times the mean variance it stands in where two evaluations at one state tell nothing.
        """
        seen = changes.seen
        alpha, noise = (placed.of_step(values)[: len(seen)] for values in self._levels[:2])
        gain = np.sqrt(changes.gram[:, -1, -1] / changes.gram[:, 0, 0])
        # a gain of 1/α or more is that of a boundless variance
        variance = gain * noise / (alpha * np.maximum(1 - alpha * gain, 1e-3))
        told = seen & (variance > 0) & (variance < np.inf)
        out = np.empty_like(changes.size)
        out[: len(seen)] = np.where(told, variance, np.where(seen, self._mean_variance * size, past))
        out[len(seen) :] = past
        last = np.zeros(out.shape, np.int64)
        last[: len(seen)] = told * np.arange(1, len(seen) + 1)[:, None]
        last = np.maximum.accumulate(last)
        return np.where(last > 0, out[np.maximum(last - 1, 0), np.arange(out.shape[1])], out)

    def _misfit(self, changes: Changes, placed: Placement, variance: Numbers, size: float) -> Numbers:
        """$ρ_m$, the error of $J_m$ for each unit of change, shape `(W, S)`.

        `variance`: that of the Gaussian model; `size`: $D$.
        """
        gram = changes.gram
        alpha, noise, B = (placed.of_step(values) for values in self._levels)
        scaled, again = alpha * variance, len(gram)
        network = B * (scaled / (alpha * scaled + noise))[:, None]
        off = changes.model + np.zeros(network.shape[-1])
        off[:, :, 0] -= network
        unseen: Numbers = np.sqrt((off * off).sum((1, 2)) + changes.scatter**2) + np.sqrt((network * network).sum(1))
        moved = sum(gram[:, i, i] for i in range(B.shape[1]))
        seen = changes.wrong / np.sqrt(moved) + unseen[:again] / size
        unseen[:again] = np.where(changes.seen & (moved > 0), seen, unseen[:again])
        return unseen

    def spent(self, past: Numbers, placed: Placement, defect: Numbers, numbers: int, safety: float, caution: float) -> Numbers:
        r"""What steps cost, before and after each one of the window, `(3, W + 1, S)`, given their defects' norms, `(W, S)`.

        The final sample, $E$; the certificate, $\sum_m ‖δ_m‖^2 / (2 C_m^2)$; and the part of $E$ that it leaves out. Estimated
        defects are multiplied by `safety` for the samples' error, by `caution` for the law's. `past`: before the window,
        `(3, S)`; `numbers`: $k D$.
        """
        known, weights = placed.of_step(self._information), placed.of_step(self._weights)
        out = np.empty((3, len(defect) + 1, defect.shape[1]))
        out[:, 0] = past
        with np.errstate(all="ignore"):
            cost = safety / math.sqrt(numbers) * (weights * defect)
            out[0, 1:] = cost
            out[1, 1:] = np.where(known > 0, known * np.square(caution * defect), 0.0)
            out[2, 1:] = np.where(known > 0, 0.0, cost)
            sums = out[:, 1:].cumsum(1)
            np.hypot(sums[::2], past[::2, None], out=out[::2, 1:])
            np.add(sums[1], past[1], out=out[1, 1:])
        return out

    def accepted(self, error: Numbers, placed: Placement, ending: Mask) -> Tensor:
        """How many steps of each sample are finished, for $E$ before and after each, `(W + 1, S)`; NaN accepts nothing.

        `ending`: whose windows reached the table's end, `(S,)`, before any was cut for what later noise brought about.
        """
        before, after, allowed = error[0], error[1:], placed.of_step(self._allowance)
        left = len(self.table) - np.array(placed.starts)
        far = np.arange(1, len(after) + 1)[:, None] / np.maximum(left, 1)
        part = np.where(ending, np.maximum(far**3, ENDING), 1.0)
        with np.errstate(all="ignore"):
            within = after * after <= before * before + part * (allowed * allowed - before * before)
        within[0] = True
        return torch.from_numpy(np.logical_and.accumulate(within).sum(0))

    def kept(self, nats: Numbers, placed: Placement, defect: Numbers, seen: Mask, target: float) -> Tensor:
        """How many states of each sample stay as they are because their measured defects are within the target, `(S,)`.

        `nats`: what was spent of it before the window, `(S,)`; `defect`: norms, `(W, S)`.
        """
        known = placed.of_step(self._information)
        with np.errstate(all="ignore"):
            total = nats + (known * np.square(defect)).cumsum(0)
        within = (total <= target * placed.of_step(self._share)) & (known > 0)
        # the state after a step not swept yet may lack that step's noise: its defect looks at what is not drawn yet
        return torch.from_numpy(np.logical_and.accumulate(within[: len(seen)] & seen).sum(0))


def norm(values: Tensor) -> Tensor:
    """Over components and coordinates of `(W, k, S, D)`, shape `(W, S)`."""
    size: Tensor = torch.linalg.vector_norm(values, dim=(1, 3))
    return size


def rms(values: Tensor) -> Tensor:
    """Root mean square over components and coordinates of `(W, k, S, D)`, shape `(W, S)`."""
    return norm(values) / math.sqrt(values.shape[1] * values.shape[3])


def on_host(values: Tensor) -> Numbers:
    """As an array of float64."""
    array: Numbers = values.cpu().double().numpy()
    return array
