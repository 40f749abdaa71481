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
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from piadm.propagators import Pair
from piadm.tables import Rows, Table, mix

SAFETY = 32.0
"""Kept every promise on the embedded networks, and 95 % on exact denoisers of 100 narrow modes, whose samples near a boundary
no constant saves: four times less kept 90 % in a tenth fewer rounds (docs/benchmarks.md)."""

CAUTION = 8.0
"""What estimated defects are multiplied by in the certificate, where no sample's own promise is at stake. In runs accepted with
a `SAFETY` of 8 it kept the estimate above what an audit measured in 48 of 48 on `digits`, in 46 of 48 on a mixture."""


def sensitivity(table: Table, variance: float | Tensor) -> Tensor:
    """$w_m$, what an error of $x_{m+1}$ is worth in the final sample, rms over coordinates; float64, shape `(M,)`."""
    v = _believable(variance).reshape(1, -1)
    spread = table.alpha[1:, None] ** 2 * v + table.sigma[1:, None] ** 2
    return (spread[-1] / spread).mean(1).sqrt()


def mean_variance(variance: float | Tensor) -> float:
    """The data's per coordinate, given that of each or of all; times their number it is the trace of the covariance."""
    return float(_believable(variance).mean())


def _believable(variance: float | Tensor) -> Tensor:
    """As a tensor; a variance of 0 throughout, which would call every error nothing, is taken for 1."""
    v = torch.as_tensor(variance, dtype=torch.float64, device="cpu")
    return v if bool((v > 0).any()) else torch.ones_like(v)


def apparent_variance(rows: Rows, pair: Pair, past: Tensor, total: float) -> Tensor:
    r"""$v$ with $α v / (α^2 v + σ^2) = ‖Δf‖ / ‖Δx‖$ at the last step evaluated twice up to each, shape `(W, S)`.

    Up to each, so that no step is judged by noise drawn after it, which the certificate forbids.

    Arguments:
        rows: The window's rows.
        pair: The last two evaluations.
        past: The value at the last step of the round before, shape `(S,)`: for steps that the window had not reached then.
        total: The trace of the data's covariance: for steps that it had, where two evaluations at one state tell nothing.
    """
    alpha, sigma = rows.alpha[..., 0], rows.sigma[..., 0]
    gain = torch.linalg.vector_norm(pair.df, dim=-1) / pair.divisor
    # a gain of 1/α or more is that of a boundless variance
    variance = gain * sigma.square() / (alpha * (1 - alpha * gain).clamp(min=1e-3))
    lane = torch.arange(1, len(gain) + 1, device=gain.device)[:, None]
    last = (pair.known & (variance > 0) & (variance < torch.inf)).mul(lane).cummax(0).values
    return torch.where(last > 0, variance.gather(0, (last - 1).clamp(min=0)), torch.where(pair.seen, total, past))


def misfit(rows: Rows, jacobian: Tensor, variance: Tensor, pair: Pair | None, step: Tensor, size: float) -> Tensor:
    r"""$ρ_m$: the error of $J_m$ for each unit of change, shape `(W, S)`.

    Arguments:
        rows: The window's rows.
        jacobian: $J_m$, shape `(W, k, k, S|1, D|1)`.
        variance: That of the Gaussian model, shape `(W, S)` or `(1, S)`.
        pair: The last two evaluations.
        step: The change $Δx_m$ between them, shape `(W, k, S, D)`.
        size: $D$.
    """
    gaussian = rows.jacobian(rows.gaussian_gain(variance[..., None]))
    unseen = _norm(jacobian - gaussian) + _norm(gaussian - rows.A)
    if pair is None:
        return unseen
    length = rms(step)
    known = pair.seen & (length > 0)
    wrong = rms(mix(rows.A - jacobian, step) + rows.B * pair.df.unsqueeze(1))
    return torch.where(known, wrong / torch.where(known, length, 1.0) + unseen / size, unseen)


def rms(values: Tensor) -> Tensor:
    """Root mean square over components and coordinates of `(W, k, S, D)`, shape `(W, S)`."""
    norm: Tensor = torch.linalg.vector_norm(values, dim=(1, 3))
    return norm / math.sqrt(values.shape[1] * values.shape[3])


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius norm of $k×k$ matrices `(W, k, k, S|1, D|1)`, rms over coordinates, shape `(W, S|1)`."""
    if matrix.shape[1] == matrix.shape[-1] == 1:
        return matrix[:, 0, 0, :, 0].abs()
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(1, 2, 4))
    return norm / math.sqrt(matrix.shape[-1])
