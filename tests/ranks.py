"""What one rank of a test in `test_sharded` does: `python tests/ranks.py SCENARIO… FOLDER`, once for each rank.

A scenario returns what its rank has seen; the parent reads it from `FOLDER/RANK.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import piadm
from piadm import checkpoint
from piadm.diffusers.shares import shared

BETAS, PAPER = piadm.schedules.DiscreteBetas.linear(1000), piadm.schedules.OrnsteinUhlenbeck()
SHAPE = (3, 4)


class Network:
    """Elementwise, so that batches of any size round alike; keeps count, and does what it is told at one of its calls."""

    def __init__(self, act: Any = None, at: int = 0) -> None:
        self.act, self.at, self.calls, self.rows = act, at, 0, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        self.rows.append(len(x))
        if self.calls == self.at:
            self.act()
        f = x / (1 + x.abs()) * (1 - 1e-4 * t.to(x.dtype)[:, None])
        return f if shift is None else f + 0.1 * shift.to(x.dtype)


def denoiser(network: Any, schedule: Any = BETAS) -> piadm.Denoiser:
    return piadm.Denoiser(network, schedule, "sample", variance=0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SAMPLERS = {
    "window 5": lambda one: piadm.Parallel(one(BETAS), piadm.DDPM(12), window=5, tolerance=1e-4),
    "full": lambda one: piadm.Parallel(one(BETAS), piadm.DDIM(12), window=None, tolerance=1e-4),
    "window 1": lambda one: piadm.Parallel(one(BETAS), piadm.DDPM(12), window=1),
    "sequential": lambda one: piadm.Sequential(one(BETAS), piadm.DDPM(12)),
    "published": lambda one: piadm.PIADMODE(one(PAPER), horizon=2.0, block=1.0, step=0.25, early_stop=0.05, iterations=3),
    "exact": lambda one: piadm.Exact(one(BETAS), piadm.DDPM(12), window=5),
    "guided": lambda one: piadm.Parallel(
        piadm.Guided(one(BETAS), 2.0, {"shift": torch.zeros(1, 1)}), piadm.DDPM(12), window=5, tolerance=1e-4
    ),
}
"""The last one is called with a condition."""


def condition(name: str, samples: int) -> dict[str, torch.Tensor]:
    return {"shift": torch.arange(samples)[:, None] + 1} if name == "guided" else {}


def sampler(network: Any, timeout: float = 60.0, group: Any = None) -> piadm.Parallel:
    return piadm.Parallel(
        piadm.Sharded(denoiser(network), group, timeout), piadm.DDPM(40), window=8, tolerance=1e-6, propagator=SLOW
    )


SLOW = piadm.propagators.Jacobi()


def compare(group: Any = None) -> dict[str, Any]:
    """Every sampler, sharded and alone, on batches of 3 and of 1."""
    seen: dict[str, Any] = {}
    for name, make in SAMPLERS.items():
        for samples in (3, 1):
            network, alone = Network(), Network()
            shards: list[piadm.Sharded] = []

            def one(schedule: Any, network: Any = network, shards: Any = shards) -> Any:
                shards.append(piadm.Sharded(denoiser(network, schedule), group, timeout=60.0))
                return shards[-1]

            given = condition(name, samples)
            mine = make(one)((samples, 4), generator=generator(), **given)
            theirs = make(lambda schedule, alone=alone: denoiser(alone, schedule))((samples, 4), generator=generator(), **given)
            cost = shards[0].cost
            seen[f"{name}, {samples}"] = {
                "equal": torch.equal(mine.samples, theirs.samples),
                "rounds": [mine.rounds, theirs.rounds, cost.rounds],
                "rows": [sum(network.rows), sum(alone.rows), cost.rows],
                "calls": [len(network.rows), len(alone.rows)],
                "received": cost.received,
                "times": [cost.network, cost.slowest, cost.seconds, mine.network_seconds, mine.seconds],
            }
    return seen


def same(folder: Path) -> dict[str, Any]:
    seen = compare()
    digits = piadm.models.load("digits")
    label = torch.tensor([1, 2])
    run = {"generator": generator(), "label": label}
    mine = piadm.Parallel(piadm.Sharded(digits), piadm.DDPM(60), window=16)((2, 1, 8, 8), **run)
    run = {"generator": generator(), "label": label}
    theirs = piadm.Parallel(digits, piadm.DDPM(60), window=16)((2, 1, 8, 8), **run)
    nested = piadm.Sharded(piadm.Replicas(digits, ["cpu", "cpu"]))
    run = {"generator": generator(), "label": label}
    both = piadm.Parallel(nested, piadm.DDPM(60), window=16)((2, 1, 8, 8), **run)
    gaps = [float((one.samples - theirs.samples).abs().max()) for one in (mine, both)]
    return {"elementwise": seen, "digits": gaps}


def subgroup(folder: Path) -> dict[str, Any]:
    """Ranks 0 and 2 share a run, rank 1 has something else to do."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        try:
            piadm.Sharded(denoiser(Network()), group)
        except ValueError as error:
            return {"refused": str(error)}
    return compare(group)


def different(folder: Path) -> dict[str, Any]:
    """What the ranks are asked differs in one way or another."""
    rank, seen = dist.get_rank(), {}
    odd = rank == 1
    calls = {
        "seed": lambda: sampler(Network())(SHAPE, generator=generator(7 if odd else 0)),
        "shape": lambda: sampler(Network())((2, 4) if odd else (3, 4), generator=generator()),
        "shift": lambda: sampler(Network())(SHAPE, generator=generator(), shift=torch.ones(1, 1) * (2 if odd else 1)),
    }
    for name, call in calls.items():
        try:
            call()
            seen[name] = "nothing"
        except ValueError as error:
            seen[name] = str(error)
        dist.barrier()
    return seen


def raising(folder: Path) -> dict[str, Any]:
    def act() -> None:
        raise LookupError("no such weight")

    return _ending(act)


def interrupted(folder: Path) -> dict[str, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
    return _ending(lambda: signal.raise_signal(signal.SIGINT))


def _ending(act: Any) -> dict[str, Any]:
    """Rank 1's network ends the run; then all go on from what their exceptions carry."""
    network = Network(act, at=9 if dist.get_rank() == 1 else 0)
    run, started = sampler(network), time.monotonic()
    try:
        run(SHAPE, generator=generator())
    except (LookupError, KeyboardInterrupt, piadm.RankError) as error:
        kept: checkpoint.Checkpoint = error.checkpoint  # type: ignore[union-attr]
        seen = {
            "error": type(error).__name__,
            "ranks": getattr(error, "ranks", None),
            "message": str(error),
            "rounds": kept.state.rounds,
            "seconds": time.monotonic() - started,
        }
        whole = piadm.Parallel(denoiser(Network()), piadm.DDPM(40), window=8, tolerance=1e-6, propagator=SLOW)
        result = run.resume(kept)
        return {**seen, "equal": torch.equal(result.samples, whole(SHAPE, generator=generator()).samples)}
    return {"error": None}


def _dying(folder: Path, number: signal.Signals, timeout: float) -> dict[str, Any]:
    def act() -> None:
        (folder / "dying").write_text(str(os.getpid()))
        os.kill(os.getpid(), number)

    victim = dist.get_rank() == int(os.environ["VICTIM"])
    network = Network(act, at=9 if victim else 0)
    try:
        sampler(network, timeout)(SHAPE, generator=generator(), checkpoint=folder / "run.safetensors", checkpoint_seconds=0)
    except piadm.RankError as error:
        since = time.time() - (folder / "dying").stat().st_mtime
        kept: checkpoint.Checkpoint = error.checkpoint  # type: ignore[attr-defined]
        return {"ranks": error.ranks, "message": str(error), "seconds": since, "rounds": kept.state.rounds}
    return {"ranks": None}


def killed(folder: Path) -> dict[str, Any]:
    return _dying(folder, signal.SIGKILL, 60.0)


def stopped(folder: Path) -> dict[str, Any]:
    return _dying(folder, signal.SIGSTOP, 3.0)


def resumed(folder: Path) -> dict[str, Any]:
    """As many ranks as there are go on where the others broke off."""
    before = checkpoint.load(folder / "run.safetensors").state.rounds
    dist.barrier()
    result = sampler(Network()).resume(folder / "run.safetensors")
    whole = piadm.Parallel(denoiser(Network()), piadm.DDPM(40), window=8, tolerance=1e-6, propagator=SLOW)
    uninterrupted = whole(SHAPE, generator=generator())
    return {"before": before, "rounds": result.rounds, "equal": torch.equal(result.samples, uninterrupted.samples)}


def _lanes(count: int, act: Any = None, asked: float = 0.0) -> tuple[list[torch.Tensor], int]:
    """What a network answers for so many lanes, in tensors of every kind, shared; and how many it was asked for here."""
    seen = []

    def call(part: slice) -> Any:
        seen.append(part.stop - part.start)
        if act is not None:
            act()
        lane = torch.arange(part.start, part.stop)
        wide = (lane[:, None] / 3 + torch.arange(4)).transpose(0, 1).contiguous().transpose(0, 1)
        tensors = [wide.reshape(-1, 2, 2), lane, lane[:, None] > 2, wide.bfloat16(), wide[:, :3].double()]
        return tensors, [*tensors, "a word"], None

    tensors, leaves, _ = shared(piadm.Ranks(timeout=60.0), [torch.full((3, 2), asked)], count, call)
    assert leaves[-1] == "a word"
    return tensors, sum(seen)


def lanes(folder: Path) -> dict[str, Any]:
    """More lanes than ranks and fewer; then another question on rank 1, then an error in its network, then all is well."""
    odd, seen = dist.get_rank() == 1, dict[str, Any]()

    def act() -> None:
        raise LookupError("no such weight")

    for count in range(1, 8):
        tensors, asked = _lanes(count)
        lane = torch.arange(count)
        wide = lane[:, None] / 3 + torch.arange(4)
        expected = [wide.reshape(-1, 2, 2), lane, lane[:, None] > 2, wide.bfloat16(), wide[:, :3].double()]
        same = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, expected, strict=True))
        seen[str(count)] = {"same": same, "asked": asked}
    try:
        _lanes(5, asked=float(odd))
    except ValueError as error:
        seen["different"] = str(error)
    try:
        _lanes(5, act if odd else None)
    except (LookupError, piadm.RankError) as error:
        seen["raised"] = [type(error).__name__, str(error)]
    return {**seen, "after": len(_lanes(5)[0])}


def lanes_killed(folder: Path) -> dict[str, Any]:
    def act() -> None:
        (folder / "dying").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)

    _lanes(5)
    try:
        _lanes(5, act if dist.get_rank() == 0 else None)
    except piadm.RankError as error:
        return {"ranks": error.ranks, "message": str(error), "seconds": time.time() - (folder / "dying").stat().st_mtime}
    return {"ranks": None}


def pipeline(folder: Path) -> dict[str, Any]:
    """A pipeline of diffusers, shared and alone, its memory bounded or not."""
    from diffusers import DDPMScheduler

    from tests import tiny

    seen = {}
    for name, settings in {
        "plain": {},
        "exact": {"exact": True},
        "bounded": {"max_memory": 900_000},
        "two": {"window": 2},
    }.items():
        found = []
        for ranks in (piadm.Ranks(timeout=60.0), None):
            pipe, rows = tiny.dit(), []
            pipe.scheduler = DDPMScheduler() if name == "exact" else pipe.scheduler
            forward = pipe.transformer.forward
            pipe.transformer.forward = lambda x, *args, rows=rows, forward=forward, **rest: (
                rows.append(len(x)) or forward(x, *args, **rest)
            )
            fast = piadm.diffusers.parallelize(pipe, **{"window": 7, "tolerance": 1e-4, "ranks": ranks, **settings})
            text = {"class_labels": [1], "num_inference_steps": 14, "guidance_scale": 1.0 if name == "exact" else 4.0}
            torch.manual_seed(0)  # from which this pipeline has its scheduler draw
            out = fast(**text, output_type="np", generator=generator())
            found.append((torch.as_tensor(out.images), fast.last_result.rounds, sum(rows), max(rows)))
        (mine, *ours), (alone, *theirs) = found
        seen[name] = {"gap": float((mine - alone).abs().max()), "sum": float(mine.sum()), "shared": ours, "alone": theirs}
    return seen


if __name__ == "__main__":
    *scenarios, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for scenario in scenarios:
        seen = globals()[scenario](Path(folder))
        (Path(folder) / f"{scenario}.{rank}.json").write_text(json.dumps(seen))
    if scenario not in ("killed", "stopped", "lanes_killed"):
        dist.destroy_process_group()
    else:  # a group with a dead member is not waited for
        os._exit(0)
