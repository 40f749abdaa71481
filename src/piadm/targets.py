r"""Exact denoisers, for tests, studies and posteriors known in closed form.

For data $x_0 \sim \sum_i w_i N(μ_i, \mathrm{diag}(v_i))$ and $x_t = α x_0 + σ ε$,

$$ \mathbb{E}[x_0 | x_t = x] = \sum_i π_i(x) \Big( μ_i + \frac{α v_i}{α^2 v_i + σ^2} (x - α μ_i) \Big), \qquad
   π_i(x) \propto w_i N(x; α μ_i, α^2 v_i + σ^2). $$

The empirical distribution of a data set is the mixture at its points with $v_i = 0$.
"""

from __future__ import annotations

import torch
from torch import Tensor

from piadm.denoiser import require_moments
from piadm.errors import require
from piadm.schedules import OrnsteinUhlenbeck, Schedule

CHUNK = 2**23
"""Numbers that a mixture holds at once: 64 MiB in float64."""


class _Target:
    """What the exact denoisers share: they are denoisers that compute in float64 and live wherever `x` lives."""

    schedule: Schedule
    mean: float | Tensor
    variance: float | Tensor
    event_shape: tuple[int, ...] | None = None
    dtype = torch.float32
    device = None

    def check(self, times: Tensor) -> None:
        """Defined at every time."""

    def _levels(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """$α, σ^2$ of every row, shape `(B, 1)`, on `x`'s device."""
        t = t.to(x.device)
        return self.schedule.alpha(t).reshape(-1, 1), self.schedule.sigma(t).reshape(-1, 1) ** 2


def _require_schedule(schedule: Schedule | None) -> None:
    if not isinstance(schedule, Schedule | None):
        raise TypeError(f"`schedule` is a {type(schedule).__name__}: give one of piadm.schedules, such as OrnsteinUhlenbeck()")


class Gaussian(_Target):
    r"""Data $N(μ, \mathrm{diag}(v))$: $f(x, t) = μ + \frac{α v}{α^2 v + σ^2} (x - α μ)$.

    Arguments:
        mean: $μ$, a number or a tensor of one sample's shape.
        variance: $v \ge 0$, likewise.
        schedule: The noise schedule, the paper's by default.
    """

    def __init__(self, mean: float | Tensor = 0.0, variance: float | Tensor = 1.0, schedule: Schedule | None = None) -> None:
        require_moments(mean, variance)
        _require_schedule(schedule)
        self.mean, self.variance, self.schedule = mean, variance, schedule or OrnsteinUhlenbeck()

    def __repr__(self) -> str:
        def short(value: float | Tensor) -> str:
            return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else f"{value:g}"

        return f"Gaussian(mean={short(self.mean)}, variance={short(self.variance)}, {self.schedule!r})"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, noise = (level.reshape(-1, *[1] * (x.ndim - 1)) for level in self._levels(x, t))
        mean = torch.as_tensor(self.mean, dtype=torch.float64, device=x.device)
        variance = torch.as_tensor(self.variance, dtype=torch.float64, device=x.device)
        gain = alpha * variance / (alpha**2 * variance + noise)
        return (mean + gain * (x - alpha * mean)).to(x.dtype)


class GaussianMixture(_Target):
    r"""Data $\sum_i w_i N(μ_i, \mathrm{diag}(v_i))$, evaluated `CHUNK` numbers at a time.

    Arguments:
        means: $μ_i$, shape `(n, *event)`.
        variance: $v_i \ge 0$: a number, shape `(n,)` (isotropic components) or `(n, *event)`.
        weights: $w_i > 0$, shape `(n,)`; equal by default, normalised here.
        schedule: The noise schedule, the paper's by default.
    """

    def __init__(
        self,
        means: Tensor,
        variance: float | Tensor,
        weights: Tensor | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        if not isinstance(means, Tensor):
            raise TypeError(f"`means` is a {type(means).__name__}: give a tensor of shape (components, *event)")
        require(means.ndim >= 1 and len(means) >= 1, "means", tuple(means.shape), "give shape (components, *event)")
        require(bool(means.isfinite().all()), "means", means, "must be finite")
        _require_schedule(schedule)
        n = len(means)
        self.means = means.detach().double().reshape(n, -1)
        v = torch.as_tensor(variance, dtype=torch.float64, device=means.device)
        right = v.ndim == 0 or v.shape == (n,) or v.shape == means.shape
        require(right, "variance", tuple(v.shape), f"give a number, shape ({n},) or {tuple(means.shape)}")
        require(bool((v >= 0).all() and v.isfinite().all()), "variance", variance, "must be finite and ≥ 0")
        self.variances = v.expand(n)[:, None] if v.ndim < 2 else v.reshape(n, -1)
        w = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
        require(w.shape == (n,) and bool((w > 0).all() and w.isfinite().all()), "weights", weights, f"give {n} numbers above 0")
        self.log_weights = (w / w.sum()).log().to(means.device)
        self.schedule = schedule or OrnsteinUhlenbeck()
        share = self.log_weights.exp()[:, None]
        centre = (share * self.means).sum(0)
        self.event_shape = tuple(means.shape[1:])
        self.mean = centre.reshape(self.event_shape)
        # of the whole mixture, not of a component; one number: the scale that the Gaussian model needs, not a map of it
        self.variance = float((share * (self.variances + (self.means - centre) ** 2)).sum(0).mean())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.means)} components of {self.means.shape[1]} numbers, {self.schedule!r})"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, noise = self._levels(x, t)
        means, variances = self.means.to(x.device), self.variances.to(x.device)
        # an isotropic mixture needs inner products alone, so its chunks hold weights, not differences
        width = max(1, CHUNK // (means.numel() if variances.shape[1] > 1 else len(means)))
        evaluate = self._diagonal if variances.shape[1] > 1 else self._isotropic
        flat = x.reshape(len(x), -1).double()
        parts = zip(torch.split(flat, width), torch.split(alpha, width), torch.split(noise, width), strict=True)
        return torch.cat([evaluate(*part, means, variances) for part in parts]).reshape(x.shape).to(x.dtype)

    def _isotropic(self, x: Tensor, alpha: Tensor, noise: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        spread = alpha**2 * variances.T + noise  # (B, n)
        distance = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ means.T) + alpha**2 * means.square().sum(1)
        logits = self.log_weights.to(x.device) - distance / (2 * spread) - x.shape[1] / 2 * spread.log()
        responsibility = logits.softmax(1)
        gain = alpha * variances.T / spread
        return (responsibility * (1 - alpha * gain)) @ means + (responsibility * gain).sum(1, keepdim=True) * x

    def _diagonal(self, x: Tensor, alpha: Tensor, noise: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        alpha, noise = alpha[:, None], noise[:, None]  # (B, 1, 1)
        spread = alpha**2 * variances + noise  # (B, n, D)
        offset = x[:, None] - alpha * means
        logits = self.log_weights.to(x.device) - (offset**2 / spread + spread.log()).sum(-1) / 2
        centres = means + alpha * variances / spread * offset
        return (logits.softmax(1)[:, None] @ centres)[:, 0]


class Empirical(GaussianMixture):
    r"""The empirical distribution of a data set: the mixture at its points, $v_i = 0$.

    Its denoiser is what a network that fits its training set perfectly would compute.

    Arguments:
        data: Points, shape `(n, *event)`.
        schedule: The noise schedule, the paper's by default.
    """

    def __init__(self, data: Tensor, schedule: Schedule | None = None) -> None:
        super().__init__(data, 0.0, schedule=schedule)
