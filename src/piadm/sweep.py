r"""The forward substitution of a round, $x^{new}_{m+1} = Φ_m(x_m) + J_m (x^{new}_m - x_m)$, over the window.

The change $d_m = x^{new}_m - x_m$ obeys $d_{m+1} = r_m + J_m d_m$ with the defect $r_m = Φ_m(x_m) - x_{m+1}$ and
$d_0 = 0$. A loop over the steps has the least memory traffic, and up to some tens of steps the fewest operator calls; beyond
them, and where states are small, it is run at once in $\sqrt W$ stretches of $\sqrt W$ steps, and once more from stretch to
stretch. That multiplies neighbouring $J$ and never divides by a product of them, so products that vanish lose nothing. Both end
with $x^{new}_{m+1} = Φ_m(x_m) + J_m d_m$, so where $d_m = 0$ the step is $Φ_m$ to the last bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from piadm.tables import mix

LOOP_FROM = 4096
"""Numbers per state from which the loop always wins (measured on a 2-core CPU at windows 16 to 256)."""

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
    """$d_1 … d_W$ with $d_{m+1} = r_m + J_m d_m$, $d_0 = 0$.

    Arguments:
        jacobian: $J_1 …$, shape `(W - 1, k, k, S|1, D|1)`.
        defect: $r_0 …$, shape `(W, k, S, D)`; it may be overwritten.
    """
    count = len(defect)
    if count <= LOOP_TO or defect[0].numel() >= LOOP_FROM:
        _loop(jacobian, defect)
        return defect
    length = math.isqrt(count - 1)
    whole = (count - 1) // length * length
    within = jacobian[:whole].reshape(-1, length, *jacobian.shape[1:])
    changes = defect[:whole].view(-1, length, *defect.shape[1:])
    # every stretch as if nothing came in from the one before
    _loop(within.transpose(0, 1), changes.transpose(0, 1))
    # what comes out of each, then with what came in: it may be 0, and meet a product that overflows
    products = _products(within).nan_to_num()
    out = mix(within[:, -1], changes[:, -1])
    _loop(products[1:, -1], out)
    changes[1:, 0] += out[:-1]
    changes[1:, 1:] += mix(products[1:, :-1], out[:-1, None])
    defect[whole] += out[-1]
    _loop(jacobian[whole:], defect[whole:])
    return defect


def _loop(jacobian: Tensor, steps: Tensor) -> None:
    """Step after step and in place, on `(W, …, k, S, D)`, each $J$ of shape `(…, k, k, S|1, D|1)` leading to the next step."""
    numbers, each = jacobian.shape[-4] == 1, steps.unbind()
    for J, before, after in zip((jacobian.squeeze(-4) if numbers else jacobian).unbind(), each, each[1:], strict=False):
        if numbers:
            after.addcmul_(J, before)
        else:
            after += mix(J, before)


def _plus(values: Tensor, matrix: Tensor, vector: Tensor) -> Tensor:
    """`values` plus $k×k$ matrices `(W, k, k, S|1, D|1)` times `vector`, both `(W, k, S, D)`."""
    if vector.shape[-3] == 1:
        return torch.addcmul(values, matrix[:, 0], vector)
    return values + mix(matrix, vector)


def _products(matrix: Tensor) -> Tensor:
    """Of each of the $k×k$ matrices `(n, b, k, k, S|1, D|1)` with those before it along `b`."""
    if matrix.shape[2] == 1:
        return matrix.cumprod(1)
    found = [matrix[:, 0]]
    for later in matrix[:, 1:].unbind(1):
        found.append((later.unsqueeze(3) * found[-1].unsqueeze(1)).sum(2))
    return torch.stack(found, 1)
