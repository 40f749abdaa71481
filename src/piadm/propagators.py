r"""Propagators: the linear model $J_m$ of a step with which a round carries corrections forward,

$$ x^{new}_{m+1} = Φ_m(x_m) + J_m (x^{new}_m - x_m). $$

It is the only thing in which the known parallel samplers differ, and it changes how many rounds a run takes, never the
fixed point, which is the sequential sample. With the denoiser modelled as $f(x^{new}) ≈ f(x) + L (x^{new} - x)$ it is
$J = A + B L$.

| propagator | choice | known as |
|---|---|---|
| `Jacobi` | $J = 0$ | Jacobi iteration |
| `Identity` | $J = I$ | ParaDiGMS (arXiv 2305.16317) |
| `Exponential` | $L = 1/α$: the score is constant | PIADM (arXiv 2405.15986) |
| `Gaussian` | $L = α v / (α^2 v + σ^2)$ | the exact Jacobian were the data $N(μ, v I)$ |
| `Secant` | $L = ⟨Δx, Δf⟩ / ⟨Δx, Δx⟩$ from the last two rounds | `Gaussian` until there are two |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from piadm.errors import require
from piadm.tables import Rows, Table


@dataclass(frozen=True, eq=False)
class Pair:
    """What two evaluations say of the denoiser in a window's first lanes.

    Attributes:
        step: $Δx$ between them, shape `(L, k, S, D)`; zero where there are no two.
        df: $Δf$, shape `(L, S, D)`.
        seen: Where there are two, shape `(L, S)`, on the CPU.
    """

    step: Tensor
    df: Tensor
    seen: Tensor

    @classmethod
    def between(cls, step: Tensor, df: Tensor, seen: Tensor) -> Pair:
        """Of differences that mean nothing where there are no two."""
        return cls(step if bool(seen.all()) else step * seen.to(step.device)[:, None, :, None], df, seen)

    @cached_property
    def gram(self) -> Tensor:
        """Products of the $k$ components of $Δx$ and, last, $Δf$ with one another, shape `(L, S, k + 1, k + 1)`."""
        vectors = torch.cat([self.step, self.df.unsqueeze(1)], dim=1).transpose(1, 2)
        return vectors @ vectors.transpose(2, 3)


class Propagator(Protocol):
    """A policy: a model, and a check that refuses tables for which the model is undefined."""

    def check(self, table: Table) -> None: ...

    def jacobian(self, rows: Rows, pair: Pair | None) -> Tensor:
        """$J$, shape `(W, k, k, S|1, D|1)`; `pair` is `None` in the first round."""


@dataclass(frozen=True)
class Jacobi:
    r"""$J = 0$: corrections are not carried at all. One further step is exact after each round."""

    def check(self, table: Table) -> None:
        """Defined for every table."""

    def jacobian(self, rows: Rows, pair: Pair | None) -> Tensor:
        return torch.zeros_like(rows.A)


@dataclass(frozen=True)
class Identity:
    r"""$J = I$: ParaDiGMS's prefix sum of drifts (Shih et al., arXiv 2305.16317, eq. 6)."""

    def check(self, table: Table) -> None:
        require(table.components == 1, "propagator", self, "is for schemes of one component; use Exponential() or Gaussian()")

    def jacobian(self, rows: Rows, pair: Pair | None) -> Tensor:
        return torch.ones_like(rows.A)


@dataclass(frozen=True)
class Exponential:
    r"""$L = 1/α$, which is $∂s/∂x = 0$: the linear part is integrated exactly, the score lags a round. PIADM as published.

    For `ExponentialSDE` and `ExponentialODE` this gives $J = e^{ε/2}$, for the corrector the Langevin step's $2×2$ flow.
    """

    def check(self, table: Table) -> None:
        ok = bool((table.alpha > 0).all())
        require(
            ok, "propagator", self, "needs α > 0 at every step (no score where nothing is left of the data); use Gaussian()"
        )

    def jacobian(self, rows: Rows, pair: Pair | None) -> Tensor:
        return rows.jacobian(rows.inverse)


@dataclass(frozen=True, eq=False)
class Gaussian:
    r"""$L = α v / (α^2 v + σ^2)$: the exact Jacobian of $f$ were the data $N(μ, \mathrm{diag}(v))$.

    Arguments:
        variance: $v \ge 0$, a number or a tensor of one sample's shape.
    """

    variance: float | Tensor = 1.0

    def __post_init__(self) -> None:
        v = torch.as_tensor(self.variance)
        require(bool((v >= 0).all() and v.isfinite().all()), "variance", self.variance, "must be finite and ≥ 0")

    def check(self, table: Table) -> None:
        """Defined for every table."""

    def gain(self, rows: Rows) -> Tensor:
        """$L$, shape `(W, S|1, D|1)`."""
        if not isinstance(self.variance, Tensor):
            return rows.gaussian_gain(float(self.variance))
        return rows.gaussian_gain(self.variance.to(rows.alpha).reshape(1, 1, -1))

    def jacobian(self, rows: Rows, pair: Pair | None) -> Tensor:
        return rows.jacobian(self.gain(rows))


@dataclass(frozen=True, eq=False)
class Secant:
    r"""$L = ⟨Δx, Δf⟩ / ⟨Δx, Δx⟩$ for every step and sample, from the change between its last two evaluations.

    It costs no network call. Until a step has been evaluated twice its gain is that of `Gaussian(variance)`. Estimates
    are kept between 0 and $1/α$: $∂f/∂x = α\,\mathrm{Cov}(x_0|x)/σ^2$ is positive semi-definite, and above $1/α$ the
    score's own derivative would be positive.

    Arguments:
        variance: The start's $v$, a number or a tensor of one sample's shape.
    """

    variance: float | Tensor = 1.0
    _start: Gaussian = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_start", Gaussian(self.variance))

    def check(self, table: Table) -> None:
        """Defined for every table."""

    def jacobian(self, rows: Rows, pair: Pair | None) -> Tensor:
        start = self._start.gain(rows)
        if pair is None:
            return rows.jacobian(start)
        square, product = pair.gram[..., 0, 0, None], pair.gram[..., 0, -1, None]
        again = len(square)
        # products of huge states overflow
        gain = (product / square).nan_to_num_().clamp_(min=0).minimum(rows.inverse[:again])
        gain = torch.where(square > 0, gain, start[:again])
        if again < len(start):
            gain = torch.cat([gain, start[again:].expand(-1, *gain.shape[1:])])
        return rows.jacobian(gain)
