"""A scheduler's table, read off it: closed forms, whole runs with the scheduler's own noise, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

import piadm
from piadm.diffusers import UnsupportedError, probe
from piadm.diffusers.probing import clipped
from piadm.diffusers.scheduler import SchedulerNoise
from tests.tiny import STABLE

pytestmark = pytest.mark.filterwarnings("ignore")
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
SCHEDULERS: dict[str, Any] = {
    "DDIM": lambda: diffusers.DDIMScheduler(**STABLE, clip_sample=False),
    "DDIM linspace": lambda: diffusers.DDIMScheduler(**STABLE, clip_sample=False, timestep_spacing="linspace"),
    "DDIM zero SNR": lambda: diffusers.DDIMScheduler(**ZERO, clip_sample=False),
    "DDIM sample": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "DDIM clipped": lambda: diffusers.DDIMScheduler(),
    "DDIM thresholded": lambda: diffusers.DDIMScheduler(clip_sample=False, thresholding=True, sample_max_value=2.0),
    "DDPM": lambda: diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "DDPM clipped": lambda: diffusers.DDPMScheduler(),
    "DDPM fixed large": lambda: diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_large"),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**STABLE),
    "Euler Karras": lambda: diffusers.EulerDiscreteScheduler(**STABLE, use_karras_sigmas=True),
    "Euler beta": lambda: diffusers.EulerDiscreteScheduler(**STABLE, use_beta_sigmas=True),
    "Euler zero SNR": lambda: diffusers.EulerDiscreteScheduler(**ZERO),
    "Euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**STABLE),
    "DPM-Solver++ 1": lambda: diffusers.DPMSolverMultistepScheduler(**STABLE, solver_order=1),
    "DPM-Solver++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(**STABLE),
    "DPM-Solver++ 2M Karras": lambda: diffusers.DPMSolverMultistepScheduler(**STABLE, use_karras_sigmas=True),
    "DPM-Solver++ 2M exponential": lambda: diffusers.DPMSolverMultistepScheduler(**STABLE, use_exponential_sigmas=True),
    "DPM-Solver++ 3M": lambda: diffusers.DPMSolverMultistepScheduler(**STABLE, solver_order=3),
    "DPM-Solver++ SDE": lambda: diffusers.DPMSolverMultistepScheduler(**STABLE, algorithm_type="sde-dpmsolver++"),
    "DPM-Solver++ thresholded": lambda: diffusers.DPMSolverMultistepScheduler(thresholding=True, sample_max_value=2.0),
    "DPM-Solver epsilon": lambda: diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    ),
    "DPM-Solver flow": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
    "DPM-Solver singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(**STABLE),
    "DEIS": lambda: diffusers.DEISMultistepScheduler(**STABLE),
    "LMS": lambda: diffusers.LMSDiscreteScheduler(**STABLE),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(**STABLE),
    "Heun clipped": lambda: diffusers.HeunDiscreteScheduler(clip_sample=True),
    "KDPM2": lambda: diffusers.KDPM2DiscreteScheduler(**STABLE),
    "KDPM2 ancestral": lambda: diffusers.KDPM2AncestralDiscreteScheduler(**STABLE),
    "PNDM": lambda: diffusers.PNDMScheduler(**STABLE, skip_prk_steps=True, steps_offset=1),
    "PNDM Runge-Kutta": lambda: diffusers.PNDMScheduler(**STABLE),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**STABLE),
    "UniPC 3": lambda: diffusers.UniPCMultistepScheduler(**STABLE, solver_order=3),
    "UniPC flow": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "SA-Solver": lambda: diffusers.SASolverScheduler(**STABLE),
    "LCM": lambda: diffusers.LCMScheduler(**STABLE),
    "TCD": lambda: diffusers.TCDScheduler(**STABLE),
    "EDM Euler": lambda: diffusers.EDMEulerScheduler(),
    "EDM DPM-Solver": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "flow matching Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow matching Euler stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "flow matching Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "CogVideoX DDIM": lambda: diffusers.CogVideoXDDIMScheduler(),
}
OPTIONS = {"DDIM": {"eta": 0.6}, "DDIM linspace": {"eta": 1.0}, "Euler": {"s_churn": 2.0}}
SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_table_run_by_itself_is_the_scheduler_with_its_own_noise(name):
    """Float32 schedulers against a float64 table, to their rounding; the generator ends where the scheduler leaves it."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(11)
    options = OPTIONS.get(name, {})
    found = probe(scheduler, scheduler.timesteps, options)
    table, steps = found.table, len(scheduler.timesteps)
    assert len(table) == steps
    seeded = torch.Generator().manual_seed(5)
    scale = float((table.alpha[0] ** 2 + table.sigma[0] ** 2).sqrt())
    start = scale * torch.randn(SHAPE, generator=seeded)
    outputs = torch.randn(steps, *SHAPE, generator=seeded)

    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    own, ours = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    given = [{**options, "generator": one} if takes_generator else options for one in (own, ours)]
    torch.manual_seed(1)  # of those that take none
    sequential, x, path = copy.deepcopy(scheduler), start, []
    for t, g in zip(scheduler.timesteps, outputs, strict=True):
        if hasattr(sequential, "scale_model_input"):
            sequential.scale_model_input(x, t)
        x = sequential.step(g, t, x, **given[0], return_dict=False)[0]
        path.append(x)

    torch.manual_seed(1)
    noise = SchedulerNoise(copy.deepcopy(scheduler), found, outputs[0], start, given[1], torch.float64)
    rows = table.cast(torch.device("cpu"), torch.float64)
    state = torch.zeros(1, table.components, SHAPE[0], 60, dtype=torch.float64)
    state[0, 0] = start.reshape(2, -1)
    for m, g in enumerate(outputs):
        f = found.on_state[m] * state[0, 0] + found.on_output[m] * g.double().reshape(2, -1)
        if found.clipping is not None:
            f = clipped(scheduler, f.reshape(SHAPE), found.clipping[m]).reshape(2, -1)
        state = rows.take(torch.tensor([[m]])).step(state, f[None], noise(m, m + 1))
        expected = path[m].double().reshape(2, -1)
        assert (state[0, 0] - expected).abs().max() <= 2e-5 * max(scale, float(expected.abs().max())), m
    assert torch.equal(own.get_state(), ours.get_state())


@pytest.mark.parametrize(
    ("scheduler", "scheme", "schedule"),
    [
        (
            diffusers.DDPMScheduler(clip_sample=False),
            piadm.DDPM(25),
            piadm.schedules.DiscreteBetas.linear(1000),
        ),
        (
            diffusers.DDIMScheduler(**STABLE, clip_sample=False),
            piadm.DDIM(25),
            piadm.schedules.DiscreteBetas.scaled_linear(1000),
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            piadm.Euler(25),
            piadm.schedules.RectifiedFlow(num_train_timesteps=1000, shift=3.0),
        ),
    ],
)
def test_tables_read_off_are_those_of_our_own_schemes(scheduler, scheme, schedule):
    scheduler.set_timesteps(25)
    found, known = probe(scheduler, scheduler.timesteps).table, scheme(schedule)
    for name in ("A", "B", "C", "alpha", "sigma"):
        torch.testing.assert_close(getattr(found, name), getattr(known, name), rtol=2e-4, atol=2e-4, msg=name)


def test_components_are_what_a_scheme_needs_to_remember():
    """Not what the scheduler happens to keep: DPM-Solver++ of order p needs p - 1 earlier predictions."""
    for order in (1, 2, 3):
        scheduler = diffusers.DPMSolverMultistepScheduler(**STABLE, solver_order=order)
        scheduler.set_timesteps(12)
        assert probe(scheduler, scheduler.timesteps).table.components == order


def test_the_scheduler_probed_is_left_alone():
    scheduler = SCHEDULERS["UniPC"]()
    scheduler.set_timesteps(9)
    before, random = repr(vars(scheduler)), torch.get_rng_state()
    probe(scheduler, scheduler.timesteps)
    assert repr(vars(scheduler)) == before
    assert torch.equal(torch.get_rng_state(), random)


class Cubic(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **more):
        return super().step(0.01 * model_output**3, timestep, sample, **more)


class Forgetful(diffusers.DDIMScheduler):
    """Linear at every step, but what it does depends on how often it was asked: one run's table is not another's."""

    asked = 0

    def step(self, model_output, timestep, sample, **more):
        type(self).asked += 1
        return super().step(model_output * (1 + 0.01 * type(self).asked), timestep, sample, **more)


class Twice(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **more):
        noise = torch.randn(sample.shape) + torch.randn(sample.shape)
        return super().step(model_output, timestep, sample + noise, **more)


class Shifted(diffusers.DDIMScheduler):
    """Says it predicts epsilon but takes what it is given for twice that."""

    def step(self, model_output, timestep, sample, **more):
        return super().step(model_output / 2, timestep, sample, **more)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (Cubic(clip_sample=False), "not a linear, finite function"),
        (Forgetful(clip_sample=False), "does not reproduce a whole run|does not understand it"),
        (Twice(clip_sample=False), "draws 2 noises"),
        (Shifted(clip_sample=False), "always predicts the image c"),
        (diffusers.CogVideoXDPMScheduler(), "whose step takes"),
        (diffusers.RePaintScheduler(), "original_image, mask"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), "its noise depends on the network"),
        (diffusers.CMStochasticIterativeScheduler(), "not a linear|not understand"),
        (diffusers.DDIMInverseScheduler(), "always predicts the image c"),
        (
            diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False),
            "use v_prediction|not a linear",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_schedulers_without_a_table_are_refused_with_the_reason(scheduler, reason):
    scheduler.set_timesteps(8)
    with pytest.raises(UnsupportedError, match=reason):
        probe(scheduler, scheduler.timesteps)
