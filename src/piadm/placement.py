r"""Placement: where the steps of a window are in its tensors.

A window's tensors have one row for each *lane*: lane $i$ of sample $s$ holds step $\text{start}_s + i$ while that is below
$\text{stop}_s$. Samples slide apart, and then a lane holds another step in each; mostly they are together, when a lane's step
is one number and every choice of lanes a slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# what is known of steps and lanes, on the host
Numbers = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Placement:
    """Which steps the lanes of a window hold.

    Arguments:
        start: First step of each sample, shape `(S,)`, on the CPU.
        stop: One past the last one, likewise.
        count: $W$, how many lanes there are: at least the steps of the widest sample.
    """

    start: Tensor
    stop: Tensor
    count: int

    @classmethod
    def around(cls, start: Tensor, stop: Tensor) -> Placement:
        """With no more lanes than the widest sample needs."""
        return cls(start, stop, max(last - first for first, last in zip(start.tolist(), stop.tolist(), strict=True)))

    @cached_property
    def starts(self) -> list[int]:
        """`start` as numbers."""
        found: list[int] = self.start.tolist()
        return found

    @cached_property
    def stops(self) -> list[int]:
        """`stop` as numbers."""
        found: list[int] = self.stop.tolist()
        return found

    @cached_property
    def widths(self) -> list[int]:
        """How many steps each sample has."""
        return [stop - start for start, stop in zip(self.starts, self.stops, strict=True)]

    @cached_property
    def low(self) -> int:
        """The first step of all."""
        return min(self.starts)

    @cached_property
    def high(self) -> int:
        """One past the last step of all."""
        return max(self.stops)

    @cached_property
    def together(self) -> bool:
        """Whether every lane holds a step, the same one in all samples."""
        return same(self.starts) and same(self.stops) and self.high - self.low == self.count

    @cached_property
    def steps(self) -> Tensor:
        """The step of each lane, shape `(W, S)`, on the CPU; beyond `stop` it goes on counting."""
        return self.start + torch.arange(self.count)[:, None]

    @cached_property
    def valid(self) -> Tensor:
        """Which lanes hold a step of their sample, shape `(W, S)`, on the CPU."""
        return self.steps < self.stop

    def of_step(self, values: Numbers) -> Numbers:
        """Entries of `values`, one for each step of the table, by lane: `(M, …)` to `(W, …, S|1)`."""
        if self.together:
            return values[self.low : self.high, ..., None]
        return np.moveaxis(values[self.steps.clamp(max=len(values) - 1).numpy()], 1, -1)

    def dense(self, f: Tensor) -> Tensor:
        """The rows of the lanes that hold a step, `(R, D)`, as `(W, S, D)`, zeros in the others, without their graph."""
        samples, f = len(self.starts), f.detach()
        if len(f) < self.count * samples:
            whole = f.new_zeros(self.count * samples, f.shape[-1])
            whole[self.valid.flatten().to(f.device)] = f
            f = whole
        return f.reshape(self.count, samples, -1)

    def at_last(self, values: Tensor) -> Tensor:
        """Values by lane, `(W, S, D)`, at the last step of each sample, `(S, D)`."""
        return pick(values, [width - 1 for width in self.widths], 1)[0]

    def by_step(self, values: Tensor) -> Tensor:
        """Values by lane, `(W, S)`, as values by step from `low` to `high`, NaN outside a sample's window."""
        if self.together:
            return values
        out = values.new_full((self.high - self.low + 1, values.shape[1]), torch.nan)
        # samples slide apart; what lies outside a sample's window goes to a row that is cut off
        index = torch.where(self.valid, self.steps - self.low, self.high - self.low)
        return out.scatter_(0, index.to(values.device), values)[:-1]


def same(numbers: list[int]) -> bool:
    """Whether all numbers are one."""
    return numbers.count(numbers[0]) == len(numbers)


def pick(values: Tensor, first: list[int], count: int, last: list[int] | None = None) -> Tensor:
    """`count` rows of each sample from `first[s]` on, that of `last[s]` again beyond it: `(L, …, S, D)` to `(count, …, S, D)`.

    A view, where the samples want the same rows and have them.
    """
    if len(values) == 0:
        return values.new_zeros(count, *values.shape[1:])
    ends = [len(values) - 1] * len(first) if last is None else last
    if same(first) and same(ends):
        low = min(first[0], ends[0])
        there = values[low : min(low + count, ends[0] + 1)]
        beyond = count - len(there)
        return there if beyond == 0 else torch.cat([there, there[-1:].expand(beyond, *there.shape[1:])])
    index = (torch.tensor(first) + torch.arange(count)[:, None]).minimum(torch.tensor(ends))
    index = index.clamp(min=0).reshape(count, *[1] * (values.ndim - 3), len(first), 1)
    return values.gather(0, index.to(values.device).expand(-1, *values.shape[1:]))
