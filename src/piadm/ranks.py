"""The processes of a `torch.distributed` group that share a run: who has which rows, and messages that outlive a dead rank.

Messages go straight from rank to rank: one that dies is seen, and named, by all.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piadm.errors import RankError, require_positive

FINE, BROKE, BEREFT = 0, 1, 2
"""What a rank says of its own share: evaluated, its network raised an error, or it has lost another rank."""
_GRACE = 3.0
"""Seconds that a rank which was missed has to say that it is there."""

Posted = list[tuple[int, "dist.Work | None"]]
"""Messages under way, each with the rank that it is for or from; `None`: it could not be sent off."""


class Ranks:
    """The ranks of a process group, each of which takes a share of the rows; shares differ by at most one row.

    Arguments:
        group: The process group; the default one if `None`.
        timeout: Seconds after which a rank that is not heard of is given up: more than its share of a round may take.

    Attributes:
        rank: This process's, in the group.
        size: How many there are.
        others: All but this one.

    Raises:
        ValueError: without an initialised process group that this process belongs to.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 600.0) -> None:
        require_positive("timeout", timeout, "timeout=600.0")
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "there is no process group: start with torchrun, and call torch.distributed.init_process_group() first"
            )
        if dist.get_rank(group) < 0:
            raise ValueError("`group` does not contain this process: share a run among its members only")
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self._peers = list(range(self.size)) if group is None else dist.get_process_group_ranks(group)

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"

    def share(self, rows: int, rank: int) -> slice:
        """A rank's rows of so many."""
        return slice(rank * rows // self.size, (rank + 1) * rows // self.size)

    def swap(self, outgoing: Tensor, incoming: dict[int, Tensor], tag: int) -> set[int]:
        """Sends a tensor to the ranks of `incoming` and fills their tensors; returns those that failed (see `settle`)."""
        return self.settle(self.post(outgoing, incoming, tag))

    def post(self, outgoing: Tensor, incoming: dict[int, Tensor], tag: int) -> Posted:
        """Sends a tensor to the ranks of `incoming`, and receives theirs, all at once."""
        group, peers = self.group, self._peers
        acts: list[tuple[int, Any, Tensor]] = [(rank, dist.irecv, tensor) for rank, tensor in incoming.items()]
        acts += [(rank, dist.isend, outgoing) for rank in incoming]
        if not acts or outgoing.is_cuda:  # NCCL wants to hear of all of them in one call, and answers with one piece of work
            works = (
                dist.batch_isend_irecv([dist.P2POp(act, x, peers[rank], group, tag) for rank, act, x in acts]) if acts else []
            )
            return [(acts[i][0], work) for i, work in enumerate(works)]
        posted: Posted = []
        for rank, act, tensor in acts:
            try:
                posted.append((rank, act(tensor, peers[rank], group=group, tag=tag)))
            except RuntimeError:  # the connection is known to be broken
                posted.append((rank, None))
        return posted

    def settle(self, posted: Posted) -> set[int]:
        """Waits for all, even if some fail: the living get what they wait for. Returns the ranks that failed.

        Raises:
            RankError: if a rank is not heard of in time. Gloo then breaks every connection: of the others nothing is known.
        """
        limit, lost = time.monotonic() + self.timeout, set[int]()
        for rank, work in posted:
            try:
                if work is None:
                    raise RuntimeError("the connection was broken before")
                work.wait(timedelta(seconds=max(0.01, limit - time.monotonic())))
            except RuntimeError as error:
                if time.monotonic() >= limit:
                    missed = f"of {self.size} was not heard of for {self.timeout:g} s"
                    raise RankError([self._trace(rank)], missed) from error
                lost.add(rank)
        return lost

    def check_questions(self, own: Tensor, questions: dict[int, Tensor]) -> None:
        """Raises `ValueError` if another rank was asked something else, in the few numbers that tell."""
        odd = [rank for rank, one in questions.items() if not torch.allclose(one, own, rtol=1e-3, atol=1e-3, equal_nan=True)]
        if odd:
            raise ValueError(
                f"rank {self.rank} was asked something else than rank {', '.join(map(str, odd))}: give all "
                "the same shape, sampler, conditions and seed (generator=torch.Generator().manual_seed(0))"
            )

    def check_states(self, lost: set[int], states: dict[int, float]) -> None:
        """Raises `RankError` if ranks were lost, or say of themselves that they are not fine."""
        if lost:
            raise RankError(sorted({self._trace(rank) for rank in lost}), f"of {self.size} died")
        broke = [rank for rank, state in states.items() if state != FINE]
        if broke:
            raise RankError(broke, f"of {self.size} broke off with an error of its own")

    def _trace(self, missed: int) -> int:
        """The rank at fault: one that was missed may itself have missed another, and says so in the group's store."""
        from torch.distributed.distributed_c10d import _get_default_store

        known = {self.rank}
        try:
            store = _get_default_store()
            store.set(f"piadm/missed/{self._peers[self.rank]}", str(missed))
            while missed not in known:
                known.add(missed)
                key = f"piadm/missed/{self._peers[missed]}"
                store.wait([key], timedelta(seconds=_GRACE))
                missed = int(store.get(key))
        except RuntimeError:  # it does not answer, or took the store with it
            pass
        return missed
