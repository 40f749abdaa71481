"""The record of a run: what was asked, on what, and what came of it. A folder holds one run.

| file | content |
|---|---|
| `run.json` | arguments, versions, result, and each round's window and residuals |
| `samples.safetensors` | `samples`, the conditions they were drawn for, and `sequential` if the run was compared |
| `samples.png` | the samples, if they are images |
| `convergence.png` | residual against step and round, if the run had rounds |
| `film.safetensors` | how the first samples emerged, if the run was filmed: see `piadm.film` |
| `report.html` | all of it on a page, if that was asked for: see `piadm.report` |
| `finished.safetensors` | of a run that broke: `x`, the state each sample had reached, and `finished`, after how many steps |
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from piadm.errors import NonFiniteError
from piadm.pictures import draw_convergence, draw_samples, is_image
from piadm.result import Result

_BESIDES = ("samples.png", "convergence.png", "film.safetensors", "report.html", "finished.safetensors")
"""What a run may have beside its record."""


@dataclass(frozen=True, eq=False)
class Run:
    """What was asked.

    Attributes:
        arguments: All that reproduces the run, as JSON holds it.
        denoiser: The denoiser, in words.
        scheme: The sequential scheme, in words.
        condition: The tensors given to the network, one entry per sample.
        title: The run in a line.
    """

    arguments: Mapping[str, Any]
    denoiser: str
    scheme: str
    condition: Mapping[str, Any]
    title: str


def distance(result: Result, sequential: Result) -> Tensor:
    """rms difference of each sample from the sequential one, shape `(S,)`."""
    return (result.samples - sequential.samples).flatten(1).square().mean(1).sqrt()


def write_run(
    folder: Path, run: Run, result: Result, sequential: Result | None = None, film: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the run's files, each one whole or not at all, over those of an earlier run in that folder."""
    tensors = {"samples": result.samples, **run.condition}
    if sequential is not None:
        tensors["sequential"] = sequential.samples
    _save(folder / "samples.safetensors", tensors, run)
    with replacing(folder / "run.json") as path:
        path.write_text(_json(run, result, sequential), encoding="utf-8")
    _forget(folder, *_BESIDES)
    if film is not None:
        _save(folder / "film.safetensors", film, run)
    if is_image(result.samples.shape[1:]):
        with replacing(folder / "samples.png") as path:
            draw_samples(path, result.samples)
    if result.windows:
        residuals = [r.tolist() for r in result.residuals]
        with replacing(folder / "convergence.png") as path:
            draw_convergence(path, result.steps, result.windows, residuals, run.title)


def forget_run(folder: Path) -> None:
    """Removes an earlier run's files, which would pass for those of the run that broke here."""
    _forget(folder, "run.json", "samples.safetensors", *_BESIDES)


def write_finished(folder: Path, run: Run, error: NonFiniteError) -> Path:
    """Writes what a run had finished when the network returned NaN or infinity."""
    path = folder / "finished.safetensors"
    _save(path, {"x": error.x, "finished": error.finished, **run.condition}, run)
    return path


def _forget(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _json(run: Run, result: Result, sequential: Result | None) -> str:
    samples = result.samples
    record: dict[str, Any] = {
        "arguments": dict(run.arguments),
        "title": run.title,
        "denoiser": run.denoiser,
        "scheme": run.scheme,
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"piadm": version("piadm"), "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"device": str(samples.device), "platform": platform.platform(), "threads": torch.get_num_threads()},
        "result": {
            "shape": list(samples.shape),
            "dtype": str(samples.dtype).removeprefix("torch."),
            **_figures(result),
            "converged": result.converged,
            "error": _rounded(result.error.tolist()),
            "acceptance": _acceptance(result),
            "choice": _choice(result),
        },
        "sequential": None,
    }
    if sequential is not None:
        record["sequential"] = {
            **_figures(sequential),
            "time_ratio": _rounded(sequential.seconds / result.seconds),
            "rms_difference": _rounded(distance(result, sequential).tolist()),
        }
    rounds = (
        json.dumps({"window": window, "residuals": [_rounded(r) if r >= 0 else None for r in residuals.tolist()]})
        for window, residuals in zip(result.windows, result.residuals, strict=True)
    )
    # a line for each round: indented, every residual would take one
    body = json.dumps(record, indent=2, allow_nan=False).removesuffix("\n}")
    return body + ',\n  "rounds": [\n    ' + ",\n    ".join(rounds) + "\n  ]\n}\n"


def _acceptance(result: Result) -> dict[str, list[int]] | None:
    counts = result.acceptance
    return None if counts is None else {name: value.tolist() for name, value in vars(counts).items()}


def _choice(result: Result) -> dict[str, float] | None:
    choice = result.choice
    return None if choice is None else {name: _rounded(value) for name, value in vars(choice).items()}


def _figures(result: Result) -> dict[str, Any]:
    certificate = result.certificate
    return {
        "steps": result.steps,
        "rounds": result.rounds,
        "evaluations": _rounded(result.evaluations),
        "certificate": {
            "kl": _rounded(certificate.kl),
            "standard_error": _rounded(certificate.standard_error),
            "tv": _rounded(certificate.tv),
            "rms": _rounded(certificate.rms),
            "rigorous": certificate.rigorous,
            "unbounded": certificate.kl == math.inf,
            "calls": certificate.calls,
            "evaluations": _rounded(certificate.evaluations),
        },
        "seconds": _rounded(result.seconds),
        "network_seconds": _rounded(result.network_seconds),
    }


def _rounded(value: Any) -> Any:
    """To 4 significant digits; `None` and what JSON cannot hold become `None`."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def _save(path: Path, tensors: Mapping[str, Tensor], run: Run) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        part.write_bytes(save(whole, metadata={"arguments": json.dumps(run.arguments)}))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once all is written."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
