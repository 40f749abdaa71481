"""Pictures of a run: its samples, and how they converged. matplotlib's objects only, no global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from torch import Tensor

SIDE = 112
"""Least pixels along an image's shorter side: smaller ones are magnified by a whole number, so pixels stay sharp."""


def is_image(event: Sequence[int]) -> bool:
    """Whether samples of this shape can be drawn: `(1 | 3, H, W)`."""
    return len(event) == 3 and event[0] in (1, 3)


def draw_samples(path: Path, samples: Tensor) -> None:
    """A near-square grid of images with values in [-1, 1], shape `(S, 1 | 3, H, W)`, in reading order."""
    images = ((samples.detach().cpu().float().nan_to_num().clamp(-1, 1) + 1) * 127.5).round().byte()
    scale = max(1, math.ceil(SIDE / min(images.shape[2:])))
    images = images.expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    count, _, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    gap = 4
    canvas = np.full((math.ceil(count / columns) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for n, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = gap + n // columns * (height + gap), gap + n % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    imsave(path, canvas, format="png")


def draw_convergence(path: Path, steps: int, windows: Sequence[tuple[int, int]], residuals: Sequence[Any], title: str) -> None:
    """Residual in colour against step and round, and the steps finished before each round as a line.

    Arguments:
        path: The PNG to write.
        steps: Steps of the scheme.
        windows: First step and one past the last of each round.
        residuals: Defects of each round's steps from its first on, as numbers; below 0, NaN or `None` where there is none.
        title: What was run.
    """
    rounds = len(windows)
    heat = np.full((rounds, steps), np.nan)
    for row, (start, _), values in zip(heat, windows, residuals, strict=True):
        defects = np.asarray(values, dtype=float)[: steps - start]
        row[start : start + len(defects)] = np.where(defects >= 0, defects, np.nan)
    positive = heat[np.isfinite(heat) & (heat > 0)]
    high = float(positive.max()) if positive.size else 1.0
    # eight decades are all that float32 resolves; a defect of 0 takes the lowest colour
    low = min(max(float(positive.min()), high * 1e-8), high / 10) if positive.size else 0.1
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.93")
    picture = axes.imshow(
        np.ma.masked_invalid(heat.clip(low, high)),
        norm=LogNorm(low, high),
        cmap="viridis",
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(0, steps, 0.5, rounds + 0.5),
    )
    finished = [start for start, _ in windows]
    edges = np.arange(rounds + 1) + 0.5
    line = np.repeat([*finished, steps], 2)[:-1], np.repeat(edges, 2)[1:]
    axes.plot(*line, color="white", linewidth=3.4)
    axes.plot(*line, color="crimson", linewidth=1.8, label="finished steps")
    axes.set(xlim=(0, steps), ylim=(0.5, rounds + 0.5), xlabel="step (0 is pure noise)", ylabel="round", title=title)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right" if finished[-1] > 0 else "upper left", framealpha=0.95)
    figure.colorbar(picture, ax=axes, label="residual (rms defect)", pad=0.02)
    figure.savefig(path, format="png")
