r"""A sequential sampler as data: one row per step,

$$ x_{m+1} = Φ_m(x_m), \qquad Φ_m(x) = A_m x + B_m f(x^{(0)}, t_m) + C_m ξ_m, $$

with $f(x, t) = \mathbb{E}[x_0 | x_t = x]$ the denoiser, $A_m, C_m$ of shape $k×k$ and $B_m$ of shape $k$. The network sees
component 0 of the state. One component serves DDPM, DDIM, Euler and the exponential schemes; two, position and velocity,
serve underdamped Langevin dynamics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from piadm.errors import require


def mix(matrix: Tensor, vector: Tensor) -> Tensor:
    """$k×k$ matrices `(…, k, k, S|1, D|1)` times vectors `(…, k, S, D)`."""
    if vector.shape[-3] == 1:
        return matrix.squeeze(-3) * vector
    return (matrix * vector.unsqueeze(-4)).sum(-3)


@dataclass(frozen=True, eq=False)
class Columns:
    r"""A whole table, cast and shaped to act on states, one entry for each step.

    `alpha` and `sigma` belong to the states evaluated; `growth` is the ratio of $\sqrt{α^2 + σ^2}$ after the step and before.
    """

    A: Tensor
    B: Tensor
    C: Tensor | None
    alpha: Tensor
    sigma: Tensor
    growth: Tensor

    def take(self, index: Tensor) -> Rows:
        """The steps `(W, S|1)`."""

        def pick(values: Tensor) -> Tensor:
            picked = values[..., 0, 0][index]  # (W, S, *entries)
            return picked.movedim(1, -1).unsqueeze(-1)

        return Rows(self, pick)

    def cut(self, first: int, last: int) -> Rows:
        """The steps from `first` up to but excluding `last`: views."""
        return Rows(self, lambda values: values[first:last])

    @cached_property
    def inverse(self) -> Tensor:
        """$1/α$."""
        return 1 / self.alpha

    @cached_property
    def _gains(self) -> dict[float, Tensor]:
        return {}

    def gaussian_gain(self, variance: float) -> Tensor:
        r"""$L = α v / (α^2 v + σ^2)$, worked out once for each $v$."""
        if variance not in self._gains:
            self._gains[variance] = gaussian_gain(self.alpha, self.sigma, variance)
        return self._gains[variance]


class Rows:
    """The arithmetic of some steps of a table, `W` of them, on states `(W, k, S, D)`.

    Arguments:
        columns: The table's.
        act: What takes these steps' entries from a column; one that nobody asks for is not touched.
    """

    def __init__(self, columns: Columns, act: Callable[[Tensor], Tensor]) -> None:
        self._columns, self._act = columns, act

    @cached_property
    def A(self) -> Tensor:
        """$A_m$, shape `(W, k, k, S|1, 1)`."""
        return self._act(self._columns.A)

    @cached_property
    def B(self) -> Tensor:
        """$B_m$, shape `(W, k, S|1, 1)`."""
        return self._act(self._columns.B)

    @cached_property
    def C(self) -> Tensor | None:
        """$C_m$, like $A_m$; `None` for a table without noise."""
        return None if self._columns.C is None else self._act(self._columns.C)

    @cached_property
    def alpha(self) -> Tensor:
        """$α$ of the states evaluated, shape `(W, S|1, 1)`."""
        return self._act(self._columns.alpha)

    @cached_property
    def inverse(self) -> Tensor:
        """$1/α$."""
        return self._act(self._columns.inverse)

    @cached_property
    def sigma(self) -> Tensor:
        """$σ$, like $α$."""
        return self._act(self._columns.sigma)

    @cached_property
    def growth(self) -> Tensor:
        r"""$\sqrt{α^2 + σ^2}$ after the step over that before, like $α$."""
        return self._act(self._columns.growth)

    def step(self, x: Tensor, f: Tensor, noise: Tensor | None) -> Tensor:
        """$Φ_m(x_m)$ for states `(W, k, S, D)`, denoiser outputs `(W, S, D)` and noise like the states."""
        out = mix(self.A, x).add_(self.B * f.unsqueeze(1))
        return out if self.C is None or noise is None else out.add_(mix(self.C, noise))

    def jacobian(self, gain: Tensor) -> Tensor:
        r"""$J_m = A_m + B_m L_m e_0^\top$ for a gain $L$ of shape `(W, S|1, D|1)`; shape `(W, k, k, S|1, D|1)`."""
        column = (self.B * gain.unsqueeze(1)).unsqueeze(2)
        if self.A.shape[1] == 1:
            return self.A + column
        rest = torch.zeros_like(column).expand(-1, -1, self.A.shape[1] - 1, -1, -1)
        return self.A + torch.cat([column, rest], dim=2)

    def gaussian_gain(self, variance: float | Tensor) -> Tensor:
        r"""$L = α v / (α^2 v + σ^2)$, $∂f/∂x$ for data $N(μ, v)$, for a number or a tensor `(1, S|1, D|1)`; `W` rows of it."""
        if isinstance(variance, Tensor):
            return gaussian_gain(self.alpha, self.sigma, variance)
        return self._act(self._columns.gaussian_gain(variance))


def gaussian_gain(alpha: Tensor, sigma: Tensor, variance: float | Tensor) -> Tensor:
    r"""$L = α v / (α^2 v + σ^2)$."""
    scaled = alpha * variance
    return scaled / (alpha * scaled + sigma.square())


@dataclass(frozen=True, eq=False)
class Table:
    r"""A scheme's rows, in float64.

    Arguments:
        A: $A_m$, shape `(M, k, k)`.
        B: $B_m$, shape `(M, k)`.
        C: $C_m$, shape `(M, k, k)`.
        times: The network's time at each step, shape `(M,)`, float64 or int64.
        alpha: $α$ of every state, the final one last, shape `(M + 1,)`.
        sigma: $σ$ of every state, likewise.
        scale: Standard deviation of the starting noise.
        blocks: Where blocks begin, and `M` at the end.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    times: Tensor
    alpha: Tensor
    sigma: Tensor
    scale: float = 1.0
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        steps = len(self.times)
        require(steps >= 1, "times", steps, "a table needs at least one step")
        k = self.A.shape[-1]
        shapes = {"A": (steps, k, k), "B": (steps, k), "C": (steps, k, k), "alpha": (steps + 1,), "sigma": (steps + 1,)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            require(tuple(value.shape) == shape, name, tuple(value.shape), f"expected shape {shape}")
            require(bool(value.isfinite().all()), name, value, "the coefficients of a table must be finite")
        if not self.blocks:
            object.__setattr__(self, "blocks", (0, steps))
        rising = all(a < b for a, b in zip(self.blocks, self.blocks[1:], strict=False))
        ends = self.blocks[0] == 0 and self.blocks[-1] == steps
        require(rising and ends, "blocks", self.blocks, f"boundaries must rise from 0 to {steps}")

    def __len__(self) -> int:
        return len(self.times)

    @property
    def components(self) -> int:
        """$k$."""
        return self.A.shape[-1]

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise."""
        return bool((self.C != 0).any())

    @property
    def share(self) -> Tensor:
        """How far each step is on the way, $(m + 1)/M$, shape `(M,)`."""
        return torch.arange(1, len(self) + 1) / torch.tensor(float(len(self)), dtype=torch.float64)

    @property
    def noise_scale(self) -> Tensor:
        """The smallest singular value of $C_m$, shape `(M,)`."""
        values: Tensor = torch.linalg.svdvals(self.C)
        return values[:, -1]

    def cast(self, device: torch.device, dtype: torch.dtype) -> Columns:
        """All rows on a device and in a dtype."""
        scale = (self.alpha**2 + self.sigma**2).sqrt()
        values = self.A, self.B, self.C, self.alpha[:-1], self.sigma[:-1], scale[1:] / scale[:-1]
        A, B, C, alpha, sigma, growth = (value.to(device, dtype)[..., None, None] for value in values)
        return Columns(A, B, C if self.stochastic else None, alpha, sigma, growth)
