r"""What does `Exact` cost, and is its law the sequential one?

    python benchmarks/exact.py --output out/exact                # about half an hour on one core
    python benchmarks/exact.py --only Law --output out/exact     # one of its tables
    python benchmarks/exact.py --quick --output out/exact        # a minute: digits, fewer steps, samples and seeds

*Rounds*: DDPM 1000, one sample a run, so that rounds are a sample's own.

*Thresholds*: the same at other values of `threshold`; the law does not depend on it.

*Law*: samples of `digits` at few steps, where rejections are common, from `Exact` and from `Sequential` with other noise, in a
two-sample test: Kolmogorov and Smirnov's on every pixel and on as many random projections, and the difference of all second
moments in standard errors. `p` is the smallest p-value times the number of tests. `NoReflection`, a solver that differs from
`Exact`'s by a missing reflection, shows the power of the test.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.workloads import Case, cases
from piadm import DDPM, Exact, Sequential
from piadm.noise import Noise
from piadm.speculative import Scan, Speculation, SpeculativeSolver

WINDOWS = (32, 128, None)
THRESHOLDS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 1e9)
TITLES = ("Rounds", "Thresholds", "Law")


class NoReflection(SpeculativeSolver):
    """A rejected step is recomputed with the noise it had: wrong, and by how much is what the test must see."""

    def _scan(self, state: Speculation, steps: Tensor, inside: Tensor, mean: Tensor, xi: Tensor) -> Scan:
        return replace(super()._scan(state, steps, inside, mean, xi), noise=xi)


class Broken(Exact):
    """`Exact` without its reflection."""

    def _solver(self, noise: Noise) -> SpeculativeSolver:
        return NoReflection(**vars(super()._solver(noise)))


def cost(case: Case, threshold: float, seeds: int) -> tables.Row:
    """Rounds, evaluations and tests of one case, over seeds."""
    sampler = Exact(case.denoiser, case.scheme, window=case.window, threshold=threshold)
    runs = [sampler(case.shape, generator=torch.Generator().manual_seed(s), **case.condition) for s in range(seeds)]
    counts = [run.acceptance for run in runs if run.acceptance is not None]
    return {
        "work": case.work,
        "window": case.width,
        "threshold": threshold,
        "seeds": seeds,
        "rounds, mean": statistics.fmean(run.rounds for run in runs),
        "rounds, max": max(run.rounds for run in runs),
        "evaluations a step": statistics.fmean(run.evaluations / run.steps for run in runs),
        "rejections": statistics.fmean(float(count.rejected.double().mean()) for count in counts),
        "recomputed": statistics.fmean(float(count.recomputed.double().mean()) for count in counts),
    }


def draw(sampler: Exact | Sequential, case: Case, count: int, seed: int) -> tuple[Tensor, float, float]:
    """Samples `(count, D)` in float64, drawn in batches of the case's size; rejections and rounds of a batch."""
    generator = torch.Generator().manual_seed(seed)
    runs = [sampler(case.shape, generator=generator, **case.condition) for _ in range(count // case.samples)]
    rejected = [float(run.acceptance.rejected.double().mean()) for run in runs if run.acceptance is not None]
    samples = torch.cat([run.samples.flatten(1).double() for run in runs])
    return samples, statistics.fmean(rejected) if rejected else 0.0, statistics.fmean(run.rounds for run in runs)


def p_values(one: Tensor, other: Tensor) -> Iterator[float]:
    """Every test of two samples `(S, D)`: marginals, projections, second moments."""
    size = one.shape[1]
    directions = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for basis in (torch.eye(size, dtype=torch.float64), directions):
        for a, b in zip((one @ basis).T, (other @ basis).T, strict=True):
            yield float(stats.ks_2samp(a.numpy(), b.numpy()).pvalue)
    mean = torch.cat([one, other]).mean(0)
    for i in range(size):
        a, b = ((x - mean)[:, i : i + 1] * (x - mean)[:, i:] for x in (one, other))
        z = (a.mean(0) - b.mean(0)) / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        yield from (2 * stats.norm.sf(z.abs().numpy())).tolist()


def evidence(one: Tensor, other: Tensor) -> float:
    """The smallest p-value times the number of tests, at most 1."""
    p = list(p_values(one, other))
    return min(1.0, min(p) * len(p))


def laws(case: Case, count: int, threshold: float) -> list[tables.Row]:
    """Two-sample tests of `Exact`, of a second sequential sample, and of the broken solver against a sequential sample."""
    sequential = Sequential(case.denoiser, case.scheme)
    keywords = {"window": case.window, "threshold": threshold}
    samplers = {
        "Sequential": sequential,
        "Exact": Exact(case.denoiser, case.scheme, **keywords),  # type: ignore[arg-type]
        "NoReflection": Broken(case.denoiser, case.scheme, **keywords),  # type: ignore[arg-type]
    }
    reference, _, _ = draw(sequential, case, count, seed=1)
    rows: list[tables.Row] = []
    for i, (name, sampler) in enumerate(samplers.items()):
        samples, rejected, rounds = draw(sampler, case, count, seed=2 + i)
        row = {"against Sequential": name, "work": case.work, "window": case.width, "samples": count}
        rows.append({**row, "rounds": rounds, "rejections a sample": rejected, "p": evidence(samples, reference)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for exact.md, .csv and .json")
    parser.add_argument("--quick", action="store_true", help="digits alone, fewer steps, samples and seeds")
    parser.add_argument("--only", choices=TITLES, help="one table")
    tables.add_report(parser)
    asked = parser.parse_args(arguments)
    about = tables.machine(["python", "benchmarks/exact.py", *(sys.argv[1:] if arguments is None else arguments)])
    scheme, seeds = DDPM(50 if asked.quick else 1000), 2 if asked.quick else 8
    digits, fashion = cases("digits", scheme, WINDOWS, 1), cases("fashion", scheme, WINDOWS, 1)
    found: dict[str, list[tables.Row]] = {title: [] for title in TITLES if asked.only in (None, title)}

    def keep(title: str, rows: list[tables.Row]) -> None:
        found[title] += rows
        tables.write(asked.output, "exact", found, about)  # after every case: a run cut short leaves what it had
        tables.show(title, rows)

    if "Rounds" in found:
        for case in digits if asked.quick else [*digits, *fashion]:
            keep("Rounds", [cost(case, 2.0, seeds if case.model == "digits" else seeds // 2)])
    if "Thresholds" in found:
        for threshold in THRESHOLDS:
            keep("Thresholds", [cost(digits[1], threshold, seeds)])
    if "Law" in found:
        few, batch, count = (5, 100, 400) if asked.quick else (6, 1000, 20_000)
        keep("Law", laws(Case("digits", DDPM(few), None, batch), count, 1e9))
    if asked.report:
        tables.report(asked.output, "exact")


if __name__ == "__main__":
    main()
