"""Unmodified pipelines with tiny random weights: what each returns in parallel is what it returns by itself."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import piadm.diffusers
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 14
PIXELS = np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)
HALF = Image.fromarray(np.uint8(255 * (np.arange(256).reshape(16, 16) % 16 < 8)))
TEXT = {"prompt": "a red cat", "height": 16, "width": 16}
MANY = {
    "prompt": ["a red cat", "the blue boat"],
    "negative_prompt": ["rain", "dog"],
    "num_images_per_prompt": 2,
    "guidance_scale": 3.0,
    "height": 16,
    "width": 16,
}
HUNYUAN = {"prompt": "a red cat", "height": 64, "width": 64, "use_resolution_binning": False}


def embedded() -> dict[str, Any]:
    """What EasyAnimate is asked with in place of a prompt."""
    generator = torch.Generator().manual_seed(5)
    embeds = {f"{sign}prompt_embeds": torch.randn(1, 6, 32, generator=generator) for sign in ("", "negative_")}
    masks = {f"{sign}prompt_attention_mask": torch.ones(1, 6, dtype=torch.long) for sign in ("", "negative_")}
    return {"prompt": None, "height": 16, "width": 16, "num_frames": 5, **embeds, **masks}


FILM = torch.from_numpy(PIXELS / 255).float().movedim(-1, 0)[None, :, None].repeat(1, 1, 5, 1, 1)
HALF_FILM = 255.0 * (torch.arange(16) < 8).expand(1, 1, 5, 16, 16)

PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "StableDiffusion": (tiny.stable_diffusion, TEXT),
    "StableDiffusion, no guidance": (tiny.stable_diffusion, {**TEXT, "guidance_scale": 1.0}),
    "StableDiffusion, many": (tiny.stable_diffusion, MANY),
    "StableDiffusion, rescaled guidance": (tiny.stable_diffusion, {**TEXT, "guidance_rescale": 0.7, "eta": 0.5}),
    "img2img": (
        lambda: tiny.stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline),
        {"prompt": "a red cat", "image": PHOTO, "strength": 0.7},
    ),
    "inpaint": (
        lambda: tiny.stable_diffusion(diffusers.StableDiffusionInpaintPipeline),
        {**TEXT, "image": PHOTO, "mask_image": HALF},
    ),
    "inpaint, two samples, strength": (
        lambda: tiny.stable_diffusion(diffusers.StableDiffusionInpaintPipeline),
        {**TEXT, "image": PHOTO, "mask_image": HALF, "num_images_per_prompt": 2, "strength": 0.8, "eta": 1.0},
    ),
    "inpaint, nine channels": (
        lambda: tiny.stable_diffusion(diffusers.StableDiffusionInpaintPipeline, 9),
        {**TEXT, "image": PHOTO, "mask_image": HALF},
    ),
    "ControlNet": (tiny.stable_diffusion_control, {**TEXT, "image": PHOTO}),
    "ControlNet, guess mode": (tiny.stable_diffusion_control, {**TEXT, "image": PHOTO, "guess_mode": True}),
    "SDXL": (tiny.stable_diffusion_xl, MANY),
    "SD3": (tiny.stable_diffusion_3, MANY),
    "Flux": (tiny.flux, {**TEXT, "max_sequence_length": 16, "num_images_per_prompt": 2}),
    "PixArt": (tiny.pixart, {**TEXT, "use_resolution_binning": False, "clean_caption": False}),
    "DiT": (tiny.dit, {"class_labels": [1, 2], "output_type": "np"}),
    "DiT, no guidance": (tiny.dit, {"class_labels": [1, 2], "output_type": "np", "guidance_scale": 1.0}),
    "DDPM": (
        lambda: tiny.quiet(diffusers.DDPMPipeline(tiny.unet2d(), diffusers.DDPMScheduler(clip_sample_range=4.0))),
        {"batch_size": 2, "output_type": "np"},
    ),
    "DDIM": (
        lambda: tiny.quiet(diffusers.DDIMPipeline(tiny.unet2d(), diffusers.DDIMScheduler(clip_sample=False))),
        {"batch_size": 2, "output_type": "np", "eta": 0.5},
    ),
    "StableAudio": (tiny.stable_audio, {"prompt": "piano rain", "audio_end_in_s": 1.0}),
    "CogVideoX": (
        tiny.cogvideox,
        {"prompt": "a red cat", "height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16},
    ),
    "LTX": (tiny.ltx, {"prompt": "a red cat", "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}),
    "Wan": (tiny.wan, {"prompt": "a red cat", "height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}),
    "AuraFlow": (tiny.aura_flow, TEXT),
    "AuraFlow, images": (tiny.aura_flow, {**TEXT, "guidance_scale": 1.0, "num_images_per_prompt": 2, "output_type": "np"}),
    "HunyuanDiT, two prompts, eta": (
        tiny.hunyuan_dit,
        {**MANY, **HUNYUAN, "prompt": MANY["prompt"], "num_images_per_prompt": 1, "eta": 0.5},
    ),
    "HunyuanDiT, images": (tiny.hunyuan_dit, {**HUNYUAN, "guidance_scale": 1.0, "output_type": "np"}),
    "HunyuanDiT, PAG": (lambda: tiny.hunyuan_dit(diffusers.HunyuanDiTPAGPipeline), HUNYUAN),
    "HunyuanDiT, PAG, no guidance": (
        lambda: tiny.hunyuan_dit(diffusers.HunyuanDiTPAGPipeline),
        {**HUNYUAN, "guidance_scale": 1.0, "pag_scale": 0.0},
    ),
    "HunyuanDiT, ControlNet": (tiny.hunyuan_dit_control, {**HUNYUAN, "control_image": PHOTO}),
    "HunyuanDiT, ControlNet, no guidance": (
        tiny.hunyuan_dit_control,
        {**HUNYUAN, "control_image": PHOTO, "guidance_scale": 1.0},
    ),
    "EasyAnimate": (tiny.easy_animate, embedded()),
    "EasyAnimate, films": (tiny.easy_animate, {**embedded(), "guidance_scale": 1.0, "output_type": "np"}),
    "EasyAnimate, inpaint": (
        lambda: tiny.easy_animate(diffusers.EasyAnimateInpaintPipeline, 4, tiny.ddim()),
        {**embedded(), "video": FILM, "mask_video": HALF_FILM, "strength": 0.8},
    ),
    "EasyAnimate, inpaint, no guidance": (
        lambda: tiny.easy_animate(diffusers.EasyAnimateInpaintPipeline, 4, tiny.ddim()),
        {**embedded(), "video": FILM, "mask_video": HALF_FILM, "guidance_scale": 1.0},
    ),
    "EasyAnimate, inpaint, nine channels": (
        lambda: tiny.easy_animate(diffusers.EasyAnimateInpaintPipeline, 9),
        embedded(),
    ),
    "policy": (tiny.policy, {"observation": torch.linspace(-1, 1, 4)[None]}),
}


def call(pipe: Any, options: dict[str, Any]) -> torch.Tensor:
    """The first entry of what a pipeline returns, from one seed; latents where they can be had."""
    defaults = {"num_inference_steps": STEPS, "output_type": "latent"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # from which EasyAnimate encodes a film to inpaint
        out = pipe(**{**defaults, **options}, generator=torch.Generator().manual_seed(3))[0]
    return torch.as_tensor(out).double()


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_in_parallel_returns_what_it_returns_by_itself(name):
    """Bit for bit with a window of one step; within the tolerance of its latents, in fewer rounds, with every other."""
    build, options = PIPELINES[name]
    pipe = build()
    alone = call(pipe, options)
    size = max(1.0, rms(alone))
    for window in (1, 5, None):
        parallel = piadm.diffusers.parallelize(pipe, window=window, tolerance=1e-3 * size)
        together = call(parallel, options)
        assert together.shape == alone.shape
        result = parallel.last_result
        if window == 1:
            assert torch.equal(together, alone)
            assert result.rounds == result.steps
        else:
            assert rms(together - alone) < 1e-3 * size
            assert result.rounds < result.steps
            assert result.converged
        assert result.evaluations >= result.steps


def test_images_are_decoded_once_from_finished_latents(monkeypatch):
    pipe = tiny.stable_diffusion()
    options = {**MANY, "output_type": "np"}
    alone = call(pipe, options)
    seen: dict[str, list[int]] = {"encoder": [], "decoder": []}
    encode, decode = pipe.text_encoder.forward, pipe.vae.decode

    def encoder(ids, *args, **kwargs):
        seen["encoder"].append(len(ids))
        return encode(ids, *args, **kwargs)

    def decoder(latents, *args, **kwargs):
        seen["decoder"].append(len(latents))
        return decode(latents, *args, **kwargs)

    monkeypatch.setattr(pipe.text_encoder, "forward", encoder)
    monkeypatch.setattr(pipe.vae, "decode", decoder)
    together = call(piadm.diffusers.parallelize(pipe, window=8, tolerance=1e-4), options)
    assert (together - alone).abs().max() < 1e-3
    assert seen == {"encoder": [2, 2], "decoder": [4]}  # prompts, negative prompts; the four images


def test_the_network_sees_only_live_lanes_and_never_more_than_the_window():
    pipe = tiny.stable_diffusion()
    rows: list[int] = []
    forward = pipe.unet.forward

    def watched(sample, *args, **kwargs):
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = watched
    parallel = piadm.diffusers.parallelize(pipe, window=6)
    call(parallel, TEXT)
    assert parallel.last_result.windows[0] == (0, 6)
    check = rows.pop(1)  # the first lane by itself, compared once
    assert check == 2
    assert rows == [2 * (stop - start) for start, stop in parallel.last_result.windows]
    assert max(rows) == 12
    rows.clear()
    call(parallel, TEXT)
    assert rows == [2 * (stop - start) for start, stop in parallel.last_result.windows]
