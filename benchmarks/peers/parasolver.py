r"""ParaSolver: ParaDiGMS's update, started from a few sequential steps and filled by jumps.

The first $n$ steps are taken one after the other. Every later state is then reached by the scheme's own steps, known noise
included, with the prediction of $x_0$ held at its newest value (no network call); so are the states that enter the window
later, from the prediction of the window's last state. Update, window and tolerance are ParaDiGMS's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.common import Run
from benchmarks.peers.paradigms import ParaDiGMS, jump
from piadm.denoiser import DenoiserLike
from piadm.errors import require_count
from piadm.schemes import Scheme


class ParaSolver(ParaDiGMS):
    """ParaSolver (module docstring), one step a subinterval as in all of its published settings.

    Arguments:
        denoiser: The denoiser.
        scheme: The steps.
        window: $w$; all steps by default.
        tolerance: $τ$, a change relative to the noise scale; 0.55 for DDPM and 0.05 for DDIM in the published settings.
        warmup: $n$, sequential steps at the start; 5 for DDPM and 1 for DDIM in the published settings.

    References:
        Lu, Zhu, Hou, "ParaSolver: A Hierarchical Parallel Integral Solver for Diffusion Models", ICLR 2025.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scheme: Scheme,
        *,
        window: int | None = None,
        tolerance: float = 0.1,
        warmup: int | None = None,
    ) -> None:
        super().__init__(denoiser, scheme, window=window, tolerance=tolerance)
        self.warmup = (5 if self.table.stochastic else 1) if warmup is None else warmup
        require_count("warmup", self.warmup, "warmup=5")

    def _start(self, run: Run, x: Tensor) -> tuple[int, Tensor]:
        warmup, states = min(self.warmup, run.steps), [x]
        for m in range(warmup):
            f = run.evaluate(states[-1][None], [m])
            states.append(run.step(states[-1][None], f, m, m + 1)[0])
        return warmup, torch.cat([torch.stack(states), jump(run, states[-1], f[0], warmup, run.steps)])

    def _enter(self, run: Run, x: Tensor, f: Tensor, first: int, last: int) -> Tensor:
        return jump(run, x, f, first, last)
