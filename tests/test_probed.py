r"""Moments asked of a denoiser: exact for Gaussian data, and worth their call on networks."""

import math

import pytest
import torch

import piadm

LINEAR = piadm.schedules.DiscreteBetas.linear(1000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", [LINEAR, piadm.schedules.RectifiedFlow(), piadm.schedules.VarianceExploding()], ids=repr)
@pytest.mark.parametrize("variance", [0.05, 4.0])
def test_gaussian_data_is_found_exactly(schedule, variance):
    mean = torch.randn(12, generator=generator(), dtype=torch.float64)
    denoiser = piadm.targets.Gaussian(mean, variance, schedule=schedule)
    scheme = piadm.DDIM(50) if schedule is LINEAR else piadm.Euler(50)
    probed = piadm.Probed(denoiser, scheme, (3, 12), generator=generator())
    # isotropic data has one gain, whatever the probes; float32 states, whose answers are differences of large numbers
    torch.testing.assert_close(probed.mean.double(), mean, atol=1e-4 * max(1, variance), rtol=1e-3)
    assert probed.variance == pytest.approx(variance, rel=1e-3)


def test_variances_that_differ_give_their_mean_within_the_error_of_the_probes():
    variance = torch.tensor([0.01, 0.02, 0.1, 0.4], dtype=torch.float64).repeat(64)
    denoiser = piadm.targets.Gaussian(0.0, variance, schedule=LINEAR)
    probed = piadm.Probed(denoiser, piadm.DDPM(1000), (1, 256), generator=generator(), probes=64)
    standard_error = math.sqrt(2 * float(variance.square().mean()) / variance.numel() / 64)
    # the mean of λ/(1 + r²λ) at r = 0.2 stands for that of λ
    assert probed.variance == pytest.approx(float((variance / (1 + 0.04 * variance)).mean()), abs=4 * standard_error + 0.005)


def test_a_label_has_its_own_mean_and_the_run_costs_less():
    denoiser = piadm.models.load("digits")
    shape, zero = (1, 1, 8, 8), torch.tensor([0])
    zeros = piadm.Probed(denoiser, piadm.DDIM(50), shape, label=zero)
    ones = piadm.Probed(denoiser, piadm.DDIM(50), shape, label=torch.tensor([1]))
    assert zeros.mean[0, 3:5, 3:5].mean() < -0.3  # a zero is hollow
    assert ones.mean[0, 3:5, 3:5].mean() > 0.3
    costs = {"given": 0.0, "probed": 0.0}
    for seed in range(3):
        for name, one in (("given", denoiser), ("probed", zeros)):
            sampler = piadm.Parallel(one, piadm.DDIM(50), window=None)
            costs[name] += sampler(shape, generator=generator(seed), label=zero).evaluations
    assert costs["probed"] < 0.95 * costs["given"]


def test_it_changes_how_a_run_goes_and_not_what_it_gives():
    means = torch.randn(5, 16, generator=generator(), dtype=torch.float64)
    denoiser = piadm.targets.GaussianMixture(means, 0.1, schedule=LINEAR)
    probed = piadm.Probed(denoiser, piadm.DDPM(30), (2, 16))
    noise = torch.randn(2, 16, generator=generator(1), dtype=torch.float64)
    one, other = (
        piadm.Sequential(each, piadm.DDPM(30))((2, 16), generator=generator(), noise=noise).samples
        for each in (denoiser, probed)
    )
    assert torch.equal(one, other)


def test_what_cannot_be_probed_is_said():
    denoiser = piadm.targets.Gaussian(0.0, 1.0, schedule=piadm.schedules.OrnsteinUhlenbeck())
    with pytest.raises(ValueError, match="more noise than data"):
        piadm.Probed(denoiser, piadm.ExponentialSDE(horizon=0.2, block=0.1, step=0.05, early_stop=0.01), (1, 4))
    with pytest.raises(ValueError, match="probes"):
        piadm.Probed(denoiser, piadm.DDIM(5), (1, 4), probes=0)
    broken = piadm.Denoiser(lambda x, t: x * torch.nan, LINEAR, "sample")
    with pytest.raises(ValueError, match="`denoiser` returns NaN or infinity"):
        piadm.Probed(broken, piadm.DDIM(5), (1, 4))
