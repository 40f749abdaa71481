"""`Exact`: its samples have the sequential scheme's law, and every ingredient of the proof is needed for that.

The law is tested on innovations (`innovations.py`) and on final states against closed forms. Every such test has its mutants,
solvers with one ingredient removed, which it must refuse: p-values must be above `LEVEL` for the solver (whose seeds are fixed)
and below `FOUND` for a mutant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import diffusers
import pytest
import torch
from innovations import evidence, observe
from linear import Underdamped, law
from scipy import stats
from torch import Tensor

import piadm
import piadm.diffusers
from benchmarks.exact import NoReflection
from piadm.noise import Noise
from piadm.propagators import Gaussian, Jacobi, Secant
from piadm.speculative import Scan, SpeculativeSolver
from piadm.windows import Blocks, Pipelined, Sliding

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers
LEVEL, FOUND = 1e-3, 1e-9
ALWAYS = 1e9
"""A threshold that no draft exceeds: every step is tested and rejections are common."""
SAMPLES = 2000
BETAS = piadm.schedules.DiscreteBetas.linear(1000)
STEPS = piadm.DDPM(12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- solvers with one ingredient removed; `NoReflection` is the benchmark's ---


class LooksAtItsNoise(SpeculativeSolver):
    """The choice to test depends on the noise of the step: where it points far along the error the step is recomputed."""

    def _scan(self, state, steps, inside, mean, xi):
        scan = super()._scan(state, steps, inside, mean, xi)
        off = (state.mean - mean)[:, :1]
        away = (off * xi[:, :1]).sum((1, 3)) <= off.square().sum((1, 3)).sqrt()
        kept = (scan.kept & away).long().cumprod(0).bool()
        ended = (torch.arange(len(kept))[:, None] == kept.sum(0)) & inside
        return replace(scan, kept=kept, ended=ended, rejected=scan.rejected & ended & away)


class TestsTwice(SpeculativeSolver):
    """A rejected draft is refined and tested in the next round, with noise that has been through a test."""

    __test__ = False

    def _scan(self, state, steps, inside, mean, xi):
        scan = super()._scan(state, steps, inside, mean, xi)
        again = scan.rejected.clone()
        again[0] = False  # a round must finish a step
        return replace(scan, ended=scan.ended & ~again, rejected=scan.rejected & ~again)


class KeepsAll(SpeculativeSolver):
    """Drafts are not tested but kept."""

    def _scan(self, state, steps, inside, mean, xi):
        noisy = (self.table.C[:, 0, 0] != 0)[steps]
        kept = (inside & noisy).long().cumprod(0).bool()
        ended = (torch.arange(len(kept))[:, None] == kept.sum(0)) & inside
        return Scan(kept, ended, torch.zeros_like(kept), xi)


@dataclass(frozen=True)
class Shared:
    """A secant averaged over the window: the model of a step depends on later noise."""

    secant: Secant

    def check(self, table):
        """Defined for every table."""

    def jacobian(self, rows, pair):
        jacobian = self.secant.jacobian(rows, pair)
        return jacobian.mean(0, keepdim=True).expand_as(jacobian).clone()


class Forgets(SpeculativeSolver):
    """What a scheme remembers stays as the draft had it when the step's own noise changed."""

    def _recalled(self, state, steps, rows, mean):
        return state.mean, mean


MUTANTS = [NoReflection, LooksAtItsNoise, TestsTwice, KeepsAll]


# --- targets ---


def correlated():
    """Data N(0, Σ) in four dimensions, eigenvalues 1e-3 to 2."""
    values = torch.tensor([2.0, 0.5, 0.05, 1e-3], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator(5), dtype=torch.float64)).Q

    def network(x, t):
        alpha, sigma = BETAS.alpha(t)[:, None], BETAS.sigma(t)[:, None]
        gain = alpha * values / (alpha**2 * values + sigma**2)
        return (x.double() @ basis * gain @ basis.T).to(x.dtype)

    return piadm.Denoiser(network, BETAS, "sample", variance=float(values.mean()), event_shape=(4,)), values, basis


def mixture(schedule=BETAS):
    """Four modes of standard deviation 0.14, some 2 apart."""
    means = 1.5 * torch.randn(4, 2, generator=generator(3))
    return piadm.targets.GaussianMixture(means, 0.02, weights=torch.tensor([1.0, 2.0, 3.0, 4.0]), schedule=schedule)


def rough():
    """A network that is the denoiser of no data: it jumps and expands."""
    return piadm.Denoiser(lambda x, t: torch.floor(3 * x) / 2 + x.flip(1), BETAS, "sample", variance=0.5, event_shape=(3,))


LANGEVIN = piadm.ExponentialODE(2.0, 1.0, 0.5, 0.3, piadm.Corrector(friction=2.0, horizon=4.0, blocks=1, step=0.5))
"""States (u, v): steps without noise, each block's corrector with a $C$ of two by two."""


@dataclass(frozen=True)
class Multistep:
    """A scheduler of diffusers that remembers earlier outputs."""

    scheduler: str
    steps: int
    options: tuple[tuple[str, object], ...] = ()

    def __call__(self, schedule):
        made = getattr(diffusers, self.scheduler)(**dict(self.options))
        made.set_timesteps(self.steps)
        found = piadm.diffusers.probe(made, made.timesteps)
        return replace(found.table, times=found.times)


SDE = Multistep("DPMSolverMultistepScheduler", 14, (("algorithm_type", "sde-dpmsolver++"),))
"""States (x, f of the step before), noise in x alone."""
SA = Multistep("SASolverScheduler", 14)
"""A predictor and a corrector that remembers the noise, too."""


CASES = {
    "correlated, jacobi": lambda: (correlated()[0], piadm.DDPM(12), {"propagator": Jacobi(), "window": 5}),
    "correlated, gaussian": lambda: (correlated()[0], piadm.DDPM(12), {"propagator": Gaussian(0.6), "window": None}),
    "mixture, secant": lambda: (mixture(), piadm.DDPM(12), {"window": 4}),
    "mixture, all steps": lambda: (mixture(), piadm.DDIM(12, eta=0.7), {"window": None}),
    "mixture, threshold": lambda: (mixture(), piadm.DDPM(20), {"propagator": Jacobi(), "window": None, "threshold": 0.7}),
    "mixture, sde": lambda: (mixture(None), piadm.ExponentialSDE(3.0, 1.0, 0.25, 0.02), {"window": 6}),
    "rough": lambda: (rough(), piadm.DDPM(10), {"window": 4}),
    "langevin": lambda: (mixture(None), LANGEVIN, {"propagator": Jacobi(), "window": 6}),
    "multistep": lambda: (mixture(), SDE, {"window": 6}),
    "multistep, all steps": lambda: (rough(), SDE, {"propagator": Jacobi(), "window": None}),
    "predictor and corrector": lambda: (rough(), SA, {"propagator": Jacobi(), "window": 8}),
}
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_innovations_are_standard_normal_given_the_past(case):
    denoiser, scheme, keywords = CASES[case]()
    run = observe(denoiser, scheme, SAMPLES, **{"threshold": ALWAYS, **keywords})
    # rejections are common, or the test would show nothing
    assert run.state.rejected.double().mean() > 0.3
    assert evidence(run) > LEVEL
    assert run.off < 1e-9


@pytest.mark.parametrize("mutant", MUTANTS)
@cases
def test_each_ingredient_removed_is_seen_in_the_innovations(case, mutant):
    denoiser, scheme, keywords = CASES[case]()
    assert evidence(observe(denoiser, scheme, SAMPLES, solver=mutant, **{"threshold": ALWAYS, **keywords})) < FOUND


def test_steps_without_noise_are_taken_from_their_true_mean():
    denoiser, scheme = mixture(None), LANGEVIN
    table = scheme(denoiser.schedule)
    run = observe(denoiser, scheme, 20)
    noiseless = (table.C[:, 0] == 0).all(1).nonzero().flatten().tolist()
    assert noiseless
    assert len(noiseless) + len(run.steps) == len(table)
    for m in noiseless:
        x = run.path[m]
        f = denoiser(x[0], table.times[m].expand(20))
        expected = table.A[m, 0, 0] * x[0] + table.A[m, 0, 1] * x[1] + table.B[m, 0] * f
        torch.testing.assert_close(run.path[m + 1, 0], expected, rtol=1e-12, atol=1e-12)


# --- final states ---


class Made(piadm.Exact):
    """`Exact` with another solver."""

    solver = SpeculativeSolver

    def _solver(self, noise):
        return self.solver(**vars(super()._solver(noise)))


def made(solver):
    return type("Made", (Made,), {"solver": solver})


def final(solver, denoiser, scheme, samples, **keywords):
    sampler = made(solver)(denoiser, scheme, threshold=ALWAYS, **keywords)
    return sampler((samples, *denoiser.event_shape), generator=generator(1), noise=start(samples, denoiser.event_shape))


def start(samples, event, seed=2):
    return torch.randn(samples, *event, generator=generator(seed), dtype=torch.float64)


def gaussian_evidence(samples: Tensor, variance: Tensor) -> float:
    """Samples `(S, D)` against N(0, diag(variance)): marginals, second moments, norms; smallest p-value times their number."""
    z = samples / variance.sqrt()
    count, size = z.shape
    p = [stats.kstest(z[:, d].numpy(), "norm").pvalue for d in range(size)]
    p.append(stats.kstest(z.square().sum(1).numpy(), "chi2", args=(size,)).pvalue)
    for i in range(size):
        for j in range(i + 1):
            moment = float((z[:, i] * z[:, j]).mean()) - (i == j)
            p.append(2 * stats.norm.sf(abs(moment) / math.sqrt((1 + (i == j)) / count)))
    return min(p) * len(p)


def ddpm_variance(values: Tensor, scheme) -> Tensor:
    """Of the sequential scheme's output for data N(0, values), by its recursion."""
    table = scheme(BETAS)
    variance = torch.full_like(values, table.scale**2)
    for m in range(len(table)):
        alpha, sigma = table.alpha[m], table.sigma[m]
        gain = table.A[m, 0, 0] + table.B[m, 0] * alpha * values / (alpha**2 * values + sigma**2)
        variance = gain**2 * variance + table.C[m, 0, 0] ** 2
    return variance


@pytest.mark.parametrize(("solver", "right"), [(SpeculativeSolver, True), *((mutant, False) for mutant in MUTANTS)])
def test_correlated_gaussian_data_come_out_with_their_exact_law(solver, right):
    denoiser, values, basis = correlated()
    scheme = piadm.DDPM(10)
    result = final(solver, denoiser, scheme, 20_000, propagator=Jacobi(), window=None)
    p = gaussian_evidence(result.samples @ basis, ddpm_variance(values, scheme))
    assert (p > LEVEL) if right else (p < FOUND)


def final_variance(values: Tensor, table) -> Tensor:
    """Of a table's samples for data N(0, values), whatever it remembers, by its recursion."""
    k, out = table.components, []
    for v in values.tolist():
        covariance = torch.zeros(k, k, dtype=torch.float64)
        covariance[0, 0] = 1.0
        for m in range(len(table)):
            alpha, sigma = BETAS.alpha(table.times[m]), BETAS.sigma(table.times[m])
            step = table.A[m].clone()
            step[:, 0] += table.B[m] * alpha * v / (alpha**2 * v + sigma**2)
            covariance = step @ covariance @ step.T + table.C[m] @ table.C[m].T
        out.append(covariance[0, 0])
    return torch.stack(out)


@pytest.mark.parametrize(("solver", "right"), [(SpeculativeSolver, True), (NoReflection, False), (Forgets, False)])
def test_a_multistep_sde_comes_out_with_its_exact_law(solver, right):
    """DPM-Solver++ 2M SDE as diffusers has it, on correlated data, from drafts so poor that rejections are common."""
    denoiser, values, basis = correlated()
    result = final(solver, denoiser, SDE, 6_000, propagator=Jacobi(), window=None)
    p = gaussian_evidence(result.samples @ basis, final_variance(values, SDE(BETAS)))
    assert (p > LEVEL) if right else (p < FOUND)
    if right:
        assert result.acceptance.rejected.double().mean() > 0.5
        assert result.rounds < len(SDE(BETAS))


def test_what_a_scheme_remembers_is_its_own_and_not_the_drafts():
    assert observe(rough(), SDE, 200, threshold=ALWAYS, window=6).off < 1e-9
    assert observe(rough(), SDE, 200, solver=Forgets, threshold=ALWAYS, window=6).off > 1e-3


@pytest.mark.parametrize(("solver", "right"), [(SpeculativeSolver, True), (NoReflection, False), (TestsTwice, False)])
def test_underdamped_langevin_comes_out_with_its_exact_law(solver, right):
    """Of the paper's formulas (`linear.law`), which know neither tables nor solvers."""
    variance = torch.tensor([0.05, 1.5], dtype=torch.float64)
    target = piadm.targets.Gaussian(0.0, variance)
    target.event_shape = (2,)
    corrector = piadm.Corrector(friction=2.0, horizon=4.0, blocks=1, step=1.0)
    scheme = piadm.ExponentialODE(2.0, 1.0, 0.5, 0.3, corrector)
    result = final(solver, target, scheme, 8_000, propagator=Jacobi(), window=6)
    damped = Underdamped(2.0, 4.0, 1, 1.0, None)
    expected = [law(v, 2.0, 1.0, 0.5, 0.3, None, weight=1, corrector=damped).variance for v in variance.tolist()]
    p = gaussian_evidence(result.samples, torch.tensor(expected, dtype=torch.float64))
    assert (p > LEVEL) if right else (p < FOUND)


def two_sample_evidence(one: Tensor, other: Tensor, projections: int = 8) -> float:
    """Kolmogorov and Smirnov's test on random projections of samples `(S, D)`; smallest p-value times their number."""
    directions = torch.randn(one.shape[1], projections, generator=generator(4), dtype=torch.float64)
    pairs = zip((one.double() @ directions).T, (other.double() @ directions).T, strict=True)
    return min(stats.ks_2samp(a.numpy(), b.numpy()).pvalue for a, b in pairs) * projections


@pytest.mark.parametrize(("solver", "right"), [(SpeculativeSolver, True), *((mutant, False) for mutant in MUTANTS)])
def test_a_separated_mixture_comes_out_as_the_sequential_sampler_has_it(solver, right):
    scheme = piadm.DDPM(10)
    result = final(solver, mixture(), scheme, 40_000, window=None)
    sequential = piadm.Sequential(mixture(), scheme)((40_000, 2), generator=generator(9), noise=start(40_000, (2,), seed=9))
    p = two_sample_evidence(result.samples, sequential.samples)
    assert (p > LEVEL) if right else (p < FOUND)


@cache
def digits():
    return piadm.models.load("digits")


@pytest.mark.parametrize(("solver", "right"), [(SpeculativeSolver, True), (NoReflection, False), (TestsTwice, False)])
def test_the_digits_network_keeps_its_law(solver, right):
    """In float32; 60 samples of 12 steps suffice, with more than two rejections each."""
    label = torch.arange(60) % 10
    run = observe(digits(), piadm.DDPM(12), 60, solver=solver, window=6, dtype=torch.float32, label=label)
    p = evidence(run)
    if right:
        assert run.state.rejected.double().mean() > 2
        assert p > LEVEL
    else:
        assert p < FOUND


# --- what the proof rests on, bit for bit ---

ELEMENTWISE = {
    "smooth": lambda x, t: x / (1 + x.abs()) * (1 - 1e-4 * t.to(x.dtype)[:, None]),
    "expansive": lambda x, t: (3 * x).clamp(-50, 50) + 0.1,
    "discontinuous": lambda x, t: torch.floor(4 * x) / 2,
}
"""Arithmetic that IEEE rounds the same in every batch."""
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
networks = pytest.mark.parametrize("network", ELEMENTWISE)


def elementwise(network):
    return piadm.Denoiser(ELEMENTWISE[network], BETAS, "sample", variance=0.3, event_shape=(4,))


@dataclass(frozen=True)
class Moved:
    """A noise source with ξ and u of one step changed."""

    source: Noise
    step: int

    def __call__(self, first, last):
        xi = self.source(first, last)
        if first <= self.step < last:
            xi[self.step - first] += 3
        return xi

    def uniform(self, first, last):
        u = self.source.uniform(first, last)
        u[self.step - first] = 1 - u[self.step - first]
        return u

    def __getattr__(self, name):
        return getattr(self.source, name)


def peeks(network, dtype, propagator, window, moved, scheme=STEPS) -> bool:
    """Whether anything decided before or about step `moved` depends on its ξ and u, in any round up to the one finishing it."""
    denoiser = elementwise(network)
    table = scheme(BETAS)
    source = Noise(generator(), 3, 4, table.components, torch.device("cpu"), dtype)
    runs = []
    for noise in (source, Moved(source, moved)):
        fill = piadm.fills.Jump(0.0, 0.3)
        solver = SpeculativeSolver(table, noise, propagator, Sliding(window), fill, 1.0, 0.3, threshold=0.5)
        state, history = solver.init(start(3, (4,)).to(dtype)), []
        while not state.done:
            history.append(state)
            request = solver.request(state)
            state = solver.update(state, denoiser(request.x, request.t))
        runs.append(history)
    for one, other in zip(*runs, strict=False):
        for s in range(3):
            first = int(one.start[s])
            if first > moved:  # finished in one run: in the other one too, or the choice depended on its noise
                if int(other.start[s]) <= moved:
                    return True
                continue
            if int(other.start[s]) != first or one.stop[s] != other.stop[s]:
                return True
            count = min(moved + 1, int(one.stop[s])) - first
            if not torch.equal(one.mean[:count, :, s], other.mean[:count, :, s]):
                return True
            if not torch.equal(one.x[:count, :, s], other.x[:count, :, s]):
                return True
    return False


@pytest.mark.parametrize("window", [4, None])
@networks
@dtypes
def test_the_choice_to_test_and_both_means_are_made_before_a_steps_noise(dtype, network, window):
    for moved in (0, 5, 9):
        for propagator in (Secant(0.3), Jacobi()):
            assert not peeks(network, dtype, propagator, window, moved)


@pytest.mark.parametrize("window", [6, None])
@pytest.mark.parametrize("scheme", [SDE, SA], ids=["sde", "predictor and corrector"])
@networks
def test_what_is_remembered_and_tested_is_made_before_a_steps_noise(network, scheme, window):
    for moved in (0, 6, 10):
        for dtype in (torch.float32, torch.float64):
            assert not peeks(network, dtype, Secant(0.3), window, moved, scheme)


def test_a_propagator_shared_along_the_window_would_be_found_out():
    assert peeks("expansive", torch.float64, Shared(Secant(0.3)), None, 9)


@pytest.mark.parametrize("window", [1, 4, None])
@networks
@dtypes
def test_without_tests_it_is_the_sequential_sampler_bit_for_bit(dtype, network, window):
    denoiser, noise = elementwise(network), start(3, (4,)).to(dtype)
    # an error of exactly zero still passes for a test, and keeps the draft
    result = piadm.Exact(denoiser, piadm.DDPM(12), window=window, threshold=1e-300)((3, 4), generator=generator(), noise=noise)
    sequential = piadm.Sequential(denoiser, piadm.DDPM(12))((3, 4), generator=generator(), noise=noise)
    assert torch.equal(result.samples, sequential.samples)
    assert result.acceptance.rejected.tolist() == [0, 0, 0]


@pytest.mark.parametrize("threshold", [0.1, ALWAYS])
@pytest.mark.parametrize("window", [1, 4, None])
@networks
def test_a_run_ends_within_a_round_for_each_step_and_every_step_is_counted_once(network, window, threshold):
    sampler = piadm.Exact(elementwise(network), piadm.DDPM(12), window=window, threshold=threshold)
    result = sampler((5, 4), generator=generator())
    assert result.converged
    assert result.rounds <= 12
    assert result.rounds == 12 or window != 1
    counts = result.acceptance
    assert (counts.accepted + counts.rejected + counts.recomputed).tolist() == [12] * 5
    # a rejection ends the scan, and so its round
    assert int((counts.rejected + counts.recomputed).max()) <= result.rounds
    assert (counts.recomputed >= 1).all()  # DDPM's last step has no noise


def test_finished_states_stay_as_they_are_and_every_draft_is_its_mean_with_its_noise():
    denoiser, scheme = mixture(), piadm.DDPM(12)
    table = scheme(BETAS)
    noise = Noise(generator(), 6, 2, 1, torch.device("cpu"), torch.float32)
    solver = SpeculativeSolver(table, noise, Secant(1.0), Sliding(5), piadm.fills.Jump(0.0, 1.0), 1.0, 1.0, threshold=ALWAYS)
    state = solver.init(noise.start())
    while not state.done:
        steps = state.placement.steps.clamp(max=len(solver.table) - 1)
        C = table.C[steps, 0, 0].float()
        assert torch.equal(state.x[1:, 0], state.mean[:, 0] + C[..., None] * state.noise[:, 0])
        request = solver.request(state)
        after = solver.update(state, denoiser(request.x, request.t))
        kept = after.accepted - state.accepted
        for s in range(6):
            # all kept drafts lie before the new start, the last of them at most one step behind it
            assert 0 <= int(after.start[s] - state.start[s] - kept[s]) <= 1
            if after.start[s] - state.start[s] == kept[s] > 0:
                assert torch.equal(after.x[0, :, s], state.x[kept[s], :, s])
        state = after


@pytest.mark.parametrize("threshold", [1e-6, ALWAYS])
def test_a_move_is_carried_on_so_that_an_exact_model_needs_two_rounds(threshold):
    """The first round recomputes or reflects the first step, whose draft is a copy; with the right J all others follow it."""
    target = piadm.targets.Gaussian(0.5, 0.2, schedule=BETAS)
    sampler = piadm.Exact(
        target, piadm.DDPM(12), propagator=Gaussian(0.2), window=None, threshold=threshold, fill=piadm.fills.Copy()
    )
    # far out, where copies are far off
    result = sampler((5, 4), generator=generator(), noise=start(5, (4,)) + 100)
    assert result.rounds == 2
    assert result.acceptance.accepted.tolist() == [10] * 5


def test_a_sample_does_not_depend_on_its_batch():
    target = piadm.targets.Gaussian(0.5, torch.tensor([0.1, 0.5, 1.0, 2.0]))
    sampler = piadm.Exact(target, piadm.DDPM(15), window=6, threshold=ALWAYS)
    batch = sampler((3, 4), generator=[generator(i) for i in range(3)])
    assert batch.acceptance.rejected.sum() > 0
    for i in range(3):
        alone = sampler((1, 4), generator=generator(i))
        assert torch.equal(alone.samples, batch.samples[i : i + 1])
        assert alone.acceptance.rejected[0] == batch.acceptance.rejected[i]


def test_uniforms_are_a_function_of_seed_and_step():
    noise = Noise(generator(), 4000, 1, 1, torch.device("cpu"), torch.float32)
    u = noise.uniform(0, 6)
    assert torch.equal(u[2:4], noise.uniform(2, 4))
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > LEVEL
    # independent of one another and of the normal noise of their step: correlations within 4.5 standard errors
    columns = torch.cat([u, noise(0, 6)[:, 0, :, 0]])
    off = torch.corrcoef(columns) - torch.eye(12)
    assert off.abs().max() < 4.5 / math.sqrt(4000)


# --- what is refused, and what a run says of itself ---

REFUSED = {
    "deterministic scheme": ({"scheme": piadm.DDIM(10)}, r"`scheme` is DDIM\(steps=10, eta=0.0.*: its steps have no noise"),
    "threshold 0": ({"threshold": 0.0}, "`threshold` is 0.0: give a finite number above 0, for example threshold=2"),
    "threshold inf": ({"threshold": math.inf}, "`threshold` is inf"),
    "blocks": ({"window": Blocks(3)}, r"`window` is Blocks\(iterations=3\): must begin at the first unfinished step"),
    "pipelined": ({"window": Pipelined(3)}, r"`window` is Pipelined\(iterations=3\): must begin"),
    "window 0": ({"window": 0}, "`window` is 0: give an integer of at least 1"),
}


@pytest.mark.parametrize(("keywords", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_exact_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        piadm.Exact(elementwise("smooth"), **{"scheme": piadm.DDPM(10), **keywords})


def test_a_state_of_another_solver_is_refused():
    table, noise = piadm.DDPM(5)(BETAS), Noise(generator(), 1, 4, 1, torch.device("cpu"), torch.float32)
    policies = table, noise, Secant(1.0), Sliding(), piadm.fills.Jump()
    state = piadm.Solver(*policies, 1e-2, 1.0).init(noise.start())
    with pytest.raises(TypeError, match="`state` is a State: give one that this solver's `init` made"):
        SpeculativeSolver(*policies, 1e-2, 1.0, threshold=2.0).update(state, torch.zeros(5, 4))


@pytest.mark.parametrize("window", [1, 4, None])
def test_a_network_that_breaks_is_reported_with_the_finished_states(window):
    times = piadm.DDPM(12)(BETAS).times

    def network(x, t, bad):
        return torch.where(((t <= times[7]) & bad)[:, None], math.nan, torch.tanh(x))

    sampler = piadm.Exact(piadm.Denoiser(network, BETAS, "sample"), piadm.DDPM(12), window=window)
    with pytest.raises(piadm.NonFiniteError) as caught:
        sampler((2, 2), generator=generator(), bad=torch.tensor([False, True]))
    error = caught.value
    assert (error.step, error.samples) == (7, [1])
    assert error.finished[1] <= 7
    assert error.x.shape == (2, 2)
    assert error.x.isfinite().all()


def test_a_run_cut_short_says_so():
    result = piadm.Exact(mixture(), piadm.DDPM(30), window=5, max_rounds=3)((4, 2), generator=generator())
    assert (result.converged, result.rounds) == (False, 3)
    counts = result.acceptance
    assert ((counts.accepted + counts.rejected + counts.recomputed) < 30).all()
    assert result.error.isinf().all()


def test_only_exact_has_an_acceptance():
    for sampler in (piadm.Parallel, piadm.Sequential):
        assert sampler(mixture(), piadm.DDPM(5))((2, 2), generator=generator()).acceptance is None
