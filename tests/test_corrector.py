"""The underdamped-Langevin corrector: one step's law to all digits, and the law it leaves invariant."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from linear import responses

import piadm
from piadm.fills import Copy
from piadm.propagators import Exponential
from piadm.windows import Blocks

ULP = 2.0**-52


def table_of(corrector, t=0.5):
    """Rows of a corrector at time `t`: what follows the first of two predictor blocks."""
    table = piadm.ExponentialODE(2 * t, t, t / 2, t / 10, corrector)(piadm.schedules.OrnsteinUhlenbeck())
    edges = table.blocks[1], table.blocks[1 + corrector.blocks]
    assert table.times[edges[0]].item() == pytest.approx(t)
    return table, slice(*edges)


def closed_form(gamma, tau):
    """One step's coefficients by section 2's formulas in 60 digits, from the float64 numbers as they are."""
    with localcontext() as context:
        context.prec = 60
        g, tau = Decimal(gamma), Decimal(tau)
        e = (-g * tau).exp()
        drift = (1 - e) / g
        push = (tau - drift) / g
        var_u = 2 / g * (tau - 2 * drift + (1 - e * e) / (2 * g))
        values = {"e": e, "drift": drift, "push": push, "uu": var_u, "uv": (1 - e) ** 2 / g, "vv": 1 - e * e}
        return {key: float(value) for key, value in values.items()}


lengths = pytest.mark.parametrize("length", [1e-8, 1e-6, 1e-4, 1e-2, 0.1, 0.2499, 0.2501, 0.5, 1.0, 3.0])
frictions = pytest.mark.parametrize("friction", [0.3, 2.0, 10.0])


@lengths
@frictions
def test_noise_of_one_step_has_the_closed_form_covariance(friction, length):
    """The closed form itself loses all digits below length 1e-5 in float64: Var ζ_u is a third-order remainder."""
    table, rows = table_of(piadm.Corrector(friction=friction, horizon=length, step=length))
    assert rows.stop - rows.start == 1
    C = table.C[rows][0]
    found, exact = C @ C.T, closed_form(friction, length)
    # relative in every entry: a few roundings of e and of the square root, squared again
    assert found[0, 0].item() == pytest.approx(exact["uu"], rel=100 * ULP)
    assert found[0, 1].item() == pytest.approx(exact["uv"], rel=100 * ULP)
    assert found[1, 1].item() == pytest.approx(exact["vv"], rel=100 * ULP)


@lengths
@frictions
def test_drift_of_one_step_has_the_closed_form(friction, length):
    t = 0.5
    table, rows = table_of(piadm.Corrector(friction=friction, horizon=length, step=length), t)
    A, B = table.A[rows][0], table.B[rows][0]
    alpha, noise, exact = math.exp(-t / 2), -math.expm1(-t), closed_form(friction, length)
    # f enters through the score (α f - x)/σ²
    assert A[0, 1].item() == pytest.approx(exact["drift"], rel=20 * ULP)
    assert A[1, 1].item() == pytest.approx(exact["e"], rel=20 * ULP)
    assert A[1, 0].item() == pytest.approx(-exact["drift"] / noise, rel=20 * ULP)
    assert B[1].item() == pytest.approx(alpha / noise * exact["drift"], rel=20 * ULP)
    assert A[0, 0].item() == pytest.approx(1 - exact["push"] / noise, rel=20 * ULP)
    # push = (τ - drift)/γ is a difference of numbers of size τ, and acts beside drift: an ulp of τ/γ in it is harmless
    slack = 20 * ULP * length / friction
    assert B[0].item() == pytest.approx(alpha / noise * exact["push"], rel=20 * ULP, abs=alpha / noise * slack)


@pytest.mark.parametrize("parts", [2, 7])
@frictions
def test_noise_of_a_step_is_that_of_its_parts(friction, parts):
    """Where no score acts, a step's covariance is the flow of its parts' (Chapman-Kolmogorov), whatever the formulas."""
    whole, one = table_of(piadm.Corrector(friction=friction, horizon=0.6, step=0.6))
    cut, many = table_of(piadm.Corrector(friction=friction, horizon=0.6, step=0.6 / parts))
    assert many.stop - many.start == parts
    covariance = torch.zeros(2, 2, dtype=torch.float64)
    for A, C in zip(cut.A[many], cut.C[many], strict=True):
        flow = A.clone()
        flow[:, 0] = torch.tensor([1.0, 0.0])  # position moves the velocity through the score alone
        covariance = flow @ covariance @ flow.T + C @ C.T
    C = whole.C[one][0]
    torch.testing.assert_close(covariance, C @ C.T, rtol=1e-12, atol=0)


def alone(corrector, t, variance):
    """A scheme of the corrector alone, started from its target law: a fresh velocity, then its rows."""
    table, rows = table_of(corrector, t)
    alpha, sigma = math.exp(-t / 2), math.sqrt(-math.expm1(-t))
    first = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    size = rows.stop - rows.start + 1
    whole = piadm.Table(
        torch.cat([first[None], table.A[rows]]),
        torch.cat([torch.zeros(1, 2, dtype=torch.float64), table.B[rows]]),
        torch.cat([second[None], table.C[rows]]),
        torch.full((size,), t, dtype=torch.float64),
        torch.full((size + 1,), alpha, dtype=torch.float64),
        torch.full((size + 1,), sigma, dtype=torch.float64),
        scale=math.sqrt(alpha**2 * variance + sigma**2),
    )
    return lambda schedule: whole


def slope(steps, errors):
    return np.polyfit(np.log(steps), np.log(np.abs(errors)), 1)[0]


STEPS = np.array([0.08, 0.04, 0.02, 0.01])


@pytest.mark.parametrize("friction", [0.7, 2.0])
@pytest.mark.parametrize(("t", "variance"), [(0.5, 0.05), (0.5, 4.0), (1.0, 0.25)])
def test_stationary_law_tends_to_the_target_at_first_order_in_the_step(t, variance, friction):
    r"""The frozen score is late by half a step: its force $-(u + v s)/V$ loses $v s/V$, a friction of order τ: order 1."""
    alpha, noise = math.exp(-t / 2), -math.expm1(-t)
    V = alpha**2 * variance + noise
    gain = alpha * variance / V  # f = L u, the exact denoiser
    errors = []
    for step in STEPS:
        table, rows = table_of(piadm.Corrector(friction=friction, horizon=step, step=step), t)
        A = table.A[rows][0] + torch.outer(table.B[rows][0], torch.tensor([gain, 0.0], dtype=torch.float64))
        Q = table.C[rows][0] @ table.C[rows][0].T
        # Σ = A Σ Aᵀ + Q, as a linear system
        stationary = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - torch.kron(A, A), Q.flatten()).reshape(2, 2)
        errors.append((stationary - torch.diag(torch.tensor([V, 1.0], dtype=torch.float64))).norm().item())
    assert slope(STEPS, errors) == pytest.approx(1, abs=0.2)
    assert errors[-1] < 0.1


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
@pytest.mark.parametrize("friction", [0.7, 2.0])
def test_corrector_started_from_its_target_law_keeps_it_as_the_step_tends_to_zero(monkeypatch, friction, kind):
    """The output's variance, exactly, through the sampler; in parallel with rounds enough to have converged."""
    t, variance = 0.5, 0.25
    denoiser = piadm.targets.Gaussian(0.0, variance)
    V = math.exp(-t) * variance - math.expm1(-t)
    errors = []
    for step in STEPS:
        scheme = alone(piadm.Corrector(friction=friction, horizon=1.0, step=float(step)), t, variance)
        if kind == "sequential":
            sampler = piadm.Sequential(denoiser, scheme)
        else:
            sampler = piadm.Parallel(denoiser, scheme, propagator=Exponential(), window=Blocks(12), fill=Copy())
        errors.append(responses(monkeypatch, sampler, (1,)).variance.item() - V)
    assert slope(STEPS, errors) == pytest.approx(1, abs=0.2)
    assert abs(errors[-1]) < 0.02 * V


def test_corrector_brings_a_wrong_law_to_its_target(monkeypatch):
    """From twice the target's variance, through the sampler."""
    t, variance = 0.5, 0.25
    denoiser = piadm.targets.Gaussian(0.0, variance)
    V = math.exp(-t) * variance - math.expm1(-t)
    twice = 2 * variance - math.expm1(-t) / math.exp(-t)
    errors = []
    for horizon in (0.5, 1.0, 4.0):
        scheme = alone(piadm.Corrector(friction=2.0, horizon=horizon, step=0.02), t, twice)
        found = responses(monkeypatch, piadm.Sequential(denoiser, scheme), (1,))
        errors.append(found.variance.item() / V - 1)
    # 1 at the start; at the end what is left is the step's own bias, of first order: about half the step, 0.01
    assert 1 > errors[0] > 2 * errors[1] > 0
    assert abs(errors[2]) < 0.02
