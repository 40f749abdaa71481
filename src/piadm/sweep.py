r"""The forward substitution of a round, $x^{new}_{m+1} = Φ_m(x_m) + J_m (x^{new}_m - x_m)$, over the window.

The change $d_m = x^{new}_m - x_m$ obeys $d_{m+1} = r_m + J_m d_m$ with the defect $r_m = Φ_m(x_m) - x_{m+1}$ and
$d_0 = 0$. A loop over the steps has the least memory traffic, and up to some tens of steps the fewest operator calls; beyond
them, and where states are small, a scan of $⌈\log_2 W⌉$ doublings has fewer. The scan multiplies neighbouring $J$ and never
divides by a product of them, so products that vanish lose nothing. Both end with $x^{new}_{m+1} = Φ_m(x_m) + J_m d_m$, so where
$d_m = 0$ the step is $Φ_m$ to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from piadm.tables import mix

LOOP_FROM = 2048
"""Numbers per state from which the loop always wins (measured on a 2-core CPU at windows 16 to 1000)."""

LOOP_TO = 64
"""Steps up to which it always does."""


def sweep(phi: Tensor, jacobian: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """New states of a window, `(W + 1, k, S, D)`, and by how much those between its steps changed, `(W - 1, k, S, D)`.

    Arguments:
        phi: $Φ_m(x_m)$, shape `(W, k, S, D)`.
        jacobian: $J_m$, shape `(W, k, k, S|1, D|1)`.
        x: The window's states, exact one first, shape `(W + 1, k, S, D)`.
    """
    change = carry(jacobian[1:-1], phi[:-1] - x[1:-1])
    return torch.cat([x[:1], phi[:1], _plus(phi[1:], jacobian[1:], change)]), change


def carry(jacobian: Tensor, defect: Tensor) -> Tensor:
    """$d_1 … d_W$ with $d_{m+1} = r_m + J_m d_m$, $d_0 = 0$; the scan is that of Hillis and Steele, 1986.

    Arguments:
        jacobian: $J_1 …$, shape `(W - 1, k, k, S|1, D|1)`.
        defect: $r_0 …$, shape `(W, k, S, D)`; it may be overwritten.
    """
    if len(defect) <= LOOP_TO or defect[0].numel() >= LOOP_FROM:
        numbers = jacobian.shape[1] == 1
        steps = defect.unbind()
        for J, before, after in zip((jacobian[:, 0] if numbers else jacobian).unbind(), steps, steps[1:], strict=False):
            if numbers:
                after.addcmul_(J, before)
            else:
                after += mix(J, before)
        return defect
    count, stride = len(defect), 1
    change, factor = defect, jacobian
    while stride < count:
        # change[m] holds the last `stride` defects up to m; factor[m] the product that leads from m's past to m + stride
        change = torch.cat([change[:stride], _plus(change[stride:], factor, change[:-stride])])
        if 2 * stride < count:
            # a product that overflows must stay finite: it may meet a change of zero
            factor = _compose(factor[stride:], factor[:-stride]).nan_to_num()
        stride *= 2
    return change


def _plus(values: Tensor, matrix: Tensor, vector: Tensor) -> Tensor:
    """`values` plus $k×k$ matrices `(W, k, k, S|1, D|1)` times `vector`, both `(W, k, S, D)`."""
    if vector.shape[-3] == 1:
        return torch.addcmul(values, matrix[:, 0], vector)
    return values + mix(matrix, vector)


def _compose(later: Tensor, earlier: Tensor) -> Tensor:
    """Products of $k×k$ matrices of shape `(W, k, k, S|1, D|1)`."""
    if later.shape[1] == 1:
        return later * earlier
    return (later.unsqueeze(3) * earlier.unsqueeze(1)).sum(2)
