"""What a round costs on 1, 2 and 3 ranks, against the cost model of docs/devices.md: `python benchmarks/devices.py`.

The network sleeps for a time proportional to its rows, as an accelerator of one's own for every rank would take: on a machine
with fewer cores than ranks a network that computes would measure the cores. Everything else is real: processes, gloo on
loopback, bytes. Latency and bandwidth are fitted to 2 ranks; the figures of 3 ranks are predicted from them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import piadm

ROW, WINDOW, STEPS = 5e-3, 60, 240
SIZES = (64, 16384)


def measure() -> None:
    """On one rank; rank 0 prints, for each size of a sample, seconds a round: whole, slowest network, communication."""
    dist.init_process_group("gloo")

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time.sleep(ROW * len(x))
        return 0.5 * x

    out = {}
    for size in SIZES:
        denoiser = piadm.Sharded(piadm.Denoiser(network, piadm.schedules.DiscreteBetas.linear(1000), "sample", variance=0.3))
        sampler = piadm.Parallel(denoiser, piadm.DDPM(STEPS), window=WINDOW, tolerance=1e-4)
        sampler((1, size), generator=torch.Generator().manual_seed(0))  # connections are made by the first messages
        denoiser.cost = piadm.sharded.Cost()
        result = sampler((1, size), generator=torch.Generator().manual_seed(0))
        cost = denoiser.cost
        seconds = {"whole": result.seconds, "network": cost.slowest, "communication": cost.communication}
        out[size] = {name: value / result.rounds for name, value in seconds.items()} | {"rounds": result.rounds}
    if dist.get_rank() == 0:
        print(json.dumps(out))
    dist.destroy_process_group()


def launch(ranks: int) -> dict[int, dict[str, float]]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    told = subprocess.run([*run, str(Path(__file__)), "measure"], capture_output=True, text=True, check=True)
    return {int(size): costs for size, costs in json.loads(told.stdout).items()}


def main() -> None:
    seen = {ranks: launch(ranks) for ranks in (1, 2, 3)}
    # 2 ranks: each receives half of a round's answers
    received = {ranks: {size: (ranks - 1) / ranks * WINDOW * size * 4 for size in SIZES} for ranks in seen}
    small, large = SIZES[0], SIZES[-1]
    slope = seen[2][large]["communication"] - seen[2][small]["communication"]
    bandwidth = (received[2][large] - received[2][small]) / slope
    latency = seen[2][small]["communication"] - received[2][small] / bandwidth
    print(f"latency {1e3 * latency:.2f} ms a round, bandwidth {bandwidth / 1e6:.0f} MB/s (fitted to 2 ranks)\n")
    print("| numbers per sample | ranks | rounds | network | communication | model | own arithmetic | round | speed-up |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in SIZES:
        for ranks, by_size in seen.items():
            one = by_size[size]
            model = 0.0 if ranks == 1 else latency + received[ranks][size] / bandwidth
            own = one["whole"] - one["network"] - one["communication"]
            parts = [one["network"], one["communication"], model, own, one["whole"]]
            figures = " | ".join(f"{1e3 * part:.1f} ms" for part in parts)
            print(f"| {size} | {ranks} | {one['rounds']} | {figures} | {seen[1][size]['whole'] / one['whole']:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        main()
