r"""Calls of one shape: for networks that are compiled, or recorded, for the rows they are first given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from piadm.denoiser import DenoiserLike, each_tensor
from piadm.errors import require_count
from piadm.executors import Executor


class FixedBatch(Executor):
    """Calls the network with exactly `size` rows, always: slices a round, and fills up the last slice with copies of a row.

    The number of rows changes from round to round (samples slide apart, the last window narrows). `torch.compile` compiles
    anew for each, and a CUDA graph (`mode="reduce-overhead"`) is recorded for each; with this, once. What the copies cost is
    at most one call's rows a round. Calls of another size are what it is there to avoid, so where memory runs out it does not
    halve them, as samplers do elsewhere: give a smaller `size`.

    Arguments:
        denoiser: The denoiser, its network compiled or not.
        size: Rows per network call: batch × window, or a part of it that fits in memory.
    """

    def __init__(self, denoiser: DenoiserLike, size: int) -> None:
        require_count("size", size, "FixedBatch(denoiser, size=64)")
        super().__init__(denoiser)
        self.size = size

    def __repr__(self) -> str:
        return f"FixedBatch({self.denoiser!r}, size={self.size})"

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        rows = len(x)
        parts = [self._call(torch.arange(first, first + self.size), x, t, condition) for first in range(0, rows, self.size)]
        return torch.cat(parts)[:rows]

    def _call(self, index: Tensor, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        """The network on rows `index`, the last row in place of those that there are not."""
        rows = len(x)
        index = index.clamp(max=rows - 1)

        def pick(value: Tensor) -> Tensor:
            return value[index.to(value.device)] if len(value) == rows else value

        return self.denoiser(pick(x), pick(t), **each_tensor(pick, condition))
