r"""Noise schedules: how much of the data is left, $x_t = α_t x_0 + σ_t ε$ with $ε \sim N(0, I)$.

| class | $α_t$ | $σ_t$ | time the network sees |
|---|---|---|---|
| `OrnsteinUhlenbeck` | $e^{-t/2}$ | $\sqrt{1 - e^{-t}}$ | $t$, continuous |
| `DiscreteBetas` | $\sqrt{\prod_{i \le t} (1 - β_i)}$ | $\sqrt{1 - α_t^2}$ | the index $t = 0 … n-1$ |
| `VarianceExploding` | 1 | $t$ | $t = σ$ |
| `RectifiedFlow` | $1 - t/n$ | $t/n$ | $t$ |
| `Continuous` | a function of yours | a function of yours | $t \in [0, 1]$ |

All arithmetic is in float64. A time is always the network's own, so a schedule is also the answer to "which noise level does
my network mean by 250". `time(λ)` inverts the log signal-to-noise ratio $λ = \log(α/σ)$, which lets a scheme written for one
schedule run on a network trained with another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from piadm.errors import require, require_count, require_positive

Spacing = Literal["leading", "trailing", "linspace"]


def check_spacing(spacing: str) -> None:
    """Raises `ValueError` for a spacing that is not one of diffusers' `timestep_spacing`."""
    require(spacing in get_args(Spacing), "timestep_spacing", spacing, "give 'leading', 'trailing' or 'linspace'")


class Schedule(ABC):
    """A noise schedule. Times, $α$ and $σ$ are float64 tensors of one shape; discrete times may be int64."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal level $α_t$."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level $σ_t$."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        r"""The time at which $\log(α_t/σ_t)$ has the given value; raises `ValueError` outside the schedule's range."""

    @abstractmethod
    def grid(self, steps: int, spacing: str = "leading") -> Tensor:
        """`steps + 1` decreasing times from the noisiest to clean data; `spacing` matters for discrete times only."""

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Time derivatives $(\dot α_t, \dot σ_t)$."""
        raise ValueError(f"`schedule` is {self!r}, which has no time derivative: use DDIM in place of Euler")

    def start_scale(self, t: Tensor) -> float:
        """Standard deviation of the starting noise at time `t` (1 where $α^2 + σ^2 = 1$)."""
        return 1.0


@dataclass(frozen=True)
class OrnsteinUhlenbeck(Schedule):
    r"""$dx = -x/2\,dt + dw$: the forward process of the paper (arXiv 2405.15986, section 2.1).

    Arguments:
        horizon: Where `grid` starts; the schedule itself is defined for every $t \ge 0$.
    """

    horizon: float = 10.0

    def __post_init__(self) -> None:
        require_positive("horizon", self.horizon, "OrnsteinUhlenbeck(horizon=10.0)")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-t.double() / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-t.double()))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-2 * log_snr.double(), threshold=40)

    def grid(self, steps: int, spacing: str = "leading") -> Tensor:
        return torch.linspace(self.horizon, 0, steps + 1, dtype=torch.float64)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -self.alpha(t) / 2, torch.exp(-t.double()) / (2 * self.sigma(t))


@dataclass(frozen=True)
class Continuous(Schedule):
    r"""Any schedule on the times $[0, 1]$, noise at 1, given as a function $t \mapsto (α_t, σ_t)$: azula's schedules are such.

    Arguments:
        levels: Called with a float64 tensor, returns two of its shape; $α/σ$ must fall as $t$ rises, and both be positive
            but for $σ_0$ and $α_1$.
    """

    levels: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        t = torch.linspace(0, 1, 101, dtype=torch.float64)
        alpha, sigma = self.alpha(t), self.sigma(t)
        ratio = alpha / sigma  # infinite at clean data
        ok = alpha.shape == t.shape == sigma.shape and bool((alpha >= 0).all() and (sigma >= 0).all())
        require(
            ok and bool((ratio[1:] < ratio[:-1]).all()),
            "levels",
            self.levels,
            "give a function of times in [0, 1] that returns (α, σ) of their shape, α/σ falling as time rises",
        )

    def alpha(self, t: Tensor) -> Tensor:
        return self.levels(t.double())[0].double()

    def sigma(self, t: Tensor) -> Tensor:
        return self.levels(t.double())[1].double()

    def time(self, log_snr: Tensor) -> Tensor:
        wanted = log_snr.double()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):
            middle = (low + high) / 2
            noisier = (self.alpha(middle) / self.sigma(middle)).log() < wanted
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        outside = ((self.alpha(low) / self.sigma(low)).log() - wanted).abs() > 1e-6 * (1 + wanted.abs())
        if bool(outside.any()):
            raise ValueError(f"log(α/σ) {wanted[outside].flatten()[0].item():.3f} is outside this schedule's range")
        return low

    def grid(self, steps: int, spacing: str = "leading") -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            time = t.detach().double().requires_grad_()
            rates = [
                torch.autograd.grad(level.sum(), time, allow_unused=True)[0] for level in (self.alpha(time), self.sigma(time))
            ]
        zero = torch.zeros_like(time)
        alpha, sigma = (zero if rate is None else rate.detach() for rate in rates)
        return alpha, sigma

    def start_scale(self, t: Tensor) -> float:
        return float((self.alpha(t) ** 2 + self.sigma(t) ** 2).sqrt())


class DiscreteBetas(Schedule):
    r"""The discrete schedule of DDPM, $\barα_t = \prod_{i \le t} (1 - β_i)$, $α_t = \sqrt{\barα_t}$ (arXiv 2006.11239).

    Integer times are looked up; between them $\log(α/σ)$ is interpolated linearly. Time -1 is clean data.

    Arguments:
        betas: The $n$ variances $β_t$, each in (0, 1]; only the last may be 1 (zero terminal signal).
    """

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        self.betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().clone()
        ok = self.betas.ndim == 1 and len(self.betas) >= 1
        require(ok, "betas", tuple(self.betas.shape), "give a one-dimensional sequence, for example DiscreteBetas.linear(1000)")
        inside = bool(((self.betas > 0) & (self.betas <= 1)).all() and (self.betas[:-1] < 1).all())
        require(
            inside, "betas", betas, "every β must be in (0, 1), the last at most 1, so that the signal decreases monotonically"
        )
        self._alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - self.betas).cumprod(0)])
        self._log_snr = 0.5 * (self._alpha_bar[1:].log() - torch.log1p(-self._alpha_bar[1:]))

    def __repr__(self) -> str:
        return f"DiscreteBetas({len(self.betas)} steps, β from {self.betas[0]:.3g} to {self.betas[-1]:.3g})"

    @classmethod
    def linear(cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteBetas:
        """Linearly growing β, as in DDPM."""
        require_count("num_train_timesteps", num_train_timesteps, "DiscreteBetas.linear(1000)")
        return cls(torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> DiscreteBetas:
        """Linearly growing √β, as in latent diffusion (Stable Diffusion's numbers by default)."""
        require_count("num_train_timesteps", num_train_timesteps, "DiscreteBetas.scaled_linear(1000)")
        return cls(torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, max_beta: float = 0.999) -> DiscreteBetas:
        r"""$\barα \propto \cos^2(\frac{t/n + 0.008}{1.008} \frac{π}{2})$ (Nichol and Dhariwal, arXiv 2102.09672)."""
        require_count("num_train_timesteps", num_train_timesteps, "DiscreteBetas.cosine(1000)")
        t = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
        bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    def _between(self, t: Tensor) -> Tensor:
        """$λ$ at fractional times."""
        table = self._log_snr.to(t.device)
        t = t.double()
        low = t.floor().long().clamp(0, max(len(table) - 2, 0))
        high = (low + 1).clamp(max=len(table) - 1)
        # not `lerp`: next to a last step without signal its λ of -∞ would make NaN of the finite one too
        return torch.where(t > low, table[low] + (t - low) * (table[high] - table[low]), table[low])

    def alpha(self, t: Tensor) -> Tensor:
        if t.is_floating_point():
            return torch.sigmoid(2 * self._between(t)).sqrt()
        return self._alpha_bar.to(t.device)[t + 1].sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        if t.is_floating_point():
            return torch.sigmoid(-2 * self._between(t)).sqrt()
        return (1 - self._alpha_bar.to(t.device)[t + 1]).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        table = self._log_snr[self._log_snr.isfinite()].flip(0).to(log_snr.device)
        slack = 1e-9
        low, high = float(table[0]) - slack, float(table[-1]) + slack
        if len(table) < 2 or float(log_snr.min()) < low or float(log_snr.max()) > high:
            first, last = (math.log1p(math.exp(-2 * edge)) for edge in (high, low))
            raise ValueError(
                f"log(α/σ) from {float(log_snr.min()):.3f} to {float(log_snr.max()):.3f} is outside this schedule's "
                f"[{low:.3f}, {high:.3f}]: in the paper's time the network knows t from {first:.2g} to {last:.4g}; "
                "choose `early_stop` and `horizon` inside"
            )
        right = torch.searchsorted(table, log_snr.double()).clamp(1, len(table) - 1)
        weight = (log_snr - table[right - 1]) / (table[right] - table[right - 1])
        return (len(table) - 1 - (right - 1 + weight)).clamp(0, len(table) - 1)

    def grid(self, steps: int, spacing: str = "leading") -> Tensor:
        """`steps` integer times and a final -1, spaced as diffusers' `timestep_spacing` does."""
        n = len(self.betas)
        require(steps <= n, "steps", steps, f"the schedule has {n} steps; ask for at most that many")
        check_spacing(spacing)
        if spacing == "leading":
            times = (torch.arange(steps) * (n // steps)).flip(0)
        elif spacing == "trailing":
            stride = (n - n / steps) - n  # ties are rounded as numpy's arange makes them
            times = (n + torch.arange(steps, dtype=torch.float64) * stride).round().long() - 1
        else:
            stride = (n - 1) / max(steps - 1, 1)  # ties as numpy's linspace makes them, which torch's does not
            times = (torch.arange(steps, dtype=torch.float64) * stride).round().long().flip(0)
        return torch.cat([times, times.new_tensor([-1])])


@dataclass(frozen=True)
class VarianceExploding(Schedule):
    r"""$x_t = x_0 + t ε$, on the grid $σ_i = (σ_{max}^{1/ρ} + \frac{i}{n-1} (σ_{min}^{1/ρ} - σ_{max}^{1/ρ}))^ρ$.

    References:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022 (arXiv 2206.00364), eq. 5.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "rho"):
            require_positive(name, getattr(self, name), f"VarianceExploding({name}=1.0)")
        require(self.sigma_min < self.sigma_max, "sigma_min", self.sigma_min, f"must be below sigma_max={self.sigma_max}")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr.double())

    def grid(self, steps: int, spacing: str = "leading") -> Tensor:
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        times = torch.linspace(*ends, steps, dtype=torch.float64) ** self.rho
        return torch.cat([times, times.new_zeros(1)])

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)

    def start_scale(self, t: Tensor) -> float:
        return float(t)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    r"""$x_t = (1 - s) x_0 + s ε$, $s = t/n$ (Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747).

    Arguments:
        num_train_timesteps: $n$, the network's time at pure noise: 1000 in diffusers. With `None` the network sees
            $t \in [0, 1]$ and the grid is uniform; with a number it is that of diffusers' FlowMatchEulerDiscreteScheduler.
        shift: The grid's $s$ becomes `shift` $s / (1 + ($`shift`$ - 1) s)$ (arXiv 2403.03206, eq. 23).
    """

    num_train_timesteps: int | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_train_timesteps is not None:
            require_count("num_train_timesteps", self.num_train_timesteps, "RectifiedFlow(num_train_timesteps=1000)")
        require_positive("shift", self.shift, "RectifiedFlow(shift=3.0)")

    @property
    def _n(self) -> int:
        return self.num_train_timesteps or 1

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double() / self._n

    def sigma(self, t: Tensor) -> Tensor:
        return t.double() / self._n

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.double()) * self._n

    def grid(self, steps: int, spacing: str = "leading") -> Tensor:
        def shifted(s: Tensor) -> Tensor:
            return self.shift * s / (1 + (self.shift - 1) * s)

        if self.num_train_timesteps is None:
            return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        # diffusers shifts its smallest noise level once when built and the whole grid once more when set
        last = shifted(torch.tensor(1 / self._n, dtype=torch.float64)).item()
        levels = shifted(torch.linspace(1, last, steps, dtype=torch.float64))
        return torch.cat([levels, levels.new_zeros(1)]) * self._n

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.full_like(t, 1 / self._n, dtype=torch.float64)
        return -slope, slope
