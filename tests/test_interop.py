"""Denoisers of azula and k-diffusion, by their shape: neither is installed. They are held against the published steps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import piadm

S, D = 3, 5
CENTRES = torch.tensor([[-1.0] * D, [1.0] * D]).double()


def posterior_mean(x, alpha, sigma):
    """E[x0 | x] for two Gaussians of variance 0.04, so that the networks below are true denoisers."""
    v = 0.04
    total = alpha**2 * v + sigma**2
    weight = torch.softmax(torch.stack([-((x - alpha * c) ** 2).sum(-1) / (2 * total[:, 0]) for c in CENTRES], 1), 1)
    gain = alpha * v / total
    return sum(weight[:, i, None] * (c + gain * (x - alpha * c)) for i, c in enumerate(CENTRES))


class AzulaSchedule:
    """azula.noise.CosineSchedule: alpha = cos(arccos(sqrt(1e-3)) t), sigma = sqrt(1 - alpha² + 1e-6)."""

    def __call__(self, t):
        alpha = torch.cos(math.acos(math.sqrt(1e-3)) * t)
        return alpha, torch.sqrt(1 - alpha**2 + 1e-6)


class AzulaDenoiser(nn.Module):
    """The interface of azula.denoise.Denoiser: a posterior with a mean, for t of shape () or (B)."""

    def __init__(self):
        super().__init__()
        self.schedule = AzulaSchedule()
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, t, **kwargs):
        alpha, sigma = (level.expand(len(x_t))[:, None] for level in self.schedule(t))
        return SimpleNamespace(mean=posterior_mean(x_t, alpha, sigma) + self.shift)


def start():
    return torch.randn(S, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_ddim_on_an_azula_denoiser_is_azulas_sampler():
    azula = AzulaDenoiser()
    x = start()
    for t, s in torch.linspace(1, 0, 31, dtype=torch.float64).unfold(0, 2, 1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = azula.schedule(t), azula.schedule(s)
        mean = azula(x, t).mean
        x = alpha_s * mean + sigma_s / sigma_t * (x - alpha_t * mean)
    denoiser = piadm.Denoiser.from_azula(azula, variance=1.0)
    noise = start() / denoiser.schedule.start_scale(torch.tensor(1.0))
    sequential = piadm.Sequential(denoiser, piadm.DDIM(30))((S, D), noise=noise)
    torch.testing.assert_close(sequential.samples, x, rtol=0, atol=1e-6)  # time reaches the network in float32 at least
    parallel = piadm.Parallel(denoiser, piadm.DDIM(30), window=None, tolerance=1e-4)((S, D), noise=noise)
    assert (parallel.samples - x).square().mean().sqrt() < 1e-4
    assert parallel.rounds < 30


def test_azulas_schedule_has_a_velocity_and_an_inverse():
    schedule = piadm.schedules.Continuous(AzulaSchedule())
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    step = 1e-6
    for rate, level in zip(schedule.velocity(t), (schedule.alpha, schedule.sigma), strict=True):
        torch.testing.assert_close(rate, (level(t + step) - level(t - step)) / (2 * step), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(schedule.time((schedule.alpha(t) / schedule.sigma(t)).log()), t, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="outside this schedule's range"):
        schedule.time(torch.tensor([50.0]))


def test_what_is_no_azula_denoiser_is_refused():
    with pytest.raises(TypeError, match="with its `schedule`"):
        piadm.Denoiser.from_azula(nn.Linear(2, 2))
    rising = AzulaDenoiser()
    rising.schedule = lambda t: (t, 1.0 - t + 0.1)
    with pytest.raises(ValueError, match="falling as time rises"):
        piadm.Denoiser.from_azula(rising)


class KModel(nn.Module):
    """The interface of k_diffusion's wrappers: denoised x for x of any noise level sigma, shape (B,)."""

    sigma_min, sigma_max = torch.tensor(0.02), torch.tensor(20.0)

    def forward(self, x, sigma, scale=None):
        out = posterior_mean(x, torch.ones_like(sigma)[:, None], sigma[:, None])
        return out if scale is None else scale[:, None] * out


@pytest.mark.parametrize("scaled", [False, True])
def test_euler_on_a_k_diffusion_model_is_sample_euler(scaled):
    model = KModel()
    extra = {"scale": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)} if scaled else {}
    # k_diffusion.sampling.get_sigmas_karras and sample_euler with s_churn = 0
    ramp = torch.linspace(0, 1, 25, dtype=torch.float64)
    low, high = 0.02 ** (1 / 7.0), 20.0 ** (1 / 7.0)
    sigmas = torch.cat([(high + ramp * (low - high)) ** 7.0, torch.zeros(1)])
    x = start() * sigmas[0]
    for i in range(25):
        denoised = model(x, sigmas[i] * x.new_ones(S), **extra)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    denoiser = piadm.Denoiser.from_k_diffusion(model, sigma_min=None if not scaled else 0.02, variance=1.0)
    parallel = piadm.Parallel(denoiser, piadm.Euler(25), window=8, tolerance=1e-4)((S, D), noise=start(), **extra)
    assert (parallel.samples - x).square().mean().sqrt() < 1e-4
    assert parallel.rounds < 25
    assert torch.allclose(piadm.Sequential(denoiser, piadm.Euler(25))((S, D), noise=start(), **extra).samples, x, atol=1e-5)


def test_a_k_diffusion_model_without_noise_levels_needs_them():
    with pytest.raises(ValueError, match=r"`sigma_min` is None: the model does not say"):
        piadm.Denoiser.from_k_diffusion(lambda x, sigma: x)
    with pytest.raises(ValueError, match="`sigma_min` is 3"):
        piadm.Denoiser.from_k_diffusion(lambda x, sigma: x, sigma_min=3.0, sigma_max=1.0)
