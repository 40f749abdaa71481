"""Thousands of runs that nobody chose: any scheme, window, propagator, fill, batch, dtype and adversarial denoiser.

Whatever they are, a parallel run ends within M rounds, in the sequential sample or, where the sequential run breaks, in the
same error. Denoisers are elementwise, so that batches of any size round alike, and hypothesis picks them hostile: expansive,
discontinuous, constant, huge, undefined in places, and never what the propagators assume.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import piadm
from piadm import fills, propagators, schedules
from piadm.errors import NonFiniteError

BETAS, PAPER, FLOW = schedules.DiscreteBetas.linear(1000), schedules.OrnsteinUhlenbeck(), schedules.RectifiedFlow()
CASES = 800


@dataclass(frozen=True)
class Affine:
    r"""A propagator that knows nothing: $J = a + b m$, alternating in sign if asked to."""

    factor: float
    alternating: bool

    def check(self, table: piadm.Table) -> None:
        """Defined for every table."""

    def jacobian(self, rows: piadm.solver.Rows, pair: propagators.Pair | None) -> Tensor:
        sign = torch.ones(len(rows.A)) if not self.alternating else (-1.0) ** torch.arange(len(rows.A))
        return torch.full_like(rows.A, self.factor) * sign.to(rows.A).reshape(-1, 1, 1, 1, 1)


@dataclass(frozen=True)
class Hostile:
    """An elementwise network with parameters, as a dataclass so that a failing case prints itself."""

    kind: str
    size: float

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        size, clock = self.size, 1e-3 * t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        match self.kind:
            case "smooth":
                return x / (1 + x.abs()) * (1 - 0.1 * clock)
            case "expansive":
                return size * x + 0.1
            case "contracting backwards":
                return -size * x
            case "bounded":
                return (size * x).clamp(-5, 5)
            case "steps":
                return torch.floor(size * x) / size
            case "sign":
                return size * torch.sign(x - 0.1)
            case "constant":
                return torch.full_like(x, size)
            case "zero":
                return torch.zeros_like(x)
            case "clock":
                return size * clock.expand_as(x)
            case "huge":
                return torch.full_like(x, min(size * 1e30, torch.finfo(x.dtype).max)) * torch.sign(x)
            case "square":
                return size * x * x
            case "pole":
                return size / x
            case "undefined beyond":
                return x.masked_fill(x.abs() > size, float("nan"))
            case "undefined late":
                return x.masked_fill((clock < 0.1 * size).expand_as(x) & (x > 0), float("nan"))
            case "sample 1 undefined":
                return x.masked_fill((x.flatten(1)[:, 0] > size).reshape(clock.shape).expand_as(x), float("inf"))
        raise AssertionError(self.kind)


KINDS = [
    *(
        "smooth",
        "expansive",
        "contracting backwards",
        "bounded",
        "steps",
        "sign",
        "constant",
        "zero",
        "clock",
        "huge",
        "square",
    ),
    *("pole", "undefined beyond", "undefined late", "sample 1 undefined"),
]
sizes = st.sampled_from([1e-6, 0.1, 0.5, 1.0, 1.7, 3.0, 50.0, 1e4, 1e12])
networks = st.builds(Hostile, st.sampled_from(KINDS), sizes)


@st.composite
def schemes(draw: st.DrawFn):
    """A scheme of at most 14 steps, with its schedule."""
    steps = draw(st.integers(1, 14))
    kind = draw(st.sampled_from(["ddpm", "ddim", "eta", "flow", "sde", "ode", "corrected"]))
    match kind:
        case "ddpm":
            return piadm.DDPM(steps), BETAS
        case "ddim":
            return piadm.DDIM(steps), BETAS
        case "eta":
            return piadm.DDIM(steps, draw(st.sampled_from([0.3, 1.0]))), BETAS
        case "flow":
            return piadm.Euler(steps), FLOW
        case "sde":
            return piadm.ExponentialSDE(2.0, draw(st.sampled_from([0.5, 1.0, 2.0])), 0.25, 0.05), PAPER
        case "ode":
            return piadm.ExponentialODE(2.0, 1.0, 0.25, 0.05), PAPER
        case "corrected":
            return piadm.ExponentialODE(1.0, 0.5, 0.25, 0.05, piadm.Corrector(horizon=0.4, step=0.2)), PAPER
    raise AssertionError(kind)


fixed = st.one_of(
    st.sampled_from([propagators.Jacobi(), propagators.Identity(), propagators.Exponential(), propagators.Gaussian(0.3)]),
    st.builds(Affine, st.sampled_from([-2.0, 0.5, 3.0, 1e8, 1e30]), st.booleans()),
)
"""Models that no evaluation changes. A secant may explain the last two exactly (always, in one dimension), and a step then
counts as finished while it still changes."""
ways = st.one_of(fixed, st.builds(propagators.Secant, st.sampled_from([0.3, 10.0])))


@dataclass(frozen=True, eq=False)
class Outcome:
    """A run's end: what every sample came to, after how many steps, and which failed."""

    x: Tensor
    finished: list[int]
    failed: list[int]
    rounds: int


def outcome(sampler, shape, **keywords) -> Outcome:
    broken = None
    try:
        result = sampler(shape, **keywords)
    except NonFiniteError as error:
        broken = error
    if broken is not None:
        assert broken.x.isfinite().all()
        assert (broken.result is None) == (len(broken.samples) == shape[0])
        assert broken.result is None or broken.result.converged
        return Outcome(broken.x, broken.finished.tolist(), broken.samples, broken.round)
    assert result.converged
    assert result.samples.isfinite().all()
    return Outcome(result.samples, [result.steps] * shape[0], [], result.rounds)


def runs(draw: st.DrawFn):
    """Scheme, network, call."""
    scheme, schedule = draw(schemes())
    network = draw(networks)
    prediction = draw(st.sampled_from(["sample", "v_prediction", "flow_prediction"]))
    one = piadm.Denoiser(network, schedule, prediction, variance=draw(st.sampled_from([1e-3, 0.3, 10.0])))
    shape = (draw(st.integers(1, 4)), *draw(st.sampled_from([(1,), (3,), (2, 2), (700,)])))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed = draw(st.integers(0, 2**31))
    start = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    tiny = 1e-20 if dtype is torch.float64 else 1e-6  # whose squares, by which changes are judged, are numbers still
    return scheme, one, shape, start * draw(st.sampled_from([1.0, 1.0, tiny, 1e3])), seed


@st.composite
def cases(draw: st.DrawFn, ways=ways):
    scheme, one, shape, start, seed = runs(draw)
    way = draw(ways)
    try:
        way.check(scheme(one.schedule))
    except ValueError as error:
        assert "`propagator` is" in str(error)  # noqa: PT017 (a refusal is one of the two ends that a run may have)
        way = propagators.Jacobi()
    window = draw(st.sampled_from([1, 2, 3, 5, None]))
    fill = draw(st.sampled_from([None, fills.Copy()]))
    return scheme, one, shape, start, seed, way, window, fill, draw(st.sampled_from([1e-2, 1e-5, 1e-12]))


quiet = settings(
    max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True, database=None
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@quiet
@given(cases())
def test_every_run_ends_within_m_rounds_and_returns_what_is_finite(case):
    scheme, one, shape, start, seed, way, window, fill, tolerance = case
    sampler = piadm.Parallel(one, scheme, propagator=way, window=window, fill=fill, tolerance=tolerance)
    found = outcome(sampler, shape, generator=generator(seed), noise=start)
    assert found.rounds <= len(sampler.table)
    if window == 1:
        whole = outcome(piadm.Sequential(one, scheme), shape, generator=generator(seed), noise=start)
        assert (found.failed, found.finished) == (whole.failed, whole.finished)
        assert torch.equal(found.x, whole.x)


@quiet
@given(cases(fixed))
def test_with_a_tolerance_nothing_meets_every_run_is_the_sequential_one_or_its_error_to_the_last_bit(case):
    """A state is accepted only once it no longer changes, whatever the network: finite termination itself."""
    scheme, one, shape, start, seed, way, window, fill, _ = case
    sampler = piadm.Parallel(one, scheme, propagator=way, window=window, fill=fill, tolerance=1e-300)
    whole = outcome(piadm.Sequential(one, scheme), shape, generator=generator(seed), noise=start)
    found = outcome(sampler, shape, generator=generator(seed), noise=start)
    assert found.rounds <= len(sampler.table)
    assert (found.failed, found.finished) == (whole.failed, whole.finished)
    # changes whose squares underflow are none to the stopping rule
    assert torch.equal(found.x, whole.x) or (found.x - whole.x).abs().max() < 1e-18


@settings(quiet, max_examples=400)
@given(cases(), st.integers(1, 6), st.booleans())
def test_every_run_interrupted_anywhere_goes_on_to_the_same_bits(tmp_path_factory, case, stop, exact):
    scheme, one, shape, start, seed, way, window, fill, tolerance = case
    if exact and isinstance(scheme, piadm.DDPM) and scheme.steps > 1:
        sampler = piadm.Exact(one, scheme, propagator=way, window=window, fill=fill)
    else:
        sampler = piadm.Parallel(one, scheme, propagator=way, window=window, fill=fill, tolerance=tolerance)
    path = tmp_path_factory.getbasetemp() / "property.safetensors"

    def interrupt(round, window, residual):
        if round == stop:
            raise KeyboardInterrupt

    whole = outcome(sampler, shape, generator=generator(seed), noise=start)
    assert whole.rounds <= len(sampler.table)
    with suppress(KeyboardInterrupt, NonFiniteError):
        sampler(shape, generator=generator(seed), noise=start, callback=interrupt, checkpoint=path)
    found = outcome(lambda shape: sampler.resume(path), shape)
    assert (found.failed, found.finished, found.rounds) == (whole.failed, whole.finished, whole.rounds)
    assert torch.equal(found.x, whole.x)
