"""Schemes: the sequential samples are diffusers' own, step by step; closed forms; orders of convergence on exact flow maps."""

from __future__ import annotations

from fractions import Fraction

import diffusers.schedulers.scheduling_ddpm as scheduling_ddpm
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.linalg import expm
from torch import Tensor

import piadm
from piadm.exponential import Corrector, step_lengths
from piadm.noise import Noise
from piadm.schedules import DiscreteBetas, OrnsteinUhlenbeck, RectifiedFlow, VarianceExploding
from piadm.tables import Table

SHAPE = (3, 2, 4)
DOUBLE = torch.float64


class SmallNetwork:
    """A fixed nonlinear function of state and time in the state's dtype, which keeps the states it was shown."""

    def __init__(self, span: float = 1000.0) -> None:
        g = torch.Generator().manual_seed(1)
        self.weight = 0.5 * torch.randn(8, 8, generator=g, dtype=DOUBLE)
        self.phase = torch.randn(8, generator=g, dtype=DOUBLE)
        self.span = span
        self.states: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.states.append(x.clone())
        self.times.append(t[0].item())
        hidden = (
            x.flatten(1) @ self.weight.to(x.dtype) + torch.cos(t.to(x.dtype) / self.span * 3)[:, None] + self.phase.to(x.dtype)
        )
        return torch.tanh(hidden).reshape(x.shape)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def ours(scheme, schedule, prediction="epsilon"):
    """The sequential run's inputs and its sample (float64), with the start and the noise it used."""
    source = Noise(torch.Generator().manual_seed(5), SHAPE[0], 8, 1, torch.device("cpu"), DOUBLE)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
    network = SmallNetwork()
    sampler = piadm.Sequential(piadm.Denoiser(network, schedule, prediction), scheme)
    samples = sampler(SHAPE, generator=torch.Generator().manual_seed(5), noise=start).samples
    assert samples.dtype == DOUBLE
    return [*network.states, samples], network.times, start, lambda m: source(m, m + 1).reshape(SHAPE)


def theirs(scheduler, x, step, timesteps):
    """The states of a loop over a diffusers scheduler, `step(g, t, x, m)` being one of its steps."""
    network, states = SmallNetwork(), []
    for m, t in enumerate(timesteps):
        states.append(x)
        x = step(network(x, t.expand(len(x))), t, x, m)
    return [*states, x]


def agree(mine, their, tolerance):
    assert len(mine) == len(their)
    errors = [relative(a, b) for a, b in zip(mine, their, strict=True)]
    assert max(errors) <= tolerance, errors


# What diffusers holds in float32 is the product of 1 - beta, rounded at 6e-8 where it is near 1: sigma there is wrong by
# 6e-8 / (2 sigma), a few 1e-6 at the last steps' sigma = 1e-2, and the states with it (seen: 7e-6). With the float64
# table in its place only the arithmetic is left: 1e-16 a step, times 1/alpha < 200 for epsilon at the noisiest (seen: 2e-13).
PRECISION = {"as shipped": 2e-5, "float64 table": 1e-12}
precision = pytest.mark.parametrize("table", PRECISION)
predictions = pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
# steps on a grid to whose next point diffusers' own DDIM steps (below)
GRIDS = [("leading", 20), ("leading", 7), ("trailing", 20)]


def equip(scheduler, schedule, table):
    if table == "float64 table":
        scheduler.alphas_cumprod = schedule.alpha(torch.arange(len(schedule.betas))) ** 2
    return scheduler


@precision
@predictions
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 20), ("leading", 7), ("trailing", 7), ("linspace", 13)])
def test_ddpm_is_diffusers_step_by_step(monkeypatch, prediction, betas, spacing, steps, table):
    span = {"beta_start": 1e-4, "beta_end": 0.02} if betas != "squaredcos_cap_v2" else {}
    schedule = getattr(DiscreteBetas, BETAS[betas])(1000, **span)
    mine, times, start, xi = ours(piadm.DDPM(steps, spacing), schedule, prediction)
    scheduler = DDPMScheduler(
        beta_schedule=betas,
        prediction_type=prediction,
        timestep_spacing=spacing,
        variance_type="fixed_small",
        clip_sample=False,
        **span,
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == times
    equip(scheduler, schedule, table)

    def step(g, t, x, m):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: xi(m))
        return scheduler.step(g, t, x).prev_sample

    # diffusers' last step adds noise of variance 1e-20 where it does not end at t = 0
    agree(
        mine, theirs(scheduler, start, step, scheduler.timesteps), max(PRECISION[table], 1e-9 if spacing == "trailing" else 0)
    )


@precision
@predictions
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), GRIDS)
def test_ddim_is_diffusers_step_by_step(prediction, eta, spacing, steps, table):
    schedule = DiscreteBetas.linear(1000)
    mine, times, start, xi = ours(piadm.DDIM(steps, eta, spacing), schedule, prediction)
    scheduler = DDIMScheduler(
        prediction_type=prediction, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True, steps_offset=0
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == times
    equip(scheduler, schedule, table)

    def step(g, t, x, m):
        return scheduler.step(g, t, x, eta=eta, variance_noise=xi(m)).prev_sample

    agree(mine, theirs(scheduler, start, step, scheduler.timesteps), PRECISION[table])


@predictions
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 13), ("trailing", 7)])
def test_ddim_steps_to_the_next_time_of_every_grid(monkeypatch, prediction, eta, spacing, steps):
    # diffusers' DDIMScheduler steps by n // steps, which on these grids is not where it evaluates next (its DDPMScheduler
    # looks the next time up). Told the true gap, it agrees: n // (n / gap) = gap
    schedule = DiscreteBetas.linear(1000)
    mine, times, start, xi = ours(piadm.DDIM(steps, eta, spacing), schedule, prediction)
    scheduler = DDIMScheduler(prediction_type=prediction, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == times
    equip(scheduler, schedule, "float64 table")
    gaps = [int(a - b) for a, b in zip(times, [*times[1:], -1], strict=True)]
    assert set(gaps) - {1000 // steps}

    def step(g, t, x, m):
        scheduler.num_inference_steps = Fraction(1000, gaps[m])
        return scheduler.step(g, int(t), x, eta=eta, variance_noise=xi(m)).prev_sample

    agree(mine, theirs(scheduler, start, step, scheduler.timesteps), PRECISION["float64 table"])


def test_ddim_is_diffusers_from_a_first_step_without_signal():
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=True
    )
    scheduler.set_timesteps(20)
    schedule = DiscreteBetas(scheduler.betas.double().clamp(max=1))
    assert schedule.alpha(torch.tensor(999)) == 0
    equip(scheduler, schedule, "float64 table")
    mine, _, start, _ = ours(piadm.DDIM(20, 0.0, "trailing"), schedule, "v_prediction")
    agree(mine, theirs(scheduler, start, lambda g, t, x, m: scheduler.step(g, t, x).prev_sample, scheduler.timesteps), 1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 10, 28])
def test_euler_on_a_flow_is_diffusers_step_by_step(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(steps)
    mine, times, start, _ = ours(piadm.Euler(steps), RectifiedFlow(1000, shift=shift), "flow_prediction")
    np.testing.assert_allclose(times, scheduler.timesteps.numpy(), rtol=5e-7)
    # diffusers rounds states, levels and times to float32 at every step, 6e-8 each (seen: 2e-7)
    agree(mine, theirs(scheduler, start, lambda g, t, x, m: scheduler.step(g, t, x).prev_sample, scheduler.timesteps), 1e-6)


LEVELS = {
    "linear": DiscreteBetas.linear(1000),
    "cosine": DiscreteBetas.cosine(1000),
    "ornstein-uhlenbeck": OrnsteinUhlenbeck(),
    "variance-exploding": VarianceExploding(),
    "rectified-flow": RectifiedFlow(),
    "rectified-flow-1000": RectifiedFlow(1000, shift=3.0),
}
levels = pytest.mark.parametrize("schedule", LEVELS.values(), ids=LEVELS.keys())
STRAIGHT = ("variance-exploding", "rectified-flow", "rectified-flow-1000")


@levels
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_marginals_of_data_at_one_point(schedule, eta):
    # x_t ~ N(alpha f, sigma^2) for every t, whatever eta
    grid = schedule.grid(20)
    table = piadm.DDIM(20, eta)(schedule)
    A, B, C = table.A[:, 0, 0], table.B[:, 0], table.C[:, 0, 0]
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    torch.testing.assert_close(A * alpha[:-1] + B, alpha[1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A**2 * sigma[:-1] ** 2 + C**2, sigma[1:] ** 2, rtol=1e-12, atol=1e-12)
    assert bool(C.any()) == (eta > 0)


@levels
def test_ddpm_is_the_posterior_of_the_forward_process(schedule):
    # (x', x) given x_0 is Gaussian: x' ~ N(alpha' x_0, sigma'^2), x | x' ~ N(r x', sigma^2 - r^2 sigma'^2), r = alpha/alpha'
    grid = schedule.grid(20)
    table = piadm.DDPM(20)(schedule)
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    covariance, variance = alpha[:-1] / alpha[1:] * sigma[1:] ** 2, sigma[:-1] ** 2
    torch.testing.assert_close(table.A[:, 0, 0], covariance / variance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(table.C[:, 0, 0] ** 2, sigma[1:] ** 2 - covariance**2 / variance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [(scheme, name) for scheme in (piadm.DDPM(20), piadm.DDIM(20), piadm.DDIM(20, 0.5)) for name in LEVELS]
    + [(piadm.Euler(20), name) for name in STRAIGHT],
    ids=str,
)
def test_the_last_step_returns_the_denoiser_output(scheme, name):
    table = scheme(LEVELS[name])
    last = torch.stack([table.A[-1, 0, 0], table.B[-1, 0], table.C[-1, 0, 0]])
    torch.testing.assert_close(last, torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STRAIGHT)
def test_ddim_is_euler_where_the_path_is_straight(name):
    schedule = LEVELS[name]
    ddim, euler = piadm.DDIM(20)(schedule), piadm.Euler(20)(schedule)
    torch.testing.assert_close(ddim.A, euler.A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ddim.B, euler.B, rtol=1e-12, atol=1e-12)


def test_euler_on_variance_exploding_is_that_of_karras():
    # x' = x + (sigma' - sigma) (x - f)/sigma (arXiv 2206.00364, algorithm 1)
    schedule = VarianceExploding()
    sigma = schedule.grid(10)
    ratio = sigma.diff() / sigma[:-1]
    table = piadm.Euler(10)(schedule)
    torch.testing.assert_close(table.A[:, 0, 0], 1 + ratio, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(table.B[:, 0], -ratio, rtol=1e-12, atol=0)
    assert table.scale == pytest.approx(80.0, rel=1e-12)


def order(sizes: list[float], errors: list[float]) -> float:
    """Slope of log error against log step size."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


MEAN, VARIANCE = 0.7, 0.3


def flow(schedule, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Exact probability flow of N(MEAN, VARIANCE) data: distances from the mean scale as the standard deviation."""

    def law(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * MEAN, (alpha**2 * VARIANCE + sigma**2).sqrt()

    (m0, s0), (m1, s1) = law(start), law(end)
    return m1 + s1 / s0 * (x - m0)


def flow_error(schedule, scheme, start: Tensor, end: Tensor) -> float:
    target = piadm.targets.Gaussian(MEAN, VARIANCE, schedule)
    sampler = piadm.Sequential(target, scheme)
    x = torch.linspace(-2, 2, 5, dtype=DOUBLE)[:, None]
    samples = sampler((5, 1), noise=x).samples
    return float((samples - flow(schedule, x * sampler.table.scale, start, end)).abs().max())


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (piadm.Euler, "ornstein-uhlenbeck"),
        (piadm.Euler, "variance-exploding"),
        (piadm.Euler, "rectified-flow"),
        (piadm.Euler, "rectified-flow-1000"),
        (piadm.DDIM, "variance-exploding"),
        (piadm.DDIM, "rectified-flow"),
        (piadm.DDIM, "ornstein-uhlenbeck"),
    ],
)
def test_euler_and_ddim_converge_to_the_exact_flow_at_order_one(scheme, name):
    schedule = {
        "rectified-flow-1000": RectifiedFlow(10**6),  # whose grid ends at 1e-6 and 0: the last step is exact
        "variance-exploding": VarianceExploding(1e-6, 20.0),
        "ornstein-uhlenbeck": OrnsteinUhlenbeck(4.0),
    }.get(name, LEVELS[name])
    steps = [64, 128, 256, 512]
    errors = []
    for n in steps:
        grid = schedule.grid(n)
        errors.append(flow_error(schedule, scheme(n), grid[0], grid[-1]))
    measured = order([1 / n for n in steps], errors)
    assert measured == pytest.approx(1.0, abs=0.2), errors


def test_exponential_ode_converges_to_the_exact_flow_at_order_one():
    schedule, steps = OrnsteinUhlenbeck(), [0.1, 0.05, 0.025, 0.0125]
    ends = torch.tensor(3.0, dtype=DOUBLE), torch.tensor(0.01, dtype=DOUBLE)
    errors = [flow_error(schedule, piadm.ExponentialODE(3.0, 1.0, step, 0.01), *ends) for step in steps]
    assert order(steps, errors) == pytest.approx(1.0, abs=0.2), errors


def variance_after(table: Table, variance: float) -> float:
    """Variance of the last state for data N(0, v), from N(0, scale^2): x' = (A + B L) x + C xi."""
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    out = table.scale**2
    for a, b, c, l in zip(table.A[:, 0, 0], table.B[:, 0], table.C[:, 0, 0], gain, strict=True):
        out = float((a + b * l) ** 2 * out + c**2)
    return out


@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_exponential_sde_has_weak_order_one(variance):
    # the reverse SDE moves the variance V by V' = (1 - 2/S) V + 1, of which S = 1 + (v - 1) e^-t is one solution; from
    # V = 1 at T the difference V - S shrinks by exp of the integral of 1 - 2/S, and that of 1/S is log(e^t + v - 1)
    horizon, stop, steps = 3.0, 0.01, [0.1, 0.05, 0.025, 0.0125]

    def marginal(t: float) -> float:
        return 1 + (variance - 1) * np.exp(-t)

    decay = horizon - stop - 2 * np.log((np.exp(horizon) + variance - 1) / (np.exp(stop) + variance - 1))
    exact = marginal(stop) + (1 - marginal(horizon)) * np.exp(decay)
    tables = [piadm.ExponentialSDE(horizon, 1.0, step, stop)(OrnsteinUhlenbeck()) for step in steps]
    errors = [abs(variance_after(table, variance) - exact) for table in tables]
    assert order(steps, errors) == pytest.approx(1.0, abs=0.2), errors


def linear_step(drift: Tensor, push: Tensor, noise: Tensor, length: float) -> tuple[Tensor, Tensor, Tensor]:
    """Exact step of dx = (F x + g) dt + L dw by matrix exponentials (Van Loan, 1978): transition, integrated g, covariance."""
    k = len(drift)
    augmented = torch.zeros(k + 1, k + 1, dtype=DOUBLE)
    augmented[:k, :k], augmented[:k, k] = drift, push
    whole = torch.from_numpy(expm(augmented.numpy() * length))
    loan = torch.zeros(2 * k, 2 * k, dtype=DOUBLE)
    loan[:k, :k], loan[:k, k:], loan[k:, k:] = -drift, noise @ noise.T, drift.T
    loan = torch.from_numpy(expm(loan.numpy() * length))  # torch's matrix_exp is good to 1e-10 only
    return whole[:k, :k], whole[:k, k], loan[k:, k:].T @ loan[:k, k:]


@pytest.mark.parametrize(("scheme", "weight"), [(piadm.ExponentialSDE, 1.0), (piadm.ExponentialODE, 0.5)])
def test_exponential_rows_are_the_exact_flow_with_the_score_frozen(scheme, weight):
    # reverse time: dx = (x/2 + s) dt + dw, or (x/2 + s/2) dt; s = (alpha f - x)/sigma^2 at the step's start
    schedule = OrnsteinUhlenbeck()
    table = scheme(horizon=3.0, block=1.0, step=0.2, early_stop=0.01)(schedule)
    times = torch.cat([table.times, torch.tensor([0.01], dtype=DOUBLE)])
    noise = torch.tensor([[1.0 if weight == 1 else 0.0]], dtype=DOUBLE)
    for m, length in enumerate(-times.diff()):
        grow, push, covariance = linear_step(
            torch.tensor([[0.5]], dtype=DOUBLE), torch.tensor([weight], dtype=DOUBLE), noise, float(length)
        )
        alpha, variance = schedule.alpha(times[m]), schedule.sigma(times[m]) ** 2
        torch.testing.assert_close(table.A[m], grow - push / variance, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(table.B[m], push * alpha / variance, rtol=1e-10, atol=0)
        torch.testing.assert_close(table.C[m] ** 2, covariance, rtol=1e-10, atol=0)


@pytest.mark.parametrize("length", [1e-3, 0.1, 0.2499, 0.2501, 2.0])
@pytest.mark.parametrize("friction", [0.5, 2.0])
def test_corrector_rows_are_the_exact_langevin_step_with_the_score_frozen(length, friction):
    t = 0.3
    drift = torch.tensor([[0.0, 1.0], [0.0, -friction]], dtype=DOUBLE)
    noise = torch.tensor([[0.0], [(2 * friction) ** 0.5]], dtype=DOUBLE)
    transition, push, covariance = linear_step(drift, torch.tensor([0.0, 1.0], dtype=DOUBLE), noise, length)
    alpha, variance = np.exp(-t / 2), 1 - np.exp(-t)
    A, B, C = Corrector(friction=friction, horizon=2.0, step=1.0).row(t, length)
    score = torch.stack([push, torch.zeros(2, dtype=DOUBLE)], dim=1) / variance
    torch.testing.assert_close(A, transition - score, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(B, push * alpha / variance, rtol=1e-9, atol=0)
    # the reference loses to cancellation what it keeps in the covariance's large entries: compare in correlation units
    unit = covariance.diagonal().sqrt()
    torch.testing.assert_close(C @ C.T / unit / unit[:, None], covariance / unit / unit[:, None], rtol=1e-6, atol=0)


def test_the_paper_grid_fills_the_horizon_and_shrinks_in_the_last_block():
    scheme = piadm.ExponentialSDE(horizon=6.0, block=1.0, step=0.25, early_stop=0.01)
    table = scheme(OrnsteinUhlenbeck())
    assert len(table) == 37  # design.md section 2
    assert table.blocks == (0, 4, 8, 12, 16, 20, 37)
    torch.testing.assert_close(table.times[:20], 6 - 0.25 * torch.arange(20, dtype=DOUBLE))
    left = table.times[20:]
    lengths = -torch.cat([left, left.new_tensor([0.01])]).diff()
    # min(step, step * time left): geometric, the last one clipped to end at the early stop
    torch.testing.assert_close(lengths[:-1], 0.25 * left[:-1])
    assert 0 < lengths[-1] <= 0.25 * left[-1]


@pytest.mark.parametrize(("length", "step", "stop"), [(1.0, 0.3, 0.0), (1.0, 0.1, 0.0), (0.7, 0.1, 1e-4), (2.0, 0.5, 0.3)])
def test_steps_of_a_block_sum_to_its_length(length, step, stop):
    steps = step_lengths(length, step, stop)
    assert sum(steps) == pytest.approx(length - stop, rel=1e-12)
    assert all(0 < one <= step * (1 + 1e-9) for one in steps)
    if not stop:
        assert len(steps) == int(np.ceil(length / step - 1e-9))


@pytest.mark.parametrize("steps", [30, 100, 1000])
def test_with_steps_uses_the_steps_it_is_given(steps):
    table = piadm.ExponentialSDE.with_steps(steps, horizon=6.0, block=1.0, early_stop=0.01)(OrnsteinUhlenbeck())
    # of six blocks each may gain a step at the same step length
    assert steps - 6 <= len(table) <= steps


@pytest.mark.parametrize(
    "schedule", [VarianceExploding(), RectifiedFlow(), DiscreteBetas.linear(1000)], ids=["ve", "rf", "betas"]
)
@pytest.mark.parametrize("corrector", [None, Corrector(step=0.25)], ids=["predictor", "corrector"])
def test_the_papers_schemes_are_the_same_on_any_schedule_up_to_scale(schedule, corrector):
    # a network trained on another schedule sees the same signal-to-noise ratios, and its samples differ by alpha alone
    def run(schedule):
        target = piadm.targets.Gaussian(MEAN, VARIANCE, schedule)
        sampler = piadm.Sequential(target, piadm.ExponentialODE(6.0, 1.0, 0.25, 0.01, corrector))
        noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        return sampler((4, 3), noise=noise, generator=torch.Generator().manual_seed(0)).samples

    end = torch.tensor(0.01, dtype=DOUBLE)
    paper = OrnsteinUhlenbeck()
    same = schedule.time((paper.alpha(end) / paper.sigma(end)).log()[None])
    torch.testing.assert_close(run(schedule) / schedule.alpha(same), run(paper) / paper.alpha(end), rtol=1e-8, atol=1e-9)
