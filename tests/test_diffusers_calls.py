"""What a user of a parallel pipeline sees: results, callbacks, progress, errors, and a pipeline that is left as it was."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

import piadm
from piadm.diffusers import UnsupportedError, parallel, parallelize
from piadm.diffusers.run import Opening
from piadm.diffusers.scheduler import SchedulerNoise
from piadm.fills import Jump
from piadm.propagators import Secant
from piadm.speculative import THRESHOLD, SpeculativeSolver
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {"prompt": "a red cat", "height": 16, "width": 16, "num_inference_steps": 12, "output_type": "latent"}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def fingerprint(pipe: Any) -> Any:
    """Everything about a pipeline that a run could have changed."""
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    return (
        type(pipe),
        {name: id(value) for name, value in vars(pipe).items() if name not in ("_current_timestep", "_num_timesteps")},
        {
            name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in modules.items()
        },
        repr(vars(pipe.scheduler)),
        repr(pipe.config),
    )


@pytest.fixture
def pipe() -> Any:
    made = tiny.stable_diffusion()
    made(**OPTIONS, generator=seeded())  # leaves its own traces, such as the guidance scale
    return made


class Boom(Exception):
    pass


def test_the_pipeline_is_exactly_as_before_after_a_call_and_after_an_exception(pipe):
    before = fingerprint(pipe)
    made = parallelize(pipe, window=6)
    made(**OPTIONS, generator=seeded())
    assert fingerprint(pipe) == before

    def fails(*_):
        raise Boom

    with pytest.raises(Boom):
        made(**OPTIONS, callback_on_step_end=fails)
    assert made.last_result is None
    assert fingerprint(pipe) == before
    assert not isinstance(getattr(pipe, "_current_timestep", None), torch.Tensor)
    forward = pipe.unet.forward
    calls = 0

    def breaks(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Boom
        return forward(*args, **kwargs)

    pipe.unet.forward = breaks
    with pytest.raises(Boom):
        made(**OPTIONS)
    assert pipe.unet.forward is breaks
    del pipe.unet.forward
    assert fingerprint(pipe) == before


def test_within_the_context_the_pipeline_itself_is_parallel(pipe):
    before, alone = fingerprint(pipe), pipe(**OPTIONS, generator=seeded()).images
    with parallel(pipe, window=6, tolerance=1e-3) as made:
        together = pipe(**OPTIONS, generator=seeded()).images
        assert isinstance(pipe, diffusers.StableDiffusionPipeline)
        assert inspect.signature(pipe.__call__) == inspect.signature(
            diffusers.StableDiffusionPipeline(**pipe.components).__call__
        )
        assert pipe.last_result is made.last_result
        assert made.last_result.rounds < made.last_result.steps
        assert torch.equal(made(**OPTIONS, generator=seeded()).images, together)
    assert fingerprint(pipe) == before
    assert 0 < rms(together - alone) < 1e-3
    with pytest.raises(Boom), parallel(pipe):
        raise Boom
    assert fingerprint(pipe) == before


def test_the_result_tells_of_the_last_call(pipe):
    made = parallelize(pipe, window=6)
    assert made.last_result is None
    images = made(**OPTIONS, generator=seeded()).images
    result = made.last_result
    assert torch.equal(result.samples, images)
    assert (result.steps, result.converged, len(result.windows), len(result.residuals)) == (
        12,
        True,
        result.rounds,
        result.rounds,
    )
    assert result.windows[0] == (0, 6)
    assert all(stop - start <= 6 for start, stop in result.windows)
    assert sum(stop - start for start, stop in result.windows) == result.evaluations
    assert result.certificate.kl is None
    assert result.certificate.rms <= 1e-2
    assert made.vae is pipe.vae  # what is not its own is the pipeline's


def test_ancestral_schedulers_report_a_certificate(pipe):
    pipe.scheduler = diffusers.DDPMScheduler(**tiny.STABLE, clip_sample=False)
    made = parallelize(pipe, window=6)
    made(**OPTIONS, generator=seeded())
    assert 0 < made.last_result.certificate.kl < float("inf")
    assert not made.last_result.certificate.rigorous


def test_generators_end_where_a_sequential_run_leaves_them(pipe):
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler(**tiny.STABLE)
    one, other = seeded(), seeded()
    pipe(**OPTIONS, generator=one)
    parallelize(pipe, window=4)(**OPTIONS, generator=other)
    assert torch.equal(one.get_state(), other.get_state())


def test_a_list_of_generators_and_torchs_own_are_followed(pipe):
    pipe.scheduler = diffusers.DDPMScheduler(**tiny.STABLE, clip_sample=False)
    options = {**OPTIONS, "prompt": ["a cat", "a dog"]}
    alone = pipe(**options, generator=[seeded(1), seeded(2)]).images
    together = parallelize(pipe, window=4, tolerance=1e-3)(**options, generator=[seeded(1), seeded(2)]).images
    assert rms(together - alone) < 1e-3
    torch.manual_seed(7)
    alone = pipe(**options).images
    torch.manual_seed(7)
    together = parallelize(pipe, window=4, tolerance=1e-3)(**options).images
    assert rms(together - alone) < 1e-3


def test_given_latents_are_where_the_run_starts(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=seeded())
    alone = pipe(**OPTIONS, latents=latents).images
    together = parallelize(pipe, window=None, tolerance=1e-3)(**OPTIONS, latents=latents).images
    assert rms(together - alone) < 1e-3


def test_output_types_and_tuples_are_the_pipelines_own(pipe):
    made = parallelize(pipe, window=6, tolerance=1e-4)
    for output in ("pil", "np", "pt"):
        options = {**OPTIONS, "output_type": output}
        alone, together = (one(**options, generator=seeded()).images for one in (pipe, made))
        assert type(alone) is type(together)
        assert type(alone[0]) is type(together[0])
    assert isinstance(made(**OPTIONS, return_dict=False), tuple)


# Callbacks and progress


def test_callbacks_see_finished_steps_and_states_without_lanes(pipe):
    sequential: list[torch.Tensor] = []
    pipe(**OPTIONS, generator=seeded(), callback_on_step_end=lambda p, i, t, k: sequential.append(k["latents"]) or k)
    seen: list[tuple[int, float]] = []

    def callback(caller, step, timestep, tensors):
        assert caller is pipe
        assert set(tensors) == {"latents", "prompt_embeds"}
        assert rms(tensors["latents"] - sequential[step]) < 1e-3
        tensors["latents"].numpy()  # an ordinary tensor
        seen.append((step, float(timestep)))
        return tensors

    made = parallelize(pipe, window=6, tolerance=1e-3)
    inputs = ["latents", "prompt_embeds"]
    made(**OPTIONS, generator=seeded(), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    assert [step for step, _ in seen] == sorted({step for step, _ in seen})
    assert len(seen) == made.last_result.rounds
    assert seen[0][0] == 0
    assert seen[-1][0] == 11
    assert [t for _, t in seen] == [float(pipe.scheduler.timesteps[step]) for step, _ in seen]


def test_callbacks_that_change_a_run_are_refused(pipe):
    made = parallelize(pipe, window=6)
    with pytest.raises(UnsupportedError, match="returned another 'latents'"):
        made(**OPTIONS, callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] + 1})


def test_an_interrupted_run_ends_with_its_newest_prediction(pipe):
    rounds = 0

    def callback(caller, step, timestep, tensors):
        nonlocal rounds
        rounds += 1
        caller._interrupt = rounds == 3
        return tensors

    images = parallelize(pipe, window=4)(**OPTIONS, generator=seeded(), callback_on_step_end=callback).images
    assert rounds == 3
    assert images.shape == (1, 4, 8, 8)
    assert images.isfinite().all()
    images.numpy()


def test_the_pipelines_own_bar_counts_finished_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False, mininterval=0)
    parallelize(pipe, window=6)(**OPTIONS, generator=seeded())
    shown = capsys.readouterr().err
    assert "100%" in shown
    counts = [int(count) for count in re.findall(r"(\d+)/12", shown)]
    assert max(counts) == counts[-1] == 12
    assert counts == sorted(counts)
    assert not re.search(r"\d+it \[", shown)  # how tqdm shows a count beyond its total
    unconditional = diffusers.DDPMPipeline(tiny.unet2d(), diffusers.DDPMScheduler())
    parallelize(unconditional, window=6)(num_inference_steps=9, output_type="np")
    assert "9/9" in capsys.readouterr().err


# What keeps working


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pipelines_agree_to_their_precision(dtype):
    pipe = tiny.stable_diffusion().to(dtype)
    alone = pipe(**OPTIONS, generator=seeded()).images
    made = parallelize(pipe, window=6)
    together = made(**OPTIONS, generator=seeded()).images
    assert together.dtype == dtype
    # a sequential run rounds its state at each of the 12 steps, the parallel one keeps it in float32
    assert rms(together - alone) < 12 * torch.finfo(dtype).eps * rms(alone)
    assert made.last_result.rounds < 12


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_networks_work(in_place):
    pipe = tiny.quiet(diffusers.DDIMPipeline(tiny.Linear(), diffusers.DDIMScheduler(clip_sample=False)))
    options = {"num_inference_steps": 12, "output_type": "np"}
    alone = torch.as_tensor(pipe(**options, generator=seeded()).images)
    if in_place:
        pipe.unet.compile(backend="eager", dynamic=True)
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager", dynamic=True)
    made = parallelize(pipe, window=6, tolerance=1e-4)
    together = torch.as_tensor(made(**options, generator=seeded()).images)
    assert rms(together - alone) < 1e-4
    assert made.last_result.rounds < 12
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch._dynamo.reset()


def test_attention_slicing_works(pipe):
    pipe.enable_attention_slicing(1)
    alone = pipe(**OPTIONS, generator=seeded()).images
    assert rms(parallelize(pipe, window=6, tolerance=1e-3)(**OPTIONS, generator=seeded()).images - alone) < 1e-3


def test_hooks_of_others_see_the_networks_calls_and_stay(pipe):
    """As LoRA, offloading and watchers use them."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    hook = Counts()
    add_hook_to_module(pipe.unet, hook)
    inner: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda module, args, out: inner.append(len(out)) or out * 1.01)
    alone = pipe(**OPTIONS, generator=seeded()).images
    hook.calls = 0
    inner.clear()
    made = parallelize(pipe, window=6, tolerance=1e-3)
    together = made(**OPTIONS, generator=seeded()).images
    assert rms(together - alone) < 1e-3
    assert hook.calls == len(inner) == made.last_result.rounds + 1  # one comparison of the first lane
    assert pipe.unet._hf_hook is hook
    handle.remove()


def test_offloading_hooks_that_replace_forward_during_a_call_are_kept(pipe):
    replaced = pipe.vae.forward

    def taken(*args, **kwargs):
        return replaced(*args, **kwargs)

    free = pipe.maybe_free_model_hooks

    def frees():
        pipe.vae.forward = taken
        return free()

    pipe.__dict__["maybe_free_model_hooks"] = frees
    parallelize(pipe, window=6)(**OPTIONS)
    assert pipe.vae.forward is taken


# Refusals


def counted(pipe: Any) -> list[int]:
    """Rows of every call of a pipeline's network from here on."""
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(1))
    return rows


def test_pipelines_that_cannot_be_run_in_parallel_are_refused_before_any_work(pipe):
    rows = counted(pipe)
    for owner, remedy in (("no pipeline", "give a diffusers pipeline"), (torch.nn.Linear(1, 1), "give a diffusers pipeline")):
        with pytest.raises(TypeError, match=remedy):
            parallelize(owner)
    pipe.scheduler = diffusers.CogVideoXDPMScheduler()
    with pytest.raises(UnsupportedError, match="whose step takes"):
        parallelize(pipe)
    panorama = tiny.stable_diffusion(diffusers.StableDiffusionPanoramaPipeline)
    with pytest.raises(UnsupportedError, match="uses the number of the step"):
        parallelize(panorama)
    assert rows == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "`window` is 0"),
        ({"window": 2.5}, "`window` is 2.5"),
        ({"tolerance": 0}, "`tolerance` is 0"),
        ({"variance": -1.0}, "`variance` is -1.0"),
        ({"mean": float("nan")}, "`mean` is nan"),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        parallelize(pipe, **arguments)


def test_a_guidance_interval_of_a_controlnet_is_refused_before_any_work():
    pipe = tiny.stable_diffusion_control()
    rows = counted(pipe)
    image = torch.zeros(1, 3, 16, 16)
    made = parallelize(pipe)
    for argument, value in (("control_guidance_end", 0.5), ("control_guidance_start", [0.2])):
        with pytest.raises(UnsupportedError, match=f"`{argument}` is"):
            made(**OPTIONS, image=image, **{argument: value})
    assert rows == []
    made(**OPTIONS, image=image, control_guidance_end=1.0)


def test_skipped_layers_of_sd3_are_refused_before_any_work():
    made = parallelize(tiny.stable_diffusion_3())
    with pytest.raises(UnsupportedError, match="`skip_guidance_layers` is"):
        made("a red cat", num_inference_steps=4, skip_guidance_layers=[0], output_type="latent")


@pytest.mark.parametrize(
    ("build", "argument", "option"),
    [(tiny.cogvideox, "use_dynamic_cfg", True), (tiny.wan, "boundary_ratio", 0.9)],
)
def test_options_that_decide_by_the_timestep_are_refused_before_any_work(build, argument, option):
    """Guidance that depends on it, an argument of the call; two experts that take turns, part of the configuration."""
    pipe = build()
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: rows.append(1), with_kwargs=True)
    options = {"prompt": "a cat", "height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}
    if argument in inspect.signature(pipe.__call__).parameters:
        options[argument] = option
        made = parallelize(pipe)
    else:
        made = parallelize(pipe)
        pipe.register_to_config(**{argument: option})
        with pytest.raises(UnsupportedError, match=f"`{argument}` is {option}"):
            parallelize(pipe)
        parallelize(pipe, window=1)  # the pipeline itself
    with pytest.raises(UnsupportedError, match=f"`{argument}` is {option}.*does something at certain steps"):
        made(**options, num_inference_steps=8, output_type="latent")
    assert rows == []


class Deciding(tiny.PolicyPipeline):
    """Halves what its network says at small timesteps."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=10, generator=None):
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            level = t / 100
            output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), t).sample
            kept = output if level > 0.5 else 0.5 * output
            actions = self.scheduler.step(kept, t, actions, generator=generator).prev_sample
        return (actions,)


class DecidingIfAsked(tiny.PolicyPipeline):
    """The same, if an option says so; otherwise the timestep is looked at in ways that lanes follow."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=10, generator=None, late=False):
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            timestep = t if torch.is_tensor(t) and t.ndim == 0 else t[0]
            if t.is_floating_point() or torch.is_complex(t) or t.dtype == torch.uint8:
                timestep = timestep.long()
            weight = torch.where(timestep > 50, 1.0, 0.9)
            output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), timestep).sample
            if late and t < 50:
                output = 0.5 * output
            actions = self.scheduler.step(weight * output, t, actions, generator=generator).prev_sample
            if i == len(self.scheduler.timesteps) - 1:
                assert float(actions.abs().max()) < 100
        return (actions,)


def test_a_loop_that_decides_by_the_timestep_is_refused_at_once():
    policy = tiny.policy()
    pipe = Deciding(policy.unet, policy.scheduler)
    with pytest.raises(UnsupportedError, match=r"needs the value of its timestep, `kept = .*level > 0\.5"):
        parallelize(pipe)
    one = parallelize(pipe, window=1)(torch.zeros(1, 4), generator=seeded())  # the pipeline itself
    assert torch.equal(one[0], pipe(torch.zeros(1, 4), generator=seeded())[0])


def test_a_decision_that_only_an_option_leads_to_is_refused_when_it_is_met_and_the_pipeline_restored():
    policy = tiny.policy()
    pipe = DecidingIfAsked(policy.unet, policy.scheduler)
    alone = pipe(torch.zeros(1, 4), num_inference_steps=20, generator=seeded())[0]
    before, made = fingerprint(pipe), parallelize(pipe, window=4, tolerance=1e-4)
    together = made(torch.zeros(1, 4), num_inference_steps=20, generator=seeded())[0]
    assert rms(together - alone) < 1e-4
    with pytest.raises(UnsupportedError, match="decides something by the value"):
        made(torch.zeros(1, 4), generator=seeded(), late=True)
    assert fingerprint(pipe) == before


class Counting(tiny.PolicyPipeline):
    """Halves what its network says from the sixth step on; the counter is nowhere an `enumerate`'s."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=10, generator=None):
        actions, i = torch.randn(len(observation), 2, 16, generator=generator), 0
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), t).sample
            output = output if i < 5 else 0.5 * output
            actions = self.scheduler.step(output, t, actions).prev_sample
            i += 1  # noqa: SIM113
        return (actions,)


class Delegating(tiny.PolicyPipeline):
    """The same, with the scheduler's step in a method of its own."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=10, generator=None):
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            actions = self.one(i, t, actions, observation)
        return (actions,)

    def one(self, i, t, actions, observation):
        output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), t).sample
        return self.scheduler.step(output if i < 5 else 0.5 * output, t, actions).prev_sample


class Indexing(tiny.PolicyPipeline):
    """Takes its timesteps by their number."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=10, generator=None):
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for n in range(num_inference_steps):
            t = self.scheduler.timesteps[n]
            output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), t).sample
            actions = self.scheduler.step(output, t, actions).prev_sample
        return (actions,)


class Listing(tiny.PolicyPipeline):
    """Makes plain numbers of its timesteps."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=10, generator=None):
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps.tolist():
            output = self.unet(torch.cat([actions, observation[:, :, None].expand(-1, -1, 16)], 1), t).sample
            actions = self.scheduler.step(output, t, actions).prev_sample
        return (actions,)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Counting, r"uses the number of the step, `output = output if i < 5"),
        (Delegating, r"no `for` loop with `scheduler\.step\(`"),
        (Indexing, r"uses the number of the step, `t = self\.scheduler\.timesteps\[i\]`"),
        (Listing, r"without going over `scheduler\.timesteps`"),
    ],
)
def test_loops_whose_steps_cannot_be_told_to_be_alike_are_refused(kind, message):
    policy = tiny.policy()
    with pytest.raises(UnsupportedError, match=message):
        parallelize(kind(policy.unet, policy.scheduler), window=4)(torch.zeros(1, 4), generator=seeded())


def test_a_loop_whose_source_is_gone_is_refused():
    names = {"torch": torch, "Base": tiny.PolicyPipeline}
    exec("class Unread(Base):\n    def __call__(self):\n        return self.scheduler.timesteps", names)
    policy = tiny.policy()
    with pytest.raises(UnsupportedError, match="in whose source no `for` loop"):
        parallelize(names["Unread"](policy.unet, policy.scheduler))


class NoisyPipeline(tiny.PolicyPipeline):
    """Draws random numbers in its loop."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=10, generator=None):
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            condition = observation[:, :, None] + 0.1 * torch.randn(1, 4, 16, generator=generator)
            output = self.unet(torch.cat([actions, condition], 1), t).sample
            actions = self.scheduler.step(output, t, actions, generator=generator).prev_sample
        return (actions,)


class NoisyElsewhere(NoisyPipeline):
    """The same, out of sight."""

    @torch.no_grad()
    def __call__(self, observation, num_inference_steps=10, generator=None):
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.unet(torch.cat([actions, Shaker.shaken(observation, generator)], 1), t).sample
            actions = self.scheduler.step(output, t, actions, generator=generator).prev_sample
        return (actions,)


class Shaker:
    """Is no part of the pipeline."""

    @staticmethod
    def shaken(observation, generator):
        return observation[:, :, None] + 0.1 * torch.randn(1, 4, 16, generator=generator)


def test_random_numbers_in_the_loop_are_refused():
    policy = tiny.policy()
    with pytest.raises(UnsupportedError, match=r"draws random numbers, `condition = observation.*: they would depend on"):
        parallelize(NoisyPipeline(policy.unet, policy.scheduler))
    with pytest.raises(UnsupportedError, match="random numbers were drawn"):
        parallelize(NoisyElsewhere(policy.unet, policy.scheduler), window=4)(torch.zeros(1, 4), generator=seeded())


class Normalised(torch.nn.Module):
    """A network with batch normalisation before it."""

    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = torch.nn.BatchNorm1d(6), inner

    def forward(self, sample, timestep):
        return self.inner(self.norm(sample), timestep)


def test_networks_in_training_mode_are_refused_before_any_of_them_is_called():
    policy = tiny.policy()
    policy.unet = Normalised(policy.unet)
    rows = counted(policy)
    with pytest.raises(
        UnsupportedError, match=r"`pipe\.unet` has a BatchNorm1d that normalises over its batch.*call pipe\.unet\.eval"
    ):
        parallelize(policy, window=4)
    policy.unet.eval()
    made = parallelize(policy, window=4)
    policy.unet.train()
    with pytest.raises(UnsupportedError, match=r"call pipe\.unet\.eval"):
        made(torch.zeros(1, 4), generator=seeded())
    dropping = tiny.stable_diffusion()
    for module in dropping.unet.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    with pytest.raises(UnsupportedError, match=r"Dropout that draws random numbers.*call pipe\.unet\.eval"):
        parallelize(dropping, window=4)
    assert rows == []
    dropping.unet.eval()
    dropping.text_encoder.train()  # is not in the loop, and does not drop
    parallelize(dropping, window=4)(**OPTIONS, generator=seeded())


def test_networks_that_mix_rows_are_refused():
    mixing = tiny.policy()
    mixing.unet.register_forward_hook(lambda module, args, out: None)
    forward = mixing.unet.forward

    def mixes(sample, *args, **kwargs):
        return forward(sample + 0.1 * sample.mean(0, keepdim=True), *args, **kwargs)

    mixing.unet.forward = mixes
    with pytest.raises(UnsupportedError, match="rows influence each other"):
        parallelize(mixing, window=4)(torch.zeros(1, 4), generator=seeded())


def test_nan_from_a_network_is_reported_with_its_step_and_round(pipe):
    forward = pipe.unet.forward
    last = float(pipe.scheduler.timesteps[7])

    def breaks(sample, timestep, *args, **kwargs):
        out = forward(sample, timestep, *args, **{**kwargs, "return_dict": False})[0]
        return (torch.where((timestep == last).reshape(-1, 1, 1, 1), torch.nan, out),)

    pipe.unet.forward = breaks
    made = parallelize(pipe, window=4)
    with pytest.raises(piadm.NonFiniteError) as caught:
        made(**OPTIONS, generator=seeded())
    assert caught.value.step == 7
    assert caught.value.x.shape == (1, 4, 8, 8)


def test_a_cache_between_steps_is_refused_before_any_work():
    pipe = tiny.flux()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedError, match="has a cache enabled"):
        parallelize(pipe)("a red cat", height=16, width=16, num_inference_steps=4)


# Exact in law


def test_exact_runs_test_every_step_that_has_noise():
    pipe = tiny.quiet(diffusers.DDPMPipeline(tiny.unet2d(), diffusers.DDPMScheduler(clip_sample=False)))
    made = parallelize(pipe, window=8, exact=True, variance=0.3)
    made(batch_size=1, num_inference_steps=40, generator=seeded(), output_type="np")
    result = made.last_result
    counts = result.acceptance
    assert int(counts.accepted + counts.rejected + counts.recomputed) == 40
    assert int(counts.accepted) > 20
    assert result.rounds < 40
    assert (
        result.certificate
        == piadm.Exact(piadm.models.load("digits"), piadm.DDPM(4), window=2)((1, 1, 8, 8), label=torch.tensor([1])).certificate
    )


def test_exact_runs_say_what_they_need(pipe):
    with pytest.raises(UnsupportedError, match="draws no noise"):
        parallelize(pipe, exact=True)(**OPTIONS)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(clip_sample=False),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.SASolverScheduler(),
    ],
    ids=lambda one: type(one).__name__,
)
@torch.no_grad()
def test_exact_runs_are_those_of_the_solver_whose_law_is_tested(scheduler):
    """Driven by hand, on the scheduler's table and noise; `tests/test_exact.py` tests its law."""
    network, steps, samples, variance = tiny.Small(), 16, 5, 2.0
    made = parallelize(tiny.quiet(tiny.LoopPipeline(network, scheduler)), window=6, exact=True, variance=variance)
    together, result = made(steps, seeded(0), samples)[0], made.last_result

    scheduler.set_timesteps(steps)
    found, generator = piadm.diffusers.probe(scheduler, scheduler.timesteps), seeded(0)
    start = randn_tensor((samples, 4, 4, 4), generator)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    noise = SchedulerNoise(copy.deepcopy(scheduler), found, start, start, options, torch.float32)
    policies = Secant(variance), Opening(6, 1, 6 * samples), Jump(0.0, variance), 1.0, variance
    solver = SpeculativeSolver(found.table, noise, *policies, threshold=THRESHOLD)
    state = solver.init(start.flatten(1))
    while not state.done:
        asked = solver.request(state)
        g = network(asked.x.unflatten(1, (4, 4, 4)), scheduler.timesteps[asked.t]).sample.flatten(1)
        P, Q = (values[asked.t, None].float() for values in (found.on_state, found.on_output))
        state = solver.update(state, P * asked.x + Q * g)
    counts = solver.acceptance(state)
    assert int(counts.accepted.sum()) > samples
    assert (result.rounds, result.acceptance.rejected.tolist()) == (state.rounds, counts.rejected.tolist())
    torch.testing.assert_close(together.flatten(1), state.finished(), rtol=1e-4, atol=1e-4)
