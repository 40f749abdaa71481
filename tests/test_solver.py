"""Facts that hold for every propagator (section 1 of the mathematics), through the public API.

"Bit for bit" tests use denoisers of elementwise arithmetic that IEEE rounds the same in every batch (`ELEMENTWISE`); networks
and mixtures go through matrix products, whose rounding depends on the number of rows, and are held to float precision.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
import torch

import piadm
from piadm import propagators, stopping
from piadm.fills import Copy, Jump
from piadm.noise import Noise
from piadm.placement import Placement
from piadm.windows import Blocks, Pipelined, Sliding

S, D = 3, 4
PROPAGATORS = {
    "jacobi": propagators.Jacobi(),
    "identity": propagators.Identity(),
    "exponential": propagators.Exponential(),
    "gaussian": propagators.Gaussian(0.3),
    "secant": propagators.Secant(0.3),
}
SCHEMES = {
    "ddpm": (piadm.DDPM(12), piadm.schedules.DiscreteBetas.linear(1000)),
    "ddim": (piadm.DDIM(12), piadm.schedules.DiscreteBetas.linear(1000)),
    "sde": (piadm.ExponentialSDE(2.0, 1.0, 0.25, 0.05), piadm.schedules.OrnsteinUhlenbeck()),
    "corrected ode": (
        piadm.ExponentialODE(2.0, 1.0, 0.25, 0.05, piadm.Corrector(horizon=0.4, step=0.1)),
        piadm.schedules.OrnsteinUhlenbeck(),
    ),
}
ELEMENTWISE = {
    "smooth": lambda x, t: x / (1 + x.abs()) * (1 - 1e-4 * t.to(x.dtype)[:, None]),
    "expansive": lambda x, t: (3 * x).clamp(-50, 50) + 0.1,  # x0 grows threefold: Picard iteration diverges before it ends
    "discontinuous": lambda x, t: torch.floor(4 * x) / 2,
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
ways = pytest.mark.parametrize(
    ("scheme", "propagator"),
    # Identity is defined for one component alone
    [pair for pair in product(SCHEMES, PROPAGATORS) if pair != ("corrected ode", "identity")],
)
every_propagator = pytest.mark.parametrize("propagator", PROPAGATORS)
elementwise = pytest.mark.parametrize("network", ELEMENTWISE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@cache
def mixture(schedule):
    """Five well separated Gaussians of different widths: nonlinear, and harder for some samples than for others."""
    means = 1.5 * torch.randn(5, D, generator=generator(7), dtype=torch.float64)
    return piadm.targets.GaussianMixture(means, torch.linspace(0.02, 0.3, 5 * D).reshape(5, D).double(), schedule=schedule)


@cache
def denoiser_of(network, schedule):
    return piadm.Denoiser(ELEMENTWISE[network], schedule, "sample", variance=0.3)


def noise_like(dtype, samples=S):
    """A starting state; its dtype is the run's."""
    return torch.randn(samples, D, generator=generator(11), dtype=torch.float64).to(dtype)


@dataclasses.dataclass(frozen=True)
class Still:
    """All steps, for `rounds` rounds, and no stopping rule: every round's states can be looked at."""

    rounds: int

    def check(self, table):
        """Fits every table."""

    def advance(self, table, rounds, ready):
        first = len(table) if rounds == self.rounds else 0
        return torch.full_like(ready, first), torch.full_like(ready, len(table))


@dataclasses.dataclass(frozen=True)
class Perturbed:
    """A noise source with ξ of one step moved."""

    source: Noise
    step: int

    def __call__(self, first, last):
        xi = self.source(first, last).clone()
        if first <= self.step < last:
            xi[self.step - first] += 3
        return xi

    def __getattr__(self, name):
        return getattr(self.source, name)


def solver_of(denoiser, scheme, propagator, window, dtype, *, fill=None, tolerance=1e-6, perturb=None):
    """A solver and its first state, as `Parallel` builds them."""
    table = scheme(denoiser.schedule)
    noise = Noise(generator(), S, D, table.components, torch.device("cpu"), dtype)
    if perturb is not None:
        noise = Perturbed(noise, perturb)
    fill = Jump(denoiser.mean, denoiser.variance) if fill is None else fill
    solver = piadm.Solver(table, noise, propagator, window, fill, tolerance, denoiser.variance)
    return solver, solver.init(noise_like(dtype) * table.scale)


def states(solver, state, denoiser):
    """The states after 0, 1, 2, … rounds."""
    yield state
    while not state.done:
        request = solver.request(state)
        state = solver.update(state, denoiser(request.x, request.t))
        yield state


@cache
def sequential_states(denoiser, scheme, dtype):
    """Sequential states 0 … M, shape `(M + 1, k, S, D)`, by a window of one step; they end where `Sequential` does."""
    solver, state = solver_of(denoiser, scheme, propagators.Jacobi(), Sliding(1), dtype)
    path = torch.stack([state.x[0] for state in states(solver, state, denoiser)])
    oracle = piadm.Sequential(denoiser, scheme)((S, D), noise=noise_like(dtype), generator=generator())
    assert torch.equal(path[-1, 0], oracle.samples)
    assert len(path) == oracle.rounds + 1
    return path


def close(a, b, dtype, steps=1000):
    """Equal up to what `steps` roundings, all of one sign and amplified tenfold, could do to numbers of size 1."""
    torch.testing.assert_close(a, b, rtol=0, atol=10 * steps * torch.finfo(dtype).eps)


# The sequential sample


@dtypes
@ways
def test_window_of_one_is_bit_for_bit_the_sequential_sample_in_m_rounds(scheme, propagator, dtype):
    scheme, schedule = SCHEMES[scheme]
    denoiser, noise = mixture(schedule), noise_like(dtype)
    sequential = piadm.Sequential(denoiser, scheme)((S, D), noise=noise, generator=generator())
    one = piadm.Parallel(denoiser, scheme, propagator=PROPAGATORS[propagator], window=1)
    result = one((S, D), noise=noise, generator=generator())
    assert torch.equal(result.samples, sequential.samples)
    assert result.rounds == result.evaluations == sequential.rounds == len(one.table)
    assert result.samples.dtype == dtype
    assert result.converged


@dtypes
@ways
@pytest.mark.parametrize("network", ["smooth", "discontinuous"])
def test_sequential_trajectory_is_a_fixed_point_of_every_propagator(scheme, propagator, network, dtype):
    """Bit for bit: a round started there returns it, and sees no defect."""
    scheme, schedule = SCHEMES[scheme]
    denoiser = denoiser_of(network, schedule)
    path = sequential_states(denoiser, scheme, dtype)
    solver, state = solver_of(denoiser, scheme, PROPAGATORS[propagator], Still(3), dtype)
    assert not torch.equal(state.x, path)
    state = dataclasses.replace(state, x=path)
    for _ in range(2):  # the second round of Secant has two evaluations of every state, without a change between them
        request = solver.request(state)
        state = solver.update(state, denoiser(request.x, request.t))
        assert torch.equal(state.x, path)
        assert state.residual.abs().max() == 0


@dtypes
@ways
@elementwise
def test_after_k_rounds_the_first_k_states_are_exact_bit_for_bit(scheme, propagator, network, dtype):
    """Also for denoisers that expand threefold or jump, and for the second component; so M rounds always suffice."""
    scheme, schedule = SCHEMES[scheme]
    denoiser = denoiser_of(network, schedule)
    path = sequential_states(denoiser, scheme, dtype)
    M = len(path) - 1
    solver, first = solver_of(denoiser, scheme, PROPAGATORS[propagator], Still(M + 1), dtype)
    for k, state in enumerate(states(solver, first, denoiser)):
        if state.done:
            break
        assert torch.equal(state.x[: k + 1], path[: k + 1])
        assert state.x.isfinite().all()
    assert k == M + 1
    assert torch.equal(state.x[0], path[-1])


@dtypes
@every_propagator
def test_after_k_rounds_the_first_k_states_of_a_mixture_are_exact_to_float_precision(propagator, dtype):
    scheme, schedule = SCHEMES["ddpm"]
    denoiser = mixture(schedule)
    path = sequential_states(denoiser, scheme, dtype)
    solver, first = solver_of(denoiser, scheme, PROPAGATORS[propagator], Still(len(path) - 1), dtype)
    for k, state in enumerate(states(solver, first, denoiser)):
        if not state.done:
            close(state.x[: k + 1], path[: k + 1], dtype)
    close(state.x[0], path[-1], dtype)


@ways
@elementwise
@pytest.mark.parametrize("window", [5, None], ids=["window 5", "full window"])
def test_no_denoiser_needs_more_than_m_rounds(scheme, propagator, network, window):
    scheme, schedule = SCHEMES[scheme]
    sampler = piadm.Parallel(
        denoiser_of(network, schedule),
        scheme,
        propagator=PROPAGATORS[propagator],
        window=window,
        tolerance=1e-30,
        max_rounds=100,  # so that a solver that hangs fails
    )
    starts = []
    result = sampler(
        (S, D), noise=noise_like(torch.float32), generator=generator(), callback=lambda r, w, _: starts.append(w[0])
    )
    assert result.converged
    assert result.rounds <= len(sampler.table)
    assert all(start >= r for r, start in enumerate(starts))  # every sample advances by a step or more in every round
    assert result.samples.isfinite().all()


@dtypes
@ways
def test_converged_sample_is_the_sequential_one(scheme, propagator, dtype):
    scheme, schedule = SCHEMES[scheme]
    denoiser, noise = mixture(schedule), noise_like(dtype)
    # near what float32 can tell of a sample, and well above it in float64
    tolerance = 1e-5 if dtype is torch.float32 else 1e-9
    sequential = piadm.Sequential(denoiser, scheme)((S, D), noise=noise, generator=generator())
    parallel = piadm.Parallel(denoiser, scheme, propagator=PROPAGATORS[propagator], tolerance=tolerance)
    result = parallel((S, D), noise=noise, generator=generator())
    # the rule is an estimate of an rms over D coordinates: allow it a factor 3, and one coordinate all of the rms
    close_enough = 3 * tolerance * D**0.5 + 1e4 * torch.finfo(dtype).eps
    assert (result.samples - sequential.samples).abs().max() < close_enough


@pytest.fixture(scope="module")
def digits():
    return {dtype: piadm.models.load("digits", dtype=dtype) for dtype in (torch.float32, torch.float64)}


@dtypes
@every_propagator
@pytest.mark.parametrize("make", [piadm.DDIM, piadm.DDPM], ids=["ddim", "ddpm"])
def test_trained_network_gives_the_sequential_digits(digits, make, propagator, dtype):
    scheme, shape, label = make(6), (2, 1, 8, 8), torch.tensor([3, 10])
    sequential = piadm.Sequential(digits[dtype], scheme)(shape, generator=generator(), label=label)
    way = PROPAGATORS[propagator]
    one = piadm.Parallel(digits[dtype], scheme, propagator=way, window=1)(shape, generator=generator(), label=label)
    assert torch.equal(one.samples, sequential.samples)
    full = piadm.Parallel(digits[dtype], scheme, propagator=way, tolerance=1e-6)(shape, generator=generator(), label=label)
    assert full.rounds <= 6
    # x0 = (x - σ ε)/α divides float errors by α = 0.0064 at the first step: up to 1e3 eps a step
    assert (full.samples - sequential.samples).abs().max() < 3e-6 * 8 + 6e3 * torch.finfo(dtype).eps


# The propagators


def gain_by_hand(propagator, alpha, sigma, dx, df):
    """L of the denoiser's linear model for one step, shape `(S, 1)`; `None` where J is not built from one."""
    gaussian = torch.full((S, 1), alpha * 0.3 / (alpha**2 * 0.3 + sigma**2), dtype=torch.float64)
    match propagator:
        case "exponential":  # the score (α f - x)/σ² does not move
            return torch.full((S, 1), 1 / alpha, dtype=torch.float64)
        case "gaussian":
            return gaussian
        case "secant" if dx is None:
            return gaussian
        case "secant":
            length = (dx * dx).sum(1, keepdim=True)
            ratio = ((dx * df).sum(1, keepdim=True) / length).clamp(0, 1 / alpha)
            return torch.where(length > 0, ratio, gaussian)
    return None


@every_propagator
@pytest.mark.parametrize(
    "network",
    [ELEMENTWISE["smooth"], ELEMENTWISE["expansive"], lambda x, t: -0.5 * x],
    ids=["smooth", "steeper than a denoiser", "falling"],
)
def test_rounds_are_the_forward_substitution_with_the_propagators_own_jacobian(propagator, network):
    """Four rounds by hand, from the table of section 1: x'[m + 1] = Φ(x[m]) + J (x'[m] - x[m]), J = A + B L, or 0, or 1."""
    scheme, schedule = SCHEMES["ddpm"]
    denoiser = piadm.Denoiser(network, schedule, "sample", variance=0.3)
    way = PROPAGATORS[propagator]
    solver, state = solver_of(denoiser, scheme, way, Still(5), torch.float64, fill=Copy())
    table = solver.table
    M, xi = len(table), solver.noise(0, len(table))[:, 0]
    A, B, C = table.A[:, 0, 0], table.B[:, 0], table.C[:, 0, 0]
    x = [noise_like(torch.float64)] * (M + 1)
    x_before = f_before = None
    for after in list(states(solver, state, denoiser))[1:5]:
        f = [denoiser(x[m], table.times[m].expand(S)) for m in range(M)]
        new = [x[0]]
        for m in range(M):
            dx, df = (None, None) if x_before is None else (x[m] - x_before[m], f[m] - f_before[m])
            gain = gain_by_hand(propagator, schedule.alpha(table.times[m]), schedule.sigma(table.times[m]), dx, df)
            jacobian = {"jacobi": 0.0, "identity": 1.0}[propagator] if gain is None else A[m] + B[m] * gain
            new.append(A[m] * x[m] + B[m] * f[m] + C[m] * xi[m] + jacobian * (new[m] - x[m]))
        x_before, f_before, x = x, f, new
        torch.testing.assert_close(after.x[:, 0], torch.stack(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gaussian_propagator_is_exact_on_gaussian_data_in_one_round(scheme):
    """It is Newton's method there, also with a variance for each coordinate and for the pair (u, v)."""
    scheme, schedule = SCHEMES[scheme]
    variance = torch.tensor([0.01, 0.3, 1.0, 5.0], dtype=torch.float64)
    denoiser = piadm.targets.Gaussian(torch.tensor([0.0, 1.0, -1.0, 2.0]), variance, schedule=schedule)
    path = sequential_states(denoiser, scheme, torch.float64)
    solver, state = solver_of(denoiser, scheme, propagators.Gaussian(variance), Still(2), torch.float64, fill=Copy())
    _, after, _ = states(solver, state, denoiser)
    close(after.x, path, torch.float64)


# Causality


WINDOWS = {"still": Still(12), "blocks": Blocks(4), "pipelined": Pipelined(4), "sliding": Sliding(6)}


@pytest.mark.parametrize("fill", [Copy(), Jump(0.0, 0.3)], ids=["copy", "jump"])
@pytest.mark.parametrize("window", ["still", "blocks", "pipelined"])
@pytest.mark.parametrize(
    ("scheme", "propagator"),
    [pair for pair in product(("ddpm", "sde", "corrected ode"), PROPAGATORS) if pair != ("corrected ode", "identity")],
)
def test_in_every_round_a_state_depends_on_earlier_noise_alone(scheme, propagator, window, fill):
    """ξ_j is moved: in every round x[0] … x[j] are the same bits, and x[j + 1] has moved in the end."""
    scheme, schedule = SCHEMES[scheme]
    denoiser, way = denoiser_of("smooth", schedule), PROPAGATORS[propagator]
    for j in (0, 5):
        runs = []
        for perturb in (None, j):
            solver, state = solver_of(denoiser, scheme, way, WINDOWS[window], torch.float64, fill=fill, perturb=perturb)
            runs.append(list(states(solver, state, denoiser)))
        moved = False
        stochastic = bool((solver.table.C[j] != 0).any())
        for one, two in zip(*runs, strict=True):
            assert torch.equal(one.start, two.start)
            first = int(one.start[0])
            upto = max(0, j + 1 - first)
            assert torch.equal(one.x[:upto], two.x[:upto])
            if upto < len(one.x):
                moved = moved or not torch.equal(one.x[upto:], two.x[upto:])
        assert moved == stochastic


@every_propagator
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("network", ["smooth", "discontinuous"])
def test_a_sliding_window_finishes_no_state_by_looking_at_later_noise(network, tolerance, propagator):
    """When a step is accepted, and with what value, is a function of the noise before it."""
    scheme, schedule = SCHEMES["ddpm"]
    denoiser, way = denoiser_of(network, schedule), PROPAGATORS[propagator]

    def finished(j, perturb):
        """How far sample 0 has got after every round, up to step j + 1, and its state there."""
        solver, state = solver_of(denoiser, scheme, way, Sliding(6), torch.float64, tolerance=tolerance, perturb=perturb)
        out = []
        for s in states(solver, state, denoiser):
            out.append((min(int(s.start[0]), j + 1), s.x[0, :, 0]))
            if s.start[0] > j:
                return out
        raise AssertionError("the run ended before step j")

    for j in (1, 3, 4, 5, 7):
        for (step, x), (other_step, other) in zip(finished(j, None), finished(j, j), strict=True):
            assert step == other_step
            assert step > j or torch.equal(x, other)


# One seed, one sample


INVARIANCE = {
    "window 1": {"window": 1},
    "window 7": {"window": 7},
    "full window": {},
    "blocks": {"window": Blocks(12)},
    "pipelined": {"window": Pipelined(12)},
    "copy": {"fill": Copy()},
    "jacobi": {"propagator": propagators.Jacobi()},
    "identity, window 5": {"propagator": propagators.Identity(), "window": 5},
    "exponential, window 5": {"propagator": propagators.Exponential(), "window": 5},
    "gaussian, pipelined": {"propagator": propagators.Gaussian(0.3), "window": Pipelined(12)},
}


@pytest.mark.parametrize("rows", [None, 5], ids=["whole", "micro-batch 5"])
@pytest.mark.parametrize("options", INVARIANCE.values(), ids=list(INVARIANCE))
@pytest.mark.parametrize("scheme", ["ddpm", "sde"])
def test_one_seed_is_one_sample_for_every_window_block_split_micro_batch_and_propagator(scheme, options, rows):
    scheme, schedule = SCHEMES[scheme]
    denoiser = mixture(schedule)
    sequential = piadm.Sequential(denoiser, scheme)((S, D), generator=generator(5))
    run_by = denoiser if rows is None else piadm.MicroBatch(denoiser, rows)
    result = piadm.Parallel(run_by, scheme, tolerance=1e-6, **options)((S, D), generator=generator(5))
    # states are float32 here: tolerance 1e-6 is below what they resolve, 1e-4 what a dozen steps may amplify it to
    torch.testing.assert_close(result.samples, sequential.samples, rtol=0, atol=1e-4)
    other = piadm.Parallel(run_by, scheme, tolerance=1e-6, **options)((S, D), generator=generator(6))
    assert (other.samples - sequential.samples).abs().max() > 0.1


@pytest.mark.parametrize("splits", [(0, 12), (0, 1, 12), (0, 8, 12), (0, 5, 9, 12)])
def test_blocks_of_as_many_rounds_as_steps_are_exact_however_the_steps_are_split(splits):
    scheme, schedule = SCHEMES["ddpm"]
    denoiser = denoiser_of("discontinuous", schedule)
    table = dataclasses.replace(scheme(schedule), blocks=splits)
    sequential = piadm.Sequential(denoiser, scheme)((S, D), generator=generator())
    iterations = [b - a for a, b in pairwise(splits)]
    result = piadm.Parallel(denoiser, lambda _: table, window=Blocks(iterations))((S, D), generator=generator())
    assert torch.equal(result.samples, sequential.samples)
    assert result.rounds == 12


@every_propagator
@pytest.mark.parametrize("window", [Sliding(6), Sliding()], ids=["window 6", "full window"])
def test_each_sample_of_a_batch_advances_on_its_own(propagator, window):
    """A batch is its samples run alone; its rounds are the slowest sample's; a finished sample costs no rows."""
    scheme, schedule = SCHEMES["ddpm"]
    samples = 5
    sampler = piadm.Parallel(mixture(schedule), scheme, propagator=PROPAGATORS[propagator], window=window, tolerance=1e-3)
    start = noise_like(torch.float64, samples)
    batch = sampler((samples, D), noise=start, generator=[generator(i) for i in range(samples)])
    alone = [sampler((1, D), noise=start[i : i + 1], generator=[generator(i)]) for i in range(samples)]
    close(batch.samples, torch.cat([one.samples for one in alone]), torch.float64)
    assert batch.rounds == max(one.rounds for one in alone)
    assert batch.evaluations == pytest.approx(sum(one.evaluations for one in alone) / samples, rel=1e-12)
    for r, ((first, last), residuals) in enumerate(zip(batch.windows, batch.residuals, strict=True)):
        largest = torch.full((last - first,), -1.0, dtype=torch.float64)
        for one in alone:
            if r < one.rounds:
                here = slice(one.windows[r][0] - first, one.windows[r][1] - first)
                largest[here] = largest[here].maximum(one.residuals[r])
        close(residuals.nan_to_num(-1.0), largest, torch.float64)
    if propagator in ("identity", "gaussian", "secant"):  # the others crawl, at one speed
        assert len({one.evaluations for one in alone}) > 1  # the samples do differ, or this test says little


# The sweep


def sweep_in_float64(phi, jacobian, x):
    """The recursion as it is written, in numpy's float64; and with all signs positive, a bound on what rounding can act on."""
    phi, jacobian, x = (v.double().numpy() for v in (phi, jacobian, x))
    k, W = phi.shape[1], len(phi)
    new, size = np.array(x), np.abs(x)
    change = np.zeros_like(x[0])  # of state m, with every term's absolute value
    for m in range(W):
        J = np.broadcast_to(jacobian[m], (k, k, *x.shape[2:]))
        new[m + 1] = phi[m] + np.einsum("abij,bij->aij", J, new[m] - x[m])
        size[m + 1] = np.abs(phi[m]) + np.einsum("abij,bij->aij", np.abs(J), change)
        change = size[m + 1] + np.abs(x[m + 1])
    return new, size


branches = pytest.mark.parametrize("branch", [0, 10**9], ids=["loop", "scan"])


@branches
@dtypes
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 33])
@pytest.mark.parametrize("shape", [(1, 1), (1, D), (S, D)], ids=["one J", "J per coordinate", "J per number"])
def test_loop_and_scan_are_the_forward_substitution(monkeypatch, branch, dtype, k, width, shape):
    monkeypatch.setattr(piadm.sweep, "LOOP_FROM", branch)
    monkeypatch.setattr(piadm.sweep, "LOOP_TO", 1)
    g = generator(width)
    phi, x = torch.randn(width, k, S, D, generator=g), torch.randn(width + 1, k, S, D, generator=g)
    jacobian = torch.randn(width, k, k, *shape, generator=g)
    phi, x, jacobian = phi.to(dtype), x.to(dtype), jacobian.to(dtype)
    found, _ = piadm.sweep.sweep(phi, jacobian, x)
    expected, size = sweep_in_float64(phi, jacobian, x)
    # every term passes at most (k + 2) W roundings on its way, in whatever order terms are joined
    bound = (k + 2) * (width + 1) * torch.finfo(dtype).eps * size
    assert (np.abs(found.double().numpy() - expected) <= bound).all()
    assert found.dtype == dtype


EXTREME = {
    "vanishing": [1e-30] * 12,
    "vanishing to the denormals": [1e-30, 1e-10, 1e-30, 1.0] * 3,
    "up and down": [1.0, 1e30, 1e-30, 1e30, 1e-30, 1.0] * 2,
    "down and up": [1.0, 1e-30, 1e30, 1e-30, 1e30, 1.0] * 2,
    "zeros": [0.0, 1.0, 0.0, 0.0, 2.0] * 3,
}


@branches
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factors", EXTREME.values(), ids=list(EXTREME))
def test_sweep_survives_products_of_j_that_vanish_or_alternate_between_extremes(monkeypatch, branch, k, factors):
    monkeypatch.setattr(piadm.sweep, "LOOP_FROM", branch)
    monkeypatch.setattr(piadm.sweep, "LOOP_TO", 1)
    width, g = len(factors), generator(1)
    phi, x = torch.rand(width, k, S, D, generator=g), torch.rand(width + 1, k, S, D, generator=g)
    jacobian = torch.tensor(factors)[:, None, None, None, None] * torch.eye(k)[None, :, :, None, None]
    found, _ = piadm.sweep.sweep(phi, jacobian, x)
    expected, size = sweep_in_float64(phi, jacobian, x)
    assert found.isfinite().all()
    bound = (k + 2) * (width + 1) * torch.finfo(torch.float32).eps * size
    assert (np.abs(found.double().numpy() - expected) <= bound).all()


@branches
def test_where_nothing_changed_the_sweep_returns_phi_to_the_last_bit(monkeypatch, branch):
    monkeypatch.setattr(piadm.sweep, "LOOP_FROM", branch)
    monkeypatch.setattr(piadm.sweep, "LOOP_TO", 1)
    g = generator(2)
    phi, jacobian = torch.randn(9, 2, S, D, generator=g), torch.randn(9, 2, 2, S, D, generator=g)
    x = torch.cat([torch.randn(1, 2, S, D, generator=g), phi])
    x[6:] += 1  # the first five states agree with Φ of the ones before them
    found, _ = piadm.sweep.sweep(phi, jacobian, x)
    assert torch.equal(found[:7], torch.cat([x[:1], phi[:6]]))
    assert not torch.equal(found[7:], phi[6:])


@pytest.mark.parametrize("branch", [0, 10**9], ids=["loop", "scan"])
def test_sweep_survives_products_of_j_that_overflow_where_no_change_meets_them(monkeypatch, branch):
    monkeypatch.setattr(piadm.sweep, "LOOP_FROM", branch)
    monkeypatch.setattr(piadm.sweep, "LOOP_TO", 1)
    jacobian = torch.tensor([1.0] + [1e30] * 4 + [1.0])[:, None, None, None, None]
    found, _ = piadm.sweep.sweep(torch.ones(6, 1, 1, 1), jacobian, torch.ones(7, 1, 1, 1))
    assert torch.equal(found, torch.ones(7, 1, 1, 1))


# Counting, reporting, and stepping by hand


class Counted(torch.nn.Module):
    """Counts its calls and rows."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls, self.rows = function, 0, 0

    def forward(self, x, t):
        assert t.shape == x.shape[:1]
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.function(x, t)


@pytest.mark.parametrize(
    "window", [1, 5, None, Blocks(3), Pipelined(3)], ids=["window 1", "window 5", "full", "blocks", "pipelined"]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounds_and_evaluations_are_the_networks_calls_and_rows(scheme, window):
    scheme, schedule = SCHEMES[scheme]
    network = Counted(ELEMENTWISE["smooth"])
    sampler = piadm.Parallel(piadm.Denoiser(network, schedule, "sample"), scheme, window=window, tolerance=1e-3)
    result = sampler((S, D), noise=noise_like(torch.float64), generator=generator())
    doubted = window != 1  # where a step is evaluated twice, the network is asked two rows once more, see piadm.repeatable
    assert result.rounds + result.certificate.calls == network.calls - doubted
    rows = network.rows - 2 * doubted
    assert result.evaluations + result.certificate.evaluations == pytest.approx(rows / S, rel=1e-12)
    assert result.certificate.evaluations in (0, result.steps)
    assert result.steps == len(sampler.table)
    assert result.evaluations >= result.steps  # every step is evaluated at least once
    blocks = len(sampler.table.blocks) - 1
    if isinstance(window, Blocks):
        assert (result.rounds, result.evaluations) == (3 * blocks, 3 * result.steps)
    if isinstance(window, Pipelined):
        assert (result.rounds, result.evaluations) == (blocks + 2, 3 * result.steps)
    if window == 1:
        assert result.rounds == result.evaluations == result.steps


def test_sequential_counts_one_call_a_step():
    scheme, schedule = SCHEMES["ddpm"]
    network = Counted(ELEMENTWISE["smooth"])
    result = piadm.Sequential(piadm.Denoiser(network, schedule, "sample"), scheme)((S, D), generator=generator())
    assert (network.calls, network.rows) == (12, 12 * S)
    assert (result.rounds, result.evaluations, result.steps) == (12, 12.0, 12)
    assert result.converged


@every_propagator
def test_max_rounds_ends_a_run_early_with_its_best_prediction(propagator):
    scheme, schedule = SCHEMES["ddpm"]
    denoiser, way, noise = mixture(schedule), PROPAGATORS[propagator], noise_like(torch.float64)

    def run(max_rounds=None):
        options = {"propagator": way, "window": 4, "tolerance": 1e-6, "max_rounds": max_rounds}
        return piadm.Parallel(denoiser, scheme, **options)((S, D), noise=noise, generator=generator())

    whole = run()
    cut = run(whole.rounds - 1)
    assert whole.converged
    assert not cut.converged
    assert cut.rounds == whole.rounds - 1
    assert cut.samples.shape == (S, D)
    assert cut.samples.isfinite().all()
    # one round short of the end, the newest E[x0 | x] is already near the sample, whose components have deviation ≤ 0.55
    assert (cut.samples - whole.samples).square().mean().sqrt() < 0.55
    assert run(whole.rounds).converged


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("window", [4, 8, None, Blocks(3)], ids=["window 4", "window 8", "full", "blocks"])
def test_callback_hears_of_every_round_its_window_and_a_residual_for_each_step_there(window, samples):
    scheme, schedule = piadm.DDPM(40), piadm.schedules.DiscreteBetas.linear(1000)
    heard = []
    sampler = piadm.Parallel(mixture(schedule), scheme, window=window, tolerance=1e-3)
    noise = noise_like(torch.float64, samples)
    result = sampler((samples, D), noise=noise, generator=generator(), callback=lambda *round: heard.append(round))
    assert [r for r, _, _ in heard] == list(range(1, result.rounds + 1))
    assert len(result.residuals) == len(result.windows) == result.rounds
    for (_, window, residuals), kept, kept_window in zip(heard, result.residuals, result.windows, strict=True):
        first, last = window
        assert 0 <= first < last <= 40
        assert residuals.shape == (last - first,)
        # NaN stands where no sample's window was: never at the ends, and nowhere for one sample
        assert residuals[[0, -1]].isfinite().all()
        assert samples > 1 or residuals.isfinite().all()
        assert not (residuals < 0).any()
        assert torch.equal(residuals, kept)
        assert window == kept_window
    assert [w[0] for w in result.windows] == sorted(w[0] for w in result.windows)
    assert result.windows[0][0] == 0
    assert result.windows[-1][1] == 40


def test_residual_is_the_rms_defect_of_the_step_it_is_given_for():
    """By hand for the first round of a full window: the states are the fill's, and the largest sample counts."""
    scheme, schedule = SCHEMES["ddpm"]
    denoiser = denoiser_of("smooth", schedule)
    solver, _ = solver_of(denoiser, scheme, propagators.Gaussian(0.3), Sliding(), torch.float64, fill=Copy())
    table, x = solver.table, noise_like(torch.float64)
    xi = solver.noise(0, len(table))
    residuals = []
    for m in range(len(table)):  # every state is a copy of the start
        f = denoiser(x, table.times[m].expand(S))
        defect = table.A[m, 0, 0] * x + table.B[m, 0] * f + table.C[m, 0, 0] * xi[m, 0] - x
        residuals.append(defect.square().mean(1).sqrt().max())
    sampler = piadm.Parallel(denoiser, scheme, propagator=propagators.Gaussian(0.3), fill=Copy())
    result = sampler((S, D), noise=x, generator=generator())
    torch.testing.assert_close(result.residuals[0], torch.stack(residuals))


def test_repr_of_a_result_says_what_was_run_in_one_line():
    scheme, schedule = SCHEMES["ddpm"]
    result = piadm.Parallel(mixture(schedule), scheme)((S, D), generator=generator())
    text = repr(result)
    assert "\n" not in text
    assert len(text) < 300
    for piece in ("Result(", "(3, 4)", "float32", "steps=12", f"rounds={result.rounds}", "converged=True", "seconds="):
        assert piece in text


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("window", [Sliding(5), Sliding(), Blocks(3), Pipelined(3)], ids=repr)
def test_stepping_by_hand_is_parallel(scheme, window):
    scheme, schedule = SCHEMES[scheme]
    denoiser, way = mixture(schedule), propagators.Secant(0.3)
    solver, state = solver_of(denoiser, scheme, way, window, torch.float64, tolerance=1e-3)
    while not state.done:
        request = solver.request(state)
        assert request.x.shape == (len(request.t), D)
        assert len(request.sample) == len(request.t)
        state = solver.update(state, denoiser(request.x, request.t))
    sampler = piadm.Parallel(denoiser, scheme, propagator=way, window=window, tolerance=1e-3)
    result = sampler((S, D), noise=noise_like(torch.float64), generator=generator())
    assert torch.equal(state.x[0, 0], result.samples)
    assert state.rounds == result.rounds
    assert state.evaluations.double().mean() == result.evaluations
    assert state.start.tolist() == [len(sampler.table)] * S


def test_stepping_by_hand_keeps_no_graph_of_the_network():
    scheme, schedule = SCHEMES["ddpm"]
    network = torch.nn.Linear(D, D, dtype=torch.float64)
    denoiser = piadm.Denoiser(lambda x, t: network(x), schedule, "sample", variance=0.3)
    solver, state = solver_of(denoiser, scheme, propagators.Secant(0.3), Sliding(5), torch.float64)
    for _ in range(3):
        request = solver.request(state)
        f = denoiser(request.x, request.t)
        assert f.requires_grad
        state = solver.update(state, f)
    assert not any(part.requires_grad for part in state.parts().values() if isinstance(part, torch.Tensor))


def test_a_state_can_be_updated_twice():
    """States are values: a round makes a new one and leaves the old one as it was."""
    scheme, schedule = SCHEMES["ddpm"]
    denoiser = denoiser_of("smooth", schedule)
    solver, state = solver_of(denoiser, scheme, propagators.Secant(0.3), Sliding(5), torch.float64)
    for _ in range(3):
        request = solver.request(state)
        f = denoiser(request.x, request.t)
        before = state.x.clone()
        one, two = solver.update(state, f), solver.update(state, f)
        assert torch.equal(state.x, before)
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.start, two.start)
        state = one


@pytest.mark.parametrize("network", [lambda x, t: x.sin(), lambda x, t: x / (1 + x * x)], ids=["sine", "rational"])
@pytest.mark.parametrize("scheme", [piadm.DDPM(60), piadm.DDIM(60)], ids=["ddpm", "ddim"])
def test_one_number_a_sample_whose_secants_fit_whatever_they_see_keeps_the_tolerance(network, scheme):
    denoiser = piadm.Denoiser(network, piadm.schedules.DiscreteBetas.linear(1000), "sample", event_shape=(1,))
    noise = torch.randn(200, 1, generator=generator(), dtype=torch.float64)
    sequential = piadm.Sequential(denoiser, scheme)((200, 1), noise=noise, generator=generator())
    for tolerance in (1e-2, 1e-4, 1e-6):
        result = piadm.Parallel(denoiser, scheme, window=20, tolerance=tolerance)((200, 1), noise=noise, generator=generator())
        assert (result.samples - sequential.samples).abs().max() <= tolerance


@pytest.mark.parametrize("variance", [0.0, torch.zeros(6)], ids=["number", "tensor"])
def test_a_variance_of_zero_does_not_make_every_error_nothing(variance):
    network = lambda x, t: (3 * x).sin()  # noqa: E731
    denoiser = piadm.Denoiser(
        network, piadm.schedules.DiscreteBetas.linear(1000), "sample", variance=variance, event_shape=(6,)
    )
    noise = torch.randn(4, 6, generator=generator(), dtype=torch.float64)
    sequential = piadm.Sequential(denoiser, piadm.DDIM(40))((4, 6), noise=noise, generator=generator())
    result = piadm.Parallel(denoiser, piadm.DDIM(40), window=10, tolerance=1e-3)((4, 6), noise=noise, generator=generator())
    assert (result.samples - sequential.samples).square().mean(1).sqrt().max() <= 1e-3


def test_where_no_step_waits_for_a_lane_errors_are_kept_sparingly():
    """Half of a window's steps cost half of what they may: accepted while steps wait, not where the window ends the table."""
    rule = stopping.Rule(piadm.DDIM(20)(piadm.schedules.DiscreteBetas.linear(1000)), 1.0, tolerance=0.1)

    def accepted(start, stop, kept, cost):
        """With `kept` spent before, and `cost` of the allowance at the last of these steps spent from the middle one on."""
        placed = Placement.around(torch.tensor([start]), torch.tensor([stop]))
        error = np.full((placed.count + 1, 1), kept)
        error[1 + placed.count // 2 :] = cost * 0.1 * math.sqrt(stop / 20)
        return int(rule.accepted(error, placed, np.array([stop == 20])))

    assert accepted(0, 10, 0.0, 0.7) == 10
    assert accepted(0, 20, 0.0, 0.7) == 10  # what costs nothing is accepted there too
    assert accepted(0, 20, 0.0, math.sqrt(stopping.ENDING) / 2) == 20
    assert accepted(10, 20, 0.05, 1.0) == 5
    assert accepted(10, 20, 0.099, 1.0) == 1  # the first step is exact, whatever was spent
    assert accepted(0, 20, 0.0, math.nan) == 10
