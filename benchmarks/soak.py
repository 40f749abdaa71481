"""Many short runs in one process, failing ones among them: memory stays flat. `python benchmarks/soak.py 10000`."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import warnings
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

import piadm

WARM = 200
"""Runs until allocators and caches have what they want."""

BACK: list[bool] = []
"""Whether the device is back."""


def resident() -> float:
    """MiB of this process that are in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def smooth(x: Tensor, t: Tensor) -> Tensor:
    return x / (1 + x.abs())


def broken(x: Tensor, t: Tensor) -> Tensor:
    if bool((t < 300).any()) and not BACK:
        raise RuntimeError("the device is gone")
    return smooth(x, t)


def undefined(x: Tensor, t: Tensor) -> Tensor:
    return smooth(x, t).masked_fill(((t < 300) & (x.flatten(1)[:, 0] > 0))[:, None], float("nan"))


def hungry(x: Tensor, t: Tensor) -> Tensor:
    if len(x) > 4:
        torch.empty(2**50)
    return smooth(x, t)


def once(n: int, network, sampler, folder: Path) -> None:
    denoiser = piadm.Denoiser(network, piadm.schedules.DiscreteBetas.linear(1000), "sample", variance=0.3)
    run, source = sampler(denoiser), torch.Generator().manual_seed(n)
    try:
        run((3, 64), generator=source, checkpoint=folder / "run.safetensors" if n % 7 == 0 else None)
    except piadm.NonFiniteError:
        pass
    except RuntimeError as error:
        if "gone" not in str(error):
            raise
        BACK.append(True)
        run.resume(error.checkpoint)  # type: ignore[attr-defined]
        BACK.clear()


def main(runs: int) -> None:
    warnings.simplefilter("ignore")
    networks = cycle([smooth, broken, undefined, hungry])
    samplers = cycle(
        [
            lambda one: piadm.Parallel(one, piadm.DDPM(6), window=3),
            lambda one: piadm.Exact(one, piadm.DDPM(6), window=3),
            lambda one: piadm.Sequential(one, piadm.DDIM(6)),
            lambda one: piadm.Parallel(piadm.MicroBatch(one, 5), piadm.DDIM(6), window=None),
            lambda one: piadm.Parallel(one, piadm.DDPM(6), window=4, target_kl=1e-2),
        ]
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for n, network, sampler in zip(range(runs), networks, samplers, strict=False):
            once(n, network, sampler, Path(folder))
            if n == WARM:
                gc.collect()
                before = resident()
    gc.collect()
    after = resident()
    print(f"{runs} runs in {time.monotonic() - started:.0f} s: {before:.1f} MiB after {WARM}, {after:.1f} MiB at the end")
    if after - before > 8:
        sys.exit(f"memory grew by {after - before:.1f} MiB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
