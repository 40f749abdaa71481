r"""How many rounds does $\mathrm{KL} \le δ^2$ take in dimension $d$? The paper's Table 1, as measurements.

    python benchmarks/scaling.py --output out/scaling           # about ten minutes on one core
    python benchmarks/scaling.py --largest 6 --output out/scaling

The data are Gaussian with coordinates of variance 0.1, 0.5, 1 and 4 in equal shares, so that no one time scale or gain fits
all. Laws are exact (`piadm.gaussian_law`), so $d = 10^{12}$ takes no sampling; up to $d = 10^5$ the samplers run too.

A third of $δ$ is spent on each of start, steps and rounds (roots of small divergences add). The horizon is the least that
keeps the first, the step the largest that keeps the second, $K$ the least that keeps the third. There are two yardsticks:
`output`, the divergence of the samples, and `path`, that of the whole path, from the exact reverse process's for steps and from
the sequential scheme's for rounds; the theorem bounds the latter. All blocks have $h = 1$. Beyond 64 steps a unit of time the
step's error is extrapolated at first order, and rounds are found on a grid of at most `GRID` steps a unit.

Ours is `Parallel(window=None, target_kl=…)` with its default secants, which spends the third part by its certificate, that is,
by the path. As $d \to ∞$ its secants, sums over coordinates,
have a deterministic limit, which is what the law of an adaptive sampler is here.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import piadm
from benchmarks import tables
from piadm.gaussian_law import gaussian_law, sequential_law
from piadm.planner import (
    Plan,
    at_step,
    divergence,
    sufficient_horizon,
    sufficient_rounds,
    sufficient_step,
    with_rounds,
)
from piadm.windows import Blocks, Pipelined

VARIANCES = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=torch.float64)
STOP = 1e-2
DELTA = 0.1
GRID = 16
SCHEDULE = piadm.schedules.OrnsteinUhlenbeck()
DATA = math.exp(-STOP) * VARIANCES - math.expm1(-STOP)
TOLD = piadm.Denoiser(piadm.targets.Gaussian(), SCHEDULE, "sample", variance=float(VARIANCES.mean()))
"""What samplers are told of the data: one number. Laws ask this denoiser for nothing else."""
WINDOW = 64
"""Steps of the window that is bounded by memory."""


def budget(d: float) -> float:
    """What one of three parts may cost, for each coordinate."""
    return DELTA**2 / 9 / d


def published(method: str, d: float, corrected: bool = True) -> Plan:
    """Horizon, step and, for the flow, corrector, with one round; the scheme that both sequential and parallel runs take."""
    lipschitz = 1 / float(VARIANCES.min())
    horizon = max(1.0, sufficient_horizon(VARIANCES, DATA, STOP, budget(d), method == "sde"))
    corrector = None
    if method == "ode" and corrected:
        corrector = piadm.Corrector(math.sqrt(lipschitz), 1 / math.sqrt(lipschitz), 1, 0.1 / math.sqrt(lipschitz), 1)
    one = Plan("sde" if method == "sde" else "ode", int(d), DELTA, lipschitz, horizon, 1.0, 0.1, STOP, 1, corrector)
    return at_step(one, sufficient_step(one, VARIANCES, DATA, 4 * budget(d)))


def path_divergence(one: Plan) -> float:
    r"""$\mathrm{KL}(\text{exact reverse process on the grid} ‖ \text{scheme})$ for each coordinate, from exact transitions."""
    times = torch.tensor([*one.scheme()(SCHEDULE).times.tolist(), STOP], dtype=torch.float64)
    t, step = times[:-1, None], (times[:-1] - times[1:])[:, None]
    now, later = (torch.exp(-s) * VARIANCES - torch.expm1(-s) for s in (t, t - step))
    slope, spread = torch.exp(-step / 2) * later / now, -torch.expm1(-step) * later / now
    scheme_slope, scheme_spread = torch.exp(step / 2) - 2 * torch.expm1(step / 2) / now, torch.expm1(step)
    excess = spread / scheme_spread - 1
    each = (excess - torch.log1p(excess) + (slope - scheme_slope) ** 2 * now / scheme_spread) / 2
    return float(each.sum(0).mean())


def path_step(one: Plan, d: float) -> float:
    """The step with which the path's divergence is within its part, first order in the step."""
    fine = 1 / 128
    return min(one.step, fine * budget(d) / path_divergence(replace(one, step=fine)))


def coarse(one: Plan) -> Plan:
    """The plan on the grid on which rounds are found."""
    return at_step(one, max(one.step, 1 / GRID))


def ours(one: Plan, window: int | None = None) -> piadm.Parallel:
    """Our default on the plan's scheme, spending its part by the certificate."""
    return piadm.Parallel(TOLD, coarse(one).scheme(), window=window, target_kl=DELTA**2 / 9)


def certified_rounds(one: Plan, d: float, least: int) -> int:
    """K of PIADM-SDE by the path: the least whose certificate is within its part."""
    rounds = least
    while gaussian_law(paper_law(coarse(one), rounds), VARIANCES).nats > budget(d):
        rounds += 1
    return rounds


def paper_law(one: Plan, rounds: int) -> piadm.PIADMSDE:
    """PIADM-SDE told one number about the data."""
    return piadm.PIADMSDE.from_plan(with_rounds(one, rounds), TOLD)


def exact_row(d: float) -> dict[str, tables.Value]:
    """Rounds and memory at one dimension, by exact laws."""
    part = budget(d)
    sde, ode, flow = published("sde", d), published("ode", d), published("ode", d, corrected=False)
    by_path = replace(sde, step=path_step(sde, d))
    k_sde, k_pipe = (sufficient_rounds(sde, VARIANCES, part, window, GRID) for window in (Blocks, Pipelined))
    k_ode, k_flow = (sufficient_rounds(one, VARIANCES, part, Blocks, GRID) for one in (ode, flow))
    law = gaussian_law(ours(sde), VARIANCES, dimension=d)
    return {
        "d": f"1e{round(math.log10(d))}",
        "sequential SDE, path": by_path.steps,
        "sequential SDE, output": sde.steps,
        "sequential ODE": flow.steps,
        "PIADM-SDE, output": with_rounds(sde, k_sde).rounds,
        "PIADM-SDE, path": sde.blocks * certified_rounds(sde, d, k_sde),
        "K": k_sde,
        "PIADM-ODE": with_rounds(ode, k_ode).rounds,
        "K†": k_ode,
        "without corrector": with_rounds(flow, k_flow).rounds,
        "pipelined": sde.blocks + k_pipe - 1,
        "piadm.Parallel": law.rounds,
        "T": sde.horizon,
        "T, ODE": ode.horizon,
        "block SDE, path": float(by_path.memory),
        "block SDE, output": float(sde.memory),
        "block ODE": float(with_rounds(ode, k_ode).memory),
        f"window {WINDOW}": float(4 * (WINDOW + 1) * d),
        "its rounds at least, path": math.ceil(by_path.steps / WINDOW),
        "its rounds at least, output": math.ceil(sde.steps / WINDOW),
    }


def exponents(rows: Sequence[tables.Row]) -> list[dict[str, tables.Value]]:
    """Slopes of log rounds and log bytes against log d, from 1e3 on, by least squares."""
    chosen = [row for row in rows if float(str(row["d"])) >= 1e3]
    logs = np.log([float(str(row["d"])) for row in chosen])
    skip = ("d", "T", "T, ODE", "K", "K†")
    out: list[dict[str, tables.Value]] = []
    for name in rows[0] if len(chosen) > 1 else ():
        if name not in skip:
            values = np.log([float(str(row[name])) for row in chosen])
            local = (values[-1] - values[-2]) / (logs[-1] - logs[-2])
            out.append({"quantity": name, "exponent": float(np.polyfit(logs, values, 1)[0]), "at the end": float(local)})
    return out


def sampled_row(d: int) -> dict[str, tables.Value]:
    """The samplers themselves on d coordinates, beside their laws."""
    part = budget(d)
    sde = published("sde", d)
    rounds = sufficient_rounds(sde, VARIANCES, part, Blocks, GRID)
    kinds = VARIANCES.repeat(math.ceil(d / len(VARIANCES)))[:d]
    exact = piadm.targets.Gaussian(0.0, kinds)
    denoiser = piadm.Denoiser(exact, SCHEDULE, "sample", variance=float(VARIANCES.mean()))
    samples = max(2, min(32, 200_000 // d))

    def draw(sampler: piadm.Parallel) -> piadm.Result:
        return sampler((samples, d), generator=torch.Generator().manual_seed(0))

    paper = piadm.PIADMSDE.from_plan(with_rounds(coarse(sde), rounds), denoiser)
    mine = piadm.Parallel(denoiser, coarse(sde).scheme(), window=None, target_kl=DELTA**2 / 9)
    bounded = piadm.Parallel(denoiser, coarse(sde).scheme(), window=WINDOW, target_kl=DELTA**2 / 9)
    exactly = piadm.Exact(denoiser, coarse(sde).scheme(), window=None)
    result, own, narrow, spoken = draw(paper), draw(mine), draw(bounded), draw(exactly)
    law, limit = gaussian_law(paper_law(coarse(sde), rounds), VARIANCES), gaussian_law(ours(sde), VARIANCES, dimension=d)
    reference = sequential_law(SCHEDULE, paper.table, VARIANCES)
    return {
        "d": f"1e{round(math.log10(d))}",
        "samples": samples,
        "steps": result.steps,
        "PIADM-SDE rounds": result.rounds,
        "its KL, exact": d * law.divergence(reference.variance),
        "its certificate": result.certificate.kl,
        "±": result.certificate.standard_error,
        "expected": d * law.nats,
        "piadm.Parallel rounds": own.rounds,
        "in the limit": limit.rounds,
        "evaluations a step": own.evaluations / own.steps,
        "its certificate (≤ 1.1e-3)": own.certificate.kl,
        f"rounds at window {WINDOW}": narrow.rounds,
        "piadm.Exact rounds": spoken.rounds,
    }


def corrector_rows() -> list[dict[str, tables.Value]]:
    """What the corrector earns: divergence from the data for each coordinate, with and without, at one step and horizon."""
    rows = []
    plans = {"with": published("ode", 1e6), "without": published("ode", 1e6, corrected=False)}
    for k in (1, 2, 3, 4, 6, 8):
        row: dict[str, tables.Value] = {"K": k}
        for name, plan in plans.items():
            one = with_rounds(at_step(replace(plan, horizon=10.0), 1 / GRID), k)
            sampler = piadm.Parallel(
                TOLD, one.scheme(), propagator=piadm.propagators.Exponential(), window=Blocks(k), fill=piadm.fills.Copy()
            )
            found = gaussian_law(sampler, VARIANCES)
            sequential = sequential_law(SCHEDULE, sampler.table, VARIANCES).variance
            row[f"rounds {name}"] = found.rounds
            row[f"KL from the data, {name}"] = found.divergence(DATA)
            row[f"KL from sequential, {name}"] = found.divergence(sequential)
            row[f"sequential from the data, {name}"] = divergence(sequential, DATA)
        rows.append(row)
    return rows


def plot(path: Path, rows: Sequence[tables.Row], fits: Sequence[tables.Row]) -> None:
    """Rounds and bytes against d."""
    from matplotlib.figure import Figure

    slopes = {row["quantity"]: row["exponent"] for row in fits}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    d = [float(str(row["d"])) for row in rows]
    lines = (
        "sequential SDE, path",
        "sequential SDE, output",
        "sequential ODE",
        "PIADM-SDE, output",
        "PIADM-SDE, path",
        "PIADM-ODE",
        "pipelined",
        "piadm.Parallel",
    )
    memory = ("block SDE, path", "block SDE, output", "block ODE", f"window {WINDOW}")
    for axis, names, label in ((left, lines, "rounds"), (right, memory, "bytes a sample")):
        for name in names:
            slope = f" ({slopes[name]:.2f})" if name in slopes else ""
            axis.loglog(d, [float(str(row[name])) for row in rows], marker="o", markersize=3, label=f"{name}{slope}")
        axis.set_xlabel("dimension")
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(f"KL ≤ {DELTA**2:g}; in brackets, exponents fitted from 1e3 on")
    figure.savefig(path, dpi=130)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/scaling"), help="folder for tables and plot")
    parser.add_argument("--largest", type=int, default=12, help="the largest power of ten by exact laws")
    parser.add_argument("--sampled", type=int, default=5, help="the largest power of ten by sampling; 0 for none")
    tables.add_report(parser)
    options = parser.parse_args(arguments)
    about = tables.machine(["python", "benchmarks/scaling.py", *(sys.argv[1:] if arguments is None else arguments)])
    started = time.perf_counter()
    exact = [exact_row(10.0**power) for power in range(1, options.largest + 1)]
    fits = exponents(exact)
    sampled = [sampled_row(10**power) for power in range(1, options.sampled + 1)]
    found = {
        f"Rounds and bytes for KL ≤ {DELTA**2:g}": exact,
        "Exponents": fits,
        "By sampling": sampled,
        "With and without the corrector": corrector_rows(),
    }
    about["seconds"] = round(time.perf_counter() - started)
    for title, rows in found.items():
        if rows:
            tables.show(title, rows)
    tables.write(options.output, "scaling", found, about)
    if exact:
        plot(options.output / "scaling.png", exact, fits)
    if options.report:
        tables.report(options.output, "scaling")


if __name__ == "__main__":
    main()
