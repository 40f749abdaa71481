r"""When to stop: an estimate of the final error, made of what each step's linear model got wrong.

A round leaves the defect $δ_m = (J^*_m - J_m) d_m$ in step $m$, where $J^*$ is the network's own Jacobian along the change $d_m$
the round made. The next round would show it; the last two evaluations already tell its size,

$$ ‖δ_m‖ ≈ ρ_m ‖d_m‖, \qquad ρ_m = ‖ΔΦ_m - J_m Δx_m‖ / ‖Δx_m‖ , $$

and a step evaluated once takes $ρ_m = ‖J_m - G_m‖ + ‖G_m - A_m‖$, which holds the Gaussian model $G$ of the step to be wrong
by as much as the network contributes. What a defect does to the final sample, the Gaussian model tells as well: it is
multiplied by $w_m = e_0^\top G_{M-1} ⋯ G_{m+1}$, which for ancestral sampling forgets early errors and for the probability
flow keeps them. So accepting step $m$ costs the final sample at most about $c_m = \sum_i |w_{m,i}| ρ_m ‖d_m‖$. Once accepted a cost
is spent; a step is accepted while

$$ \text{spent} + \sum_{j \le m} c_j \le \frac{τ}{\text{SAFETY}} \frac{m + 1}{M}. $$

This is the dual weighted residual of a posteriori error analysis, the dual problem being the Gaussian model's. It is an
estimate, calibrated by `benchmarks/promise.py`, not a bound.

References:
    Becker and Rannacher, "An optimal control approach to a posteriori error estimation", Acta Numerica 2001.
"""

from __future__ import annotations

import torch
from torch import Tensor

from piadm.propagators import Gaussian, Pair, Propagator
from piadm.tables import Rows, Table, mix

SAFETY = 1.0
"""How far the estimate is held below the tolerance."""


def sensitivity(table: Table, model: Gaussian) -> Tensor:
    """$w_m$, the final sample's response to $x_{m+1}$, rms over coordinates; float64, shape `(M, k)`."""
    rows = table.cast(torch.device("cpu"), torch.float64).take(torch.arange(len(table))[:, None])
    jacobian = model.jacobian(rows, None)[..., 0, :]  # (M, k, k, D|1)
    w = jacobian.new_zeros(len(table), table.components, jacobian.shape[-1])
    w[-1, 0] = 1.0
    for m in range(len(table) - 1, 0, -1):
        w[m - 1] = (w[m][:, None] * jacobian[m]).sum(0)
    return w.square().mean(-1).sqrt()


def misfit(rows: Rows, jacobian: Tensor, model: Gaussian, pair: Pair | None, step: Tensor) -> Tensor:
    r"""$ρ_m$ by component, shape `(W, k, S)`: the error of $J_m$ per rms unit of change.

    `step` is the change $Δx_m$ between the last two evaluated states, shape `(W, k, S, D)`.
    """
    gaussian = model.jacobian(rows, None)
    unseen = _rows_rms(jacobian - gaussian) + _rows_rms(gaussian - rows.A)
    if pair is None:
        return unseen.expand(*unseen.shape[:2], step.shape[2])
    length = step.square().mean((1, 3), keepdim=True).sqrt()
    known = pair.seen[:, None] & (length[..., 0] > 0)
    wrong = rows.step(step, pair.df, None) - mix(jacobian, step)
    return torch.where(known, (wrong.square().mean(3) / length[..., 0].square().clamp(min=1e-38)).sqrt(), unseen)


def _rows_rms(matrix: Tensor) -> Tensor:
    """Norm of each row of $k×k$ matrices `(W, k, k, S|1, D|1)`, rms over coordinates, shape `(W, k, S|1)`."""
    return matrix.square().sum(2).mean(-1).sqrt()
