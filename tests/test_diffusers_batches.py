"""Batches: every sample finishes steps at its own pace, and is what it would be alone."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from piadm.diffusers import UnsupportedError, parallelize
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {"height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 30, "guidance_scale": 3.0}
PROMPTS = ["a red cat", "the blue boat", "a piano"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ancestral(**more: Any) -> Any:
    pipe = tiny.stable_diffusion(**more)
    pipe.scheduler = diffusers.DDPMScheduler(**tiny.STABLE, clip_sample=False)
    return pipe


def multistep() -> Any:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(**tiny.STABLE, algorithm_type="sde-dpmsolver++")
    return pipe


def watch(pipe: Any) -> list[int]:
    """Rows of every call of the UNet."""
    rows: list[int] = []
    forward = pipe.unet.forward

    def watched(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = watched
    return rows


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("exact", [False, True], ids=["parallel", "exact"])
@pytest.mark.parametrize("build", [ancestral, multistep])
def test_each_sample_of_a_batch_is_what_it_is_alone_with_its_generator(build, exact):
    """To the rounding of the network's batches; it takes the rounds that its slowest sample takes, and no row too many."""
    pipe = build()
    made = parallelize(pipe, window=8, exact=exact, tolerance=0.3)
    alone, rounds, evaluations = [], [], []
    for seed, prompt in enumerate(PROMPTS):
        alone.append(made(prompt, generator=seeded(seed), **OPTIONS).images)
        rounds.append(made.last_result.rounds)
        evaluations.append(made.last_result.evaluations)
    assert len(set(evaluations)) > 1  # they go apart
    rows = watch(pipe)
    together = made(PROMPTS, generator=[seeded(seed) for seed in range(3)], **OPTIONS).images
    result = made.last_result
    assert result.rounds == max(rounds)
    assert result.evaluations == pytest.approx(sum(evaluations) / 3)
    assert gap(together, torch.cat(alone)) < 3e-5 * float(together.abs().max())
    asked = 2 * round(sum(evaluations))
    assert sum(rows) == asked + 2 * 3 + 2  # the batch's and a sample's rows in one lane, compared
    if exact:
        counts = result.acceptance
        assert (counts.accepted + counts.rejected + counts.recomputed).tolist() == [30] * 3


def test_a_batch_of_an_elementwise_network_parts_from_its_samples_alone_by_the_last_bits():
    pipe = tiny.quiet(tiny.LoopPipeline(tiny.Small(), diffusers.DDPMScheduler(clip_sample=False)))
    for exact in (False, True):
        made = parallelize(pipe, window=6, exact=exact, tolerance=1e-3)
        together = made(40, [seeded(seed) for seed in range(4)], 4)[0]
        evaluations = made.last_result.evaluations
        alone = [(made(40, [seeded(seed)], 1)[0], made.last_result.evaluations) for seed in range(4)]
        size = 1e-6 * float(together.abs().max())
        assert gap(together, torch.cat([sample for sample, _ in alone])) < size
        assert len({count for _, count in alone}) > 1  # they go apart
        assert evaluations == sum(count for _, count in alone) / 4


@pytest.mark.parametrize("lanes", [6, 9])
def test_where_lanes_are_scarce_those_far_ahead_wait(monkeypatch, lanes):
    """As where a call's arguments do not tell how many samples it asks for."""
    pipe = tiny.quiet(tiny.LoopPipeline(tiny.Small(), diffusers.DDPMScheduler(clip_sample=False)))
    generators = lambda: [seeded(seed) for seed in range(4)]  # noqa: E731
    alone = pipe(40, generators(), 4)[0]
    made = parallelize(pipe, window=6, tolerance=1e-3)
    monkeypatch.setattr(type(made), "_width", lambda self, bound: lanes)
    assert gap(made(40, generators(), 4)[0], alone) < 1e-2
    assert all(stop - start <= lanes for start, stop in made.last_result.windows)
    exact = parallelize(pipe, window=6, exact=True)
    exact(40, generators(), 4)
    counts = exact.last_result.acceptance
    assert (counts.accepted + counts.rejected + counts.recomputed).tolist() == [40] * 4


def test_inpainting_follows_samples_that_are_apart():
    from tests.test_diffusers_pipelines import HALF, PHOTO

    pipe = ancestral(cls=diffusers.StableDiffusionInpaintPipeline)
    options = {**OPTIONS, "image": PHOTO, "mask_image": HALF}
    rows = watch(pipe)
    generators = lambda: [seeded(seed) for seed in range(3)]  # noqa: E731
    alone = pipe(PROMPTS, generator=generators(), **options).images
    made = parallelize(pipe, window=8, tolerance=0.1)
    rows.clear()
    together = made(PROMPTS, generator=generators(), **options).images
    assert len({count % 6 for count in rows}) > 1  # not all samples in all lanes
    assert float((together - alone).square().mean().sqrt()) < 0.1


def test_samples_that_a_network_mixes_go_together():
    pipe = ancestral()
    forward = pipe.unet.forward

    def mixes(sample, t, *args, **kwargs):
        """The samples of a step see one another: rows of one lane are those of one timestep."""
        t = torch.as_tensor(t).expand(len(sample))
        same = (t[:, None] == t[None]).to(sample.dtype)
        return forward(
            sample + 0.1 * torch.einsum("rs,schw->rchw", same / same.sum(1, keepdim=True), sample), t, *args, **kwargs
        )

    pipe.unet.forward = mixes
    alone = pipe(PROMPTS, generator=seeded(0), **OPTIONS).images
    rows = watch(pipe)
    made = parallelize(pipe, window=5, tolerance=1e-3)
    together = made(PROMPTS, generator=seeded(0), **OPTIONS).images
    assert float((together - alone).square().mean().sqrt()) < 1e-3
    assert all(count % 6 == 0 for count in rows[3:])
    with pytest.raises(UnsupportedError, match=r"for a batch of 3, which .* does not keep apart"):
        parallelize(pipe, window=5, exact=True)(PROMPTS, generator=seeded(0), **OPTIONS)
    parallelize(pipe, window=5, exact=True)("a red cat", generator=seeded(0), **OPTIONS)


class Mixing(tiny.LoopPipeline):
    """Mixes samples itself, out of the network."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=10, generator=None, batch_size=2):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(batch_size, 4, 4, 4, generator=generator)
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t).sample
            output = 0.9 * output + 0.1 * output.mean(0, keepdim=True)
            latents = self.scheduler.step(output, t, latents, generator=generator).prev_sample
        return (latents,)


@pytest.mark.parametrize("everyones", [False, True], ids=["generator", "torch's own"])
def test_samples_that_a_pipeline_mixes_itself_go_together_once_that_is_found_out(everyones):
    pipe = tiny.quiet(Mixing(tiny.Small(), diffusers.DDPMScheduler(clip_sample=False)))

    def sample(one):
        torch.manual_seed(0)
        return one(40, None if everyones else seeded(0), 3)[0]

    made, alone = parallelize(pipe, window=5, tolerance=1e-3), sample(pipe)
    for _ in range(2):
        assert float((sample(made) - alone).square().mean().sqrt()) < 1e-3
    with pytest.raises(UnsupportedError, match=r"for a batch of 3, which .* does not keep apart"):
        parallelize(pipe, window=5, exact=True)(40, seeded(0), 3)
    parallelize(pipe, window=5, exact=True)(40, seeded(0), 1)


@pytest.mark.parametrize("exact", [False, True], ids=["parallel", "exact"])
def test_noise_is_kept_for_windows_that_are_cut_and_filled_again(exact):
    """What is NaN at guessed states alone ends a window there; the steps beyond enter it a second time, with their noise."""
    pipe = tiny.quiet(tiny.LoopPipeline(tiny.Small(), diffusers.DDPMScheduler(clip_sample=False)))
    alone = pipe(40, seeded(0), 1)[0]
    forward, calls = pipe.unet.forward, [0]

    def breaks(sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        calls[0] += 1
        out = forward(sample, timestep)
        if calls[0] in (5, 8):
            out.sample[2:] = torch.nan  # all lanes but the first two
        return out

    pipe.unet.forward = breaks
    made = parallelize(pipe, window=6, exact=exact, tolerance=1e-3)
    together = made(40, seeded(0), 1)[0]
    assert made.last_result.converged
    assert together.isfinite().all()
    if not exact:
        assert float((together - alone).square().mean().sqrt()) < 1e-3
