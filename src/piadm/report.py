"""The report of a run: one HTML file that needs nothing but itself.

It opens without a network, may load nothing (its content security policy says so), and is a function of the run's folder:
the same folder gives the same page to the byte. Whatever comes from the record is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from piadm import words
from piadm.models import LABELS
from piadm.pictures import PAGE, address, convergence, emerging, inline_svg, is_image, pixels, png, values
from piadm.record import replacing
from piadm.recorded import Cost, Recorded, read_run

IMAGES = 64
"""Samples shown as images, at most."""
TABLE = (8, 8)
"""Samples, and numbers of each, shown in a table, at most."""
STRIP = 8
"""Rounds side by side in a strip."""


def write_report(folder: Path) -> Path:
    """Writes `report.html` from the run in `folder`, and returns its path.

    Raises:
        ValueError: if the folder holds no run, or one that is damaged.
    """
    page = render(read_run(folder))
    with replacing(folder / "report.html") as path:
        path.write_text(page, encoding="utf-8")
    return folder / "report.html"


def render(run: Recorded) -> str:
    """The page of a run."""
    images = is_image(run.samples.shape[1:])
    flat = run.samples.flatten(1)
    filmed = None if run.film is None else (_film(run, run.film) if images else None)
    drawn: dict[str, Any] = {"convergence": None, "emerging": None, "values": None}
    if run.windows:
        drawn["convergence"] = _svg("convergence", lambda: convergence(run.cost.steps, run.windows, run.residuals, PAGE))
    if not images:
        drawn["values"] = _svg("values", lambda: values(flat))
        if run.film is not None:
            film = run.film
            drawn["emerging"] = _svg("emerging", lambda: emerging(film["rounds"], film["ahead"]))
    return page(
        "report.html",
        run.title,
        script="" if filmed is None else (files("piadm") / "templates" / "player.js").read_text(encoding="utf-8"),
        run=run,
        cost=words.cost(run),
        certificate=words.certificate(run),
        acceptance=words.acceptance(run),
        figures=_figures(run),
        tests=zip(*run.acceptance.values(), strict=True) if run.acceptance else (),
        images=_images(run) if images else [],
        table=[] if images else _table(run, flat),
        shown=_shown(run, images),
        film=filmed,
        command=words.command(run.arguments),
        facts=_facts(run),
        **drawn,
    )


Value = str | int | float | None


def render_tables(
    title: str, about: Mapping[str, Value], tables: Mapping[str, Sequence[Mapping[str, Value]]], picture: bytes | None
) -> str:
    """A page of tables, each a list of rows that share their columns, with a PNG above them: what benchmarks report."""

    def text(value: Value) -> str:
        return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    def table(rows: Sequence[Mapping[str, Value]]) -> dict[str, Any]:
        numbers = [any(isinstance(row[name], int | float) for row in rows) for name in rows[0]]
        return {
            "columns": list(zip(rows[0], numbers, strict=True)),
            "cells": [[text(row[name]) for name in rows[0]] for row in rows],
        }

    return page(
        "tables.html",
        title,
        about=about,
        tables={name: table(rows) for name, rows in tables.items() if rows},
        picture=None if picture is None else address(picture),
    )


def page(template: str, title: str, script: str = "", **content: Any) -> str:
    """A page from a template of this package; of scripts only `script` may run in it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("piadm", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    allowed = Markup(f"'sha256-{digest}'") if script else Markup("'none'")
    return environment.get_template(template).render(title=title, script=Markup(script), script_hash=allowed, **content)


def _svg(name: str, draw: Callable[[], Figure]) -> Markup:
    return Markup(inline_svg(draw, name))


def _figures(run: Recorded) -> list[tuple[str, list[str]]]:
    """The table of costs: a name, and the run's value beside the sequential scheme's."""
    own, other = run.cost, None if run.sequential is None else run.sequential.cost
    steps, unknown = run.cost.steps, "not run"
    beside = [f"{steps}", f"{steps}"] + ([unknown] * 2 if other is None else _times(other))
    names = ("rounds", "evaluations per sample", "wall time", "of it in the network")
    mine = [f"{own.rounds}", f"{own.evaluations:.4g}", *_times(own)]
    return [(name, [a, b] if run.windows else [a]) for name, a, b in zip(names, mine, beside, strict=True)]


def _times(cost: Cost) -> list[str]:
    return [f"{cost.seconds:.4g} s", f"{cost.network_seconds:.4g} s"]


def _captions(run: Recorded, count: int) -> list[str]:
    """The condition of each of the first samples, in words."""
    told = []
    for n in range(count):
        given = {name: tensor[n].item() for name, tensor in run.condition.items() if tensor.ndim == 1}
        parts = [f"{name} {value:g}" for name, value in given.items()]
        if run.arguments.get("model") == "fashion" and given.get("label") in range(len(LABELS)):
            parts.append(LABELS[int(given["label"])])
        told.append(", ".join(parts))
    return told


def _images(run: Recorded) -> list[dict[str, str]]:
    samples = run.samples[:IMAGES]
    return [
        {"source": address(png(image)), "caption": caption}
        for image, caption in zip(pixels(samples), _captions(run, len(samples)), strict=True)
    ]


def _table(run: Recorded, flat: Tensor) -> list[dict[str, Any]]:
    rows = flat[: TABLE[0], : TABLE[1]]
    return [
        {"numbers": [f"{value:.4g}" for value in row.tolist()], "caption": caption}
        for row, caption in zip(rows, _captions(run, len(rows)), strict=True)
    ]


def _shown(run: Recorded, images: bool) -> str:
    count, numbers = len(run.samples), run.samples[0].numel()
    if images:
        return f"The first {IMAGES} of {count}." if count > IMAGES else "All of them."
    return (
        f"The table: the first {min(numbers, TABLE[1])} of {numbers} numbers of the first {min(count, TABLE[0])} of {count} "
        "samples."
    )


def _film(run: Recorded, film: Mapping[str, Tensor]) -> dict[str, Any]:
    """All frames as one image, a row for each, with prediction and finished state of each sample side by side."""
    pair = np.stack([pixels(film["ahead"]), pixels(film["finished"])], axis=2)
    frames, samples, _, height, width, _ = pair.shape
    sprite = pair.transpose(0, 3, 1, 2, 4, 5).reshape(frames * height, samples * 2 * width, 3)
    told = [_moment(run, round) for round in film["rounds"].tolist()]
    return {
        "sprite": address(png(sprite)),
        "rows": frames,
        "columns": 2 * samples,
        "samples": samples,
        "width": width,
        "height": height,
        "heads": [head for head, _ in told],
        "captions": [caption for _, caption in told],
        "strip": sorted({round(row) for row in np.linspace(0, frames - 1, STRIP).tolist()}),
    }


def _moment(run: Recorded, number: int) -> tuple[str, str]:
    """A round in words: short, and whole."""
    if number > run.cost.rounds:
        return "end", f"The end, after {run.cost.rounds} rounds: the samples."
    if number > len(run.windows):  # one step a round
        return f"step {number}", f"Step {number} of {run.cost.steps}."
    start, stop = run.windows[number - 1]
    window = f"steps {start + 1} to {stop} of {run.cost.steps} in the window"
    return f"round {number}", f"Round {number} of {run.cost.rounds}: {window}."


def _facts(run: Recorded) -> list[tuple[str, str]]:
    shape = " × ".join(str(size) for size in run.samples.shape)
    facts = [("denoiser", run.denoiser), ("scheme", run.scheme), ("samples", f"{shape}, {run.dtype}")]
    facts += [("drawn", run.finished_at), *((name, str(value)) for name, value in run.versions.items())]
    return facts + [(name, str(value)) for name, value in run.machine.items()]
