"""The certificate: an upper bound on every exact law that is known, and exactly the divergence of the whole paths."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from linear import kl, law, path, path_kl, responses, score_slope
from test_solver import ELEMENTWISE, Perturbed, denoiser_of, generator, mixture, noise_like, solver_of, states

import piadm
from piadm import propagators
from piadm.certificate import information
from piadm.fills import Copy, Jump
from piadm.noise import Noise
from piadm.solver import Solver
from piadm.windows import Blocks, Pipelined, Sliding

GUESS = 0.5
"""The variance that the Gaussian propagator is told; the data have others."""
SLOPES = {
    "jacobi": (propagators.Jacobi(), lambda v, t, e: 0.0),
    "identity": (propagators.Identity(), lambda v, t, e: 1.0),
    "exponential": (propagators.Exponential(), lambda v, t, e: math.exp(e / 2)),
    "gaussian": (
        propagators.Gaussian(GUESS),
        lambda v, t, e: math.exp(e / 2) + 2 * math.expm1(e / 2) * score_slope(GUESS, t),
    ),
    # with one coordinate the slope of an affine denoiser is exact from a step's second round on
    "secant": (propagators.Secant(GUESS), None),
}
CASES, PARTS = 400, 4
BETAS = piadm.schedules.DiscreteBetas.linear(1000)


@dataclasses.dataclass(frozen=True)
class Case:
    numbers: dict[str, float]
    rounds: int
    propagator: str
    variances: tuple[float, ...]

    @property
    def grid(self):
        return tuple(self.numbers.values())


def random_case(seed):
    rng = np.random.default_rng(seed)
    T = rng.uniform(0.5, 8)
    h = T / rng.integers(1, 1 + math.ceil(T))
    numbers = {"horizon": T, "block": h, "step": min(rng.uniform(0.1, 0.5), h), "early_stop": 10 ** rng.uniform(-2.5, -1)}
    numbers["early_stop"] = min(numbers["early_stop"], h / 3)
    name = list(SLOPES)[seed % len(SLOPES)]
    size = 1 if name == "secant" else 4
    return Case(numbers, int(rng.integers(1, 9)), name, tuple(np.exp(rng.uniform(np.log(0.02), np.log(8), size))))


def run(monkeypatch, case):
    """Exact expectations of a sampler's own certificate and output variances, without sampling."""
    denoiser = piadm.targets.Gaussian(0.0, torch.tensor(case.variances, dtype=torch.float64))
    scheme = piadm.ExponentialSDE(**case.numbers)
    propagator, _ = SLOPES[case.propagator]
    sampler = piadm.Parallel(denoiser, scheme, propagator=propagator, window=Blocks(case.rounds), fill=Copy())
    return responses(monkeypatch, sampler, (len(case.variances),))


@pytest.mark.parametrize("part", range(PARTS))
def test_certificate_lies_above_the_exact_divergence_and_is_that_of_the_paths(monkeypatch, part):
    """400 random targets, grids, numbers of rounds, propagators.

    It is above the output's divergence always, and within a factor of 500 of it in five of six: the output forgets what
    happened on the way, and where errors cancel in its variance no bound on the paths sees it. Of the paths it is the
    divergence itself.
    """
    far, compared = 0, 0
    for seed in range(part, CASES, PARTS):
        case = random_case(seed)
        found = run(monkeypatch, case)
        sequential = [law(v, *case.grid, None).variance for v in case.variances]
        exact = sum(kl(a, b) for a, b in zip(found.variance.tolist(), sequential, strict=True))
        floor = 1e-12 * len(found.noise)  # squares of some roundings of numbers of size up to 1e3, over C² from 1e-4
        assert found.nats >= exact * (1 - 1e-9) - floor, case
        if exact > floor:
            compared += 1
            far += found.nats > 500 * exact
        slope = SLOPES[case.propagator][1]
        if slope is not None:
            paths = [[path(v, *case.grid, rounds, slope) for rounds in (case.rounds, None)] for v in case.variances]
            assert found.nats == pytest.approx(sum(path_kl(*both) for both in paths), rel=1e-6, abs=floor), case
    assert compared > CASES / PARTS / 2  # or the factor was hardly looked at
    assert far <= compared / 6


@pytest.mark.parametrize("propagator", SLOPES)
def test_batch_mean_is_within_its_standard_error_of_the_expectation(monkeypatch, propagator):
    case = Case({"horizon": 3.0, "block": 1.0, "step": 0.25, "early_stop": 0.02}, 2, propagator, (0.1, 1.0, 3.0))
    exact = run(monkeypatch, case).nats
    monkeypatch.undo()
    denoiser = piadm.targets.Gaussian(0.0, torch.tensor(case.variances, dtype=torch.float64))
    n = 4000
    for window in (Blocks(2), Pipelined(2)):
        sampler = piadm.Parallel(
            denoiser, piadm.ExponentialSDE(**case.numbers), propagator=SLOPES[propagator][0], window=window
        )
        found = sampler((n, 3), generator=generator()).certificate
        assert found.rigorous
        assert found.rms == 0
        assert found.tv == min(1.0, math.sqrt(found.kl / 2))
        if window == Blocks(2) and propagator != "secant":  # with three variances a secant is not linear
            fill = piadm.Parallel(
                denoiser, piadm.ExponentialSDE(**case.numbers), propagator=SLOPES[propagator][0], window=window, fill=Copy()
            )
            copied = fill((n, 3), generator=generator()).certificate
            assert abs(copied.kl - exact) < 4.5 * copied.standard_error
            # sums of squares of Gaussians: their deviation is of the order of their mean, and the standard error knows n
            assert copied.standard_error < 5 * copied.kl / math.sqrt(n)


def test_secants_of_an_anisotropic_target_keep_below_their_certificate():
    """Not linear, so no exact law: but of all laws with a given variance the Gaussian's divergence is the least."""
    n, variances = 20_000, torch.tensor([0.05, 0.3, 2.0], dtype=torch.float64)
    numbers = {"horizon": 4.0, "block": 2.0, "step": 0.25, "early_stop": 0.02}
    denoiser = piadm.targets.Gaussian(0.0, variances)
    seen = []
    for rounds in (1, 2, 3, 4):
        scheme, propagator = piadm.ExponentialSDE(**numbers), propagators.Secant(GUESS)
        sampler = piadm.Parallel(denoiser, scheme, propagator=propagator, window=Blocks(rounds), fill=Copy())
        result = sampler((n, 3), generator=generator())
        reference = [law(v, *numbers.values(), None).variance for v in variances.tolist()]
        least = sum(kl(a, b) for a, b in zip(result.samples.double().square().mean(0).tolist(), reference, strict=True))
        # a variance's standard error is sqrt(2/n) of it, and adds up to its square over 4, thrice, to what is true
        assert result.certificate.kl + 4.5 * result.certificate.standard_error + 4.5 * 3 / (2 * n) >= least
        seen.append(result.certificate.kl)
    assert all(b < a for a, b in pairwise(seen))


# What is measured, and by whom


def by_hand(table, x, f, noise):
    """Every sample's Σ ‖δ‖²/(2 C²) of a path `(M + 1, 1, S, D)`, and the rms of its last defect."""
    A, B, C = (value.reshape(-1, 1, 1) for value in (table.A, table.B, table.C))
    delta = x[1:, 0] - (A * x[:-1, 0] + B * f + C * noise[:, 0])
    noisy = C[:, 0, 0] > 0
    return (delta.square() / (2 * C**2))[noisy].sum((0, 2)), delta[-1].square().mean(-1).sqrt()


def accepted(solver, state, denoiser):
    """The path of states as they were accepted, `(M + 1, k, S, D)`, and the last state of the solver."""
    path = [[x] for x in state.x[0].unbind(1)]
    for last in states(solver, state, denoiser):
        left = last.left
        if left is None:
            continue
        for s, (begin, end) in enumerate(zip(left.start.tolist(), left.stop.tolist(), strict=True)):
            path[s] += [left.x[1 + m, :, s] for m in range(end - begin)]
    return torch.stack([torch.stack(states) for states in path], dim=2), last


WINDOWS = {"full": Sliding(), "window 5": Sliding(5), "blocks": Blocks(2), "pipelined": Pipelined(2)}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=list(WINDOWS))
@pytest.mark.parametrize("scheme", [piadm.DDPM(12), piadm.ExponentialSDE(2.0, 1.0, 0.25, 0.05)], ids=["ddpm", "sde"])
def test_measured_certificate_is_the_sum_over_accepted_states(scheme, window):
    """A mixture, so nothing is linear: the defects are those of the states as they were accepted, whatever the window."""
    denoiser = mixture(BETAS if isinstance(scheme, piadm.DDPM) else piadm.schedules.OrnsteinUhlenbeck())
    solver, first = solver_of(denoiser, scheme, propagators.Secant(0.3), window, torch.float64, tolerance=3e-2)
    solver = dataclasses.replace(solver, keep=True)
    path, last = accepted(solver, first, denoiser)
    table = solver.table
    f = torch.stack([denoiser(x[0], t.expand(x.shape[1])) for x, t in zip(path[:-1], table.times, strict=True)])
    nats, shift = by_hand(table, path, f, solver.noise(0, len(table)))
    sampler = piadm.Parallel(denoiser, scheme, propagator=solver.propagator, window=window, tolerance=3e-2, audit=True)
    result = sampler(path.shape[2:], noise=noise_like(torch.float64), generator=generator())
    certificate = result.certificate
    assert torch.equal(result.samples, last.finished())
    assert certificate.kl == pytest.approx(nats.mean().item(), rel=1e-9)
    assert certificate.kl > 0
    assert certificate.standard_error == pytest.approx(nats.std().item() / math.sqrt(len(nats)), rel=1e-9)
    noiseless = shift if isinstance(scheme, piadm.DDPM) else 0 * shift
    assert certificate.rms == pytest.approx(noiseless.square().mean().sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=list(WINDOWS))
@pytest.mark.parametrize(("scheme", "schedule"), [(piadm.DDPM(12), BETAS), (piadm.DDIM(12), BETAS)], ids=["ddpm", "ddim"])
def test_an_audit_never_changes_the_samples(scheme, schedule, window):
    """Bit for bit, also for a network whose rounding depends on the batch: the audit has calls of its own."""
    denoiser = mixture(schedule)
    results = []
    for audit in (False, True):
        sampler = piadm.Parallel(denoiser, scheme, window=window, tolerance=1e-3, audit=audit)
        results.append(sampler((3, 4), noise=noise_like(torch.float32), generator=generator()))
    without, within = results
    assert torch.equal(without.samples, within.samples)
    assert (without.rounds, without.evaluations) == (within.rounds, within.evaluations)
    assert (without.certificate.calls, without.certificate.evaluations) == (0, 0)
    assert within.certificate.evaluations == within.steps
    assert (without.certificate.rigorous, within.certificate.rigorous) == (False, True)


@pytest.mark.parametrize("network", ELEMENTWISE)
@pytest.mark.parametrize("step", [3, 7, 10])
@pytest.mark.parametrize("target", [None, 1.0], ids=["tolerance", "target"])
@pytest.mark.parametrize("window", [Sliding(), Sliding(4)], ids=["full", "window 4"])
def test_accepting_a_step_looks_at_earlier_noise_only(network, step, target, window):
    """What makes the certificate hold where the run decides its own rounds: x[m] is final as if ξ_m were not drawn."""
    paths = []
    for perturb in (None, step):
        scheme, denoiser = piadm.DDPM(12), denoiser_of(network, BETAS)
        # loose, so that steps are accepted with defects
        solver, first = solver_of(denoiser, scheme, propagators.Secant(0.3), window, torch.float64, tolerance=0.3)
        noise = solver.noise if perturb is None else Perturbed(solver.noise, perturb)
        solver = dataclasses.replace(solver, noise=noise, keep=True, target_kl=target)
        path, last = accepted(solver, solver.init(first.x[0, 0]), denoiser)
        paths.append(path)
    assert torch.equal(paths[0][: step + 1], paths[1][: step + 1])
    assert not torch.equal(paths[0][step + 1], paths[1][step + 1])
    assert last.rounds < 12  # or every step was exact, and nothing was decided


@pytest.mark.parametrize("step", [20, 34])
def test_of_many_samples_none_is_accepted_or_judged_by_later_noise(step):
    """The same, in bulk: what the stopping rule learns from a window's later steps is not for its earlier ones."""
    samples, d, scheme = 200, 4, piadm.DDPM(40)
    modes = torch.tensor([[0.3], [-0.3]], dtype=torch.float64).expand(2, d)
    denoiser = piadm.targets.GaussianMixture(modes, 0.01, schedule=BETAS)
    table = scheme(BETAS)
    histories = []
    for perturb in (None, step):
        noise: Any = Noise(generator(), samples, d, 1, torch.device("cpu"), torch.float64)
        noise = noise if perturb is None else Perturbed(noise, perturb)
        solver = Solver(table, noise, propagators.Secant(0.1), Sliding(), Jump(0.0, 0.1), 0.01, 0.1)
        state, history = solver.init(noise.start() * table.scale), []
        while not state.done:
            request = solver.request(state)
            state = solver.update(state, denoiser(request.x.reshape(-1, d), request.t).reshape(request.x.shape))
            # once past the step, a sample may go on as its noise has it
            history.append((state.start.clamp(max=step), state.error.where(state.start < step, 0.0)))
        histories.append(history)
    for (start, error), (other_start, other_error) in zip(*histories, strict=False):
        assert torch.equal(start, other_start)
        torch.testing.assert_close(error, other_error, rtol=1e-6, atol=0.0)


# A target in place of a tolerance


@pytest.mark.parametrize("window", [Sliding(), Sliding(5)], ids=["full", "window 5"])
@pytest.mark.parametrize("target", [10.0, 1e-1, 1e-4, 1e-8])
@pytest.mark.parametrize("scheme", [piadm.DDPM(12), piadm.ExponentialSDE(2.0, 1.0, 0.25, 0.05)], ids=["ddpm", "sde"])
def test_every_sample_keeps_to_the_target_by_its_measured_defects(scheme, target, window):
    denoiser = mixture(BETAS if isinstance(scheme, piadm.DDPM) else piadm.schedules.OrnsteinUhlenbeck())
    solver, first = solver_of(denoiser, scheme, propagators.Secant(0.3), window, torch.float64)
    solver = dataclasses.replace(solver, keep=True, target_kl=target)
    path, last = accepted(solver, first, denoiser)
    table = solver.table
    f = torch.stack([denoiser(x[0], t.expand(x.shape[1])) for x, t in zip(path[:-1], table.times, strict=True)])
    nats, shift = by_hand(table, path, f, solver.noise(0, len(table)))
    assert (nats <= target).all()
    torch.testing.assert_close(last.nats, nats, rtol=1e-9, atol=1e-20)
    if isinstance(scheme, piadm.DDPM):
        assert shift.max() <= 1e-15  # a step without noise is taken from a final state, exactly but for rounding
    sampler = piadm.Parallel(denoiser, scheme, propagator=solver.propagator, window=window, target_kl=target)
    result = sampler(path.shape[2:], noise=noise_like(torch.float64), generator=generator())
    assert torch.equal(result.samples, last.finished())
    assert result.certificate == piadm.Certificate(
        result.certificate.kl, result.certificate.standard_error, 0.0, True, calls=0, evaluations=0.0
    )
    assert result.certificate.kl == pytest.approx(nats.mean().item(), rel=1e-9)
    assert 0 < result.certificate.kl <= target
    assert result.rounds <= result.steps


def test_a_smaller_target_takes_more_rounds_and_ends_nearer_to_the_sequential_sample():
    denoiser, scheme = mixture(BETAS), piadm.DDPM(100)
    start = {"noise": noise_like(torch.float64), "generator": None}
    rounds, errors = [], []
    sequential = piadm.Sequential(denoiser, scheme)((3, 4), **start | {"generator": generator()})
    for target in (1e2, 1.0, 1e-2, 1e-6):
        result = piadm.Parallel(denoiser, scheme, window=None, target_kl=target)((3, 4), **start | {"generator": generator()})
        rounds.append(result.rounds)
        errors.append((result.samples - sequential.samples).square().mean().sqrt().item())
    assert rounds == sorted(rounds)
    assert rounds[0] < rounds[-1] < 50
    assert errors[-1] < 1e-3 < errors[0]


def test_no_target_however_large_accepts_a_state_that_lacks_its_noise():
    """`Copy` fills without ξ: what such a state's defect is worth would be decided by ξ itself."""
    denoiser = denoiser_of("smooth", BETAS)
    solver, state = solver_of(denoiser, piadm.DDPM(12), propagators.Secant(0.3), Sliding(), torch.float64, fill=Copy())
    solver = dataclasses.replace(solver, target_kl=1e9)
    state = solver.update(state, denoiser(*(lambda r: (r.x, r.t))(solver.request(state))))
    assert state.start.tolist() == [1, 1, 1]
    state = solver.update(state, denoiser(*(lambda r: (r.x, r.t))(solver.request(state))))
    assert (state.start >= 11).all()


# What is said where there is no divergence, or no end


def test_steps_without_noise_in_between_have_no_divergence():
    schedule = piadm.schedules.OrnsteinUhlenbeck()
    corrected = piadm.ExponentialODE(2.0, 1.0, 0.25, 0.05, piadm.Corrector(horizon=0.4, step=0.1))
    assert information(corrected(schedule)) is None
    assert information(piadm.DDIM(12)(BETAS)) is None
    ddpm = piadm.DDPM(12)(BETAS)
    expected = 1 / (2 * ddpm.C[:-1, 0, 0] ** 2)
    torch.testing.assert_close(
        information(ddpm), torch.cat([expected, torch.zeros(1, dtype=torch.float64)]), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("audit", [None, True])
def test_a_run_of_the_probability_flow_reports_the_predicted_rms(audit):
    denoiser = mixture(BETAS)
    sampler = piadm.Parallel(denoiser, piadm.DDIM(100), window=16, tolerance=1e-2, audit=audit)
    start = noise_like(torch.float64)
    result = sampler((3, 4), noise=start, generator=generator())
    exact = piadm.Sequential(denoiser, piadm.DDIM(100))((3, 4), noise=start, generator=generator())
    certificate = result.certificate
    assert (certificate.kl, certificate.standard_error, certificate.tv) == (None, None, None)
    assert certificate.rigorous == bool(audit)
    if audit is None:
        assert certificate.rms == pytest.approx(result.error.double().square().mean().sqrt().item(), rel=1e-9)
    distance = (result.samples - exact.samples).square().mean().sqrt().item()
    # a prediction by a Gaussian model of the mixture: the right order of magnitude
    assert distance / 10 < certificate.rms < 100 * distance


def test_piadm_ode_with_its_corrector_reports_rms_and_more_rounds_less():
    denoiser = piadm.targets.Gaussian(0.0, 0.25)
    rms = []
    for rounds in (3, 5, 8):
        sampler = piadm.PIADMODE(denoiser, horizon=4.0, step=0.1, early_stop=0.01, iterations=rounds)
        certificate = sampler((8, 4), generator=generator()).certificate
        assert certificate.kl is None
        assert not certificate.rigorous
        rms.append(certificate.rms)
    assert rms[0] > rms[1] > rms[2] > 0


def test_piadm_sde_is_rigorous_without_being_asked_and_sequential_is_exact():
    denoiser = piadm.targets.Gaussian(0.0, 0.25)
    result = piadm.PIADMSDE(denoiser, horizon=4.0, step=0.1, early_stop=0.01, iterations=5)((8, 4), generator=generator())
    assert result.rounds == 4 * 5
    assert result.certificate.rigorous
    assert result.certificate.calls == 4
    assert result.certificate.evaluations == result.steps
    sequential = piadm.Sequential(denoiser, piadm.DDPM(5))
    assert sequential.table.components == 1
    assert sequential((8, 4)).certificate == piadm.Certificate(0.0, None, 0.0, True)


def test_tolerance_runs_cost_nothing_and_their_estimate_is_seldom_below_what_is_measured():
    denoiser = piadm.models.load("digits")
    label = {"label": torch.arange(4)}
    below = 0
    for window, tolerance in [(16, 1e-1), (None, 1e-2)]:
        runs = []
        for audit in (None, True):
            sampler = piadm.Parallel(denoiser, piadm.DDPM(30), window=window, tolerance=tolerance, audit=audit)
            runs.append(sampler((4, 1, 8, 8), generator=generator(), **label).certificate)
        estimated, measured = runs
        assert (estimated.calls, estimated.evaluations, estimated.rigorous) == (0, 0, False)
        assert measured.rigorous
        below += estimated.kl < measured.kl
    assert below == 0


def test_a_batch_of_one_has_no_standard_error():
    certificate = piadm.PIADMSDE(piadm.targets.Gaussian(), horizon=2.0, iterations=2)((1, 4)).certificate
    assert certificate.standard_error is None
    assert "±" not in str(certificate)


def test_a_run_cut_short_certifies_nothing():
    sampler = piadm.Parallel(mixture(BETAS), piadm.DDPM(12), window=4, max_rounds=1)
    certificate = sampler((3, 4), generator=generator()).certificate
    assert certificate.kl == certificate.rms == math.inf
    assert certificate.tv == 1


def test_a_network_that_is_not_finite_at_an_accepted_state_makes_the_bound_infinite_and_keeps_the_samples():
    calls = []

    def network(x, t):
        calls.append(len(x))
        return x * (math.nan if len(calls) == 2 else 0.5)  # the second call is the audit of a single round

    denoiser = piadm.Denoiser(network, piadm.schedules.OrnsteinUhlenbeck(), "sample")
    sampler = piadm.PIADMSDE(denoiser, horizon=1.0, block=1.0, step=0.25, early_stop=0.05, iterations=1)
    result = sampler((2, 4), generator=generator())
    assert result.samples.isfinite().all()
    assert result.certificate.kl == math.inf
    assert result.certificate.tv == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_kl": 0.0}, "`target_kl` is 0.0: give a finite number above 0"),
        ({"target_kl": 0.1, "scheme": piadm.DDIM(12)}, "`target_kl` is 0.1: steps without noise have no divergence"),
        (
            {"target_kl": 0.1, "window": Blocks(3)},
            r"`target_kl` is 0.1: Blocks\(iterations=3\) has a number of rounds of its own",
        ),
    ],
)
def test_targets_that_cannot_be_kept_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        piadm.Parallel(mixture(BETAS), arguments.pop("scheme", piadm.DDPM(12)), **arguments)


def test_after_a_window_was_cut_no_step_is_judged_by_what_came_out_beyond_the_cut():
    """The network breaks at a guessed state: what is known of the data is the same whatever noise came after that step."""

    def after_the_cut(perturb: int | None) -> list[float]:
        target = mixture(BETAS)
        solver, state = solver_of(
            target, piadm.DDPM(30), propagators.Secant(0.5), Sliding(), torch.float64, tolerance=1e-2, perturb=perturb
        )
        for rounds in range(2):
            request = solver.request(state)
            f = target(request.x, request.t)
            if rounds == 1:
                assert 20 in state.placement.steps
                f = torch.where((request.t == solver.table.times[20])[:, None], torch.nan, f)
            state = solver.update(state, f)
        return state.variance.tolist()

    assert after_the_cut(None) == after_the_cut(24)
