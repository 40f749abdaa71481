r"""Executors: how a round's rows reach the network. An executor is a wrapper that is itself a denoiser.

| executor | a round's rows go |
|---|---|
| `MicroBatch(denoiser, size)` | to the network in slices, smaller ones when memory runs out |
| `piadm.FixedBatch(denoiser, size)` | to the network in slices that are all of one size |
| `piadm.Replicas(denoiser, devices)` | to several devices of this process, each of which takes a share |
| `piadm.Sharded(denoiser)` | to all processes of a `torch.distributed` group, each of which takes a share |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from piadm.denoiser import DenoiserLike, Wrapper, each_tensor
from piadm.errors import require_count

Part = TypeVar("Part")

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""What CUDA's, MPS's and the CPU's allocators say; the last two, and CUDA before torch 2.5, in a plain `RuntimeError`."""


class Executor(Wrapper):
    """A wrapper that changes how the network is called and not what it says: it leaves no trace in a checkpoint.

    Attributes:
        takes: Names of conditions that it keeps from the network.
    """

    takes: tuple[str, ...] = ()


class MicroBatch(Executor):
    """Evaluates a round in slices of at most `size` rows: less memory, the same sample.

    When the network runs out of memory, the slice is halved, again and again if need be, and the run goes on; it is said in
    one warning, and the size found is kept. Every sampler does that by itself, unwrapped denoisers included.

    Arguments:
        denoiser: The denoiser.
        size: Rows per network call; `None` for all of them, for as long as memory lasts.
    """

    def __init__(self, denoiser: DenoiserLike, size: int | None = None) -> None:
        if size is not None:
            require_count("size", size, "MicroBatch(denoiser, size=64)")
        super().__init__(denoiser)
        self.size = size

    def __repr__(self) -> str:
        return f"MicroBatch({self.denoiser!r}, size={self.size})"

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        rows, before = len(x), self.size

        def call(part: slice) -> Tensor:
            whole = part == slice(0, rows)
            return self.denoiser(x[part], t[part], **(condition if whole else cut(condition, part, rows)))

        parts, self.size = sliced(rows, self.size, call)
        if self.size != before:
            told = f"the network ran out of memory: from now on it is called with at most {self.size} rows"
            warnings.warn(f"{told}; piadm.MicroBatch(denoiser, size={self.size}) says so from the start", stacklevel=2)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def sliced(rows: int, size: int | None, call: Callable[[slice], Part]) -> tuple[list[Part], int | None]:
    """What `call` says of `rows` rows, in slices of at most `size`, halved where memory runs out; and the size found.

    A single row that finds no memory raises what the allocator raised, and so does all else that goes wrong.
    """
    parts: list[Part] = []
    first = 0
    while first < rows:
        part = slice(first, rows if size is None else min(first + size, rows))
        try:
            parts.append(call(part))
            first = part.stop
            continue
        except (RuntimeError, MemoryError) as error:
            if part.stop - first == 1 or not _out_of_memory(error):
                raise
        # out here the traceback, which holds the network's intermediate results, is gone
        size = (part.stop - first + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return parts, size


def in_slices(denoiser: DenoiserLike) -> DenoiserLike:
    """A denoiser that survives running out of memory; one with an executor in it already does, or has its own way."""
    return denoiser if any(isinstance(layer, Executor) for layer in layers(denoiser)) else MicroBatch(denoiser)


def layers(denoiser: object) -> Iterator[object]:
    """A denoiser, the one it wraps, and so on."""
    yield denoiser
    if isinstance(denoiser, Wrapper):
        yield from layers(denoiser.denoiser)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(text in str(error) for text in _MEMORY)


def cut(condition: Mapping[str, Any], part: slice | list[int], rows: int) -> dict[str, Any]:
    """The conditions of some rows; what does not run along the rows is shared."""
    out: dict[str, Any] = each_tensor(lambda value: value[part] if len(value) == rows else value, condition)
    return out
