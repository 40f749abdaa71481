"""PIADM-SDE and PIADM-ODE against their exact laws on Gaussian targets, without sampling.

`linear.law` propagates coefficients through the paper's formulas; `linear.responses` reads the same coefficients off the real
samplers, by running them on unit impulses. Both are float64 sums of some hundred terms of size at most about e^(T/2), so they
agree to far better than `EXACT`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from linear import Underdamped, grid, kl, law, responses

import piadm
from piadm.fills import Copy
from piadm.propagators import Exponential
from piadm.windows import Blocks, Pipelined

EXACT = 1e-10
V = (0.05, 0.25, 1.0, 4.0)  # a different variance in each coordinate of one target
MU = (0.0, 1.0, -2.0, 0.5)
DESIGN = {"horizon": 6.0, "block": 1.0, "step": 0.25, "early_stop": 0.01}
GRIDS = {
    "design": DESIGN,
    "one block": {"horizon": 1.5, "block": 1.5, "step": 0.1, "early_stop": 1e-3},
    "step does not divide block": {"horizon": 4.0, "block": 2.0, "step": 0.3, "early_stop": 0.05},
    "block does not divide horizon": {"horizon": 5.0, "block": 0.9, "step": 0.2, "early_stop": 0.02},
}
grids = pytest.mark.parametrize("numbers", GRIDS.values(), ids=list(GRIDS))


def target(schedule=None):
    mean, variance = (torch.tensor(values, dtype=torch.float64) for values in (MU, V))
    return piadm.targets.Gaussian(mean, variance, schedule=schedule)


def four(numbers):
    return numbers["horizon"], numbers["block"], numbers["step"], numbers["early_stop"]


def underdamped(corrector, sequential=False):
    iterations = None if sequential else corrector.iterations
    return Underdamped(corrector.friction, corrector.horizon, corrector.blocks, corrector.step, iterations)


def assert_same(found, expected):
    """Every coefficient of a sampler's output equals the reference's, in every coordinate."""
    for d, reference in enumerate(expected):
        assert found.start[d].item() == pytest.approx(reference.start, rel=EXACT, abs=EXACT)
        assert found.mean[d].item() == pytest.approx(reference.mean * MU[d], rel=EXACT, abs=EXACT)
        contributions = found.noise[:, :, d].square().sum(1).numpy()
        np.testing.assert_allclose(contributions, reference.contributions, rtol=EXACT, atol=EXACT)
        assert found.variance[d].item() == pytest.approx(reference.variance, rel=EXACT)


@pytest.mark.parametrize("rounds", [1, 2, 3, 8])
@grids
def test_piadm_sde_has_the_law_of_algorithm_1(monkeypatch, numbers, rounds):
    found = responses(monkeypatch, piadm.PIADMSDE(target(), **numbers, iterations=rounds), (4,))
    expected = [law(v, *four(numbers), rounds) for v in V]
    assert_same(found, expected)
    assert found.rounds == rounds * len(grid(*four(numbers)))
    for d, reference in enumerate(expected):  # with signs, not only as variances
        np.testing.assert_allclose(found.noise[:, 0, d], reference.noise[:, 0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rounds", [1, 3, 6])
@grids
def test_ode_predictor_has_its_law(monkeypatch, numbers, rounds):
    sampler = piadm.Parallel(
        target(), piadm.ExponentialODE(**numbers), propagator=Exponential(), window=Blocks(rounds), fill=Copy()
    )
    assert_same(responses(monkeypatch, sampler, (4,)), [law(v, *four(numbers), rounds, weight=1) for v in V])


CORRECTORS = {
    "default": piadm.Corrector(),
    "two blocks": piadm.Corrector(friction=0.7, horizon=0.8, blocks=2, step=0.15, iterations=2),
    "one round": piadm.Corrector(friction=3.0, horizon=0.5, blocks=1, step=0.1, iterations=1),
}
correctors = pytest.mark.parametrize("corrector", CORRECTORS.values(), ids=list(CORRECTORS))


@pytest.mark.parametrize("rounds", [1, 3])
@correctors
@grids
def test_piadm_ode_has_the_law_of_predictor_and_corrector_composed(monkeypatch, numbers, corrector, rounds):
    found = responses(monkeypatch, piadm.PIADMODE(target(), **numbers, iterations=rounds, corrector=corrector), (4,))
    expected = [law(v, *four(numbers), rounds, weight=1, corrector=underdamped(corrector)) for v in V]
    assert_same(found, expected)
    assert found.rounds == len(grid(*four(numbers))) * (rounds + corrector.blocks * corrector.iterations)


@pytest.mark.parametrize(
    ("scheme", "weight", "corrector"),
    [(piadm.ExponentialSDE, 2, None), (piadm.ExponentialODE, 1, None), (piadm.ExponentialODE, 1, CORRECTORS["two blocks"])],
    ids=["sde", "ode", "ode with corrector"],
)
@grids
def test_sequential_scheme_has_its_law(monkeypatch, numbers, scheme, weight, corrector):
    extra = {} if corrector is None else {"corrector": corrector}
    found = responses(monkeypatch, piadm.Sequential(target(), scheme(**numbers, **extra)), (4,))
    after = None if corrector is None else underdamped(corrector, sequential=True)
    assert_same(found, [law(v, *four(numbers), None, weight=weight, corrector=after) for v in V])


def test_design_figures_are_reproduced(monkeypatch):
    """The figures of section 2 of the design, which it gives to three digits."""
    denoiser = piadm.targets.Gaussian(0.0, 0.25)
    sequential = responses(monkeypatch, piadm.Sequential(denoiser, piadm.ExponentialSDE(**DESIGN)), (1,))
    assert sequential.rounds == 37
    for rounds, expected in enumerate((2.98, 0.399, 7.07e-2, 1.26e-4, 2.55e-5, 3.19e-7), start=1):
        parallel = responses(monkeypatch, piadm.PIADMSDE(denoiser, **DESIGN, iterations=rounds), (1,))
        # half a unit in the third digit is at most 0.5 %
        assert kl(parallel.variance.item(), sequential.variance.item()) == pytest.approx(expected, rel=5e-3)


@grids
@pytest.mark.parametrize("scheme", [piadm.ExponentialSDE, piadm.ExponentialODE])
def test_last_block_shrinks_its_steps_and_ends_at_early_stop(numbers, scheme):
    schedule = piadm.schedules.OrnsteinUhlenbeck()
    table = scheme(**numbers)(schedule)
    T, h, eps, eta = four(numbers)
    N = math.ceil(T / h - 1e-9)
    first = table.blocks[-2]
    times = [*table.times.tolist(), eta]
    assert len(table.blocks) == N + 1
    for n, edge in enumerate(table.blocks[:-1]):
        assert times[edge] == pytest.approx(T - n * T / N, abs=1e-12)
    lengths = -np.diff(times)
    left = np.array(times[first:-1])  # h - τ at each step of the last block
    wanted = np.minimum(eps, eps * left)
    # all but the clipped last step are exactly the rule's, and a step is never longer than it
    np.testing.assert_allclose(lengths[first:-1], wanted[:-1], rtol=1e-9)
    assert 0 < lengths[-1] <= wanted[-1] * (1 + 1e-9)
    assert (lengths[:first] <= eps * (1 + 1e-9)).all()
    assert (lengths > 0).all()
    if scheme is piadm.ExponentialSDE:
        # what the last row itself integrates over, from its noise sqrt(e^ε - 1)
        last = torch.log1p(table.C[-1, 0, 0] ** 2).item()
        assert times[-2] - last == pytest.approx(eta, abs=1e-12)


@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_pipelined_blocks_take_n_plus_k_minus_1_rounds_and_are_the_schedule_written_by_hand(monkeypatch, rounds):
    """A simulation of the diagonal schedule, on linear forms: block n is alive in rounds n to n + K - 1 (from 0)."""
    numbers, v = DESIGN, 0.25
    steps = grid(*four(numbers))
    M = sum(map(len, steps))
    first = np.cumsum([0, *map(len, steps)])
    unit = np.eye(1 + M)
    Y: list[np.ndarray] = [unit[0]]  # states 0, 1, …, as far as blocks have entered
    for r in range(len(steps) + rounds - 1):
        if r < len(steps):  # a block enters with copies of the newest state there is
            Y += [Y[-1]] * len(steps[r])
        alive = range(max(0, r - rounds + 1), min(r + 1, len(steps)))
        new = list(Y)
        for n in alive:
            for j, (t, e) in enumerate(steps[n]):
                m = first[n] + j
                s = -Y[m] / (math.exp(-t) * v - math.expm1(-t))
                new[m + 1] = math.exp(e / 2) * new[m] + 2 * math.expm1(e / 2) * s + math.sqrt(math.expm1(e)) * unit[1 + m]
        Y = new
    sampler = piadm.Parallel(
        piadm.targets.Gaussian(0.0, v),
        piadm.ExponentialSDE(**numbers),
        propagator=Exponential(),
        window=Pipelined(rounds),
        fill=Copy(),
    )
    found = responses(monkeypatch, sampler, (1,))
    assert found.rounds == len(steps) + rounds - 1
    assert found.start.item() == pytest.approx(Y[-1][0], abs=EXACT)
    np.testing.assert_allclose(found.noise[:, 0, 0], Y[-1][1:], atol=EXACT)


SCHEDULES = {
    "fine betas": piadm.schedules.DiscreteBetas.linear(20000, 1e-6, 1.2e-3),
    "coarse betas": piadm.schedules.DiscreteBetas(torch.linspace(0.005, 0.5, 30, dtype=torch.float64)),
    "variance exploding": piadm.schedules.VarianceExploding(),
    "rectified flow": piadm.schedules.RectifiedFlow(),
}
CORRECTOR = CORRECTORS["two blocks"]
SDE, ODE = piadm.ExponentialSDE(**DESIGN), piadm.ExponentialODE(**DESIGN, corrector=CORRECTOR)
MAKERS = {
    "piadm-sde": lambda denoiser: piadm.PIADMSDE(denoiser, **DESIGN, iterations=3),
    "piadm-ode": lambda denoiser: piadm.PIADMODE(denoiser, **DESIGN, iterations=3, corrector=CORRECTOR),
    "sequential sde": lambda denoiser: piadm.Sequential(denoiser, SDE),
    "sequential ode": lambda denoiser: piadm.Sequential(denoiser, ODE),
    "jump sde": lambda denoiser: piadm.Parallel(denoiser, SDE, propagator=Exponential(), window=Blocks(3)),
    "jump ode": lambda denoiser: piadm.Parallel(denoiser, ODE, propagator=Exponential(), window=Blocks(3)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_another_schedule_is_another_clock_and_scaling_of_the_same_algorithm(make, schedule):
    """Steps are taken in the same log(α/σ), so samples agree up to the final scaling α'/α, at whatever resolution.

    After three rounds, far from convergence, this holds the fill and the propagator to it as well.
    """
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    paper, other = (
        make(target(clock))((5, 4), noise=noise, generator=torch.Generator().manual_seed(0)) for clock in (None, schedule)
    )
    # the end, η = 0.01, as a time of the other schedule
    end = torch.tensor(0.01, dtype=torch.float64)
    scale = schedule.alpha(schedule.time(-torch.expm1(end).log() / 2)) / torch.exp(-end / 2)
    assert other.rounds == paper.rounds
    torch.testing.assert_close(other.samples / scale, paper.samples, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: piadm.PIADMSDE(target(), **DESIGN, iterations=2),
            [law(v, *four(DESIGN), 2) for v in V],
        ),
        (
            lambda: piadm.PIADMODE(target(), **DESIGN, iterations=2, corrector=CORRECTORS["two blocks"]),
            [law(v, *four(DESIGN), 2, weight=1, corrector=underdamped(CORRECTORS["two blocks"])) for v in V],
        ),
    ],
    ids=["sde", "ode"],
)
def test_random_samples_have_the_exact_mean_and_variance(make, expected):
    n = 20_000
    samples = make()((n, 4), generator=torch.Generator().manual_seed(0)).samples.double()
    for d, reference in enumerate(expected):
        mean, variance = reference.mean * MU[d], reference.variance
        # standard errors sqrt(v/n) and v sqrt(2/n); 4.5 of them: 16 comparisons fail by chance once in 10,000 seeds
        assert abs(samples[:, d].mean().item() - mean) < 4.5 * math.sqrt(variance / n)
        assert abs(samples[:, d].var().item() - variance) < 4.5 * variance * math.sqrt(2 / n)
    covariance = torch.corrcoef(samples.T) - torch.eye(4, dtype=torch.float64)
    # coordinates are independent: a correlation has standard error 1/sqrt(n)
    assert covariance.abs().max().item() < 4.5 / math.sqrt(n)
