"""The work: models, schemes and windows that the benchmark commands run.

| model | what |
|---|---|
| `digits`, `fashion` | the embedded networks, class-conditional |
| `mixture` | exact denoiser of a Gaussian mixture, variance 0.05 around 100 of scikit-learn's digits |
| `points` | the same digits without that variance: where they disagree about the nearest digit, the sampler jumps |
| `flow` | the mixture under a rectified flow |
| `policy` | an MLP trained here for some seconds on two modes of 16 two-dimensional actions |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

import piadm
from piadm.denoiser import DenoiserLike
from piadm.schemes import DDIM, DDPM, Euler


@dataclass(frozen=True)
class Case:
    """A model, a scheme, a window (`None`: all steps) and how many samples a run draws."""

    model: str
    scheme: DDIM | DDPM | Euler
    window: int | None
    samples: int

    @property
    def work(self) -> str:
        """Model and scheme in words."""
        return f"{self.model} {type(self.scheme).__name__} {self.steps}"

    @property
    def steps(self) -> int:
        return self.scheme.steps

    @property
    def width(self) -> str:
        """The window in words."""
        return "full" if self.window is None else str(self.window)

    @property
    def denoiser(self) -> DenoiserLike:
        return denoiser(self.model)

    @property
    def shape(self) -> tuple[int, ...]:
        event = self.denoiser.event_shape
        if event is None:
            raise ValueError(f"{self.model} does not say the shape of a sample")
        return (self.samples, *event)

    @property
    def condition(self) -> dict[str, Tensor]:
        """Classes 3, 4, … for the embedded networks."""
        return {"label": (torch.arange(self.samples) + 3) % 10} if self.model in piadm.models.NAMES else {}

    def __str__(self) -> str:
        return f"{self.work}, window {self.width}, {self.samples} samples"


def cases(model: str, scheme: DDIM | DDPM | Euler, windows: Sequence[int | None], samples: int) -> list[Case]:
    """One case for each window."""
    return [Case(model, scheme, window, samples) for window in windows]


@cache
def denoiser(model: str) -> DenoiserLike:
    """The denoiser of a name in the module's table."""
    discrete, flow = piadm.schedules.DiscreteBetas.linear(1000), piadm.schedules.RectifiedFlow()
    match model:
        case "digits" | "fashion":
            return piadm.models.load(model)
        case "mixture":
            return piadm.targets.GaussianMixture(digits(), 0.05, schedule=discrete)
        case "points":
            return piadm.targets.Empirical(digits(), schedule=discrete)
        case "flow":
            return piadm.targets.GaussianMixture(digits(), 0.05, schedule=flow)
        case "policy":
            return policy()
    raise ValueError(f"`model` is {model!r}: give one of digits, fashion, mixture, points, flow, policy")


def digits() -> Tensor:
    """The first 100 digits of scikit-learn, in [-1, 1], shape `(100, 1, 8, 8)`."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images[:100], dtype=torch.float64)[:, None] / 8 - 1


class Policy(nn.Module):
    """An MLP that predicts clean actions from noisy ones, `(B, 32)`, at time `(B,)`."""

    def __init__(self, size: int = 32, width: int = 256, frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.logspace(0, 3, frequencies) / 100)
        self.layers = nn.Sequential(
            nn.Linear(size + 2 * frequencies, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, size),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t.to(x)[:, None] * self.frequency
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], 1))


def actions(count: int, generator: torch.Generator) -> Tensor:
    """Paths of 16 points that pass an obstacle on one side or the other, shape `(count, 32)`."""
    s = torch.linspace(0, 1, 16)
    side = torch.randint(2, (count, 1), generator=generator) * 2 - 1
    height = side * (0.6 + 0.1 * torch.randn(count, 1, generator=generator)) * (math.pi * s).sin()
    along = (2 * s - 1).expand(count, -1) + 0.05 * torch.randn(count, 1, generator=generator)
    return torch.cat([along, height], 1)


def policy(iterations: int = 1500) -> DenoiserLike:
    """A `Policy` trained from a fixed seed, on the cosine schedule of 100 steps."""
    schedule = piadm.schedules.DiscreteBetas.cosine(100)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Policy()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(iterations):
        x, t = actions(256, generator), torch.randint(100, (256,), generator=generator)
        alpha, sigma = schedule.alpha(t).float()[:, None], schedule.sigma(t).float()[:, None]
        noisy = alpha * x + sigma * torch.randn(x.shape, generator=generator)
        loss = (network(noisy, t) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval().requires_grad_(False)
    data = actions(4096, generator)
    mean, variance = data.mean(0), float(data.var(0).mean())
    return piadm.Denoiser(network, schedule, "sample", mean=mean, variance=variance, event_shape=(32,))
