"""The peers, each built from its paper, end at the sequential sample and take the rounds that their papers' algebra says."""

import pytest
import torch

import piadm
from benchmarks.peers import CHORDS, SRDS, ParaDiGMS, ParaSolver, ParaTAA, Picard

DIGITS = piadm.models.load("digits")
SHAPE, LABEL = (2, 1, 8, 8), torch.tensor([3, 7])
FLOW = piadm.targets.GaussianMixture(
    torch.tensor([[-2.0, 0.5], [1.5, 1.0], [0.5, -2.0]]), 0.05, schedule=piadm.schedules.RectifiedFlow()
)
WINDOWED = {
    "ParaDiGMS": ParaDiGMS,
    "ParaSolver": ParaSolver,
    "ParaTAA": ParaTAA,
    "ParaTAA, order 4, memory 3": lambda *a, **k: ParaTAA(*a, order=4, memory=3, **k),
    "Picard": Picard,
}


def seeded():
    return torch.Generator().manual_seed(5)


def distance(a, b):
    return (a.samples - b.samples).square().mean().sqrt().item()


@pytest.fixture(scope="module", params=[piadm.DDIM(50), piadm.DDPM(100)], ids=["DDIM", "DDPM"])
def reference(request):
    return request.param, piadm.Sequential(DIGITS, request.param)(SHAPE, generator=seeded(), label=LABEL)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_tight_tolerance_gives_the_sequential_sample_in_fewer_rounds(name, reference):
    scheme, sequential = reference
    result = WINDOWED[name](DIGITS, scheme, window=20, tolerance=1e-4)(SHAPE, generator=seeded(), label=LABEL)
    assert distance(result, sequential) < 1e-4
    assert result.converged
    assert result.rounds < 0.6 * result.steps
    assert result.steps / 20 <= result.evaluations <= 20 * result.rounds


@pytest.mark.parametrize("name", [name for name in WINDOWED if name != "Picard"])
def test_flow_matching_on_a_mixture_ends_at_the_sequential_sample(name):
    scheme, noise = piadm.Euler(50), torch.randn(16, 2, generator=seeded(), dtype=torch.float64)
    sequential = piadm.Sequential(FLOW, scheme)((16, 2), noise=noise)
    result = WINDOWED[name](FLOW, scheme, window=16, tolerance=1e-5)((16, 2), noise=noise)
    assert distance(result, sequential) < 1e-4
    assert result.rounds < 50


@pytest.mark.parametrize("name", [name for name in WINDOWED if name != "Picard"])
def test_window_one_is_the_sequential_run(name):
    scheme = piadm.DDPM(30)
    sequential = piadm.Sequential(DIGITS, scheme)(SHAPE, generator=seeded(), label=LABEL)
    extra = {"order": 1} if name.startswith("ParaTAA, ") else {}
    build = ParaTAA if extra else WINDOWED[name]
    result = build(DIGITS, scheme, window=1, **extra)(SHAPE, generator=seeded(), label=LABEL)
    assert result.rounds == result.evaluations == 30
    assert distance(result, sequential) < 1e-5


@pytest.mark.parametrize("build", [ParaDiGMS, ParaTAA])
def test_an_unmeetable_tolerance_ends_within_as_many_rounds_as_steps(build):
    result = build(DIGITS, piadm.DDPM(20), tolerance=1e-300)(SHAPE, generator=seeded(), label=LABEL)
    assert result.rounds <= 20


def test_paradigms_is_the_prefix_sum_of_drifts():
    """One round over two steps from copies: the second state is $x_0 + (Φ_0(x_0) - x_0) + (Φ_1(x_0) - x_0)$."""
    scheme, x = piadm.Euler(2), torch.randn(3, 2, generator=seeded(), dtype=torch.float64)
    table = scheme(FLOW.schedule)

    def step(m):
        f = FLOW(x, table.times[m].expand(3))
        return table.A[m, 0, 0] * x + table.B[m, 0] * f

    result = ParaDiGMS(FLOW, scheme, tolerance=1e9)((3, 2), noise=x)
    assert result.rounds == 1
    torch.testing.assert_close(result.samples, step(0) + step(1) - x)


def test_parasolver_needs_fewer_evaluations_than_paradigms():
    runs = [build(DIGITS, piadm.DDPM(40), window=10, tolerance=1e-2) for build in (ParaSolver, ParaDiGMS)]
    jump, copy = (run(SHAPE, generator=seeded(), label=LABEL) for run in runs)
    assert jump.evaluations < copy.evaluations


def test_anderson_acceleration_saves_parataa_rounds_on_an_ode():
    rounds = [
        ParaTAA(DIGITS, piadm.DDIM(30), memory=memory)(SHAPE, generator=seeded(), label=LABEL).rounds for memory in (1, 2)
    ]
    assert rounds[1] < rounds[0]


def test_one_srds_iteration_is_parareal_written_out():
    """Two blocks: after one iteration the sample is $F(G(x)) + G(F(x)) - G(G(x))$, and the next one is exact."""
    scheme, x = piadm.Euler(8), torch.randn(4, 2, generator=seeded(), dtype=torch.float64)
    times = scheme(FLOW.schedule).times

    def velocity(x, t):
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        return (x - FLOW(x, t)) / t[:, None]

    def fine(x, first):
        for t in times[first : first + 4]:
            x = x - velocity(x, t) / 8
        return x

    def coarse(x, t):
        return x - velocity(x, t) / 2

    result = SRDS(FLOW, scheme, blocks=2, tolerance=1e9)((4, 2), noise=x)
    once = fine(coarse(x, 1.0), 4) + coarse(fine(x, 0), 0.5) - coarse(coarse(x, 1.0), 0.5)
    torch.testing.assert_close(result.samples, once)


def test_srds_rounds_follow_the_pipeline_and_end_at_the_sequential_sample():
    scheme = piadm.DDIM(49)  # seven blocks of seven
    sequential = piadm.Sequential(DIGITS, scheme)(SHAPE, generator=seeded(), label=LABEL)
    first = SRDS(DIGITS, scheme, tolerance=1e9)(SHAPE, generator=seeded(), label=LABEL)
    assert first.rounds == 7 - 1 + 7
    tight = SRDS(DIGITS, scheme, tolerance=1e-12)(SHAPE, generator=seeded(), label=LABEL)
    assert tight.rounds <= 49
    assert distance(tight, sequential) < 1e-5


@pytest.mark.parametrize("core", [1, 2, 3])
def test_chords_outputs_arrive_when_the_paper_says_and_draw_nearer(core):
    scheme = piadm.DDIM(50)
    result = CHORDS(DIGITS, scheme, core=core)(SHAPE, generator=seeded(), label=LABEL)
    assert result.rounds == (17, 24, 31)[core - 1]
    assert (result.core, result.cores) == (core, 8)


def test_the_last_core_of_chords_is_the_sequential_run():
    scheme, x = piadm.Euler(50), torch.randn(16, 2, generator=seeded(), dtype=torch.float64)
    sequential = piadm.Sequential(FLOW, scheme)((16, 2), noise=x)
    results = [CHORDS(FLOW, scheme, cores=4, core=core)((16, 2), noise=x) for core in (1, 2, 3, 4)]
    errors = [distance(result, sequential) for result in results]
    assert errors[3] < 1e-12
    assert errors[3] < errors[1] < errors[0]
    assert results[3].rounds == 50
    by_residual = CHORDS(FLOW, scheme, cores=4, tolerance=1e-9)((16, 2), noise=x)
    assert distance(by_residual, sequential) < 1e-8


@pytest.mark.parametrize("build", [SRDS, CHORDS])
def test_ode_methods_refuse_noise(build):
    with pytest.raises(ValueError, match="draws noise"):
        build(DIGITS, piadm.DDPM(50))


@pytest.mark.parametrize("scheme", [piadm.DDIM(20), piadm.Euler(20)], ids=["DDIM", "Euler"])
def test_a_long_step_over_one_step_is_that_step(scheme):
    from benchmarks.peers.common import Leap

    table = scheme(FLOW.schedule)
    leap = Leap(table, scheme, FLOW, "SRDS")
    for m in (0, 7, 19):
        torch.testing.assert_close(
            torch.tensor(leap.coefficients(m, m + 1)).double(),
            torch.stack([table.A[m, 0, 0], table.B[m, 0]]),
            rtol=1e-6,
            atol=1e-6,
        )
