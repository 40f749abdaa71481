r"""SRDS: parareal over blocks, pipelined.

The $M$ steps are cut into $n = ⌈\sqrt M⌉$ blocks. With $F$ a block's own steps one after the other and $G$ one long step over
it, the block ends follow $x^p_{i+1} = F(x^{p-1}_i) + G(x^p_i) - G(x^{p-1}_i)$, from $x^0_{i+1} = G(x^0_i)$. After $p$
iterations the first $p$ blocks are exact. The run ends when $x^p_n$ differs from $x^{p-1}_n$ by at most $τ$ in the mean
absolute value, for every sample.

Pipelined: each solve starts as soon as its input exists, and a round evaluates every solve then under way. $F$ and $G$ from
one state share its first network call, so iteration $p$ ends in round $n - p + p ⌈M/n⌉$ when blocks are equally long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.common import Leap, Peer, Run
from piadm.denoiser import DenoiserLike
from piadm.errors import require, require_count, require_positive
from piadm.schemes import Scheme


@dataclass
class Solve:
    """A fine solve under way: block `i` of iteration `p`, at step `m`."""

    i: int
    p: int
    m: int
    x: Tensor


class SRDS(Peer):
    """SRDS, pipelined (module docstring).

    Arguments:
        denoiser: The denoiser.
        scheme: The steps of an ODE.
        tolerance: $τ$, the mean absolute change of the final sample between iterations.
        blocks: $n$; the root of the steps by default.

    Raises:
        ValueError: for a scheme that draws noise.

    References:
        Selvam, Merchant, Ermon, "Self-Refining Diffusion Samplers", NeurIPS 2024 (arXiv 2412.08292).
    """

    def __init__(self, denoiser: DenoiserLike, scheme: Scheme, *, tolerance: float = 1e-3, blocks: int | None = None) -> None:
        super().__init__(denoiser, scheme)
        self.leap = Leap(self.table, scheme, denoiser, "SRDS")
        steps = len(self.table)
        blocks = math.ceil(math.sqrt(steps)) if blocks is None else blocks
        require_count("blocks", blocks, "blocks=10")
        require(blocks <= steps, "blocks", blocks, f"the scheme has {steps} steps; give at most that many")
        require_positive("tolerance", tolerance, "tolerance=1e-3")
        self.tolerance = tolerance
        self.edges = [round(steps * i / blocks) for i in range(blocks + 1)]

    def _solve(self, run: Run, x: Tensor) -> tuple[Tensor, bool]:
        last = len(self.edges) - 1
        starts: dict[tuple[int, int], Tensor] = {(0, 0): x}  # $x^p_i$
        coarse: dict[tuple[int, int], Tensor] = {}  # $G(x^p_i)$
        fine: dict[tuple[int, int], Tensor] = {}  # $F(x^p_i)$
        active, checked = [Solve(0, 0, 0, x)], 0
        while True:
            f = run.evaluate(torch.stack([solve.x for solve in active]), [solve.m for solve in active])
            going = []
            for solve, out in zip(active, f, strict=True):
                at = (solve.i, solve.p)
                if solve.m == self.edges[solve.i]:
                    coarse[at] = self.leap(solve.x, out, self.edges[solve.i], self.edges[solve.i + 1])
                solve.x = run.step(solve.x[None], out[None], solve.m, solve.m + 1)[0]
                solve.m += 1
                if solve.m == self.edges[solve.i + 1]:
                    fine[at] = solve.x
                else:
                    going.append(solve)
            active = going + [Solve(i, p, self.edges[i], starts[i, p]) for i, p in self._ready(starts, coarse, fine)]
            while (last, checked + 1) in starts:
                checked += 1
                change = (starts[last, checked] - starts[last, checked - 1]).abs().mean(-1)
                run.residuals.append(change)
                if checked == last or bool((change <= self.tolerance).all()):
                    return starts[last, checked], True
            if last == 1 and (0, 0) in fine:  # one block: its fine solve is the sequential run
                return fine[0, 0], True

    def _ready(
        self,
        starts: dict[tuple[int, int], Tensor],
        coarse: dict[tuple[int, int], Tensor],
        fine: dict[tuple[int, int], Tensor],
    ) -> list[tuple[int, int]]:
        """Adds every $x^p_i$ that can now be formed; returns those from which a solve must start."""
        found, last = [], len(self.edges) - 1
        for i in range(1, last + 1):
            for p in range(i + 1):
                if (i, p) in starts:
                    continue
                if p == 0:
                    value = coarse.get((i - 1, 0))
                elif (i - 1, p - 1) not in fine:
                    break
                elif p == i:  # the block's start is exact: G(x^p) and G(x^{p-1}) are the same
                    value = fine[i - 1, i - 1]
                else:
                    now = coarse.get((i - 1, p))
                    value = None if now is None else fine[i - 1, p - 1] + now - coarse[i - 1, p - 1]
                if value is None:
                    break
                starts[i, p] = value
                if i < last:
                    found.append((i, p))
        return found
