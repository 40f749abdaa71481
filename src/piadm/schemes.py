r"""Sequential schemes as makers of tables: DDPM, DDIM and Euler.

A scheme is called with a schedule and returns its `Table`. In all of them $ε = (x - α f)/σ$.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from piadm.errors import require, require_count
from piadm.schedules import Schedule, Spacing, check_spacing
from piadm.tables import Table


class Scheme(Protocol):
    """Anything that turns a schedule into a table."""

    def __call__(self, schedule: Schedule) -> Table: ...


def _levels(schedule: Schedule, grid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    return alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]


def _table(schedule: Schedule, grid: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Table:
    """One component, from coefficients of shape `(M,)` on a grid of `M + 1` times."""
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    scale = schedule.start_scale(grid[0])
    return Table(a[:, None, None], b[:, None], c[:, None, None], grid[:-1], alpha, sigma, scale)


def _ancestral(schedule: Schedule, grid: Tensor, std: Tensor) -> Table:
    r"""$x' = α' f + \sqrt{σ'^2 - s^2}\, ε + s\, ξ$ for a given noise level $s$."""
    a0, s0, a1, s1 = _levels(schedule, grid)
    keep = (s1**2 - std**2).clamp(min=0).sqrt() / s0
    return _table(schedule, grid, keep, a1 - keep * a0, std)


def _posterior_std(schedule: Schedule, grid: Tensor) -> Tensor:
    r"""$s = \frac{σ'}{σ} \sqrt{σ^2 - (α σ'/α')^2 }$, the deviation of $x' | x, x_0$ under the forward process."""
    a0, s0, a1, s1 = _levels(schedule, grid)
    return s1 / s0 * (s0**2 - (a0 / a1 * s1) ** 2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class DDPM:
    r"""Ancestral sampling: $x'$ from the forward process's posterior given $x$ and $x_0 = f$, the "fixed small" variance.

    Arguments:
        steps: $M$.
        timestep_spacing: How discrete schedules spread the steps, in diffusers' words.

    References:
        Ho, Jain, Abbeel, 2020 (arXiv 2006.11239), eq. 6-7.
    """

    steps: int
    timestep_spacing: Spacing = "leading"

    def __post_init__(self) -> None:
        require_count("steps", self.steps, "DDPM(steps=1000)")
        check_spacing(self.timestep_spacing)

    def __call__(self, schedule: Schedule) -> Table:
        return DDIM(self.steps, 1.0, self.timestep_spacing)(schedule)


@dataclass(frozen=True)
class DDIM:
    r"""$x' = α' f + \sqrt{σ'^2 - s^2}\, ε + s\, ξ$, with $s$ = `eta` times the posterior's deviation.

    `eta=0` is the exponential integrator of the probability-flow ODE, `eta=1` is DDPM.

    Arguments:
        steps: $M$.
        eta: $η \in [0, 1]$.
        timestep_spacing: How discrete schedules spread the steps, in diffusers' words.

    References:
        Song, Meng, Ermon, 2021 (arXiv 2010.02502), eq. 12 and 16.
    """

    steps: int
    eta: float = 0.0
    timestep_spacing: Spacing = "leading"

    def __post_init__(self) -> None:
        require_count("steps", self.steps, "DDIM(steps=50)")
        check_spacing(self.timestep_spacing)
        number = isinstance(self.eta, int | float)
        require(number and 0 <= self.eta <= 1, "eta", self.eta, "give a number from 0 (deterministic) to 1 (DDPM)")

    def __call__(self, schedule: Schedule) -> Table:
        grid = schedule.grid(self.steps, self.timestep_spacing)
        return _ancestral(schedule, grid, self.eta * _posterior_std(schedule, grid))


@dataclass(frozen=True)
class Euler:
    r"""$x' = x + (t' - t) (\dot α f + \dot σ ε)$, Euler's method on the probability-flow ODE in the schedule's time.

    On `RectifiedFlow` this is flow matching's Euler step, on `VarianceExploding` that of Karras et al. (arXiv 2206.00364).

    Arguments:
        steps: $M$.
    """

    steps: int

    def __post_init__(self) -> None:
        require_count("steps", self.steps, "Euler(steps=50)")

    def __call__(self, schedule: Schedule) -> Table:
        grid = schedule.grid(self.steps)
        alpha, sigma, _, _ = _levels(schedule, grid)
        d_alpha, d_sigma = schedule.velocity(grid[:-1])
        width = grid[1:] - grid[:-1]
        a = 1 + width * d_sigma / sigma
        b = width * (d_alpha - d_sigma * alpha / sigma)
        return _table(schedule, grid, a, b, torch.zeros_like(a))
