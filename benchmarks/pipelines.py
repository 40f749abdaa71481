"""diffusers' own parallel pipeline and ours on the same network: rounds and evaluations at equal final error.

    python benchmarks/pipelines.py --output out/pipelines

The network is the embedded `digits`, dressed as a UNet of StableDiffusion: the class is the prompt, guidance is the pipelines'
own, and their latents are the 8×8 images. `StableDiffusionParadigmsPipeline` runs with `DDIMParallelScheduler` or
`DDPMParallelScheduler`, ours is `StableDiffusionPipeline` with `DDIMScheduler` or `DDPMScheduler` through
`piadm.diffusers.parallelize`. Each case is one image of one seed, and so one noise: both draw it from the same generator.

A setting is the largest tolerance, of each method's own rule, whose final latents are within `--target` rms of the sequential
pipeline's. The schedulers of diffusers' parallel pipeline do not step as their sequential namesakes do, so it has a second
line, held against its own limit: what it returns when its tolerance goes to zero, `off` away from the sequential pipeline.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import piadm
from benchmarks import tables
from piadm.diffusers import parallelize

SCHEDULERS: dict[str, tuple[type, type]] = {
    "DDIM": (diffusers.DDIMScheduler, diffusers.DDIMParallelScheduler),
    "DDPM": (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler),
}
TOLERANCES = [10 ** (2 - k / 4) for k in range(25)]
LIMIT = 1e-6


class Digits(diffusers.ModelMixin, ConfigMixin):
    """The embedded network with the arguments of `UNet2DConditionModel`; counts its calls and rows."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: int = 8, time_cond_proj_dim: int | None = None) -> None:
        super().__init__()
        denoiser = piadm.models.load("digits")
        self.network, self.variance = denoiser.network, float(denoiser.variance)
        self.calls = self.rows = 0

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        self.calls += 1
        self.rows += len(sample)
        return (self.network(sample, timestep.expand(len(sample)), label=encoder_hidden_states[:, 0, 0].round().long()),)


@dataclass(frozen=True)
class Run:
    """What a method returned and what it took; rows per image."""

    latents: Tensor
    rounds: int
    evaluations: float


@dataclass(frozen=True)
class Case:
    """A scheduler, its steps, a window and guidance."""

    scheduler: str
    steps: int
    window: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.scheduler} {self.steps}, window {self.window}, guidance {self.guidance:g}"


CASES = [
    Case(scheduler, steps, window, guidance)
    for scheduler, steps in (("DDIM", 50), ("DDIM", 100), ("DDPM", 100))
    for window in (16, steps)
    for guidance in (1.0, 3.0)
]


class Bench:
    """Both pipelines around one network."""

    def __init__(self, case: Case) -> None:
        self.case, self.unet = case, Digits().eval()
        vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                                      up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
        parts = {
            "vae": vae, "text_encoder": None, "tokenizer": None, "unet": self.unet, "safety_checker": None,
            "feature_extractor": None, "requires_safety_checker": False,
        }  # fmt: skip
        sequential, parallel = (one(clip_sample=False) for one in SCHEDULERS[case.scheduler])
        self.plain = diffusers.StableDiffusionPipeline(scheduler=sequential, **parts)
        self.theirs = diffusers.StableDiffusionParadigmsPipeline(scheduler=parallel, **parts)
        for pipe in (self.plain, self.theirs):
            pipe.set_progress_bar_config(disable=True)

    def _run(self, pipe: Callable[..., Any], **options: Any) -> Run:
        self.unet.calls = self.unet.rows = 0
        latents = pipe(
            prompt_embeds=torch.full((1, 1, 1), 3.0),
            negative_prompt_embeds=torch.full((1, 1, 1), 10.0),
            height=16,
            width=16,
            num_inference_steps=self.case.steps,
            guidance_scale=self.case.guidance,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        )[0]
        return Run(latents, self.unet.calls, self.unet.rows / (2 if self.case.guidance > 1 else 1))

    def sequential(self) -> Run:
        return self._run(self.plain)

    def paradigms(self, tolerance: float) -> Run:
        return self._run(self.theirs, parallel=self.case.window, tolerance=tolerance)

    def ours(self, tolerance: float) -> Run:
        made = parallelize(self.plain, window=self.case.window, tolerance=tolerance, variance=self.unet.variance)
        self._run(made)  # a first call also compares a lane with a single evaluation
        return self._run(made)


def distance(one: Tensor, other: Tensor) -> float:
    """rms per coordinate."""
    return float((one - other).square().mean().sqrt())


def largest(run: Callable[[float], Run], reference: Tensor, target: float) -> tuple[float, Run] | None:
    """The largest tolerance tried whose latents are within the target of the reference."""
    for tolerance in TOLERANCES:
        found = run(tolerance)
        if distance(found.latents, reference) <= target:
            return tolerance, found
    return None


def rows(case: Case, target: float) -> Iterator[dict[str, tables.Value]]:
    """The lines of one case."""
    bench = Bench(case)
    reference = bench.sequential()
    limit = bench.paradigms(LIMIT).latents
    tried = [
        ("StableDiffusionPipeline", lambda tolerance: reference, reference.latents),
        ("piadm.diffusers.parallelize", bench.ours, reference.latents),
        ("StableDiffusionParadigmsPipeline", bench.paradigms, reference.latents),
        ("StableDiffusionParadigmsPipeline, own limit", bench.paradigms, limit),
    ]
    for name, run, goal in tried:
        found = largest(run, goal, target)
        tolerance, best = found if found is not None else (None, None)
        yield {
            "work": str(case),
            "method": name,
            "setting": None if best is reference else tolerance,
            "rounds": None if best is None else best.rounds,
            "evaluations a step": None if best is None else best.evaluations / case.steps,
            "error": None if best is None else distance(best.latents, goal),
            "off": distance(goal, reference.latents),
        }


def main(arguments: list[str] | None = None) -> list[dict[str, tables.Value]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=1e-2, help="final rms error")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--output", type=Path, default=Path("out/pipelines"))
    tables.add_report(parser)
    given = parser.parse_args(arguments)
    found: list[dict[str, tables.Value]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES:
            if given.only in str(case):
                lines = list(rows(case, given.target))
                tables.show(str(case), lines)
                found += lines
    command = ["python", "benchmarks/pipelines.py", *(sys.argv[1:] if arguments is None else arguments)]
    about = {**tables.machine(command), "diffusers": diffusers.__version__, "target": given.target}
    tables.write(given.output, "pipelines", {f"Final error at most {given.target:g}": found}, about)
    if given.report:
        tables.report(given.output, "pipelines")
    return found


if __name__ == "__main__":
    main()
