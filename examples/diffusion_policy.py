"""A diffusion policy plans 100 denoising steps in fewer rounds: latency before and after.

A robot sees where it stands, where it should go and where an obstacle is, and plans 16 positions that pass the obstacle on one
side or the other. A small 1-D UNet of diffusers is trained here, on paths made up by a rule, for a minute: this is a toy, not a
trained robot. Then one plan is drawn by the pipeline as it is and by `piadm.diffusers.parallelize`, from the same seeds.

    python examples/diffusion_policy.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import diffusers
import torch
from torch import Tensor

import piadm.diffusers

POINTS = 16


class PolicyPipeline(diffusers.DiffusionPipeline):
    """Plans positions `(B, 2, POINTS)` for observations `(B, 6)`: two coordinates each of start, goal and obstacle."""

    def __init__(self, unet: diffusers.UNet1DModel, scheduler: diffusers.DDPMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, observation: Tensor, num_inference_steps: int = 100, generator: torch.Generator | None = None) -> Tensor:
        plan = torch.randn(len(observation), 2, POINTS, generator=generator)
        condition = observation[:, :, None].expand(-1, -1, POINTS)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([plan, condition], 1), t).sample
            plan = self.scheduler.step(noise, t, plan, generator=generator).prev_sample
        return plan


def demonstrations(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Observations and paths: a straight line, bent around the obstacle on the side that chance chooses."""
    s = torch.linspace(0, 1, POINTS)
    start, goal = torch.rand(count, 2, 1, generator=generator) - 1, torch.rand(count, 2, 1, generator=generator)
    centre = (start + goal) / 2 + 0.1 * torch.randn(count, 2, 1, generator=generator)
    along = goal - start
    across = torch.stack([-along[:, 1], along[:, 0]], 1) / along.norm(dim=1, keepdim=True)
    side = torch.randint(2, (count, 1, 1), generator=generator) * 2.0 - 1
    bend = 0.35 * side + ((centre - start) * across).sum(1, keepdim=True)
    path = start + s * along + bend * across * (math.pi * s).sin()
    return torch.cat([start, goal, centre], 1)[..., 0], path


def train(seconds: float, scheduler: diffusers.DDPMScheduler) -> diffusers.UNet1DModel:
    """A UNet that predicts the noise in a path, given the observation in further channels."""
    torch.manual_seed(0)
    unet = diffusers.UNet1DModel(
        in_channels=8,
        out_channels=2,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        act_fn="swish",
        time_embedding_type="positional",
        use_timestep_embedding=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        down_block_types=("DownResnetBlock1D",) * 3,
        up_block_types=("UpResnetBlock1D",) * 2,
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
    )
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    end, loss = time.monotonic() + seconds, torch.tensor(torch.nan)
    while time.monotonic() < end:
        observation, path = demonstrations(128, generator)
        noise = torch.randn(path.shape, generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(path),), generator=generator)
        rows = torch.cat([scheduler.add_noise(path, noise, t), observation[:, :, None].expand(-1, -1, POINTS)], 1)
        loss = (unet(rows, t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained for {seconds:g} s, loss {float(loss):.3f}")
    return unet.eval().requires_grad_(False)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=25)
    parser.add_argument("--plans", type=int, default=10)
    given = parser.parse_args(arguments)

    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample_range=1.5)
    policy = PolicyPipeline(train(given.train_seconds, scheduler), scheduler)
    policy.set_progress_bar_config(disable=True)
    # variance of the paths' positions; a plan may differ by 1e-2 from the sequential one, a hundredth of the way
    fast = piadm.diffusers.parallelize(policy, window=given.window, tolerance=1e-2, variance=0.3)

    observations, _ = demonstrations(given.plans, torch.Generator().manual_seed(1))
    latency: dict[str, list[float]] = {"before": [], "after": []}
    gaps, rounds = [], []
    fast(observations[:1], given.steps)  # reads the scheduler's table, once
    for seed, observation in enumerate(observations):
        plans = []
        for name, pipe in (("before", policy), ("after", fast)):
            started = time.perf_counter()
            plans.append(pipe(observation[None], given.steps, generator=torch.Generator().manual_seed(seed)))
            latency[name].append(1000 * (time.perf_counter() - started))
        gaps.append(float((plans[0] - plans[1]).square().mean().sqrt()))
        rounds.append(fast.last_result.rounds)
    figures = {
        "before, ms": statistics.median(latency["before"]),
        "after, ms": statistics.median(latency["after"]),
        "network calls before": float(given.steps),
        "rounds after": statistics.median(rounds),
        "largest rms difference": max(gaps),
    }
    for name, value in figures.items():
        print(f"{name:24} {value:8.4g}")
    return figures


if __name__ == "__main__":
    main()
