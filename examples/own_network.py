"""Your own network in three lines: a small flow on two moons, trained here for some seconds, sampled in parallel.

    python examples/own_network.py

The three lines are in `main`. The rest makes a network worth sampling, and holds the samples against the sequential ones.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor, nn

import piadm


class Velocity(nn.Module):
    """Predicts ε - x0 at x_t = (1 - t) x0 + t ε for points `(B, 2)` and times `(B,)`, given which moon, `(B,)`."""

    def __init__(self) -> None:
        super().__init__()
        self.moon = nn.Embedding(2, 16)
        self.layers = nn.Sequential(nn.Linear(2 + 16 + 16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x: Tensor, t: Tensor, moon: Tensor) -> Tensor:
        angles = t[:, None].to(x) * math.pi * torch.arange(1, 9, device=x.device, dtype=x.dtype)
        return self.layers(torch.cat([x, angles.sin(), angles.cos(), self.moon(moon)], 1))


def moons(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points near two half circles, and which of the two."""
    moon = torch.randint(2, (count,), generator=generator)
    angle = math.pi * torch.rand(count, generator=generator) + math.pi * moon
    point = torch.stack([angle.cos() + 0.5 - moon, angle.sin() - 0.25 + 0.5 * moon], 1)
    return point + 0.05 * torch.randn(count, 2, generator=generator), moon


def train(seconds: float) -> Velocity:
    """Flow matching with Adam."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = Velocity()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        point, moon = moons(512, generator)
        noise, t = torch.randn(512, 2, generator=generator), torch.rand(512, generator=generator)
        x = (1 - t[:, None]) * point + t[:, None] * noise
        loss = (network(x, t, moon) - (noise - point)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-seconds", type=float, default=15.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8)
    given = parser.parse_args(arguments)
    network, moon = train(given.train_seconds), torch.arange(given.samples) % 2

    denoiser = piadm.Denoiser(network, piadm.schedules.RectifiedFlow(), "flow_prediction", variance=0.5)
    sampler = piadm.Parallel(denoiser, piadm.Euler(given.steps), window=32, tolerance=1e-2)
    result = sampler((given.samples, 2), generator=torch.Generator().manual_seed(1), moon=moon)

    oracle = piadm.Sequential(denoiser, piadm.Euler(given.steps))
    sequential = oracle((given.samples, 2), generator=torch.Generator().manual_seed(1), moon=moon)
    print(result)
    centre = torch.tensor([[0.5, -0.25], [-0.5, 0.25]])[moon]
    figures = {
        "steps": float(result.steps),
        "rounds": float(result.rounds),
        "rms difference from sequential": float((result.samples - sequential.samples).square().mean().sqrt()),
        "mean distance from the moons": float(((result.samples - centre).norm(dim=1) - 1).abs().mean()),
    }
    for name, value in figures.items():
        print(f"{name:32} {value:8.3g}")
    return figures


if __name__ == "__main__":
    main()
