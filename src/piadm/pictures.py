"""Pictures of a run: its samples, and how they converged. matplotlib's objects only, no global state."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from torch import Tensor

SIDE = 112
"""Least pixels along an image's shorter side: smaller ones are magnified by a whole number, so pixels stay sharp."""
COLUMNS = 2000
"""Steps that a convergence map shows one by one; of more, several share a column."""
LINES = 8
"""Samples drawn as lines, at most."""
PAGE = (4.6, 3.4)
"""Inches of a figure on a page: small, so that its text can still be read where the page is narrow."""
_INK, _PAPER = "#010203", "#fdfcfb"  # what a page's own colours take the place of


def is_image(event: Sequence[int]) -> bool:
    """Whether samples of this shape can be drawn: `(1 | 3, H, W)`."""
    return len(event) == 3 and event[0] in (1, 3)


def draw_samples(path: Path, samples: Tensor) -> None:
    """A near-square grid of images with values in [-1, 1], shape `(S, 1 | 3, H, W)`, in reading order."""
    scale = max(1, math.ceil(SIDE / min(samples.shape[2:])))
    images = pixels(samples).repeat(scale, 1).repeat(scale, 2)
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    gap = 4
    canvas = np.full((math.ceil(count / columns) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for n, image in enumerate(images):
        top, left = gap + n // columns * (height + gap), gap + n % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    imsave(path, canvas, format="png")


def draw_convergence(path: Path, steps: int, windows: Sequence[tuple[int, int]], residuals: Sequence[Any], title: str) -> None:
    """`convergence` as a PNG, under a title."""
    figure = convergence(steps, windows, residuals, (8, 4.6))
    # a title may hold a dollar sign, which would begin a formula
    figure.axes[0].set_title(title, parse_math=False)
    figure.savefig(path, format="png")


def heat_map(
    steps: int, windows: Sequence[tuple[int, int]], residuals: Sequence[Any], columns: int = COLUMNS
) -> tuple[np.ndarray[Any, Any], int, float, float]:
    """Residuals as colours show them; arguments as those of `convergence`.

    Returns:
        The residuals, shape `(rounds, columns)`, NaN where there is none; how many steps share a column; the ends of the scale.
    """
    rounds, each = len(windows), -(-steps // columns)  # of steps that share a column the largest defect shows
    heat = np.full((rounds, -(-steps // each)), np.nan)
    for row, (start, _), values in zip(heat, windows, residuals, strict=True):
        defects = np.asarray(values, dtype=float)[: steps - start]
        np.fmax.at(row, (start + np.arange(len(defects))) // each, np.where(defects >= 0, defects, np.nan))
    positive = heat[np.isfinite(heat) & (heat > 0)]
    high = float(positive.max()) if positive.size else 1.0
    # eight decades are all that float32 resolves; a defect of 0 takes the lowest colour
    low = min(max(float(positive.min()), high * 1e-8), high / 10) if positive.size else 0.1
    return heat, each, low, high


def heat_image(
    steps: int, windows: Sequence[tuple[int, int]], residuals: Sequence[Any], columns: int
) -> tuple[np.ndarray[Any, Any], float, float]:
    """`convergence` without axes, quick to draw: a pixel for each round and column, shape `(rounds, columns, 4)`, first round
    below, transparent where there is no residual; and the ends of its scale."""
    heat, _, low, high = heat_map(steps, windows, residuals, columns)
    coloured = colormaps["viridis"](LogNorm(low, high)(np.ma.masked_invalid(heat.clip(low, high))), bytes=True)
    coloured[np.isnan(heat)] = 0
    return coloured[::-1], low, high


def convergence(steps: int, windows: Sequence[tuple[int, int]], residuals: Sequence[Any], size: tuple[float, float]) -> Figure:
    """Residual in colour against step and round, and the steps finished before each round as a line.

    Arguments:
        steps: Steps of the scheme.
        windows: First step and one past the last of each round.
        residuals: Defects of each round's steps from its first on, as numbers; below 0, NaN or `None` where there is none.
        size: Width and height in inches.
    """
    rounds = len(windows)
    heat, each, low, high = heat_map(steps, windows, residuals)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor((0.5, 0.5, 0.5, 0.15))  # on white as on black
    picture = axes.imshow(
        np.ma.masked_invalid(heat.clip(low, high)),
        norm=LogNorm(low, high),
        cmap="viridis",
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(0, heat.shape[1] * each, 0.5, rounds + 0.5),
    )
    finished = [start for start, _ in windows]
    edges = np.arange(rounds + 1) + 0.5
    line = np.repeat([*finished, steps], 2)[:-1], np.repeat(edges, 2)[1:]
    axes.plot(*line, color="white", linewidth=3.4)
    axes.plot(*line, color="crimson", linewidth=1.8, label="finished steps")
    axes.set(xlim=(0, steps), ylim=(0.5, rounds + 0.5), xlabel="step (0 is pure noise)", ylabel="round")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(loc="lower right" if finished[-1] > 0 else "upper left", framealpha=0.95)
    figure.colorbar(picture, ax=axes, label="residual (rms defect)", pad=0.02)
    return figure


def values(samples: Tensor) -> Figure:
    """Samples that are no images, shape `(S, D)`: a histogram, points in the plane, or the first of them as lines."""
    figure = Figure(figsize=PAGE, layout="constrained")
    axes = figure.add_subplot()
    match samples.shape[1]:
        case 1:
            axes.hist(samples[:, 0].numpy(), bins=min(40, max(5, len(samples) // 4)))
            axes.set(xlabel="value", ylabel="samples")
        case 2:
            axes.scatter(samples[:, 0].numpy(), samples[:, 1].numpy(), s=14, alpha=0.9)
            axes.set(xlabel="first number", ylabel="second number")
        case numbers:
            for n, sample in enumerate(samples[:LINES]):
                axes.plot(np.arange(1, numbers + 1), sample.numpy(), linewidth=1.2, label=f"sample {n + 1}")
            axes.set(xlabel="number", ylabel="value")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend()
    return figure


def emerging(rounds: Tensor, ahead: Tensor) -> Figure:
    """Predictions of samples that are no images, shape `(F, n, D)`, against the round that made them, shape `(F,)`."""
    figure = Figure(figsize=PAGE, layout="constrained")
    axes = figure.add_subplot()
    styles = ("-", "--", ":")
    for n in range(ahead.shape[1]):
        for i, style in enumerate(styles[: ahead.shape[2]]):
            label = f"sample {n + 1}" if i == 0 else None
            axes.plot(rounds.numpy(), ahead[:, n, i].float().numpy(), style, color=f"C{n}", linewidth=1.5, label=label)
    axes.set(xlabel="round", ylabel="predicted value")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def png(image: np.ndarray[Any, Any]) -> bytes:
    """An image of bytes, shape `(H, W, 3 | 4)`, as a PNG file."""
    nothing: Any = {"Software": None}
    file = BytesIO()
    imsave(file, image, format="png", metadata=nothing)
    return file.getvalue()


def address(picture: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def pixels(images: Tensor) -> np.ndarray[Any, Any]:
    """Images with values in [-1, 1], shape `(…, 1 | 3, H, W)`, as bytes, shape `(…, H, W, 3)`."""
    values = ((images.detach().cpu().float().nan_to_num().clamp(-1, 1) + 1) * 127.5).round().byte()
    whole: np.ndarray[Any, Any] = values.expand(*values.shape[:-3], 3, -1, -1).movedim(-3, -1).numpy()
    return whole


def inline_svg(draw: Callable[[], Figure], name: str) -> str:
    """A figure as an `<svg>` element of a page, in the page's own colours and with ids that begin with `name`.

    matplotlib's settings are changed while it draws, and then put back.
    """
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10.5, "savefig.facecolor": "none"}
    settings |= {"axes.facecolor": "none", "legend.facecolor": _PAPER, "text.color": _INK}
    settings |= {f"{part}.color": _INK for part in ("xtick", "ytick")} | {
        f"axes.{part}color": _INK for part in ("edge", "label")
    }
    nothing: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    file = StringIO()
    with rc_context(settings):
        draw().savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", text)
    return text.replace(_INK, "currentColor").replace(_PAPER, "var(--card)")
