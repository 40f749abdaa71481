"""Memory: how many bytes a network row takes, how many the window's states do, and what of them fits.

Counted are tensors that live at the same time during a call, weights not. What a kernel allocates for itself meanwhile is
counted by CUDA's allocator; on the CPU it is allowed for.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from piadm.errors import require
from piadm.tables import Table

COPIES = 23
"""Most numbers that live at once in a round of the solver, for each number of a window's states."""

WORKSPACE = 2.0
"""Of a call on the CPU: how much a process may grow over the tensors counted, for the C library keeps gaps in its heap. With
80 MiB promised, runs of `fashion` grew by 60 to 89 at a factor of 1.5 (by 43 with every block mapped by itself), and by 45 to
60 at this one."""


class _Counter(TorchDispatchMode):
    """Bytes of the storages that operators have made and nobody has dropped, now and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key = id(storage)
            if key in given or key in self._known:
                continue
            size = storage.nbytes()
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)
        return out


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call takes at most, besides those that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    counter = _Counter()
    with counter:
        call()
    return math.ceil(WORKSPACE * counter.peak)


def require_limit(max_memory: float) -> None:
    """Bytes, a whole number such as `2e9`, or a fraction, 1.0 among them, of a device's memory; `ValueError` otherwise."""
    number = isinstance(max_memory, int | float) and not isinstance(max_memory, bool) and max_memory > 0
    right = number and (max_memory <= 1 or float(max_memory).is_integer())
    require(right, "max_memory", max_memory, "give bytes, such as 2e9, or a fraction of the device's, such as 0.5")


def limit(max_memory: float, device: torch.device) -> int:
    """`max_memory` in bytes.

    Raises:
        ValueError: if it is neither bytes nor a fraction, or a fraction of a memory of unknown size.
    """
    require_limit(max_memory)
    if isinstance(max_memory, int) or max_memory > 1:
        return int(max_memory)
    if device.type == "cuda":
        return int(max_memory * int(torch.cuda.get_device_properties(device).total_memory))
    known = hasattr(os, "sysconf")  # which Windows lacks
    require(known, "max_memory", max_memory, "how much memory there is cannot be found out on this system: give bytes")
    return int(max_memory * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def row_bytes(call: Callable[[int], object], device: torch.device) -> int:
    """Bytes that a network call takes for each row: what a second one adds to the first."""
    call(1)
    one, two = (peak(partial(call, rows), device) for rows in (1, 2))
    return max(two - one, one // 2, 1)


def lane_bytes(table: Table, x: Tensor) -> int:
    """Bytes that a solver's round takes for each step of the window, for starting states `x` of shape `(S, D)`."""
    return COPIES * table.components * x.numel() * x.element_size()


def divide(max_memory: float, device: torch.device, row: int, lane: int, lanes: int) -> tuple[int, int]:
    """The largest window, of at most `lanes` steps, and the most rows in a call that fit in `max_memory` together.

    A window takes half the room at most, and leaves room for a row: what it leaves is the network's.

    Arguments:
        max_memory: As given: bytes, or a fraction of the memory of `device`.
        device: Where the states live.
        row: Bytes of a network row.
        lane: Bytes of a step of the window.
        lanes: Steps wanted.

    Raises:
        ValueError: if one step and one row do not fit.
    """
    room, least = limit(max_memory, device), lane + row
    here = "" if room == max_memory else f" and there are {room}"
    cost = f"one step and the smallest network call take about {least} bytes{here}"
    require(room >= least, "max_memory", max_memory, f"{cost}: give at least that")
    lanes = min(lanes, max(1, min(room // 2, room - row) // lane))
    return lanes, (room - lanes * lane) // row


def require_fit(window: int, lanes: int, fitting: int, row: int, lane: int, max_memory: float) -> None:
    """Refuses a window that the user gave, of so many `lanes`, where only `fitting` of them fit; the rest as in `divide`."""
    right = f"give at most {fitting}, or max_memory of about {lanes * lane + max(lanes * lane, row)} bytes"
    require(fitting >= lanes, "window", window, f"does not fit in max_memory={max_memory}: {right}")
