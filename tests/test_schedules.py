"""Schedules: levels against closed forms and diffusers, `time` against log-SNR, velocities against autograd, grids."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from piadm.schedules import DiscreteBetas, OrnsteinUhlenbeck, RectifiedFlow, VarianceExploding

EPS32 = torch.finfo(torch.float32).eps
DIFFUSERS_BETAS = {
    "linear": (DiscreteBetas.linear, {"beta_schedule": "linear"}),
    "scaled_linear": (
        DiscreteBetas.scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (DiscreteBetas.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
}
CONTINUOUS = {
    "ornstein-uhlenbeck": (OrnsteinUhlenbeck(), torch.logspace(-5, 1.3, 50, dtype=torch.float64)),
    "variance-exploding": (VarianceExploding(), torch.logspace(-2.7, 1.9, 50, dtype=torch.float64)),
    "rectified-flow": (RectifiedFlow(), torch.linspace(0.001, 0.999, 50, dtype=torch.float64)),
    "rectified-flow-1000": (RectifiedFlow(1000, shift=3.0), torch.linspace(1, 999, 50, dtype=torch.float64)),
}
ALL = {
    **{name: schedule for name, (schedule, _) in CONTINUOUS.items()},
    **{name: make(1000) for name, (make, _) in DIFFUSERS_BETAS.items()},
}
continuous = pytest.mark.parametrize(("schedule", "t"), CONTINUOUS.values(), ids=CONTINUOUS.keys())
discrete = pytest.mark.parametrize(("make", "config"), DIFFUSERS_BETAS.values(), ids=DIFFUSERS_BETAS.keys())


def slope(value, t: torch.Tensor) -> torch.Tensor:
    t = t.clone().requires_grad_()
    out = value(t)
    return torch.autograd.grad(out.sum(), t)[0] if out.requires_grad else torch.zeros_like(t)


@discrete
@pytest.mark.parametrize("n", [10, 1000])
def test_discrete_levels_are_those_of_diffusers(make, config, n):
    ours, theirs = make(n), DDIMScheduler(num_train_timesteps=n, **config)
    t = torch.arange(n)
    # relative rounding of a float32 beta, in units of the log of 1 - beta, summed as the product sums it; then one rounding
    # of 1 - beta and one of the product at each step
    beta = ours.betas
    bound = 2 * EPS32 * (beta / (1 - beta)).cumsum(0) + EPS32 * (t + 1)
    error = (ours.alpha(t) ** 2 / theirs.alphas_cumprod.double()).log().abs()
    assert (error <= bound).all(), (error / bound).max()
    # without the product's own rounding the bound is 3 digits tighter
    exact = (1 - theirs.betas.double()).cumprod(0)
    assert ((ours.alpha(t) ** 2 / exact).log().abs() <= 2 * EPS32 * (beta / (1 - beta)).cumsum(0)).all()
    torch.testing.assert_close(ours.sigma(t) ** 2, 1 - ours.alpha(t) ** 2, rtol=1e-10, atol=0)


def test_ornstein_uhlenbeck_levels_solve_the_forward_process():
    # dx = -x/2 dt + dw from a point: mean' = -mean/2, variance' = 1 - variance, from (1, 0)
    schedule, t = CONTINUOUS["ornstein-uhlenbeck"]
    variance = schedule.sigma(t) ** 2
    torch.testing.assert_close(slope(schedule.alpha, t), -schedule.alpha(t) / 2, rtol=1e-12, atol=0)
    # 1 - variance, and autograd's own derivative of expm1, are rounded at 1
    torch.testing.assert_close(slope(lambda t: schedule.sigma(t) ** 2, t), 1 - variance, rtol=1e-12, atol=1e-15)
    start = torch.zeros(1)
    assert (schedule.alpha(start), schedule.sigma(start)) == (1, 0)


def test_discrete_levels_compose_one_step_of_the_forward_process():
    # x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise
    schedule, t = DiscreteBetas.linear(1000), torch.arange(1000)
    torch.testing.assert_close(schedule.alpha(t), (1 - schedule.betas).sqrt() * schedule.alpha(t - 1), rtol=1e-14, atol=0)
    variance = (1 - schedule.betas) * schedule.sigma(t - 1) ** 2 + schedule.betas
    # 1 - (product of 1 - beta) loses eps / sigma^2, and sigma^2 starts at beta_0 = 1e-4
    torch.testing.assert_close(schedule.sigma(t) ** 2, variance, rtol=1e-11, atol=0)


def test_variance_exploding_and_rectified_flow_levels_are_their_definitions():
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert VarianceExploding().alpha(t).tolist() == [1.0, 1.0]
    assert VarianceExploding().sigma(t).tolist() == [0.25, 0.5]
    assert RectifiedFlow().alpha(t).tolist() == [0.75, 0.5]
    assert RectifiedFlow().sigma(t).tolist() == [0.25, 0.5]
    assert RectifiedFlow(1000).sigma(1000 * t).tolist() == [0.25, 0.5]


@continuous
def test_time_inverts_log_snr(schedule, t):
    # condition number of t(log-SNR) is |log-SNR| / |t d(log-SNR)/dt| < 1e4 here
    torch.testing.assert_close(schedule.time((schedule.alpha(t) / schedule.sigma(t)).log()), t, rtol=1e-11, atol=0)


@discrete
def test_discrete_time_inverts_log_snr_between_steps_too(make, config):
    schedule = make(1000)
    t = torch.linspace(0, 999, 997, dtype=torch.float64)
    back = schedule.time((schedule.alpha(t) / schedule.sigma(t)).log())
    torch.testing.assert_close(back, t, rtol=0, atol=1e-9)


@discrete
def test_discrete_levels_are_continuous_through_integer_times(make, config):
    schedule, t = make(1000), torch.arange(1000)
    torch.testing.assert_close(schedule.alpha(t.double()), schedule.alpha(t), rtol=1e-11, atol=0)
    torch.testing.assert_close(schedule.sigma(t.double()), schedule.sigma(t), rtol=1e-11, atol=0)
    between = torch.linspace(0, 999, 5000, dtype=torch.float64)
    assert (schedule.alpha(between).diff() < 0).all()
    torch.testing.assert_close(schedule.alpha(between) ** 2 + schedule.sigma(between) ** 2, torch.ones(5000).double())


def test_a_last_step_without_signal_spoils_no_other():
    schedule = DiscreteBetas(rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000)))
    whole = torch.arange(1000)
    assert schedule.alpha(whole)[-1] == 0
    assert schedule.sigma(whole)[-1] == 1
    torch.testing.assert_close(schedule.alpha(whole.double()), schedule.alpha(whole), rtol=1e-11, atol=0)
    t = torch.linspace(0, 998, 997, dtype=torch.float64)
    torch.testing.assert_close(schedule.time((schedule.alpha(t) / schedule.sigma(t)).log()), t, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="outside this schedule's"):
        schedule.time(torch.tensor([-20.0]))


@continuous
def test_velocity_is_the_derivative_of_the_levels(schedule, t):
    alpha, sigma = schedule.velocity(t)
    torch.testing.assert_close(alpha, slope(schedule.alpha, t), rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma, slope(schedule.sigma, t), rtol=1e-12, atol=1e-15)  # autograd's expm1 is rounded at 1


def test_a_discrete_schedule_has_no_velocity_and_says_what_to_use():
    with pytest.raises(ValueError, match="use DDIM"):
        DiscreteBetas.linear(1000).velocity(torch.arange(3))


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_fall_from_noise_to_clean_data(schedule, steps, spacing):
    grid = schedule.grid(steps, spacing)
    assert len(grid) == steps + 1
    assert (grid.diff() < 0).all()
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    assert (alpha[-1], sigma[-1]) == (1, 0)
    assert ((alpha / sigma).diff() > 0).all()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [100, 1000])
def test_discrete_grids_are_diffusers_timesteps_for_every_number_of_steps(spacing, n):
    ours = DiscreteBetas.linear(n)
    theirs = DDIMScheduler(num_train_timesteps=n, timestep_spacing=spacing)
    for steps in range(1, n + 1):
        theirs.set_timesteps(steps)
        # np.arange sometimes overshoots its end in "trailing", and diffusers then has an extra step at time -1
        assert ours.grid(steps, spacing)[:-1].tolist() == theirs.timesteps[:steps].tolist(), steps


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 28, 50])
def test_flow_grid_is_that_of_diffusers(shift, steps):
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    theirs.set_timesteps(steps)
    schedule = RectifiedFlow(1000, shift=shift)
    grid = schedule.grid(steps)
    # diffusers rounds to float32 when it is built, when its grid is set and when times are made of levels
    torch.testing.assert_close(grid[:-1].float(), theirs.timesteps, rtol=4 * EPS32, atol=0)
    torch.testing.assert_close(schedule.sigma(grid).float(), theirs.sigmas, rtol=4 * EPS32, atol=0)


def test_flow_shift_multiplies_the_noise_to_signal_ratio():
    # s -> shift s / (1 + (shift - 1) s) is s/(1 - s) -> shift s/(1 - s)
    plain, shifted = RectifiedFlow().grid(20), RectifiedFlow(shift=3.0).grid(20)
    torch.testing.assert_close(shifted[1:] / (1 - shifted[1:]), 3 * plain[1:] / (1 - plain[1:]), rtol=1e-12, atol=0)
    assert shifted[0] == 1
    torch.testing.assert_close(plain, torch.arange(20, -1, -1).double() / 20)


@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80.0, 7.0), (0.02, 10.0, 3.0)])
def test_variance_exploding_grid_is_evenly_spaced_in_the_rho_th_root(low, high, rho):
    grid = VarianceExploding(low, high, rho).grid(18)
    roots = grid[:-1] ** (1 / rho)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(17), rtol=1e-10, atol=0)
    torch.testing.assert_close(grid[[0, 17]], torch.tensor([high, low], dtype=torch.float64), rtol=1e-14, atol=0)
    theirs = EDMEulerScheduler(sigma_min=low, sigma_max=high, rho=rho)
    theirs.set_timesteps(18)
    torch.testing.assert_close(grid.float(), theirs.sigmas, rtol=2 * EPS32, atol=0)


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
def test_runs_start_at_the_standard_deviation_of_noised_data_of_vanishing_size(schedule):
    # on a linear path it is sigma at the first time; where alpha^2 + sigma^2 = 1 it is 1, as diffusers starts too
    t = schedule.grid(10)[0]
    expected = schedule.sigma(t) if isinstance(schedule, VarianceExploding | RectifiedFlow) else torch.tensor(1.0)
    assert schedule.start_scale(t) == expected


def test_schedules_are_named_in_their_repr():
    assert repr(DiscreteBetas.linear(1000)) == "DiscreteBetas(1000 steps, β from 0.0001 to 0.02)"
    assert repr(RectifiedFlow(1000, 3.0)) == "RectifiedFlow(num_train_timesteps=1000, shift=3.0)"
