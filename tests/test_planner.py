"""Plans: the theorems' orders, counts that are those of the schemes, and configurations that do what they promise."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from linear import kl, law
from typer.testing import CliRunner

import piadm
from piadm.cli import app
from piadm.gaussian_law import sequential_law
from piadm.planner import WIDE, sufficient_rounds, sufficient_step
from piadm.schedules import OrnsteinUhlenbeck

METHODS = pytest.mark.parametrize("method", ["sde", "ode"])


@METHODS
@pytest.mark.parametrize("early_stop", [0.05, 1e-3])
@pytest.mark.parametrize(("horizon", "block", "step"), [(3.0, 1.0, 0.11), (2.5, 2.0, 0.05), (0.7, 0.2, 0.03)])
def test_counts_are_those_of_the_scheme_it_describes(method, early_stop, horizon, block, step):
    corrector = piadm.Corrector(2.0, 0.5, 2, 0.07, 3) if method == "ode" else None
    one = piadm.Plan(method, 5, 0.1, 1.0, horizon, block, step, early_stop, 4, corrector)
    denoiser = piadm.targets.Gaussian()
    sampler = (piadm.PIADMSDE if method == "sde" else piadm.PIADMODE).from_plan(one, denoiser)
    blocks = [b - a for a, b in pairwise(sampler.table.blocks)]
    result = sampler((2, 5), generator=torch.Generator().manual_seed(0))
    assert one.rounds == result.rounds
    # the last block's shrinking steps are counted in closed form, which may be off by one
    assert abs(one.steps - result.steps) <= 1
    assert one.evaluations == pytest.approx(result.evaluations, abs=one.iterations)
    assert one.memory == pytest.approx(4 * (1 if corrector is None else 2) * 5 * (1 + max(blocks)), rel=0.05)


def test_the_theorems_orders():
    """T, K and N grow like log d; ε falls like 1/(d log d), and 1/(√d log d) for the ODE; rounds like log² d."""
    for method, exponent in (("sde", 1.0), ("ode", 0.5)):
        plans = [piadm.planner.theorem(10**k, 0.1, method=method) for k in (6, 9, 12)]
        for low, high in pairwise(plans):
            assert high.horizon - low.horizon == pytest.approx(math.log(1e3), rel=1e-9)
            assert low.step / high.step == pytest.approx(1e3**exponent * high.horizon / low.horizon, rel=1e-9)
            assert 0 <= high.iterations - low.iterations - math.log(1e3) <= 3
        assert plans[-1].rounds / plans[0].rounds < (math.log(3e14) / math.log(3e8)) ** 2 * 1.2
        assert plans[0].lipschitz ** 2 * plans[0].block * math.exp(3.5 * plans[0].block) == pytest.approx(
            math.exp(-1), rel=1e-6
        )
        if method == "ode":
            assert plans[0].corrector.step / plans[1].corrector.step == pytest.approx(1e3**0.5, rel=1e-9)


def total(variances, found, data):
    return sum(kl(a, b) for a, b in zip(found, data, strict=True)) / len(variances)


def test_what_suffices_does_suffice_and_hardly_less():
    """By the independent linear algebra: d KL ≤ δ² from the data at η, and not with three rounds less or a fourfold step."""
    one = piadm.plan(100, 0.1, lipschitz=5.0).sufficient
    variances = [1 / one.lipschitz, WIDE]
    data = [math.exp(-one.early_stop) * v - math.expm1(-one.early_stop) for v in variances]
    grid = one.horizon, one.block, one.step, one.early_stop
    for rounds, holds in ((one.iterations, True), (one.iterations - 3, False)):
        found = [law(v, *grid, rounds).variance for v in variances]
        assert (100 * total(variances, found, data) <= 0.1**2) == holds
    coarse = [law(v, one.horizon, one.block, 4 * one.step, one.early_stop, None).variance for v in variances]
    assert 100 * total(variances, coarse, data) > 0.1**2 / 9


def test_a_plan_for_a_small_problem_runs_and_its_certificate_keeps_to_the_tolerance():
    plan = piadm.plan(2, 0.5)
    result = piadm.PIADMSDE.from_plan(plan, piadm.targets.Gaussian(0.0, 2.0))(
        (64, 2), generator=torch.Generator().manual_seed(0)
    )
    assert result.rounds == plan.rounds
    assert result.certificate.kl + 4.5 * result.certificate.standard_error < 0.5**2 / 3


def test_steps_beyond_the_finest_law_are_extrapolated_at_first_order():
    """Held against the law at the step itself."""
    schedule, variance = OrnsteinUhlenbeck(), torch.tensor([0.2, WIDE], dtype=torch.float64)
    one = piadm.Plan("sde", 1, 0.1, 5.0, 6.0, 1.0, 0.1, 1e-2, 1)
    data = math.exp(-1e-2) * variance - math.expm1(-1e-2)
    budget = 2e-7
    step = sufficient_step(one, variance, data, 4 * budget)
    assert step < 1 / 64
    table = dataclasses.replace(one, horizon=14.0, step=step).scheme()(schedule)  # from far enough for steps alone to err
    found = sequential_law(schedule, table, variance).divergence(data)
    assert found == pytest.approx(budget, rel=0.15)


def test_rounds_found_on_a_coarse_grid_are_those_of_a_finer_one():
    one = piadm.Plan("sde", 10**6, 0.1, 5.0, 4.0, 1.0, 1e-5, 1e-2, 1)
    variance = torch.tensor([0.2, WIDE], dtype=torch.float64)
    coarse, finer = (sufficient_rounds(one, variance, 1e-9, per_unit=per_unit) for per_unit in (32, 64))
    assert 0 <= finer - coarse <= 1


def test_the_wrong_sampler_and_numbers_out_of_range_are_refused():
    plan = piadm.Plan("sde", 5, 0.1, 1.0, 3.0, 1.0, 0.1, 1e-3, 4)
    with pytest.raises(ValueError, match="is for PIADMSDE"):
        piadm.PIADMODE.from_plan(plan, piadm.targets.Gaussian())
    for arguments, message in [
        ({"dimension": 0}, "`dimension` is 0"),
        ({"tolerance": 1.0}, "`tolerance` is 1.0: give a number between 0 and 1"),
        ({"lipschitz": 0.5}, "`lipschitz` is 0.5: noise alone has 1"),
        ({"method": "pde"}, "`method` is 'pde': give 'sde' or 'ode'"),
        ({"early_stop": 0.5}, "`early_stop` is 0.5: must be below the block length 0.19"),
    ]:
        with pytest.raises(ValueError, match=message):
            piadm.plan(**{"dimension": 10, "tolerance": 0.1} | arguments)


def test_the_command_prints_theorem_and_need():
    result = CliRunner().invoke(app, ["plan", "--dimension", "8", "--tolerance", "0.5", "--method", "ode"])
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("theorem 3.5", "Gaussian data need", "rounds K†", "evaluations per sample"))
    refused = CliRunner().invoke(app, ["plan", "--dimension", "0"])
    assert refused.exit_code == 2
    assert "--dimension is 0" in refused.stderr
