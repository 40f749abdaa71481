r"""CHORDS: cores that start at different steps, the slower rectifying the faster.

Core $k$ starts at step $i_k$ ($0 = i_1 < i_2 < …$) from a state reached by long steps along $i_1, i_2, …$, one round after its
neighbour, and takes the scheme's steps. Let $b$ be the step at which it started or was last rectified and $x_b, f_b$ its state
and prediction there. When its slower neighbour evaluates step $b$ while core $k$ evaluates step $m$, core $k$ moves to

$$ x_{m+1} = Φ_m(x_m) + G_{b→m+1}(x^{slower}_b) - G_{b→m+1}(x_b), $$

with $G$ one long step, and $b$ becomes $m + 1$. Core $k$ reaches the end in round $k - 1 + M - i_k$, the fastest first; core 1
is the sequential run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import Leap, Peer, Run, rms
from piadm.denoiser import DenoiserLike
from piadm.errors import require, require_count, require_positive
from piadm.samplers import Result
from piadm.schemes import Scheme

STARTS = {4: (0, 8, 16, 32), 6: (0, 3, 6, 12, 24, 36), 8: (0, 2, 4, 8, 16, 24, 32, 40)}
"""Starting steps of 50, by number of cores; scaled to other numbers of steps."""


@dataclass(frozen=True, eq=False, repr=False)
class CHORDSResult(Result):
    """A result that says which output it is.

    Attributes:
        core: The core whose output is returned, counted from 1, the fastest to finish.
        cores: How many there are; core `cores` is the sequential run.
    """

    core: int
    cores: int


@dataclass
class Core:
    """One core: it is at step `m` in `x`; since `base` its states were not rectified."""

    m: int
    x: Tensor
    base: int
    x_base: Tensor
    f_base: Tensor | None = None


class CHORDS(Peer):
    """CHORDS (module docstring).

    Arguments:
        denoiser: The denoiser.
        scheme: The steps of an ODE.
        cores: How many cores, which is rows a round; 4, 6 or 8 unless `starts` is given.
        starts: $i_1, i_2, …$; the published ones for 50 steps, scaled, by default.
        core: Which output to return, 1 being the first to arrive.
        tolerance: If given, the first output whose rms distance from the one before (the first of all: from one long step out
            of the fastest core's start) is at most this is returned instead.

    Raises:
        ValueError: for a scheme that draws noise, or starts that do not rise from 0.

    References:
        Han et al., "CHORDS: Diffusion Sampling Accelerator with Multi-core Hierarchical ODE Solvers", ICCV 2025
        (arXiv 2507.15260).
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scheme: Scheme,
        *,
        cores: int = 8,
        starts: Sequence[int] | None = None,
        core: int = 1,
        tolerance: float | None = None,
    ) -> None:
        super().__init__(denoiser, scheme)
        self.leap = Leap(self.table, scheme, denoiser, "CHORDS")
        steps = len(self.table)
        if starts is None:
            require(cores in STARTS, "cores", cores, f"give {', '.join(map(str, STARTS))}, or the starting steps, `starts`")
            starts = sorted({i * steps // 50 for i in STARTS[cores]})
        self.starts = tuple(starts)
        rising = all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False))
        fits = len(self.starts) > 0 and self.starts[0] == 0 and self.starts[-1] < steps
        require(rising and fits, "starts", self.starts, f"must rise from 0 and stay below the scheme's {steps} steps")
        require_count("core", core, "core=1")
        require(core <= len(self.starts), "core", core, f"there are {len(self.starts)} cores")
        if tolerance is not None:
            require_positive("tolerance", tolerance, "tolerance=1e-2")
        self.core, self.tolerance = core, tolerance

    def _solve(self, run: Run, x: Tensor) -> tuple[Tensor, bool]:
        cores, outputs = [Core(0, x, 0, x)], []
        guess: Tensor | None = None
        while True:
            busy = [core for core in cores if core.m < run.steps]
            f = run.evaluate(torch.stack([core.x for core in busy]), [core.m for core in busy])
            slower: tuple[int, Tensor, Tensor] | None = None
            for core, out in zip(busy, f, strict=True):
                here = (core.m, core.x, out)
                self._step(run, core, out, slower)
                slower = here
            m, x, out = here
            if len(cores) < len(self.starts):  # the newest core stands at its start: send out the next one
                ahead = self.starts[len(cores)]
                x = self.leap(x, out, m, ahead)
                cores.append(Core(ahead, x, ahead, x))
            elif guess is None:
                guess = self.leap(x, out, m, run.steps)
            while len(outputs) < len(cores) == len(self.starts) and cores[-1 - len(outputs)].m == run.steps:
                outputs.append(cores[-1 - len(outputs)].x)
                if self._done(run, outputs, guess):
                    self.returned = len(outputs)
                    return outputs[-1], True

    def _step(self, run: Run, core: Core, f: Tensor, slower: tuple[int, Tensor, Tensor] | None) -> None:
        if core.f_base is None:
            core.f_base = f
        m = core.m
        core.m, core.x = m + 1, run.step(core.x[None], f[None], m, m + 1)[0]
        if slower is not None and slower[0] == core.base:
            a, b = self.leap.coefficients(core.base, m + 1)
            core.x = core.x + a * (slower[1] - core.x_base) + b * (slower[2] - core.f_base)
            core.base, core.x_base, core.f_base = m + 1, core.x, None

    def _done(self, run: Run, outputs: list[Tensor], guess: Tensor | None) -> bool:
        before = outputs[-2] if len(outputs) > 1 else guess
        change = rms(outputs[-1] - before) if before is not None else outputs[-1].new_full((1,), torch.inf)
        run.residuals.append(change)
        if self.tolerance is None:
            return len(outputs) == self.core
        return len(outputs) == len(self.starts) or bool((change <= self.tolerance).all())

    def _finish(self, result: dict[str, Any]) -> Result:
        return CHORDSResult(**result, core=self.returned, cores=len(self.starts))
