"""A k-diffusion model, in parallel: `sample_euler` as k-diffusion writes it, and `Denoiser.from_k_diffusion` beside it.

    python examples/k_diffusion.py

k-diffusion need not be installed: a model is one of its kind if `model(x, sigma, **extra)` returns the denoised `x`.
Here it is the embedded `digits` network, seen as k-diffusion's `DiscreteVDDPMDenoiser` would see it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

import piadm


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """k_diffusion.sampling.get_sigmas_karras."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, ramp.new_zeros(1)])


def sample_euler(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, **extra: Tensor) -> Tensor:
    """k_diffusion.sampling.sample_euler, without its options."""
    for sigma, following in sigmas.unfold(0, 2, 1).tolist():
        denoised = model(x, x.new_full((len(x),), sigma), **extra)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def k_model() -> Callable[..., Tensor]:
    """The embedded network as `model(x, sigma, label)`, with x = x0 + σ ε."""
    inner = piadm.models.load("digits")

    def model(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        t = inner.schedule.time(-sigma.double().log()).round().long()  # the step of the training schedule with that α/σ
        scale = (1 + sigma**2).rsqrt().reshape(-1, 1, 1, 1).to(x.dtype)
        return inner(scale * x, t, label=label)

    return model


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=25)
    given = parser.parse_args(arguments)
    model, label = k_model(), torch.tensor([3])
    low, high = 0.02, 80.0
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    started = time.perf_counter()
    expected = sample_euler(model, noise * high, get_sigmas_karras(given.steps, low, high), label=label)
    sequential = time.perf_counter() - started

    denoiser = piadm.Denoiser.from_k_diffusion(model, sigma_min=low, sigma_max=high, variance=0.3)
    sampler = piadm.Parallel(denoiser, piadm.Euler(given.steps), window=given.window, tolerance=1e-2)
    result = sampler((1, 1, 8, 8), noise=noise, label=label)
    figures = {
        "network calls, sample_euler": float(given.steps),
        "rounds, Parallel": float(result.rounds),
        "rms difference": float((result.samples - expected).square().mean().sqrt()),
        "s, sample_euler": sequential,
        "s, Parallel": result.seconds,
    }
    for name, value in figures.items():
        print(f"{name:28} {value:8.3g}")
    return figures


if __name__ == "__main__":
    main()
