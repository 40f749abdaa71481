r"""Several processes, one run: each rank of a `torch.distributed` group evaluates its share of every round.

Every rank runs the same program: same sampler, same seed, same conditions. Each holds the network and the solver's state, asks
its network about its own rows, and receives the others' answers; the recurrence needs nothing else, so the states and the
conditions are never sent. A round of $R$ rows of $D$ numbers on $n$ ranks costs

$$ \max_i \text{network}(R / n) + \text{latency} + \frac{n - 1}{n} \frac{R D \cdot \text{bytes}}{\text{bandwidth}} . $$

Before it starts on its rows a rank tells the others what it was asked, so that ranks that were given different seeds, shapes or
conditions hear of it and do not mix two runs. Answers go straight from rank to rank: one that dies is seen, and named, by all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piadm.denoiser import DenoiserLike, Wrapper, each_tensor
from piadm.errors import RankError, require_positive
from piadm.executors import Executor, cut, in_slices

_QUESTION, _ANSWER = 1, 2
_FINE, _BROKE, _BEREFT = 0, 1, 2
_SAMPLE = 4
_GRACE = 3.0
"""Seconds that a rank which was missed has to say that it is there."""


@dataclass(frozen=True)
class Cost:
    """What the rounds of one rank have cost so far.

    Attributes:
        rounds: Calls.
        rows: Rows evaluated here.
        seconds: Wall time of the calls.
        network: Of that, time in this rank's network.
        slowest: Time in the network of each round's slowest rank; what is left of `seconds` is communication.
        received: Bytes of answers from other ranks.
    """

    rounds: int = 0
    rows: int = 0
    seconds: float = 0.0
    network: float = 0.0
    slowest: float = 0.0
    received: int = 0

    @property
    def communication(self) -> float:
        """Seconds that no network accounts for: latency, bytes, bookkeeping."""
        return max(0.0, self.seconds - self.slowest)


class Sharded(Executor):
    """Evaluates a round on all ranks of a process group, a share on each: the same sample, to float precision.

    Shares differ by at most one row; with more ranks than rows some have none. `cost` says what the rounds cost. Only the
    group's first rank writes checkpoints while all is well.

    Arguments:
        denoiser: The denoiser, the same on every rank; it may live on another device on each.
        group: The process group; the default one if `None`.
        timeout: Seconds after which a rank that is not heard of is given up: more than its share of a round may take.

    Raises:
        ValueError: without an initialised process group that this process belongs to; from a call, if the ranks were asked
            different things.
        RankError: from a call, if another rank died, fell silent or raised an error; the run so far is its `.checkpoint`.
    """

    def __init__(self, denoiser: DenoiserLike, group: dist.ProcessGroup | None = None, timeout: float = 600.0) -> None:
        require_positive("timeout", timeout, "timeout=600.0")
        super().__init__(in_slices(denoiser))
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "Sharded needs a process group: start with torchrun, and call torch.distributed.init_process_group()"
            )
        if dist.get_rank(group) < 0:
            raise ValueError("`group` does not contain this process: wrap the denoiser on its members only")
        self.group, self.timeout = group, timeout
        self.rank, self.ranks, self.cost = dist.get_rank(group), dist.get_world_size(group), Cost()
        self.peers = list(range(self.ranks)) if group is None else dist.get_process_group_ranks(group)

    def __repr__(self) -> str:
        return f"Sharded({self.denoiser!r}, rank {self.rank} of {self.ranks})"

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        started, rows = time.perf_counter(), len(x)
        bounds = [rank * rows // self.ranks for rank in range(self.ranks + 1)]
        part = slice(bounds[self.rank], bounds[self.rank + 1])
        others = [rank for rank in range(self.ranks) if rank != self.rank]

        question = _describe(x, t, condition)
        questions = {rank: torch.empty_like(question) for rank in others}
        asking = self._post(dict.fromkeys(others, question), questions, _QUESTION)
        f, failure = torch.zeros_like(x[part]), None
        if part.stop > part.start:
            try:
                f = self.denoiser(x[part], t[part], **cut(condition, part, rows)).to(x.dtype).contiguous()
            except Exception as error:  # the others are waiting: they are told before it goes its way
                failure = error
        if f.is_cuda:
            torch.cuda.synchronize(f.device)
        network = time.perf_counter() - started

        try:
            lost = self._settle(asking)
        except RankError:
            if failure is not None:
                raise failure from None
            raise
        if not lost:
            odd = [
                rank for rank in others if not torch.allclose(questions[rank], question, rtol=1e-3, atol=1e-3, equal_nan=True)
            ]
            if odd:
                raise ValueError(
                    f"rank {self.rank} was asked something else than rank {', '.join(map(str, odd))}: give all "
                    "the same shape, sampler, conditions and seed (generator=torch.Generator().manual_seed(0))"
                )
        there = [rank for rank in others if rank not in lost]
        status = _BROKE if failure is not None else _BEREFT if lost else _FINE
        answer = torch.cat([x.new_tensor([status, network]), f.reshape(-1)])
        answers = {rank: x.new_empty(2 + (bounds[rank + 1] - bounds[rank]) * x[0].numel()) for rank in there}
        lost |= self._settle(self._post(dict.fromkeys(there, answer), answers, _ANSWER))
        if failure is not None:
            raise failure
        heads = {rank: answers[rank][:2].tolist() for rank in there if rank not in lost}
        if lost:
            raise RankError(sorted({self._trace(rank) for rank in lost}), f"of {self.ranks} died")
        broke = [rank for rank, (status, _) in heads.items() if status != _FINE]
        if broke:
            raise RankError(broke, f"of {self.ranks} broke off with an error of its own")

        pieces = [f if rank == self.rank else answers[rank][2:].reshape(-1, *x.shape[1:]) for rank in range(self.ranks)]
        whole = torch.cat(pieces)
        self.cost = replace(
            self.cost,
            rounds=self.cost.rounds + 1,
            rows=self.cost.rows + len(f),
            seconds=self.cost.seconds + time.perf_counter() - started,
            network=self.cost.network + network,
            slowest=self.cost.slowest + max([network, *(seconds for _, seconds in heads.values())]),
            received=self.cost.received + (rows - len(f)) * x[0].numel() * x.element_size(),
        )
        return whole

    def _post(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor], tag: int) -> list[tuple[int, dist.Work | None]]:
        """Sends to and receives from ranks, all at once; each with whom it is about."""
        group, peers = self.group, self.peers
        acts: list[tuple[int, Any, Tensor]] = [(rank, dist.irecv, tensor) for rank, tensor in incoming.items()]
        acts += [(rank, dist.isend, tensor) for rank, tensor in outgoing.items()]
        if not acts or acts[0][2].is_cuda:  # NCCL wants to hear of all of them in one call, and answers with one piece of work
            works = (
                dist.batch_isend_irecv([dist.P2POp(act, x, peers[rank], group, tag) for rank, act, x in acts]) if acts else []
            )
            return [(acts[i][0], work) for i, work in enumerate(works)]
        posted: list[tuple[int, dist.Work | None]] = []
        for rank, act, tensor in acts:
            try:
                posted.append((rank, act(tensor, peers[rank], group=group, tag=tag)))
            except RuntimeError:  # the connection is known to be broken
                posted.append((rank, None))
        return posted

    def _settle(self, works: list[tuple[int, dist.Work | None]]) -> set[int]:
        """Waits for all, even if some fail: the living get what they wait for. Returns the ranks that failed.

        Raises:
            RankError: if a rank is not heard of in time. Gloo then breaks every connection: of the others nothing is known.
        """
        limit, lost = time.monotonic() + self.timeout, set[int]()
        for rank, work in works:
            try:
                if work is None:
                    raise RuntimeError("the connection was broken before")
                work.wait(timedelta(seconds=max(0.01, limit - time.monotonic())))
            except RuntimeError as error:
                if time.monotonic() >= limit:
                    missed = f"of {self.ranks} was not heard of for {self.timeout:g} s"
                    raise RankError([self._trace(rank)], missed) from error
                lost.add(rank)
        return lost

    def _trace(self, missed: int) -> int:
        """The rank at fault: one that was missed may itself have missed another, and says so in the group's store."""
        from torch.distributed.distributed_c10d import _get_default_store

        known = {self.rank}
        try:
            store = _get_default_store()
            store.set(f"piadm/missed/{self.peers[self.rank]}", str(missed))
            while missed not in known:
                known.add(missed)
                key = f"piadm/missed/{self.peers[missed]}"
                store.wait([key], timedelta(seconds=_GRACE))
                missed = int(store.get(key))
        except RuntimeError:  # it does not answer, or took the store with it
            pass
        return missed


def sharding(denoiser: DenoiserLike) -> Sharded | None:
    """The `Sharded` in a stack of wrappers, if there is one."""
    inner: object = denoiser
    while isinstance(inner, Wrapper) and not isinstance(inner, Sharded):
        inner = inner.denoiser
    return inner if isinstance(inner, Sharded) else None


def _describe(x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
    """A round's question in a few numbers: how many rows, when, a few entries of the first and the last, their conditions."""
    ends = torch.zeros(2, _SAMPLE, dtype=x.dtype, device=x.device)
    size = min(_SAMPLE, x[0].numel())
    ends[:, :size] = x.reshape(len(x), -1)[[0, -1], :size]
    given = x.new_zeros(1)
    each_tensor(lambda value: given.add_(value[[0, -1]].to(x).sum()), condition)
    return torch.cat([x.new_tensor([len(x), x[0].numel()]), t[[0, -1]].to(x), ends.reshape(-1), given])
