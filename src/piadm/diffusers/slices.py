"""How many lanes a network of the pipeline is called with at once: as many as are its rank's, and fit in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from piadm.diffusers.shares import Answer, shared
from piadm.executors import sliced
from piadm.memory import divide, lane_bytes, require_fit, row_bytes
from piadm.ranks import Ranks
from piadm.tables import Table

LOOP = 3
"""Of each number that a network answers with, how many more a pipeline's loop holds: 3.0 where StableDiffusion is guided."""


class Slices:
    """The slices of one run.

    Arguments:
        max_memory: See `parallelize`.
        costs: Bytes that a network's call takes a lane, measured in earlier calls; added to.
        found: By network, the most lanes for which memory lasted; added to.
        ranks: Those that take a share each, if there are any.
    """

    def __init__(
        self, max_memory: float | None, costs: dict[Hashable, int], found: dict[str, int], ranks: Ranks | None = None
    ) -> None:
        self.max_memory, self.costs, self.found, self.ranks = max_memory, costs, found, ranks
        self.window, self.lane, self.loop, self.device = 1, 0, 0, torch.device("cpu")

    def answered(self, answer: Any) -> None:
        """What a network says in the first step, which is taken alone: in a window there is one for each step."""
        self.loop += LOOP * sum(leaf.nbytes for leaf in tree_leaves(answer) if isinstance(leaf, Tensor))

    def open(self, table: Table, x: Tensor, window: int, lanes: int) -> None:
        """A run of starting states `x`, shape `(S, D)`, begins; its loop has so many lanes."""
        self.window, self.device = min(window, len(table)), x.device
        self.lane = lane_bytes(table, x) + self.loop * min(lanes, len(table)) // self.window

    def __call__(self, name: str, key: Hashable, lanes: int, call: Callable[[slice], Answer], asked: list[Tensor]) -> Answer:
        """What a network answers for so many lanes.

        Arguments:
            name: The network's name in the pipeline.
            key: What its cost depends on.
            lanes: How many.
            call: Asks the network for some of them. It has two at least, of which idle ones are copies.
            asked: The call's tensors.

        Raises:
            ValueError: if the window does not fit in `max_memory`, or one lane does not; if ranks were asked different things.
            RankError: if another rank did not go on.
        """
        if self.ranks is None:
            return self._cut(name, key, slice(0, lanes), call)
        return shared(self.ranks, asked, lanes, lambda part: self._cut(name, key, part, call))

    def _cut(self, name: str, key: Hashable, share: slice, call: Callable[[slice], Answer]) -> Answer:
        """A share of the lanes, in slices."""
        known = [self.found[name]] if name in self.found else []
        fits = [] if self.max_memory is None else [self._fit(self.max_memory, (name, key), call)]
        size = min(known + fits, default=None)

        def within(part: slice) -> Answer:
            return call(slice(share.start + part.start, share.start + part.stop))

        parts, found = sliced(share.stop - share.start, size, within)
        if found is not None and found != size:
            self.found[name] = found
            told = f"`{name}` ran out of memory: from now on it is called for at most {found} steps of the window at once"
            warnings.warn(f"{told}; give max_memory to have its calls cut from the start", stacklevel=2)
        if len(parts) == 1:
            return parts[0]
        return [torch.cat(each) for each in zip(*(tensors for tensors, _, _ in parts), strict=True)], *parts[0][1:]

    def _fit(self, max_memory: float, key: Hashable, call: Callable[[slice], Answer]) -> int:
        """The most lanes in a call."""
        if key not in self.costs:
            self.costs[key] = row_bytes(lambda lanes: call(slice(0, lanes)), self.device)
        row = self.costs[key]
        fitting, most = divide(max_memory, self.device, row, self.lane, self.window)
        require_fit(self.window, self.window, fitting, row, self.lane, max_memory)
        return most
