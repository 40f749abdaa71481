"""What a pipeline's loop calls of the pipeline's own is read before any work: each rule, then pipelines of diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from piadm.diffusers import UnsupportedError, parallelize
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


class Calling(tiny.PolicyPipeline):
    """Leaves something of each step to a method, which is handed the timestep."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=8, generator=None, late=False):
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), t).sample
            output = self.changed(output, t / 100, late=late, generator=generator)
            actions = self.scheduler.step(output, t, actions, generator=generator).prev_sample
        return (actions,)


def made(changed: Any) -> Any:
    """A pipeline with that method, of a network that has been trained as little as all of these."""
    policy = tiny.policy()
    return type("Made", (Calling,), {"changed": changed, "__module__": __name__})(policy.unet, policy.scheduler)


# What is refused


def decides(self, output, level, **options):
    return 0.5 * output if level < 0.5 else output


def makes_a_number(self, output, level, **options):
    return output * torch.full((1,), level)


def asks_a_function(self, output, level, **options):
    return weighed(output, early=level > 0.5)


def weighed(output, early):
    return output if bool(early) else 0.5 * output


def asks_a_static_method(self, output, level, **options):
    return self.weight(level) * output


@staticmethod
def weight(level):
    return max(level, 0.5)


def draws(self, output, level, generator, **options):
    return output + 0.1 * torch.randn(output.shape, generator=generator)


def draws_elsewhere(self, output, level, generator, **options):
    return output + noise(output.shape, generator)


def noise(shape, generator):
    return torch.randn(shape, generator=generator)


def draws_after_a_definition(self, output, level, generator, **options):
    def scaled(values):
        return 0.1 * values

    return output + scaled(torch.randn(output.shape, generator=generator))


def decides_either_way(self, output, level, late, **options):
    if late:
        scale = float(level)
    else:
        scale = level.item()
        scale = 2 * scale
    return scale * output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            decides,
            r"needs the value of its timestep, `decides: return 0\.5 \* output if level < 0\.5 else output`",
        ),
        (makes_a_number, r"needs the value .* `makes_a_number: return output \* torch\.full\(\(1,\), level\)`"),
        (asks_a_function, r"needs the value .* `weighed: return output if bool\(early\) else 0\.5 \* output`"),
        (asks_a_static_method, r"needs the value .* `weight: return max\(level, 0\.5\)`"),
        (draws, r"draws random numbers, `draws: return output \+ 0\.1 \* torch\.randn"),
        (decides_either_way, r"needs the value .* `decides_either_way: scale = float\(level\)`"),
        (draws_after_a_definition, r"draws random numbers, `draws_after_a_definition: return output \+ scaled"),
        (draws_elsewhere, r"draws random numbers, `noise: return torch\.randn"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_a_method_does_at_certain_steps_or_draws_is_refused_at_once(changed, message):
    pipe = made(changed)
    type(pipe).weight = weight
    with pytest.raises(UnsupportedError, match=message):
        parallelize(pipe)
    parallelize(pipe, window=1)(torch.zeros(1, 4), generator=seeded())  # the pipeline itself


# What is not


def asks_of_what_kind_it_is(self, output, level, **options):
    if not torch.is_tensor(level):
        level = torch.tensor([level])
    elif level.ndim == 0 and level.dtype.is_floating_point:
        level = level[None]
    if level.requires_grad or level.shape[0] != 1:
        raise ValueError
    assert len(level.shape) == 1
    return output * torch.where(level < 0.5, 0.5, 1.0)


def decides_by_something_else(self, output, level, late=None, **options):
    level = torch.ones(()) + (0.0 if late else 1.0)
    return self.halved(level, 2 * level, output) if level > 0.5 else output


def halved(self, level, other, output):
    return 0.5 * output if level < other else output


def draws_if_asked(self, output, level, late=None, generator=None):
    if not late:
        return output
    return output + 0.1 * torch.randn(output.shape, generator=generator)


def asks_for_draws_if_asked(self, output, level, late=None, generator=None):
    return output + noise(output.shape, generator) if late else output


def decides_if_asked(self, output, level, late=None, generator=None):
    match late:
        case True:
            return output if level > 0.5 else 0.5 * output
    return output


def decides_either_way_if_asked(self, output, level, late=None, **options):
    if late is None:
        return output
    if late:
        return output if level > 0.5 else 0.5 * output
    return 2 * output


def lists_it(self, output, level, **options):
    return output * torch.tensor([0.5, level] * len(output)).mean()


def draws_the_same_again(self, output, level, **options):
    own = torch.Generator().manual_seed(7)
    return output + 0.1 * torch.randn(output.shape, generator=own)


def defines_what_would_draw(self, output, level, late=None, generator=None):
    def drawn():
        return torch.randn(output.shape, generator=generator)

    return output + drawn() if late else output


IF_ASKED = [
    draws_if_asked,
    asks_for_draws_if_asked,
    decides_if_asked,
    decides_either_way_if_asked,
    defines_what_would_draw,
]
HARMLESS = [asks_of_what_kind_it_is, decides_by_something_else, draws_the_same_again, lists_it]


@pytest.mark.parametrize("changed", HARMLESS + IF_ASKED, ids=lambda one: one.__name__)
def test_a_method_that_does_no_such_thing_runs_in_parallel(changed):
    pipe = made(changed)
    type(pipe).halved = halved
    alone = pipe(torch.zeros(1, 4), generator=seeded())[0]
    fast = parallelize(pipe, window=4, tolerance=1e-4)
    assert rms(fast(torch.zeros(1, 4), generator=seeded())[0] - alone) < 1e-4
    assert fast.last_result.evaluations > 8  # in lanes


@pytest.mark.parametrize("changed", IF_ASKED, ids=lambda one: one.__name__)
def test_what_only_an_option_leads_to_in_a_method_is_refused_when_it_is_met(changed):
    with pytest.raises(UnsupportedError, match=r"random numbers were drawn|decides something by the value"):
        parallelize(made(changed), window=4)(torch.zeros(1, 4), generator=seeded(), late=True)


class Handing(tiny.PolicyPipeline):
    """Gives its scheduler an option that is made of the timestep, if there is a second loop to do so in."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=8, generator=None):
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), t).sample
            actions = self.scheduler.step(output, timestep=t, sample=actions, s_noise=t / 100, generator=generator).prev_sample
        return (actions,)


def test_an_option_of_the_scheduler_that_differs_from_step_to_step_is_refused_at_once():
    policy = tiny.policy()
    with pytest.raises(UnsupportedError, match=r"gives `scheduler\.step` an option that differs .* `s_noise=t / 100`"):
        parallelize(Handing(policy.unet, policy.scheduler))


class Blending(tiny.PolicyPipeline):
    """Keeps the first action at what is known of it, noised before or after the step, to the step's own timestep."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=8, generator=None):
        noise = torch.randn(len(observation), 2, 16, generator=generator)
        known, actions = torch.zeros(len(observation), 2, 1), noise
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            first = self.scheduler.add_noise(known, noise[:, :, :1], torch.tensor([t]))
            actions = torch.cat([first, actions[:, :, 1:]], -1)
            output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), t).sample
            actions = self.scheduler.step(output, t, actions, generator=generator).prev_sample
        return (actions,)


class BlendingLate(tiny.PolicyPipeline):
    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=8, generator=None, other=False):
        noise = torch.randn(len(observation), 2, 16, generator=generator)
        known, actions = torch.zeros(len(observation), 2, 1), noise
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), t).sample
            actions = self.scheduler.step(output, t, actions, generator=generator).prev_sample
            if other:
                first = self.scheduler.add_noise(known, noise[:, :, 1:2], torch.tensor([t]))
            else:
                first = self.scheduler.add_noise(known, noise[:, :, :1], timesteps=t[None])
            actions = torch.cat([first, actions[:, :, 1:]], -1)
        return (actions,)


def test_what_is_known_can_be_noised_to_the_timestep_before_its_step():
    policy = tiny.policy()
    pipe = Blending(policy.unet, policy.scheduler)
    alone = pipe(torch.zeros(1, 4), generator=seeded())[0]
    fast = parallelize(pipe, window=4, tolerance=1e-4)
    assert rms(fast(torch.zeros(1, 4), generator=seeded())[0] - alone) < 1e-4
    assert fast.last_result.evaluations > 8  # in lanes


def test_what_is_noised_to_the_timestep_after_its_step_is_refused_at_once():
    policy = tiny.policy()
    with pytest.raises(UnsupportedError, match=r"noises something to its timestep after `scheduler\.step`, .*torch\.tensor"):
        parallelize(BlendingLate(policy.unet, policy.scheduler))


# Pipelines of diffusers


def worked(pipe: Any) -> list[str]:
    """Names of a pipeline's modules, each time that one is called from here on."""
    calls: list[str] = []
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name), with_kwargs=True)
    return calls


PICTURE = {"prompt": "a red cat", "height": 16, "width": 16, "num_inference_steps": 8, "output_type": "latent"}


def test_adaptive_attention_guidance_is_refused_before_any_work():
    pipe = tiny.stable_diffusion(diffusers.StableDiffusionPAGPipeline)
    calls, fast = worked(pipe), parallelize(pipe, window=4)
    for value in (0.5, 1):
        with pytest.raises(UnsupportedError, match=rf"`pag_adaptive_scale` is {value}: .*give `pag_adaptive_scale=0\.0`"):
            fast(**PICTURE, pag_adaptive_scale=value)
    assert calls == []
    fast(**PICTURE, pag_scale=0.0, pag_adaptive_scale=0.5)  # which scales nothing
    assert calls


@pytest.mark.parametrize("options", [{"prompt": "a red cat"}, {"mode": "joint"}, {}], ids=["prompt", "joint", "inferred"])
def test_guidance_that_draws_in_a_method_is_refused_before_any_work(options):
    """UniDiffuser guides by noise, by 8 if the call does not say how much."""
    pipe = tiny.unidiffuser()
    pipe.mode = options.pop("mode", None)
    calls, fast = worked(pipe), parallelize(pipe, window=4, tolerance=1e-4)
    common = {**PICTURE, "prompt": None, **options}
    for asked, given in (({}, 8.0), ({"guidance_scale": 3}, 3)):
        with pytest.raises(
            UnsupportedError, match=rf"`guidance_scale` is {given}: .* draws random .*give `guidance_scale=1\.0`"
        ):
            fast(**common, **asked)
    assert calls == []
    alone = pipe(**common, guidance_scale=0.5, generator=seeded()).images
    assert rms(fast(**common, guidance_scale=0.5, generator=seeded()).images - alone) < 1e-4


def test_a_network_that_a_method_calls_is_refused_in_training_mode_before_any_work():
    pipe = tiny.unidiffuser()
    calls = worked(pipe)
    for module in pipe.unet.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    with pytest.raises(UnsupportedError, match=r"Dropout that draws random numbers.*call pipe\.unet\.eval"):
        parallelize(pipe, window=4)
    assert calls == []


def test_noise_around_an_inpainted_grounding_is_refused_before_any_work():
    own = tiny.stable_diffusion().components
    more = {"processor": None, "image_encoder": None, "image_project": None, "safety_checker": None, "feature_extractor": None}
    named = {name: own[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = diffusers.StableDiffusionGLIGENTextImagePipeline(**named, **more, requires_safety_checker=False)
    calls, fast = worked(pipe), parallelize(pipe, window=4)
    with pytest.raises(UnsupportedError, match=r"`gligen_inpaint_image` is array.*give `gligen_inpaint_image=None`"):
        fast(**PICTURE, gligen_inpaint_image=np.zeros((16, 16, 3)))
    assert calls == []


def test_a_mode_that_does_not_guide_needs_no_option():
    pipe = tiny.unidiffuser()
    pipe.set_image_mode()
    alone = pipe(**PICTURE, generator=seeded()).images
    fast = parallelize(pipe, window=4, tolerance=1e-4)
    assert rms(fast(**PICTURE, generator=seeded()).images - alone) < 1e-4


def test_what_a_network_kept_of_one_step_is_refused_before_any_work():
    """Self-attention guidance looks at the attention of the step before it; by 0.75 if the call does not say how much."""
    pipe = tiny.stable_diffusion(diffusers.StableDiffusionSAGPipeline)
    calls, fast = worked(pipe), parallelize(pipe, window=4, tolerance=1e-4)
    with pytest.raises(UnsupportedError, match=r"`sag_scale` is 0\.75: .*give `sag_scale=0\.0`"):
        fast(**PICTURE)
    assert calls == []
    alone = pipe(**PICTURE, sag_scale=0.0, generator=seeded()).images
    assert rms(fast(**PICTURE, sag_scale=0.0, generator=seeded()).images - alone) < 1e-4


def test_timesteps_for_each_token_are_refused_at_once():
    components = {**tiny.ltx().components, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    with pytest.raises(UnsupportedError, match=r"`scheduler\.step` an option that differs .* `per_token_timesteps=timestep`"):
        parallelize(diffusers.LTXConditionPipeline(**components))


@pytest.mark.parametrize("name", ["ErnieImagePipeline", "ZImageImg2ImgPipeline", "CycleDiffusionPipeline"])
def test_loops_of_diffusers_that_make_a_number_of_their_timestep_are_told(name):
    from piadm.diffusers.loop import check_loop

    with pytest.raises(UnsupportedError, match="needs the value of its timestep"):
        check_loop(getattr(diffusers, name))
