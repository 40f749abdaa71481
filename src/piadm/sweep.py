r"""The forward substitution of a round, $x^{new}_{m+1} = Φ_m(x_m) + J_m (x^{new}_m - x_m)$, over the window.

The change $d_m = x^{new}_m - x_m$ obeys $d_{m+1} = r_m + J_m d_m$ with the defect $r_m = Φ_m(x_m) - x_{m+1}$ and
$d_0 = 0$. Large states are swept by a loop, whose memory traffic is least; small ones by a scan of $⌈\log_2 W⌉$ doublings,
whose number of operator calls is least. The scan multiplies neighbouring $J$ and never divides by a product of them, so
products that vanish lose nothing. Both end with $x^{new}_{m+1} = Φ_m(x_m) + J_m d_m$, so where $d_m = 0$ the step is $Φ_m$
to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from piadm.tables import mix

LOOP_FROM = 2048
"""Numbers per state from which the loop wins (measured on a 2-core CPU at windows 16 to 1000)."""


def sweep(phi: Tensor, jacobian: Tensor, x: Tensor) -> Tensor:
    """New states of a window.

    Arguments:
        phi: $Φ_m(x_m)$, shape `(W, k, S, D)`.
        jacobian: $J_m$, shape `(W, k, k, S|1, D|1)`.
        x: The window's states, exact one first, shape `(W + 1, k, S, D)`.
    """
    if len(phi) == 1:
        return torch.cat([x[:1], phi])
    if phi[0].numel() >= LOOP_FROM:
        out = torch.empty_like(x)
        out[0] = x[0]
        out[1] = phi[0]
        for m in range(1, len(phi)):
            torch.add(phi[m], mix(jacobian[m], out[m] - x[m]), out=out[m + 1])
        return out
    change = scan(jacobian[1:-1], phi[:-1] - x[1:-1])
    return torch.cat([x[:1], phi[:1], phi[1:] + mix(jacobian[1:], change)])


def scan(jacobian: Tensor, defect: Tensor) -> Tensor:
    """$d_1 … d_W$ with $d_{m+1} = r_m + J_m d_m$, $d_0 = 0$: `defect` is $r_0 …$, `jacobian` is $J_1 …$, one fewer.

    Hillis and Steele, "Data parallel algorithms", 1986.
    """
    count, stride = len(defect), 1
    change, carry = defect, jacobian
    while stride < count:
        # change[m] holds the last `stride` defects up to m; carry[m] the product that leads from m's past to m + stride
        change = torch.cat([change[:stride], change[stride:] + mix(carry, change[:-stride])])
        if 2 * stride < count:
            # a product that overflows must stay finite: it may meet a change of zero
            carry = _compose(carry[stride:], carry[:-stride]).nan_to_num()
        stride *= 2
    return change


def _compose(later: Tensor, earlier: Tensor) -> Tensor:
    """Products of $k×k$ matrices of shape `(W, k, k, S|1, D|1)`."""
    if later.shape[1] == 1:
        return later * earlier
    return (later.unsqueeze(3) * earlier.unsqueeze(1)).sum(2)
