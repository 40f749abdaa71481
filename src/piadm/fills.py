r"""Fills: what a state holds before the network has seen it.

A fill is an affine model of a step, $x_{m+1} = J_m x_m + c_m$, run forward from the window's last known state.

| fill | model | known as |
|---|---|---|
| `Copy` | $x_{m+1} = x_m$ | ParaDiGMS; PIADM as published |
| `Jump` | the known noise, and $f$ of the Gaussian model, later the newest $f$ of the window's end | ours, ParaSolver's jump |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from piadm.propagators import Gaussian
from piadm.tables import Rows, mix


class Fill(Protocol):
    """A policy with one method."""

    def model(self, rows: Rows, noise: Tensor | None, newest: Tensor | None) -> tuple[Tensor, Tensor]:
        """$J$, `(W, k, k, S|1, D|1)`, and $c$, `(W, k, S, D)` or broadcastable; `newest`: last $f$ of the window, `(S, D)`."""


@dataclass(frozen=True)
class Copy:
    r"""Every unvisited state is a copy of the newest known one, in units of $\sqrt{α^2 + σ^2}$: where that is not 1 throughout,
    the network's scaling of the states changes along the way and the paper's does not.
    """

    def model(self, rows: Rows, noise: Tensor | None, newest: Tensor | None) -> tuple[Tensor, Tensor]:
        jacobian = torch.zeros_like(rows.A)
        jacobian[:, 0, 0] = rows.growth
        for velocity in range(1, rows.A.shape[1]):
            jacobian[:, velocity, velocity] = 1
        return jacobian, torch.zeros_like(rows.B)


@dataclass(frozen=True, eq=False)
class Jump:
    r"""$f = μ + L (x - α μ)$ with the Gaussian gain $L$ at first; later $f$ is held at its newest value (ParaSolver's jump).

    Arguments:
        mean: $μ$, a number or a tensor of one sample's shape.
        variance: $v$, likewise.
    """

    mean: float | Tensor = 0.0
    variance: float | Tensor = 1.0

    def model(self, rows: Rows, noise: Tensor | None, newest: Tensor | None) -> tuple[Tensor, Tensor]:
        if newest is None:
            gain = Gaussian(self.variance).gain(rows)
            mean = torch.as_tensor(self.mean, device=gain.device, dtype=gain.dtype).reshape(1, 1, -1)
            jacobian, f = rows.jacobian(gain), mean * (1 - gain * rows.alpha)
        else:
            jacobian, f = rows.A, newest[None]
        offset = rows.B * f.unsqueeze(1)
        return jacobian, offset if rows.C is None or noise is None else offset + mix(rows.C, noise)
