r"""Every method on the same model, noise and final error: rounds, evaluations, wall-clock, memory.

    python benchmarks/compare.py --output out/compare            # some minutes on 2 cores
    python benchmarks/compare.py --full --output out/compare     # hours: fashion, batches of 16, full windows of 1000 steps
    python benchmarks/compare.py --only "digits DDIM 100" --output out/compare

The methods stop by different rules, so each is given the largest tolerance whose final rms distance from `Sequential` on the
same noise, over the batch, is at most the target. The search walks a grid of half decades from 1, up while the target is met or
down until it is, then halves the half decade above twice; where the error does not fall with the tolerance it may miss a
larger one. CHORDS takes the first of its outputs that meets the target. ParaTAA (equations of full order, or order 8 with three
iterates) and CHORDS (4, 6 or 8 cores) are given the best of their settings, by rounds.

*Time* is the median, over interleaved pairs (a sequential run, then the method's), of sequential seconds / seconds: above 1 is
faster than sequential. *Rows* is the largest number of network rows in one call, per sample: what a round costs in memory.
SRDS and CHORDS are for ODEs and have no window: their rows are the same whatever the case's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.peers import CHORDS, SRDS, ParaDiGMS, ParaSolver, ParaTAA, Picard
from benchmarks.workloads import Case, cases
from piadm import DDIM, DDPM, Euler, Parallel, Sequential
from piadm.denoiser import DenoiserLike, Wrapper
from piadm.result import Result

TARGET = 1e-2
GRID = tuple(10 ** (-k / 2) for k in range(-4, 15))
"""Tolerances, from 100 to 1e-7."""

Sampler = Callable[..., Result]
Build = Callable[..., Sampler]
"""A sampler from a denoiser and the method's one free parameter."""


class Counted(Wrapper):
    """A denoiser that remembers the most rows it was given at once."""

    def __init__(self, denoiser: DenoiserLike) -> None:
        super().__init__(denoiser)
        self.rows = 0

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        self.rows = max(self.rows, len(x))
        return self.denoiser(x, t, **condition)


@dataclass(frozen=True)
class Found:
    """A method at its best: its parameter in words, a sampler, the run and its error, and rows in one call per sample."""

    setting: str
    sampler: Sampler
    result: Result
    error: float
    rows: float


def selection(full: bool) -> list[Case]:
    """The cases, the cheap ones first."""
    chosen = [
        *cases("flow", Euler(50), (8, 16, None), 1),
        *cases("policy", DDPM(50), (16, None), 1),
        *cases("policy", DDPM(100), (16, None), 1),
        *cases("digits", DDIM(100), (16, None), 1),
        *cases("digits", DDPM(100), (16, None), 1),
        *cases("digits", DDPM(1000), (32, 128), 1),
    ]
    if full:
        chosen += [
            *cases("flow", Euler(50), (16, 32, None), 16),
            *cases("policy", DDPM(100), (16, None), 16),
            *cases("digits", DDIM(100), (32,), 1),
            *cases("digits", DDPM(100), (32,), 1),
            *cases("digits", DDPM(1000), (16, None), 1),
            *cases("digits", DDIM(1000), (32, 128), 1),
            *cases("fashion", DDIM(100), (16, 32, None), 1),
            *cases("fashion", DDPM(100), (16, 32, None), 1),
            *cases("digits", DDIM(100), (16, 32, None), 16),
            *cases("digits", DDPM(100), (16, 32, None), 16),
            *cases("fashion", DDPM(1000), (32, 128, None), 1),
            *cases("digits", DDPM(1000), (32, 128), 16),
        ]
    return chosen


def methods(case: Case) -> dict[str, list[Build]]:
    """Every method with its settings, as functions of the denoiser and the tolerance; CHORDS is apart."""
    scheme, window = case.scheme, case.window

    def build(method: Callable[..., Sampler], **setting: Any) -> Build:
        return lambda denoiser, tolerance: method(denoiser, scheme, tolerance=tolerance, **setting)

    found = {
        "piadm.Parallel": [build(Parallel, window=window)],
        "Picard": [build(Picard, window=window)],
        "ParaDiGMS": [build(ParaDiGMS, window=window)],
        "ParaTAA": [build(ParaTAA, window=window)],
        "ParaSolver": [build(ParaSolver, window=window)],
    }
    if case.steps <= 100:
        found["ParaTAA"] += [build(ParaTAA, window=window, order=8, memory=3)]
    if not scheme(case.denoiser.schedule).stochastic:
        found["SRDS"] = [build(SRDS)]
    return found


class Bench:
    """One case: its sequential run, and runs held against it."""

    def __init__(self, case: Case, target: float, seed: int = 0) -> None:
        self.case, self.target, self.seed = case, target, seed
        self.sequential = Sequential(case.denoiser, case.scheme)
        self.reference = self.run(self.sequential)

    def run(self, sampler: Sampler) -> Result:
        case = self.case
        return sampler(case.shape, generator=torch.Generator().manual_seed(self.seed), **case.condition)

    def attempt(self, setting: str, build: Callable[[DenoiserLike], Sampler]) -> Found:
        counted = Counted(self.case.denoiser)
        result = self.run(build(counted))
        error = float((result.samples - self.reference.samples).square().mean().sqrt())
        return Found(setting, build(self.case.denoiser), result, error, counted.rows / self.case.samples)

    def search(self, build: Build) -> Found | None:
        """The method at its largest tolerance that meets the target; `None` if none of the grid does."""

        def attempt(tolerance: float) -> Found | None:
            found = self.attempt(f"{tolerance:.2g}", partial(build, tolerance=tolerance))
            return found if found.error <= self.target else None

        place = GRID.index(1.0)
        best = attempt(GRID[place])
        if best is not None:
            while place > 0 and (better := attempt(GRID[place - 1])) is not None:
                best, place = better, place - 1
        while best is None:
            place += 1
            if place == len(GRID):
                return None
            best = attempt(GRID[place])
        if place == 0:
            return best
        low, high = GRID[place], GRID[place - 1]
        for _ in range(2):
            middle = (low * high) ** 0.5
            better = attempt(middle)
            if better is None:
                high = middle
            else:
                best, low = better, middle
        return best

    def chords(self) -> Found | None:
        """CHORDS's first output that meets the target, of 4, 6 or 8 cores."""
        best = None
        for cores in (4, 6, 8):
            for core in range(1, cores + 1):
                build = partial(CHORDS, scheme=self.case.scheme, cores=cores, core=core)
                found = self.attempt(f"output {core} of {cores}", build)
                if found.error <= self.target:
                    if best is None or found.result.rounds < best.result.rounds:
                        best = found
                    break
        return best

    def speed(self, sampler: Sampler, pairs: int) -> float | None:
        """Sequential seconds / seconds, the median over interleaved pairs."""
        ratios = [self.run(self.sequential).seconds / self.run(sampler).seconds for _ in range(pairs)]
        return statistics.median(ratios) if ratios else None

    def best(self) -> Iterator[tuple[str, Found | None]]:
        """Every method that takes the case's scheme and model."""
        for name, builds in methods(self.case).items():
            try:
                found = [self.search(build) for build in builds]
            except ValueError as error:  # Picard has no score where α = 0
                print(f"{self.case}: {name} does not apply: {error}", flush=True)
                continue
            yield name, min((one for one in found if one is not None), key=lambda one: one.result.rounds, default=None)
        if not self.sequential.table.stochastic:
            yield "CHORDS", self.chords()


def compare(case: Case, target: float, pairs: int) -> list[tables.Row]:
    """A row for each method, the sequential sampler first."""
    bench = Bench(case, target)
    base = {"work": case.work, "samples": case.samples, "window": case.width}
    first: dict[str, tables.Value] = {
        "method": "Sequential",
        "setting": None,
        "rounds": bench.reference.rounds,
        "evaluations a step": bench.reference.evaluations / case.steps,
        "time": 1.0,
        "rows": 1.0,
        "error": 0.0,
    }
    rows: list[tables.Row] = [{**base, **first}]
    for name, found in bench.best():
        if found is None:
            rows.append({**base, **dict.fromkeys(first), "method": name})
            continue
        figures = {
            "method": name,
            "setting": found.setting,
            "rounds": found.result.rounds,
            "evaluations a step": found.result.evaluations / case.steps,
            "time": bench.speed(found.sampler, pairs),
            "rows": found.rows,
            "error": found.error,
        }
        rows.append({**base, **figures})
    return rows


def draw(path: Path, rows: Sequence[tables.Row]) -> None:
    """Rounds, evaluations, time and rows of every method, one group of bars for each case."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["work"], row["samples"], row["window"]) for row in rows))
    names = list(dict.fromkeys(str(row["method"]) for row in rows))
    figure = Figure(figsize=(max(8.0, 1.3 * len(groups)), 11), layout="constrained")
    panels = {
        "rounds": "rounds",
        "evaluations a step": "evaluations a step",
        "time": "sequential time / time",
        "rows": "network rows in a call, per sample",
    }
    for axes, (key, label) in zip(figure.subplots(len(panels), 1, sharex=True), panels.items(), strict=True):
        for i, name in enumerate(names):
            found = {(row["work"], row["samples"], row["window"]): row[key] for row in rows if row["method"] == name}
            places = [g for g, group in enumerate(groups) if found.get(group) is not None]
            width = 0.85 / len(names)
            axes.bar(
                [g + width * (i - (len(names) - 1) / 2) for g in places], [found[groups[g]] for g in places], width, label=name
            )
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
    labels = [f"{work}\nwindow {window}" + (f"\n{samples} samples" if samples != 1 else "") for work, samples, window in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=7)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for compare.md, .csv, .json and .png")
    parser.add_argument("--full", action="store_true", help="more models, windows and samples")
    parser.add_argument("--only", default="", help="cases whose name contains this, such as 'digits DDIM 100, window 16'")
    parser.add_argument("--target", type=float, default=TARGET, help="largest final rms difference from the sequential samples")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved pairs of runs for the time; 0 leaves it out")
    tables.add_report(parser)
    asked = parser.parse_args(arguments)
    chosen = [case for case in selection(asked.full) if asked.only in str(case)]
    if not chosen:
        parser.error(f"--only {asked.only!r} fits no case; they are: " + "; ".join(map(str, selection(asked.full))))
    about = tables.machine(["python", "benchmarks/compare.py", *(sys.argv[1:] if arguments is None else arguments)])
    about |= {"target": asked.target, "pairs": asked.pairs}
    rows: list[tables.Row] = []
    for case in chosen:
        rows += compare(case, asked.target, asked.pairs)
        tables.write(asked.output, "compare", {f"Final error at most {asked.target:g}": rows}, about)
        draw(asked.output / "compare.png", rows)
        print(f"{case}: done", flush=True)
    tables.show(f"Final error at most {asked.target:g}", rows)
    if asked.report:
        tables.report(asked.output, "compare")


if __name__ == "__main__":
    main()
