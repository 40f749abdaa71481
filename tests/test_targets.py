"""Targets: exact denoisers are Tweedie's formula on the autograd of the log-density; float32; bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import piadm
from piadm.schedules import DiscreteBetas, OrnsteinUhlenbeck, RectifiedFlow, VarianceExploding
from piadm.targets import Empirical, Gaussian, GaussianMixture

DOUBLE = torch.float64
EVENT = (2, 2)
SCHEDULES = {
    "ornstein-uhlenbeck": OrnsteinUhlenbeck(),
    "betas": DiscreteBetas.linear(1000),
    "variance-exploding": VarianceExploding(0.05, 10.0),
    "rectified-flow": RectifiedFlow(1000),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


MEANS = 2 * draw(3, *EVENT, seed=1)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
EACH = torch.tensor([0.1, 0.5, 1.0], dtype=DOUBLE)
DIAGONAL = draw(3, *EVENT, seed=2).exp()

# name: (target of a schedule, its means, its variances and weights for the density below)
TARGETS = {
    "gaussian": (lambda s: Gaussian(0.5, 2.0, s), torch.full((1, *EVENT), 0.5), torch.tensor([2.0]), torch.ones(1)),
    "gaussian-diagonal": (lambda s: Gaussian(MEANS[0], DIAGONAL[0], s), MEANS[:1], DIAGONAL[:1], torch.ones(1)),
    "mixture-one-variance": (
        lambda s: GaussianMixture(MEANS, 0.3, WEIGHTS, s),
        MEANS,
        torch.full((3,), 0.3, dtype=DOUBLE),
        WEIGHTS,
    ),
    "mixture-isotropic": (lambda s: GaussianMixture(MEANS, EACH, WEIGHTS, s), MEANS, EACH, WEIGHTS),
    "mixture-diagonal": (lambda s: GaussianMixture(MEANS, DIAGONAL, 7 * WEIGHTS, s), MEANS, DIAGONAL, WEIGHTS),
    "mixture-equal-weights": (lambda s: GaussianMixture(MEANS, EACH, None, s), MEANS, EACH, torch.ones(3)),
    "empirical": (lambda s: Empirical(MEANS, s), MEANS, torch.zeros(3), torch.ones(3)),
}
targets = pytest.mark.parametrize(("make", "means", "variances", "weights"), TARGETS.values(), ids=TARGETS.keys())
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def log_density(x: Tensor, alpha: Tensor, sigma: Tensor, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """log p_t of each row, from the definition."""
    x, means, n = x.flatten(1), means.double().flatten(1), len(means)
    variances = variances.double().reshape(n, -1).expand_as(means)
    spread = alpha[:, None, None] ** 2 * variances + sigma[:, None, None] ** 2
    each = -((x[:, None] - alpha[:, None, None] * means) ** 2 / spread + (2 * math.pi * spread).log()).sum(-1) / 2
    return torch.logsumexp(each + (weights / weights.sum()).double().log(), 1)


def cases(schedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States about where the process puts them, with their time and levels."""
    t = schedule.grid(12)[:-1]
    t = t[schedule.alpha(t) > 0].repeat_interleave(4)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    shape = (-1, *[1] * len(EVENT))
    near = MEANS[torch.arange(len(t)) % 3]
    x = alpha.reshape(shape) * near + 1.5 * (0.3 * alpha**2 + sigma**2).sqrt().reshape(shape) * draw(len(t), *EVENT, seed=3)
    return x, t, alpha, sigma


@targets
@schedules
def test_targets_are_tweedies_formula_on_their_log_density(make, means, variances, weights, schedule):
    x, t, alpha, sigma = cases(schedule)
    x.requires_grad_()
    score = torch.autograd.grad(log_density(x, alpha, sigma, means, variances, weights).sum(), x)[0]
    shape = (-1, *[1] * len(EVENT))
    expected = (x + sigma.reshape(shape) ** 2 * score) / alpha.reshape(shape)
    f = make(schedule)(x.detach(), t)
    # the formula divides rounded terms of size |x| + 1 by alpha; 100 eps leave room for the weights' exponents (seen: 10)
    bound = 100 * torch.finfo(DOUBLE).eps * (1 + x.detach().abs()) / alpha.reshape(shape)
    assert ((f - expected.detach()).abs() <= bound).all()


@targets
@schedules
def test_targets_in_float32_are_the_float64_ones_rounded_once(make, means, variances, weights, schedule):
    x, t, _, _ = cases(schedule)
    target, x = make(schedule), x.float()
    exact = target(x.double(), t)
    out = target(x, t)
    assert out.dtype == torch.float32
    assert torch.equal(out, exact.float())


@targets
def test_targets_know_their_mean_and_variance(make, means, variances, weights):
    # exact moments of the mixture, and of draws it could not tell from them
    target = make(None)
    share = (weights / weights.sum()).double().reshape(-1, 1)
    flat = means.double().flatten(1)
    mean = (share * flat).sum(0)
    second = (share * (variances.double().reshape(len(flat), -1) + flat**2)).sum(0)
    got = torch.as_tensor(target.mean, dtype=DOUBLE)
    torch.testing.assert_close(got.expand(EVENT).flatten(), mean, rtol=1e-6, atol=1e-7)
    # per coordinate for a Gaussian; one number, their average, for a mixture
    spread = torch.as_tensor(target.variance, dtype=DOUBLE).expand(EVENT).flatten().mean()
    torch.testing.assert_close(spread, (second - mean**2).mean(), rtol=1e-6, atol=1e-7)


def test_data_at_one_point_is_found_in_one_step():
    # v = 0: f is the point wherever x is, so one deterministic step lands on it
    point = draw(1, *EVENT, seed=4)
    for target in (Empirical(point), Gaussian(point[0], 0.0)):
        samples = piadm.Sequential(target, piadm.DDIM(1))((3, *EVENT), noise=draw(3, *EVENT)).samples
        torch.testing.assert_close(samples, point.expand_as(samples), rtol=0, atol=1e-12)


def test_the_empirical_denoiser_samples_its_data():
    # the reverse process of a finite data set ends on its points
    data = 3 * draw(5, *EVENT, seed=5)
    samples = piadm.Sequential(Empirical(data, OrnsteinUhlenbeck(8.0)), piadm.DDPM(400))(
        (40, *EVENT), generator=torch.Generator().manual_seed(0)
    ).samples
    distance = torch.cdist(samples.double().flatten(1), data.flatten(1))
    assert distance.min(1).values.max() < 1e-4  # float32 states
    assert len(distance.argmin(1).unique()) == 5


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made under it held."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # views hold nothing of their own
            self.numbers = max([self.numbers, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("kind", ["one", "isotropic", "diagonal"])
@pytest.mark.parametrize("chunk", [1, 200, 500])
def test_mixtures_work_in_chunks_of_bounded_memory(monkeypatch, kind, chunk):
    rows, n, size = 50, 40, 4
    means, spread = draw(n, 2, 2), draw(n, 2, 2, seed=2).exp()
    variance = {"one": 0.3, "isotropic": spread[:, 0, 0], "diagonal": spread}[kind]
    target = GaussianMixture(means, variance, draw(n, seed=3).exp())
    x, t = draw(rows, 2, 2, seed=4), torch.linspace(0.01, 4, rows, dtype=DOUBLE)
    with Largest() as whole:
        expected = target(x, t)
    monkeypatch.setattr(piadm.targets, "CHUNK", chunk)
    with Largest() as parts:
        f = target(x, t)
    # products of other sizes may add in another order: rounding, in float64
    torch.testing.assert_close(f, expected, rtol=1e-12, atol=1e-12)
    # a chunk, one row against all the data, or the rows themselves, whichever is the largest
    assert parts.numbers <= max(chunk, n * size, rows * size)
    assert whole.numbers >= rows * n


def test_an_isotropic_mixture_never_holds_rows_times_points_times_numbers(monkeypatch):
    data, x = draw(200, 100), draw(30, 100)
    monkeypatch.setattr(piadm.targets, "CHUNK", 1000)
    with Largest() as peak:
        Empirical(data)(x, torch.full((30,), 0.5))
    assert peak.numbers == data.numel()  # the squares of the data; the rows hold 3,000, a chunk 1,000


@pytest.mark.parametrize("size", [(), (3,)], ids=str)
def test_mixtures_take_events_without_dimensions(size):
    means = draw(4, *size)
    f = GaussianMixture(means, 0.3)(draw(5, *size, seed=2), torch.full((5,), 0.7))
    assert f.shape == (5, *size)
    one = GaussianMixture(means.reshape(4, -1), 0.3)(draw(5, *size, seed=2).reshape(5, -1), torch.full((5,), 0.7))
    assert torch.equal(f.reshape(5, -1), one)
