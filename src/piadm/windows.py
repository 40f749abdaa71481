r"""Windows: which steps of each sample are iterated at once.

A window has one method, `advance(table, rounds, ready)`: after `rounds` rounds, with the first `ready` steps of each sample
accepted by the stopping rule (shape `(S,)`, int64), it answers with the first step to iterate and the one after the last.

| window | steps iterated | rounds |
|---|---|---|
| `Sliding(size)` | the next `size` unaccepted ones | as the stopping rule needs, at most $M$ |
| `Blocks(iterations)` | one block at a time, $K$ rounds each | $N K$ |
| `Pipelined(iterations)` | block $n + 1$ enters a round after block $n$ | $N + K - 1$ |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from piadm.errors import require, require_count
from piadm.tables import Table


class Window(Protocol):
    """A policy: where the window goes, and a check that refuses tables it does not fit."""

    def check(self, table: Table) -> None: ...

    def advance(self, table: Table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        """First step to iterate and one past the last, each of shape `(S,)`."""


def width(window: Window, table: Table) -> int:
    """The most steps that a window iterates at once."""
    ready, widest = torch.zeros(1, dtype=torch.long), 0
    for rounds in range(2 * len(table)):
        start, stop = window.advance(table, rounds, ready)
        widest = max(widest, int((stop - start).max()))
        if widest == len(table) or int(start.min()) == len(table):
            break
    return widest


@dataclass(frozen=True)
class Sliding:
    """The next `size` steps; each sample slides on its own. `size=None` iterates all remaining steps."""

    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            require_count("window", self.size, "window=32")

    def check(self, table: Table) -> None:
        """Fits every table."""

    def advance(self, table: Table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        size = len(table) if self.size is None else self.size
        return ready, (ready + size).clamp(max=len(table))


def _per_block(iterations: int | Sequence[int], table: Table) -> list[int]:
    return [iterations] * (len(table.blocks) - 1) if isinstance(iterations, int) else list(iterations)


def _check_iterations(iterations: int | Sequence[int]) -> None:
    for one in iterations if isinstance(iterations, Sequence) else [iterations]:
        require_count("iterations", one, "iterations=8")


def _check_blocks(iterations: int | Sequence[int], table: Table) -> None:
    blocks = len(table.blocks) - 1
    fits = isinstance(iterations, int) or len(iterations) == blocks
    require(fits, "iterations", iterations, f"give one number, or one for each of the scheme's {blocks} blocks")


@dataclass(frozen=True)
class Blocks:
    """The table's blocks one after the other, each for a fixed number of rounds: the paper's algorithms.

    Arguments:
        iterations: $K$, for all blocks or one number for each.
    """

    iterations: int | Sequence[int]

    def __post_init__(self) -> None:
        _check_iterations(self.iterations)

    def check(self, table: Table) -> None:
        _check_blocks(self.iterations, table)

    def advance(self, table: Table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        block = 0
        for count in _per_block(self.iterations, table):
            if rounds < count:
                break
            rounds -= count
            block += 1
        stop = table.blocks[min(block + 1, len(table.blocks) - 1)]
        return torch.full_like(ready, table.blocks[block]), torch.full_like(ready, stop)


@dataclass(frozen=True)
class Pipelined:
    """Block $n + 1$ enters one round after block $n$ and leaves after $K$ rounds of its own.

    Arguments:
        iterations: $K$.

    Reference: Zhou and Sugiyama, 2024 (arXiv 2412.07435).
    """

    iterations: int

    def __post_init__(self) -> None:
        _check_iterations(self.iterations)

    def check(self, table: Table) -> None:
        require_count("iterations", self.iterations, "iterations=8")

    def advance(self, table: Table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        last = len(table.blocks) - 1
        start = table.blocks[min(max(0, rounds - self.iterations + 1), last)]
        stop = table.blocks[min(rounds + 1, last)]
        return torch.full_like(ready, start), torch.full_like(ready, stop)
