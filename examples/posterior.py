"""An inverse problem: a signal from a few noisy measurements, sampled without bias, and how sure one may be of the sampler.

    python examples/posterior.py

A smooth signal of 48 points (a Gaussian process) is measured at six of them. Its posterior given the measurements is known in
closed form, and so is the ideal denoiser, which stands here for a trained conditional network. Three questions, three samplers:

- `Exact`: samples with the sequential sampler's own law. Are posterior mean and spread right?
- `Parallel(target_kl=0.01)`: what does the certificate prove?
- `Sequential`: how many network calls does that save?
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import piadm

POINTS = 48


class Posterior:
    """The law of the signal given measurements: `mean`, shape `(D,)`, and `covariance`, shape `(D, D)`."""

    def __init__(self, where: Tensor, measured: Tensor, error: float) -> None:
        s = torch.linspace(0, 1, POINTS, dtype=torch.float64)
        prior = torch.exp(-((s[:, None] - s) ** 2) / (2 * 0.15**2))
        gain = torch.linalg.solve(prior[where][:, where] + error**2 * torch.eye(len(where)), prior[where]).T
        self.mean = gain @ measured
        self.covariance = prior - gain @ prior[where] + 1e-4 * torch.eye(POINTS)
        self._levels, self._modes = torch.linalg.eigh(self.covariance)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The ideal prediction of the noise, $E[ε | x_t = x]$: what a network would be trained to say."""
        schedule = piadm.schedules.DiscreteBetas.linear(1000)
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        apart = (x.double() - alpha * self.mean) @ self._modes
        return (sigma * apart / (alpha**2 * self._levels + sigma**2) @ self._modes.T).to(x.dtype)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=200)
    given = parser.parse_args(arguments)
    where = torch.tensor([3, 9, 20, 27, 38, 44])
    law = Posterior(where, torch.tensor([0.9, -0.3, 0.6, 1.1, -0.8, 0.2], dtype=torch.float64), error=0.1)
    denoiser = piadm.Denoiser(
        law, piadm.schedules.DiscreteBetas.linear(1000), "epsilon", mean=law.mean, variance=law.covariance.diagonal()
    )
    shape, scheme = (given.samples, POINTS), piadm.DDPM(given.steps)

    exact = piadm.Exact(denoiser, scheme, window=250)(shape, generator=torch.Generator().manual_seed(0))
    samples, deviation = exact.samples.double(), law.covariance.diagonal().sqrt()
    off = (samples.mean(0) - law.mean) / deviation * given.samples**0.5
    print(f"Exact: {exact.rounds} rounds in place of {given.steps} calls; KL from the sequential law: 0, by construction")

    bounded = piadm.Parallel(denoiser, scheme, window=250, target_kl=0.01)(shape, generator=torch.Generator().manual_seed(0))
    print(f"Parallel(target_kl=0.01): {bounded.rounds} rounds; {bounded.certificate}")
    figures = {
        "rounds, Exact": float(exact.rounds),
        "rounds, target_kl": float(bounded.rounds),
        "bound on the KL": float(bounded.certificate.kl or 0.0),
        "error of the mean, in standard errors (rms)": float(off.square().mean().sqrt()),
        "spread, measured / true (rms)": float((samples.std(0) / deviation).square().mean().sqrt()),
    }
    for name, value in figures.items():
        print(f"{name:44} {value:8.3g}")
    return figures


if __name__ == "__main__":
    main()
