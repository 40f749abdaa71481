r"""Is it faster on this machine, and how much faster could it be?

    python benchmarks/clock.py --output out/clock                # some minutes on 2 cores
    python benchmarks/clock.py --only "digits DDPM 1000" --output out/clock

`Parallel(window="auto")` in its second run, when it has measured the network and learnt from a run, beside `Sequential` on the
same noise, in interleaved pairs of runs.

*Time* is the median of sequential seconds / seconds: above 1 is faster. *Limit* is what one evaluation a step would reach in
calls of the cheapest size, by the network's measured time against rows: $t(S) / (S \min_R t(R)/R)$ for $S$ samples. *Own* is
the share of the run in which the network did not run. Rows with a fixed window are there for own arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.workloads import Case, cases
from piadm import DDIM, DDPM, Euler, Parallel, Sequential
from piadm.result import Result
from piadm.samplers import _Network, _Trial
from piadm.tuning import sizes, timing

TITLE = "Parallel beside Sequential"


def selection() -> list[Case]:
    """The cases, the cheap ones first; a window of `None` stands for `"auto"`."""
    return [
        *cases("flow", Euler(50), (None,), 1),
        *cases("policy", DDPM(50), (None,), 1),
        *cases("policy", DDPM(100), (None,), 1),
        *cases("digits", DDIM(100), (None,), 1),
        *cases("digits", DDPM(100), (None,), 1),
        *cases("digits", DDPM(1000), (None, 128), 1),
        *cases("fashion", DDPM(100), (None,), 1),
        *cases("fashion", DDPM(1000), (None, 128), 1),
        *cases("policy", DDPM(100), (None,), 16),
        *cases("digits", DDPM(100), (None,), 16),
        *cases("fashion", DDPM(100), (None,), 16),
    ]


def limit(case: Case) -> float:
    """How much faster than sequential one evaluation a step would be, in calls of the cheapest size."""
    denoiser, table = case.denoiser, case.scheme(case.denoiser.schedule)
    network = _Network(denoiser, case.shape[1:], case.samples, case.condition)
    tried = sizes(case.samples, case.steps, None)
    measured = timing(case, case, _Trial(table, network, torch.device("cpu"), denoiser.dtype), tried, case.steps)
    price = min(seconds / rows for rows, seconds in zip(measured.rows, measured.seconds, strict=True))
    return measured.at(case.samples) / case.samples / price


def compare(case: Case, pairs: int) -> tables.Row:
    """One row."""
    sampler = Parallel(case.denoiser, case.scheme, window="auto" if case.window is None else case.window)
    sequential = Sequential(case.denoiser, case.scheme)

    def run(one: Parallel | Sequential) -> Result:
        return one(case.shape, generator=torch.Generator().manual_seed(0), **case.condition)

    first, best = run(sampler), limit(case)
    both = [(run(sequential), run(sampler)) for _ in range(pairs)]
    last, time = both[-1][1], statistics.median(a.seconds / b.seconds for a, b in both)
    error = float((last.samples - both[-1][0].samples).square().mean(tuple(range(1, last.samples.ndim))).sqrt().max())
    return {
        "work": case.work,
        "samples": case.samples,
        "window": "fixed 128" if last.choice is None else f"auto: {last.choice.window}",
        "rows a call": case.window if last.choice is None else last.choice.rows,
        "rounds": last.rounds,
        "evaluations a step": last.evaluations / case.steps,
        "time": time,
        "first run": both[0][0].seconds / first.seconds,
        "limit": best,
        "time / limit": time / best,
        "own": statistics.median(1 - one.network_seconds / one.seconds for _, one in both),
        "own, ms a round": statistics.median(1e3 * (one.seconds - one.network_seconds) / one.rounds for _, one in both),
        "error": error,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for clock.md, .csv and .json")
    parser.add_argument("--only", default="", help="cases whose name contains this, such as 'digits DDPM 1000'")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs of runs")
    tables.add_report(parser)
    asked = parser.parse_args(arguments)
    chosen = [case for case in selection() if asked.only in str(case)]
    if not chosen:
        parser.error(f"--only {asked.only!r} fits no case; they are: " + "; ".join(map(str, selection())))
    about = tables.machine(["python", "benchmarks/clock.py", *(sys.argv[1:] if arguments is None else arguments)])
    rows: list[tables.Row] = []
    for case in chosen:
        rows.append(compare(case, asked.pairs))
        tables.write(asked.output, "clock", {TITLE: rows}, about)
        print(f"{case}: done", flush=True)
    tables.show(TITLE, rows)
    if asked.report:
        tables.report(asked.output, "clock")


if __name__ == "__main__":
    main()
