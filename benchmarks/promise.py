r"""Does `Parallel(tolerance=τ)` return a sample within τ rms of the sequential one, and at what price?

    python benchmarks/promise.py --output out/promise            # about ten minutes on one core
    python benchmarks/promise.py --full --output out/promise     # hours: also DDIM 1000, full windows of 1000, larger batches
    python benchmarks/promise.py --only flow --seeds 1 --output out/promise

Every run is compared with `Sequential` on the same noise; every sample of a batch is a data point. The stopping rule multiplies
its estimate by `piadm.stopping.SAFETY`. Each run is repeated with other values of it, and the *oracle* is the smallest number
of rounds among those repetitions that keep the promise for every sample of the run: it knows the answer, no rule could be asked
to reach it. *Wasted* rounds are rounds / oracle − 1, over runs that kept their promise.

`points`, whose sampler is discontinuous, is reported but not counted in the totals.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import piadm.solver
from benchmarks import tables
from benchmarks.workloads import Case, cases
from piadm import DDIM, DDPM, Euler, Parallel, Sequential
from piadm.record import distance
from piadm.result import Result
from piadm.stopping import SAFETY

TOLERANCES = (1e-1, 1e-2, 1e-3)
GRID = (1 / 4, 1.0, 4.0, 8.0, 16.0, SAFETY, 2 * SAFETY, 8 * SAFETY)
"""Values of `SAFETY` for the oracle; those above the default only where the default broke its promise."""
APART = ("points",)


@dataclass(frozen=True)
class Trial:
    """One run at one `SAFETY`: the errors of its samples in units of τ."""

    rounds: int
    evaluations: float
    ratios: tuple[float, ...]

    @property
    def kept(self) -> bool:
        return max(self.ratios) <= 1


@dataclass(frozen=True)
class Run:
    """One seed of one case at one τ, at every `SAFETY` tried."""

    case: Case
    tolerance: float
    seed: int
    trials: dict[float, Trial]

    @property
    def default(self) -> Trial:
        return self.trials[SAFETY]

    @property
    def oracle(self) -> int | None:
        """The fewest rounds that keep the promise; `None` if none does."""
        return min((trial.rounds for trial in self.trials.values() if trial.kept), default=None)

    def wasted(self, trial: Trial) -> float | None:
        return trial.rounds / self.oracle - 1 if trial.kept and self.oracle else None


@contextmanager
def safety(value: float) -> Iterator[None]:
    """Runs with another `SAFETY`."""
    piadm.solver.SAFETY = value  # type: ignore[attr-defined]
    try:
        yield
    finally:
        piadm.solver.SAFETY = SAFETY  # type: ignore[attr-defined]


def selection(full: bool) -> list[Case]:
    """The cases, the cheap ones first."""
    chosen = [
        *cases("flow", Euler(50), (16, 32, None), 8),
        *cases("mixture", DDIM(50), (16, None), 8),
        *cases("mixture", DDIM(100), (16, 32, None), 8),
        *cases("mixture", DDPM(100), (16, 32, None), 8),
        *cases("points", DDIM(100), (16, None), 8),
        *cases("points", DDPM(100), (16, None), 8),
        *cases("digits", DDIM(50), (16, None), 2),
        *cases("digits", DDIM(100), (16, 32, None), 2),
        *cases("digits", DDPM(100), (16, 32, None), 2),
        *cases("fashion", DDIM(50), (16,), 1),
        *cases("fashion", DDIM(100), (None,), 1),
        *cases("fashion", DDPM(100), (16, None), 1),
        *cases("mixture", DDPM(1000), (32, 128), 4),
        *cases("digits", DDPM(1000), (32, 128), 1),
    ]
    if full:
        chosen += [
            *cases("mixture", DDPM(1000), (16, None), 4),
            *cases("mixture", DDIM(1000), (32, 128, None), 4),
            *cases("points", DDPM(1000), (32, 128), 4),
            *cases("digits", DDIM(50), (32,), 8),
            *cases("digits", DDPM(1000), (16, None), 4),
            *cases("digits", DDIM(1000), (32, 128, None), 4),
            *cases("fashion", DDIM(50), (None,), 4),
            *cases("fashion", DDIM(100), (16, 32), 4),
            *cases("fashion", DDPM(100), (32,), 4),
            *cases("fashion", DDPM(1000), (32, 128), 1),
        ]
    return chosen


def measure(case: Case, tolerance: float, seed: int, sequential: Result) -> Run:
    """One run at every `SAFETY`."""
    trials: dict[float, Trial] = {}
    sampler = Parallel(case.denoiser, case.scheme, window=case.window, tolerance=tolerance)
    for value in GRID:
        if value > SAFETY and trials[SAFETY].kept:
            continue
        with safety(value):
            result = sampler(case.shape, generator=torch.Generator().manual_seed(seed), **case.condition)
        ratios = tuple((distance(result, sequential) / tolerance).tolist())
        trials[value] = Trial(result.rounds, result.evaluations / result.steps, ratios)
    return Run(case, tolerance, seed, trials)


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def by_case(runs: Sequence[Run]) -> list[tables.Row]:
    """A row for each case and tolerance."""
    groups: dict[tuple[Case, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.case, run.tolerance), []).append(run)
    rows: list[tables.Row] = []
    for (case, tolerance), group in groups.items():
        ratios = [ratio for run in group for ratio in run.default.ratios]
        wasted = mean([run.wasted(run.default) for run in group])
        rows.append(
            {
                "work": case.work,
                "window": case.width,
                "τ": f"{tolerance:.0e}",
                "runs": len(group),
                "samples": len(ratios),
                "rounds": statistics.fmean(run.default.rounds for run in group),
                "evaluations a step": statistics.fmean(run.default.evaluations for run in group),
                "error/τ, median": statistics.median(ratios),
                "error/τ, max": max(ratios),
                "kept": f"{sum(ratio <= 1 for ratio in ratios)}/{len(ratios)}",
                "oracle rounds": mean([run.oracle for run in group]),
                "wasted": None if wasted is None else f"{wasted:.0%}",
            }
        )
    return rows


def totals(runs: Sequence[Run]) -> list[tables.Row]:
    """A row for each value of `SAFETY`, and the default's by model, tolerance and window."""
    counted = [run for run in runs if run.case.model not in APART]
    rows: list[tables.Row] = [total(f"SAFETY {value:g}", counted, value) for value in GRID if value <= SAFETY and counted]
    keys = {
        **{f"model {run.case.model}": None for run in runs},
        **{f"τ {run.tolerance:.0e}": None for run in counted},
        **{f"scheme {type(run.case.scheme).__name__}": None for run in counted},
        **{f"window {run.case.width}": None for run in counted},
    }
    for key in keys:
        kind = "model" if key.startswith("model") else ""
        group = [run for run in (runs if kind else counted) if key in _labels(run)]
        rows.append(total(key, group, SAFETY))
    return rows


def _labels(run: Run) -> tuple[str, ...]:
    case = run.case
    scheme = type(case.scheme).__name__
    return f"model {case.model}", f"τ {run.tolerance:.0e}", f"scheme {scheme}", f"window {case.width}"


def total(name: str, runs: Sequence[Run], value: float) -> tables.Row:
    """Promises kept and rounds wasted over all of some runs, at one `SAFETY`."""
    trials = [(run, run.trials[value]) for run in runs]
    ratios = [ratio for _, trial in trials for ratio in trial.ratios]
    wasted = mean([run.wasted(trial) for run, trial in trials])
    return {
        "over": name,
        "runs": len(runs),
        "samples": len(ratios),
        "samples kept": f"{sum(ratio <= 1 for ratio in ratios) / len(ratios):.1%}",
        "runs kept": f"{sum(trial.kept for _, trial in trials) / len(runs):.1%}",
        "error/τ, max": max(ratios),
        "wasted rounds, mean": None if wasted is None else f"{wasted:.1%}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for promise.md, .csv and .json")
    parser.add_argument("--full", action="store_true", help="more schemes, windows and samples")
    parser.add_argument("--only", default="", help="cases whose name contains this, such as 'digits DDPM 100, window 16'")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each case and tolerance; one for 1000 steps unless --full"
    )
    tables.add_report(parser)
    asked = parser.parse_args(arguments)
    chosen = [case for case in selection(asked.full) if asked.only in str(case)]
    if not chosen:
        parser.error(f"--only {asked.only!r} fits no case; they are: " + "; ".join(map(str, selection(asked.full))))
    about = tables.machine(["python", "benchmarks/promise.py", *(sys.argv[1:] if arguments is None else arguments)])
    runs: list[Run] = []
    for case in chosen:
        for seed in range(asked.seeds if asked.full or case.steps < 1000 else 1):
            generator = torch.Generator().manual_seed(seed)
            sequential = Sequential(case.denoiser, case.scheme)(case.shape, generator=generator, **case.condition)
            runs += [measure(case, tolerance, seed, sequential) for tolerance in TOLERANCES]
        found = {"By case": by_case(runs), "In total": totals(runs)}
        tables.write(asked.output, "promise", found, about)  # after every case: a run cut short leaves what it had
        print(f"{case}: done", flush=True)
    for title, rows in found.items():
        tables.show(title, rows)
    if asked.report:
        tables.report(asked.output, "promise")


if __name__ == "__main__":
    main()
