"""Noise: xi is a function of (seed, step) alone, and standard normal."""

from __future__ import annotations

import math

import pytest
import torch

import piadm
from piadm.noise import Noise

CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(generator, samples=3, size=5, components=2, dtype=torch.float32) -> Noise:
    return Noise(generator, samples, size, components, CPU, dtype)


@pytest.mark.parametrize("generators", ["one", "each"])
@pytest.mark.parametrize("components", [1, 2])
def test_xi_depends_on_the_step_and_not_on_how_it_was_asked_for(generators, components):
    def fresh() -> Noise:
        return noise(seeded(7) if generators == "one" else [seeded(i) for i in range(3)], components=components)

    whole = fresh()(0, 12)
    assert whole.shape == (12, components, 3, 5)
    source = fresh()
    backwards = [source(m, m + 1) for m in reversed(range(12))]
    assert torch.equal(torch.cat(backwards[::-1]), whole)
    source.start()
    assert torch.equal(torch.cat([source(0, 5), source(5, 6), source(6, 12)]), whole)
    assert torch.equal(source(3, 9), whole[3:9])


def test_steps_components_and_the_start_are_different_draws():
    source = noise(seeded(0), size=50)
    draws = [*source(0, 20).flatten(0, 1).flatten(1), source.start().flatten()]
    correlation = torch.corrcoef(torch.stack(draws).double()) - torch.eye(41)
    # 820 pairs of 150 independent numbers: 5 standard errors
    assert correlation.abs().max() < 5 / math.sqrt(150)


def test_seeds_differ_and_agree():
    assert torch.equal(noise(seeded(1))(0, 3), noise(seeded(1))(0, 3))
    assert not torch.equal(noise(seeded(1))(0, 3), noise(seeded(2))(0, 3))
    generator = seeded(1)
    first, second = noise(generator), noise(generator)
    assert not torch.equal(first(0, 1), second(0, 1))


def test_xi_is_standard_normal():
    xi = noise(seeded(3), samples=20, size=50, components=1, dtype=torch.float64)(0, 200).flatten()
    n = len(xi)
    # moments of N(0, 1) and the standard deviations of their estimates, 5 of which a fixed seed has to stay within
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((xi**power).mean()) - moment) < 5 * math.sqrt(variance / n), power


def test_per_sample_generators_make_a_sample_independent_of_its_batch():
    batch, alone = noise([seeded(i) for i in range(3)]), noise(seeded(1), samples=1)
    assert torch.equal(batch(0, 4)[:, :, 1:2], alone(0, 4))
    assert torch.equal(batch.start()[1:2], alone.start())


@pytest.mark.parametrize(
    "scheme", [piadm.DDPM(15), piadm.ExponentialODE(2.0, 1.0, 0.2, 0.01, piadm.Corrector())], ids=["k=1", "k=2"]
)
@pytest.mark.parametrize("window", [None, 4])
def test_per_sample_generators_make_a_whole_run_independent_of_its_batch(scheme, window):
    # on a target that acts number by number, so that rows of other batches are the same arithmetic
    target = piadm.targets.Gaussian(0.5, 0.2)
    sampler = piadm.Parallel(target, scheme, window=window, tolerance=1e-3)
    batch = sampler((3, 4), generator=[seeded(i) for i in range(3)]).samples
    for i in range(3):
        assert torch.equal(sampler((1, 4), generator=seeded(i)).samples, batch[i : i + 1])


def test_one_generator_is_drawn_from_once():
    used, expected = seeded(9), seeded(9)
    noise(used)(0, 5)
    torch.randint(2**63 - 1, (1,), generator=expected)
    assert torch.equal(used.get_state(), expected.get_state())


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_a_run_with_a_generator_leaves_global_state_alone(parallel):
    torch.manual_seed(1)
    before = (torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    sampler = (piadm.Parallel if parallel else piadm.Sequential)(piadm.targets.Gaussian(0.0, 1.0), piadm.DDPM(10))
    sampler((2, 3), generator=seeded(0))
    after = (torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_without_a_generator_the_global_seed_decides():
    sampler = piadm.Sequential(piadm.targets.Gaussian(0.0, 1.0), piadm.DDPM(5))
    torch.manual_seed(1)
    first, second = sampler((2, 3)).samples, sampler((2, 3)).samples
    torch.manual_seed(1)
    assert torch.equal(sampler((2, 3)).samples, first)
    assert not torch.equal(first, second)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn():
    """A seeding gives several steps' noise, and as many whether the seeds come from generators or from a checkpoint."""
    whole = noise([seeded(i) for i in range(3)], size=900, components=1)
    again = Noise.from_seeds(whole.seeds, 3, 900, 1, torch.device("cpu"), torch.float32)
    assert torch.equal(whole(0, 40), again(0, 40))
    assert torch.equal(whole(3, 35), torch.cat([again(m, m + 1) for m in range(3, 35)]))
    one = noise(seeded(0), size=900, components=1)
    assert torch.equal(one(0, 40), Noise.from_seeds(one.seeds, 3, 900, 1, torch.device("cpu"), torch.float32)(0, 40))
