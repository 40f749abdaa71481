r"""ParaTAA: equations of order $k$ and triangular Anderson acceleration.

*Equations.* In terms of what the network predicts, $g$ with $f = p x + q g$, a step is $x_{m+1} = a_m x_m + b_m g_m + c_m ξ_m$
with $a_m = A_m + p_m B_m$: ε where $α > 0$ ($p = 1/α$), else velocity ($p = 1/(α + σ)$). Substituting the last $k$ steps into
each other, but no further back than the window's start $i$, gives an equation whose residual is, with
$r_j = Φ_j(x_j) - x_{j+1}$,

$$ R_{m+1} = \sum_{j=\max(i, m-k+1)}^{m} a_{j+1} ⋯ a_m\, r_j . $$

*Update.* $x_{m+1} ← x_{m+1} + R_{m+1} - \sum_h γ_h (Δx^h + ΔR^h)_{m+1}$ with differences of the last iterates, and
$γ$ solving, for each state on its own, $(ΔR^\top ΔR + λ) γ = ΔR^\top R$ over the states up to that one: the correction is lower
triangular, so no state depends on later ones.

*Safeguard.* States up to the first unfinished one take $R$ alone; that one is then exact given those before, so each round
finishes at least one.

*Stopping.* Steps are finished up to the first with $\frac1d ‖r_m‖^2 > τ^2 g_m^2$ for any sample, $g_m$ the noise scale.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.peers.common import Peer, Run, noise_scale, rms
from piadm.denoiser import DenoiserLike
from piadm.errors import require_count, require_positive
from piadm.schemes import Scheme
from piadm.tables import Table


class ParaTAA(Peer):
    """ParaTAA (module docstring).

    Arguments:
        denoiser: The denoiser.
        scheme: The steps.
        window: $w$; all steps by default.
        tolerance: $τ$, a residual relative to the noise scale; 1e-3 in the published settings.
        order: $k$, at most the window.
        memory: Iterates that the acceleration uses, the current one included; 1 is plain fixed-point iteration.
        ridge: $λ$ per number of a state; the published 1e-3 on latents of 4,096 by default.

    References:
        Tang, Tang, Luo, Wang, Chang, "Accelerating Parallel Sampling of Diffusion Models", ICML 2024 (arXiv 2402.09970).
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scheme: Scheme,
        *,
        window: int | None = None,
        tolerance: float = 1e-3,
        order: int | None = None,
        memory: int = 2,
        ridge: float = 1e-3 / 4096,
    ) -> None:
        super().__init__(denoiser, scheme)
        self.window = len(self.table) if window is None else window
        require_count("window", self.window, "window=32")
        self.order = self.window if order is None else order
        require_count("order", self.order, "order=8")
        require_count("memory", memory, "memory=3")
        require_positive("tolerance", tolerance, "tolerance=1e-3")
        require_positive("ridge", ridge, "ridge=1e-7")
        self.tolerance, self.memory, self.ridge = tolerance, memory, ridge
        self.chain = chain(linear_part(self.table), self.order)

    def _solve(self, run: Run, x: Tensor) -> tuple[Tensor, bool]:
        wide = x.double()
        states = wide.expand(run.steps + 1, *x.shape).clone()
        limit = self.tolerance * noise_scale(self.table).to(wide)[:, None]
        links = self.chain.to(x.device)
        past: list[tuple[int, int, Tensor, Tensor]] = []  # first and last step, x and R there, oldest first
        begin, end = 0, min(self.window, run.steps)
        while begin < run.steps:
            old = states[begin:end]
            f = run.evaluate(old.to(x.dtype), range(begin, end))
            defect = run.step(old, f, begin, end) - states[begin + 1 : end + 1]
            size = rms(defect)
            run.residuals.append(size.amax(1))
            open_ = (size > limit[begin:end]).any(1).nonzero()
            first = int(open_[0]) if len(open_) else end - begin - 1
            residual = torch.einsum("mj,jsd->msd", links[begin:end, begin:end], defect)
            past = [*past, (begin, end, states[begin + 1 : end + 1].clone(), residual)][-self.memory :]
            states[begin + 1 : end + 1] += residual
            if len(past) > 1 and first + 1 < end - begin:
                states[begin + 2 + first : end + 1] -= self._accelerate(past, begin, end, first)
            begin = begin + 1 + first
            last = min(begin + self.window, run.steps)
            states[end + 1 : last + 1] = states[end]
            end = last
        return states[-1], True

    def _accelerate(self, past: list[tuple[int, int, Tensor, Tensor]], begin: int, end: int, first: int) -> Tensor:
        """$\\sum_h γ_h (Δx^h + ΔR^h)$ of the window's states after the first unfinished one."""
        residual = past[-1][3]
        d_x, d_r, known = [], [], []
        for (_, stop, x0, r0), (start, _, x1, r1) in pairwise(past):
            # steps of today's window that both iterates held: begin … stop - 1 (windows only move forward)
            held, offset = max(stop - begin, 0), begin - start
            zero = torch.zeros_like(residual)
            change_x, change_r = zero.clone(), zero
            if held:
                change_x[:held] = x1[offset : offset + held] - x0[len(x0) - held :]
                change_r[:held] = r1[offset : offset + held] - r0[len(r0) - held :]
            d_x.append(change_x)
            d_r.append(change_r)
            known.append(torch.arange(end - begin, device=residual.device) < held)
        dx, dr, has = torch.stack(d_x), torch.stack(d_r), torch.stack(known, 1)  # (h, W, S, D), (W, h)
        gram = torch.einsum("hmsd,gmsd->mshg", dr, dr).cumsum(0)
        right = torch.einsum("hmsd,msd->msh", dr, residual).cumsum(0)
        both = (has[:, :, None] & has[:, None, :])[:, None]
        ridge = self.ridge * residual.shape[-1] * torch.eye(len(dr), dtype=gram.dtype, device=gram.device)
        gram, right = gram * both + ridge, right * has[:, None]
        gamma = torch.linalg.solve(gram[first + 1 :], right[first + 1 :])
        return torch.einsum("msh,hmsd->msd", gamma, (dx + dr)[:, first + 1 :])


def linear_part(table: Table) -> Tensor:
    r"""$a_m = A_m + p_m B_m$, float64, shape `(M,)`."""
    alpha, sigma = table.alpha[: len(table)], table.sigma[: len(table)]
    p = 1 / alpha if bool((alpha > 0).all()) else 1 / (alpha + sigma)
    return table.A[:, 0, 0] + p * table.B[:, 0]


def chain(gain: Tensor, order: int) -> Tensor:
    r"""$P_{mj} = a_{j+1} ⋯ a_m$ for $m - k < j \le m$, else 0; `(M, M)` from `(M,)`."""
    out = torch.eye(len(gain), dtype=gain.dtype, device=gain.device)
    for m in range(1, len(gain)):
        low = max(0, m - order + 1)
        out[m, low:m] = gain[m] * out[m - 1, low:m]
    return out
