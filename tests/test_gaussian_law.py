"""Exact laws inside the library, against the independent linear algebra of `linear.py`, and against sampling."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from linear import Underdamped, kl, law, responses

import piadm
from piadm.fills import Copy
from piadm.gaussian_law import gaussian_law, sequential_law
from piadm.propagators import Exponential, Gaussian, Identity, Jacobi, Secant
from piadm.windows import Blocks, Pipelined

V = (0.05, 0.25, 1.0, 4.0)
KINDS = torch.tensor(V, dtype=torch.float64)
DESIGN = {"horizon": 6.0, "block": 1.0, "step": 0.25, "early_stop": 0.01}
CORRECTOR = piadm.Corrector(friction=0.7, horizon=0.8, blocks=2, step=0.15, iterations=2)
TOLD = piadm.targets.Gaussian(0.0, 0.5)
EXACT = 1e-10


@pytest.mark.parametrize("rounds", [1, 3, 6])
@pytest.mark.parametrize("corrector", [None, CORRECTOR], ids=["sde", "ode with corrector"])
def test_laws_of_the_papers_algorithms_are_those_of_linear_algebra(corrector, rounds):
    weight, after, sequential = 2, None, None
    if corrector is None:
        sampler = piadm.PIADMSDE(TOLD, **DESIGN, iterations=rounds)
    else:
        sampler = piadm.PIADMODE(TOLD, **DESIGN, iterations=rounds, corrector=corrector)
        numbers = corrector.friction, corrector.horizon, corrector.blocks, corrector.step
        weight, after, sequential = 1, Underdamped(*numbers, corrector.iterations), Underdamped(*numbers, None)
    found = gaussian_law(sampler, KINDS)
    expected = [law(v, *DESIGN.values(), rounds, weight=weight, corrector=after).variance for v in V]
    assert found.variance.tolist() == pytest.approx(expected, rel=EXACT)
    reference = sequential_law(TOLD.schedule, sampler.table, KINDS)
    expected = [law(v, *DESIGN.values(), None, weight=weight, corrector=sequential).variance for v in V]
    assert reference.variance.tolist() == pytest.approx(expected, rel=EXACT)
    total = sum(kl(a, b) for a, b in zip(found.variance.tolist(), reference.variance.tolist(), strict=True))
    assert found.divergence(reference.variance) == pytest.approx(total / len(V), rel=1e-9)


@pytest.mark.parametrize("propagator", [Jacobi(), Identity(), Exponential(), Gaussian(0.5)])
@pytest.mark.parametrize("window", [Blocks(2), Pipelined(3)], ids=["blocks", "pipelined"])
def test_law_and_certificate_are_those_of_the_sampler_on_impulses(monkeypatch, propagator, window):
    scheme = piadm.ExponentialSDE(**DESIGN)
    exact = piadm.targets.Gaussian(0.0, torch.tensor(V, dtype=torch.float64))
    # the default fill looks at the denoiser's variance, of which the law is told the same number
    fill = piadm.fills.Jump(0.0, 0.5)
    sampler = piadm.Parallel(exact, scheme, propagator=propagator, window=window, fill=fill)
    expected = responses(monkeypatch, sampler, (len(V),))
    found = gaussian_law(piadm.Parallel(TOLD, scheme, propagator=propagator, window=window, fill=fill), KINDS)
    assert found.variance.tolist() == pytest.approx(expected.variance.tolist(), rel=EXACT)
    assert found.nats * len(V) == pytest.approx(expected.nats, rel=1e-9)
    assert found.rounds == expected.rounds


@pytest.mark.parametrize("goal", [{"tolerance": 1e-2}, {"target_kl": 0.1}], ids=["tolerance", "target"])
def test_adaptive_runs_with_secants_tend_to_their_law_as_the_dimension_grows(goal):
    """Rounds and evaluations are the limit's, the divergence is off by the fluctuation of averages over d coordinates."""
    d = 20_000
    scheme, variances = piadm.ExponentialSDE(4.0, 1.0, 0.1, 0.01), KINDS.repeat(d // len(V))
    told = piadm.Parallel(
        TOLD, scheme, propagator=Secant(0.5), window=None, fill=piadm.fills.Jump(0.0, 0.5), audit=True, **goal
    )
    target = piadm.targets.Gaussian(0.0, variances)
    exact = piadm.Denoiser(target, target.schedule, "sample", variance=0.5)  # what the sampler is told
    sampler = piadm.Parallel(
        exact, scheme, propagator=Secant(0.5), window=None, fill=piadm.fills.Jump(0.0, 0.5), audit=True, **goal
    )
    noise = torch.randn(2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = sampler((2, d), noise=noise, generator=torch.Generator().manual_seed(0))
    limit = gaussian_law(told, KINDS, dimension=d)
    assert abs(result.rounds - limit.rounds) <= 1  # a threshold may fall between two fluctuations
    assert result.evaluations == pytest.approx(limit.evaluations, rel=0.02)
    assert result.certificate.kl == pytest.approx(d * limit.nats, rel=0.1)
    for kind, expected in enumerate(limit.variance.tolist()):
        sampled = result.samples[:, kind :: len(V)].square().mean().item()
        assert abs(sampled / expected - 1) < 4.5 * math.sqrt(2 / (2 * d / len(V)))


def test_the_divergence_of_a_product_target_at_d_of_a_trillion_needs_no_sampling():
    """Per coordinate it is 3.19e-7 after six rounds (docs/mathematics.md), so 3.19e5 nats at d = 1e12: more are needed."""
    denoiser = piadm.targets.Gaussian(0.0, 0.25)
    totals = []
    for rounds in (6, 8, 10, 12, 14):
        sampler = piadm.PIADMSDE(denoiser, **DESIGN, iterations=rounds)
        reference = sequential_law(denoiser.schedule, sampler.table, torch.tensor([0.25]))
        totals.append(1e12 * gaussian_law(sampler, torch.tensor([0.25])).divergence(reference.variance))
    assert totals[0] == pytest.approx(3.19e5, rel=5e-3)
    assert all(later < earlier / 1e3 for earlier, later in pairwise(totals[:3]))


def test_a_denoiser_that_tells_of_a_mean_is_refused():
    with pytest.raises(ValueError, match="must tell a mean of 0"):
        gaussian_law(piadm.PIADMSDE(piadm.targets.Gaussian(1.0), iterations=2), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="one number as variance"):
        gaussian_law(piadm.PIADMSDE(piadm.targets.Gaussian(0.0, torch.ones(2)), iterations=2), torch.tensor([1.0]))


def test_the_law_of_a_fill_by_copies_is_the_published_one():
    sampler = piadm.Parallel(TOLD, piadm.ExponentialSDE(**DESIGN), propagator=Exponential(), window=Blocks(2), fill=Copy())
    published = gaussian_law(piadm.PIADMSDE(TOLD, **DESIGN, iterations=2), KINDS)
    assert torch.equal(gaussian_law(sampler, KINDS).variance, published.variance)
