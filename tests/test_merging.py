"""Merged steps: the algebra exactly, the order measured, the tolerance kept, every step evaluated where merging may not be."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_solver import Perturbed, Still, generator, mixture

import piadm
from piadm import merging, propagators
from piadm.errors import NonFiniteError
from piadm.fills import Copy, Jump
from piadm.gaussian_law import gaussian_law, sequential_law
from piadm.merged import Merger, MergingSolver, _extrapolated
from piadm.merging import Grid, MergedNoise, Worth, expected, first_grid, lay, levels, merge
from piadm.noise import Noise
from piadm.windows import Sliding

SCHEDULE = piadm.schedules.DiscreteBetas.linear(1000)
SCHEMES = {"ddpm": piadm.DDPM(200), "ddim": piadm.DDIM(200), "between": piadm.DDIM(200, eta=0.5)}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


def uneven(steps: int) -> Grid:
    """Merged steps of all lengths up to 16, short ones after long ones and long ones after short ones."""
    anchors, lengths = [0, 1], [2, 4, 8, 16, 3, 1, 2, 1, 1, 2, 4, 7]
    while anchors[-1] < steps:
        anchors.append(min(steps, anchors[-1] + lengths[len(anchors) % len(lengths)]))
    return Grid(tuple(anchors))


def run_by_hand(table, x, xi, f):
    """The sequential scheme, step by step, on a function of state and step."""
    for m in range(len(table)):
        x = table.A[m, 0, 0] * x + table.B[m, 0] * f(x, m) + table.C[m, 0, 0] * xi[m, 0]
    return x


@every_scheme
def test_where_the_remainder_is_a_line_between_anchors_merged_steps_are_the_steps(scheme):
    """f = e + L x with e linear in the step: extrapolation is exact, so only the algebra is left."""
    table, variance = scheme(SCHEDULE), 0.4
    grid = uneven(len(table))
    merged = merge(table, grid, variance)
    noise = Noise(generator(), 2, 3, 1, torch.device("cpu"), torch.float64)
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    slope = torch.tensor([[0.3, -1.0, 0.0], [2.0, 0.1, -0.7]], dtype=torch.float64)

    def f(x, m):
        return 0.2 + slope * m / 100 + gain[m] * x

    start = noise.start()
    expected_end = run_by_hand(table, start, noise(0, len(table)), f)
    state, xi = torch.stack([start, torch.zeros_like(start)]), MergedNoise(noise, merged)(0, len(grid))
    for row, (first, _) in enumerate(pairwise(grid.anchors)):
        forced = torch.einsum("ij,jsd->isd", merged.A[row], state) + torch.einsum("ij,jsd->isd", merged.C[row], xi[row])
        state = forced + merged.B[row][:, None, None] * f(state[0], first)
    assert torch.allclose(state[0], expected_end, rtol=0, atol=1e-12)


def test_noise_of_merged_steps_is_standard_normal_and_one_for_any_stretch():
    table = piadm.DDPM(200)(SCHEDULE)
    merged = merge(table, uneven(200), 0.4)
    noise = MergedNoise(Noise(generator(3), 4, 500, 1, torch.device("cpu"), torch.float64), merged)
    whole = noise(0, len(merged))
    square = torch.zeros(len(merged), dtype=torch.float64)
    square.index_add_(0, torch.arange(len(merged)).repeat_interleave(merged.lengths), merged.mixing.square())
    noisy = merged.C[:, 0, 0] > 0
    assert torch.allclose(square[noisy], torch.ones_like(square[noisy]))
    assert torch.equal(torch.cat([noise(a, b) for a, b in pairwise([0, 1, 7, 20, len(merged)])]), whole)
    values = whole[noisy, 0].flatten()
    # the variance of n squares of standard normals is 2 n
    assert abs(float(values.square().mean()) - 1) < 5 * math.sqrt(2 / len(values))


@pytest.mark.parametrize("scheme", [piadm.DDPM(300), piadm.DDIM(300)], ids=["ddpm", "ddim"])
def test_gaussian_data_need_next_to_no_evaluations(scheme):
    """Centred, their remainder is 0 at all steps: whatever the anchors, the sample is the sequential one."""
    denoiser = piadm.targets.Gaussian(0.0, 0.25, schedule=SCHEDULE)
    sampler = piadm.Parallel(denoiser, scheme, tolerance=3e-2, window=None)
    result = sampler((3, 50), generator=generator())
    sequential = piadm.Sequential(denoiser, scheme)((3, 50), generator=generator())
    assert result.evaluations < 0.6 * len(sampler.table)
    assert torch.allclose(result.samples, sequential.samples, atol=1e-5)


def test_without_noise_the_error_falls_with_the_square_of_the_length():
    """A two-step method on the probability flow, measured by regression against the sequential scheme."""
    denoiser, scheme = mixture(SCHEDULE), piadm.DDIM(960)
    sequential = truth(denoiser, scheme)
    table, lengths, errors = scheme(SCHEDULE), (12, 16, 24, 32), []
    last = 800  # towards the end single steps are wide, and are not what is measured here
    for length in lengths:
        grid = Grid((*range(2), *range(2, 4), *range(4, last, length), *range(last, len(table) + 1)))
        solver = solver_on(denoiser, scheme, grid, tolerance=1e9, window=Still(12))
        errors.append(float((drive(solver, denoiser).finished() - sequential).square().mean().sqrt()))
    slope = float(np.polyfit(np.log(lengths), np.log(errors), 1)[0])
    assert abs(slope - 2) < 0.2, errors


def solver_on(denoiser, scheme, grid, *, tolerance=1e-2, window=None, perturb=None, seed=0, samples=4):
    """The solver that `Parallel` makes, on a grid of our own."""
    table = scheme(denoiser.schedule)
    noise = Noise(generator(seed), samples, 4, 1, torch.device("cpu"), torch.float64)
    noise = noise if perturb is None else Perturbed(noise, perturb)
    policies = propagators.Secant(denoiser.variance), window or Sliding(None), Jump(denoiser.mean, denoiser.variance)
    first = merge(table, grid, float(torch.as_tensor(denoiser.variance).mean()))
    return MergingSolver(table, noise, *policies, tolerance, denoiser.variance, first=first, mean=denoiser.mean)


def truth(denoiser, scheme):
    """The sequential samples of the solver's noise, in float64."""
    start = Noise(generator(), 4, 4, 1, torch.device("cpu"), torch.float64).start()
    return piadm.Sequential(denoiser, scheme)((4, 4), generator=generator(), noise=start).samples


def drive(solver, denoiser, each=lambda state: None):
    """To the end of the run; its states go to `each`."""
    noise = Noise(generator(), 4, 4, 1, torch.device("cpu"), torch.float64)
    state = solver.init(noise.start() * solver.table.scale)
    while not state.done:
        each(state)
        assert not (state.seen & ~state.placement.valid[: len(state.seen)]).any()
        request = solver.request(state)
        state = solver.update(state, denoiser(request.x, request.t))
    each(state)
    return state


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("scheme", [piadm.DDPM(1000), piadm.DDIM(1000), piadm.DDIM(1000, eta=0.5)], ids=SCHEMES.keys())
def test_a_grid_for_thirty_times_the_tolerance_is_cut_until_the_tolerance_is_kept(scheme, tolerance):
    denoiser, anchors = mixture(SCHEDULE), []
    table, variance = scheme(SCHEDULE), float(torch.as_tensor(denoiser.variance).mean())
    wide = first_grid(table, variance, 30 * tolerance) or pytest.skip("merging does not pay")
    state = drive(solver_on(denoiser, scheme, wide, tolerance=tolerance), denoiser, lambda one: anchors.append(one.anchors))
    as_it_is = drive(solver_on(denoiser, scheme, wide, tolerance=1e9, window=Still(40)), denoiser)
    error, uncut = ((one.finished() - truth(denoiser, scheme)).square().mean(1).sqrt() for one in (state, as_it_is))
    assert len(anchors[-1]) > len(wide) + 1
    assert all(set(before) <= set(after) for before, after in pairwise(anchors))
    if tolerance < 1e-1:  # wider than that, anchors are as far apart as they may be
        assert error.median() < 0.7 * uncut.median()
    assert error.median() <= 0.6 * tolerance
    assert (error <= 2 * tolerance).all()  # an estimate, and a sample near the boundary of two modes among four
    assert (state.error <= tolerance * 1.001).all()


def test_what_is_spent_ends_merging_and_the_rest_is_the_sequential_scheme():
    denoiser, scheme = mixture(SCHEDULE), piadm.DDPM(60)
    wide = lay(levels(scheme(SCHEDULE), 0.3), 4.0)
    state = drive(solver_on(denoiser, scheme, wide, tolerance=1e-9), denoiser)
    sequential = truth(denoiser, scheme)
    assert state.anchors == tuple(range(61))
    assert torch.allclose(state.finished(), sequential, rtol=0, atol=1e-8)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_without_noise_misses_that_are_alike_add_up(tolerance):
    """The remainder of data with a mean is a smooth curve: every extrapolation misses it to the same side."""
    denoiser = piadm.targets.Gaussian(3.0, 1.0, schedule=piadm.schedules.RectifiedFlow())
    start = torch.randn(20, 16, generator=generator(3), dtype=torch.float64)
    sampler = piadm.Parallel(denoiser, piadm.Euler(1000), tolerance=tolerance)
    result = sampler((20, 16), generator=generator(), noise=start)
    sequential = piadm.Sequential(denoiser, piadm.Euler(1000))((20, 16), generator=generator(), noise=start)
    error = (result.samples - sequential.samples).square().mean(1).sqrt()
    assert result.evaluations < 1000
    assert (error <= tolerance).all()
    assert (error <= result.error).all()
    # and it is an estimate of it, not merely above
    assert (result.error <= tolerance).all()
    assert (error >= tolerance / 20).all()


def test_the_last_steps_may_be_noisy_and_samples_end_at_different_rounds():
    """A schedule that ends with noise left: the last row may be a merged one, and finished samples are not charged for it."""
    schedule = piadm.schedules.Continuous(lambda t: (1 - t, 0.2 + 0.8 * t))
    means = 2 * torch.randn(6, 16, generator=generator(5), dtype=torch.float64)
    denoiser, scheme = piadm.targets.GaussianMixture(means, 0.05, schedule=schedule), piadm.DDIM(400)
    start = torch.randn(25, 16, generator=generator(3), dtype=torch.float64)
    result = piadm.Parallel(denoiser, scheme, tolerance=0.1, window=8)((25, 16), generator=generator(), noise=start)
    sequential = piadm.Sequential(denoiser, scheme)((25, 16), generator=generator(), noise=start)
    assert (result.error <= 0.1).all()
    assert ((result.samples - sequential.samples).square().mean(1).sqrt() <= 0.1).all()


@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("scale", [1e6, 1e25])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_network_on_which_every_step_misses_takes_no_more_rounds_than_steps(window, scale):
    denoiser = piadm.Denoiser(lambda x, t: scale * torch.sin(x), SCHEDULE, "sample", variance=1.0)
    result = piadm.Parallel(denoiser, piadm.DDPM(300), tolerance=0.3, window=window)((4, 8), generator=generator())
    assert result.rounds <= 300
    assert result.converged
    assert result.error.isfinite().all()


def test_remainders_go_on_by_the_last_two_before():
    places = torch.tensor([[0, 10], [4, 12], [6, 16], [9, 99]])
    e = torch.stack([1.0 + 2.0 * places[:, 0], 5.0 - 1.0 * places[:, 1]], 1)[..., None]
    steps, known = torch.tensor([[4, 12], [5, 13], [7, 17], [8, 18]]), torch.tensor([3, 2])
    found = _extrapolated(steps, places, known, e)[..., 0]
    assert torch.allclose(found, torch.stack([1.0 + 2.0 * steps[:, 0], 5.0 - 1.0 * steps[:, 1]], 1))
    # where the last is not known, the line is that through the two before it
    curved = e.clone()
    curved[3, 1] = 1e9
    assert torch.equal(_extrapolated(steps, places, known, curved), _extrapolated(steps, places, known, e))


@every_scheme
def test_an_error_is_worth_what_gaussian_data_make_of_it(scheme):
    """The product of the steps' Jacobians: exactly so for the probability flow and for ancestral sampling."""
    table, variance = scheme(SCHEDULE), 0.7
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    carried = (table.A[:, 0, 0] + table.B[:, 0] * gain).flip(0).cumprod(0).flip(0).numpy()
    states = np.arange(len(table))
    worth = Worth(table, variance)
    found = worth(states, np.full(len(table), variance))
    if scheme is SCHEMES["between"]:
        assert 0 < worth.forgets < 1
        assert found[0] == pytest.approx(carried[0], rel=1e-6)
    else:
        assert worth.forgets == pytest.approx(float(scheme is SCHEMES["ddpm"]), abs=0.02)
        assert np.allclose(found[:-1], carried[:-1], rtol=0.05)


@pytest.mark.parametrize("seed", range(12))
def test_the_future_is_not_looked_at(seed):
    """Noise of a step changes no state before it, in any round, nor when it is accepted, nor where anchors are before it."""
    denoiser, scheme = mixture(SCHEDULE), piadm.DDPM(200)
    wide = lay(levels(scheme(SCHEDULE), 0.3), 0.6)
    runs = []
    for perturb in (None, 150):
        seen = []
        how = {"tolerance": 3e-2, "window": Sliding(12), "perturb": perturb, "seed": seed}
        drive(solver_on(denoiser, scheme, wide, **how), denoiser, seen.append)
        runs.append(seen)
    checked = 0
    for one, other in zip(*runs, strict=False):
        before = [a for a in one.anchors if a <= 150]
        if one.reached.max() >= 150 or other.reached.max() >= 150:
            break
        assert before == [a for a in other.anchors if a <= 150]
        assert torch.equal(one.reached, other.reached)
        lanes = int((torch.tensor(one.anchors)[one.placement.steps.clamp(max=len(one.anchors) - 1)] <= 150).all(1).sum())
        # after a cut lanes are filled again, whose rounding depends on what later rows were cut into
        assert torch.allclose(one.x[:lanes, 0], other.x[:lanes, 0], rtol=0, atol=1e-12)
        checked += lanes
    assert checked > 30
    assert not torch.equal(runs[0][-1].finished(), runs[1][-1].finished())


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2])
@pytest.mark.parametrize("scheme", [piadm.DDPM(1000), piadm.DDIM(1000)], ids=["ddpm", "ddim"])
def test_digits_keep_their_tolerance_with_fewer_evaluations_than_steps(scheme, tolerance):
    denoiser, given = piadm.models.load("digits"), {"label": torch.tensor([3, 8])}
    every, result = (
        piadm.Parallel(denoiser, scheme, tolerance=tolerance, merge=merged)((2, 1, 8, 8), generator=generator(5), **given)
        for merged in (False, True)
    )
    sequential = piadm.Sequential(denoiser, scheme)((2, 1, 8, 8), generator=generator(5), **given)
    error = (result.samples - sequential.samples).flatten(1).square().mean(1).sqrt()
    assert (error <= tolerance).all()
    assert (error <= result.error).all()
    assert result.evaluations < (0.5 if tolerance == 1e-1 else 0.8) * every.evaluations


@pytest.mark.parametrize("tolerance", [1e-1, 3e-1])
@pytest.mark.parametrize("kinds", [(0.05, 0.5, 2.0), (0.01, 1.0), (4.0, 0.1)])
def test_the_certificate_is_above_the_exact_divergence_of_gaussian_data_that_are_not_as_told(kinds, tolerance):
    variance = torch.tensor(kinds, dtype=torch.float64)
    told = piadm.targets.Gaussian(0.0, float(variance.mean()), schedule=SCHEDULE)
    sampler = piadm.Parallel(told, piadm.DDPM(300), tolerance=tolerance)
    law = gaussian_law(sampler, variance)
    reference = sequential_law(SCHEDULE, sampler.table, variance)
    assert sampler.merged is not None
    assert 0 < law.divergence(reference.variance) < law.nats


def test_samples_are_one_for_every_window_and_batch_to_the_tolerance():
    denoiser, scheme, tolerance = mixture(SCHEDULE), piadm.DDPM(300), 1e-2
    each = [generator(seed) for seed in range(3)]
    sequential = piadm.Sequential(denoiser, scheme)((3, 4), generator=each).samples
    for window in (2, 8, 64, None):
        each = [generator(seed) for seed in range(3)]
        result = piadm.Parallel(denoiser, scheme, window=window, tolerance=tolerance)((3, 4), generator=each)
        assert result.windows[-1][1] == 300
        assert all(
            len(residual) == last - first for residual, (first, last) in zip(result.residuals, result.windows, strict=True)
        )
        assert ((result.samples - sequential).square().mean(1).sqrt() <= tolerance).all()
    alone = piadm.Parallel(denoiser, scheme, tolerance=tolerance)((1, 4), generator=[generator(1)]).samples
    assert (alone - sequential[1:2]).square().mean().sqrt() <= tolerance


def test_every_step_is_evaluated_where_merging_may_not_be():
    denoiser, scheme = mixture(SCHEDULE), piadm.DDPM(300)

    def merged(**how):
        return piadm.Parallel(denoiser, scheme, **{"tolerance": 1e-1, **how}).merged is not None

    assert merged()
    assert merged(window="auto")
    assert merged(propagator=propagators.Gaussian(0.3))
    for how in (
        {"merge": False},
        {"window": 1},
        {"audit": True},
        {"target_kl": 0.1},
        {"propagator": propagators.Identity()},
        {"fill": Copy()},
        {"tolerance": 1e-6},
    ):
        assert not merged(**how), how
    assert piadm.Exact(denoiser, scheme).merged is None
    assert piadm.PIADMSDE(denoiser).merged is None


@pytest.mark.parametrize("place", [3, 140, 299])
def test_a_network_that_breaks_is_reported_with_the_schemes_own_step(place):
    broken = int(piadm.DDPM(300)(SCHEDULE).times[place])

    def network(x, t):
        return torch.where((t <= broken)[:, None], torch.nan, x / (1 + x.abs()))

    denoiser = piadm.Denoiser(network, SCHEDULE, "sample", variance=0.3)
    with pytest.raises(NonFiniteError) as caught:
        piadm.Parallel(denoiser, piadm.DDPM(300), tolerance=1e-1)((2, 4), generator=generator())
    step, finished = caught.value.step, caught.value.finished
    # the first evaluated step that breaks: no earlier one does, and it is the next one after those that are finished
    assert step >= place
    assert (finished == step).all()


def test_an_interrupted_run_goes_on_to_the_same_bits_from_every_round():
    network = piadm.Denoiser(lambda x, t: x / (1 + x.abs()) * (1 - 1e-4 * t.to(x)[:, None]), SCHEDULE, "sample", variance=0.3)
    sampler = piadm.Parallel(network, piadm.DDPM(300), tolerance=3e-2, window=8)
    assert sampler.merged is not None
    whole = sampler((3, 4), generator=generator())
    for stop in range(1, whole.rounds):

        def interrupt(round, window, residuals, stop=stop):
            if round == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught:
            sampler((3, 4), generator=generator(), callback=interrupt)
        again = sampler.resume(caught.value.checkpoint)
        assert torch.equal(again.samples, whole.samples)
        assert (again.rounds, again.evaluations, again.windows) == (whole.rounds, whole.evaluations, whole.windows)


def test_a_run_within_a_bound_of_memory_goes_on_too():
    """Its window is the evaluated steps there are at first, also when it is opened again."""
    denoiser = mixture(SCHEDULE)
    sampler = piadm.Parallel(denoiser, piadm.DDPM(300), tolerance=1e-1, window=None, max_memory=2**30)

    def interrupt(round, window, residuals):
        if round == 2:
            raise KeyboardInterrupt

    whole = sampler((2, 4), generator=generator())
    with pytest.raises(KeyboardInterrupt) as caught:
        sampler((2, 4), generator=generator(), callback=interrupt)
    assert torch.allclose(sampler.resume(caught.value.checkpoint).samples, whole.samples)


def test_a_checkpoint_on_disk_holds_the_anchors(tmp_path):
    denoiser, path = mixture(SCHEDULE), tmp_path / "run.safetensors"
    sampler = piadm.Parallel(denoiser, piadm.DDIM(300), tolerance=1e-1, max_rounds=3)
    sampler((2, 4), generator=generator(), checkpoint=path)
    known = piadm.checkpoint.load(path)
    assert isinstance(known.state, Merger)
    assert known.state.anchors[-1] == 300
    assert (known.finished <= 300).all()
    on = piadm.Parallel(denoiser, piadm.DDIM(300), tolerance=1e-1)
    whole = on((2, 4), generator=generator())
    assert torch.allclose(on.resume(path).samples, whole.samples)


def test_anchors_are_laid_by_the_tolerance_and_not_where_it_does_not_pay():
    table = piadm.DDPM(1000)(SCHEDULE)
    counts = [len(first_grid(table, 0.5, tolerance)) for tolerance in (1e-2, 3e-2, 1e-1, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] <= merging.WORTHWHILE * 1000
    assert first_grid(table, 0.5, 1e-5) is None
    for tolerance in (1e-2, 1e-1):
        grid, known = first_grid(table, 0.5, tolerance), levels(table, 0.5)
        assert expected(grid, known, 0.5, stochastic=True) <= math.sqrt(merging.SHARE) * tolerance
        assert all(
            b - a <= merging.GROWTH * max(a - before, 1)
            for before, a, b in zip(*[grid.anchors[i:] for i in range(3)], strict=False)
        )


def test_cutting_keeps_anchors_and_lets_no_step_grow_more_than_twofold():
    grid = Grid((0, 1, 3, 7, 15, 31, 63, 127))
    cut = grid.split({3: 4})
    assert set(grid.anchors) < set(cut.anchors)
    assert cut.anchors[:4] == (0, 1, 3, 7)
    lengths = np.diff(cut.anchors)
    assert (lengths[1:] <= 2 * lengths[:-1]).all()
    assert grid.split(dict.fromkeys(range(len(grid)), 1000)).anchors == tuple(range(128))
