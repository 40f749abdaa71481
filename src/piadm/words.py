"""A recorded run in plain words: what it cost, what is certain of its samples, and the command that draws them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from piadm.recorded import Bound, Recorded


def cost(run: Recorded) -> list[str]:
    """Rounds, evaluations and time beside the sequential scheme's."""
    own = run.cost
    if not run.windows:
        return [
            f"One step after the other: {own.steps} network calls, each waiting for the one before, in {own.seconds:.3g} s."
        ]
    fewer = own.steps / max(own.rounds, 1)
    told = [
        f"{own.rounds} rounds of network calls, one after the other, where the sequential scheme makes {own.steps}: "
        + (f"{fewer:.3g} times fewer." if fewer > 1 else "no fewer." if fewer == 1 else "more, not fewer.")
        + f" A round evaluates many steps at once; in all {own.evaluations:.4g} evaluations for each sample, "
        f"{own.evaluations / own.steps:.3g} for each step (the sequential scheme: 1)."
    ]
    if run.sequential is None:
        told.append(f"It took {own.seconds:.3g} s. The sequential scheme was not run beside it: --compare does that.")
    else:
        ratio = run.sequential.time_ratio
        verdict = f"{ratio:.3g} times as fast." if ratio >= 1 else f"{ratio:.3g} times as fast, which is slower."
        told.append(
            f"It took {own.seconds:.3g} s, the sequential scheme on the same machine "
            f"{run.sequential.cost.seconds:.3g} s: {verdict}"
        )
        if ratio < 1:
            told.append("Where one batch of samples already keeps the processor busy, more rows in a call take more time.")
    return told


def certificate(run: Recorded) -> list[str]:
    """What is certain, or estimated, of the law of the samples."""
    if not run.converged:
        return ["The run was cut short: its samples are the newest predictions, and nothing is certain of their law."]
    if not run.windows:
        return ["Every step waited for the one before: the samples are the sequential scheme's own, with nothing to certify."]
    if run.acceptance is not None:
        return [
            "Exact: whatever the network, the samples follow the very law of the sequential scheme, up to the rounding of "
            "floating-point numbers. They are not those that the sequential scheme would draw from this seed, but no test, on "
            "however many of them, can tell the two samplers apart."
        ]
    return _bound(run.cost.certificate) + _distance(run)


def _bound(bound: Bound) -> list[str]:
    if bound.unbounded:
        return ["No bound: at an accepted state the network is not finite, so the distance from the sequential law is unknown."]
    size = "an unknown amount" if bound.rms is None else _far(bound.rms)
    if bound.kl is None:
        how = "measured" if bound.rigorous else "an estimate, not a bound"
        return [
            "The scheme has steps without noise, for which no divergence between laws is finite. Instead: the samples are "
            f"predicted to lie {size} (rms per number, in units of the data) from the sequential ones ({how})."
        ]
    error = "from one sample" if bound.standard_error is None else f"± {bound.standard_error:.2g}, over the samples of this run"
    told = (
        f"The law of the samples diverges from the sequential one's by at most {bound.kl:.3g} nats ({error}; Kullback-Leibler)"
    )
    if bound.tv is not None:
        told += (
            f", so at most {bound.tv:.3g} in total variation: whoever is shown one sample and must say which sampler drew it "
            f"is right at most {50 + 50 * bound.tv:.3g} times in a hundred, by whatever means (guessing: 50)"
        )
    sentences = [f"{told}."]
    if bound.tv is not None and bound.tv > 0.9:
        sentences.append("That is so loose a bound that it says almost nothing.")
    sentences.append(
        "The bound is rigorous: the deviation of every step was measured."
        if bound.rigorous
        else "The deviations of the steps are the stopping rule's estimates, not measured: the true bound may be larger. "
        "With --target-kl they are measured."
    )
    if bound.rms is None or bound.rms > 0:
        sentences.append(f"The last steps, which have no noise, move the samples by another {size} (rms) that it leaves out.")
    if bound.calls:
        extra = f"Measuring took {bound.calls} network calls more, {bound.evaluations:.4g} evaluations for each sample"
        sentences.append(f"{extra}, which the rounds above do not count.")
    return sentences


def _distance(run: Recorded) -> list[str]:
    """How far each sample is from the sequential one with the same noise: predicted, and as seen."""
    told = []
    known = [error for error in run.error if error is not None]
    if known:
        told.append(
            f"Each sample was predicted to end within {_far(max(known))} (rms) of the sequential one with the same noise."
        )
    seen = [] if run.sequential is None else [value for value in run.sequential.rms_difference if value is not None]
    if seen:
        told.append(f"Compared with it, the furthest is {_far(max(seen))} away, the nearest {_far(min(seen))}.")
    return told


def _far(rms: float) -> str:
    return f"{rms:.2g}" if rms > 0 else "no more than rounding"


def acceptance(run: Recorded) -> list[str]:
    """What became of the tests of an exact run."""
    if run.acceptance is None:
        return []
    accepted, rejected, recomputed = (run.acceptance[name] for name in ("accepted", "rejected", "recomputed"))
    count = len(accepted)
    tests = sum(accepted) + sum(rejected)
    share = f"{100 * sum(accepted) / tests:.3g} % of all tests" if tests else "there were no tests"
    return [
        f"Of {run.cost.steps} steps, {sum(accepted) / count:.4g} were drafts that passed their test ({share}), "
        f"{sum(rejected) / count:.4g} were rejected and moved, {sum(recomputed) / count:.4g} were taken without a test: means "
        f"over {count} {'sample' if count == 1 else 'samples'}."
    ]


def command(arguments: Mapping[str, Any]) -> str:
    """The command line that draws the same samples; every word quoted for a shell."""
    words = ["piadm", "sample"]
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            # a value that begins with a dash would be taken for an option
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]
    return shlex.join(words)
