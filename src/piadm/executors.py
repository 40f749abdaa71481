r"""Executors: how a round's rows reach the network. An executor is a wrapper that is itself a denoiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from piadm.denoiser import DenoiserLike, Wrapper, each_tensor
from piadm.errors import require_count


class MicroBatch(Wrapper):
    """Evaluates a round in slices of at most `size` rows: less memory, the same sample.

    Arguments:
        denoiser: The denoiser.
        size: Rows per network call.
    """

    def __init__(self, denoiser: DenoiserLike, size: int) -> None:
        require_count("size", size, "MicroBatch(denoiser, size=64)")
        super().__init__(denoiser)
        self.size = size

    def __repr__(self) -> str:
        return f"MicroBatch({self.denoiser!r}, size={self.size})"

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        rows = len(x)
        if rows <= self.size:
            return self.denoiser(x, t, **condition)
        parts = (slice(first, first + self.size) for first in range(0, rows, self.size))
        return torch.cat([self.denoiser(x[part], t[part], **_cut(condition, part, rows)) for part in parts])


def _cut(condition: dict[str, Any], part: slice, rows: int) -> dict[str, Any]:
    """The conditions of some rows; what does not run along the rows is shared."""
    out: dict[str, Any] = each_tensor(lambda value: value[part] if len(value) == rows else value, condition)
    return out
