r"""Several processes, one run: each rank of a `torch.distributed` group evaluates its share of every round.

Every rank runs the same program: same sampler, same seed, same conditions. Each holds the network and the solver's state, asks
its network about its own rows, and receives the others' answers; the recurrence needs nothing else, so the states and the
conditions are never sent. A round of $R$ rows of $D$ numbers on $n$ ranks costs

$$ \max_i \text{network}(R / n) + \text{latency} + \frac{n - 1}{n} \frac{R D \cdot \text{bytes}}{\text{bandwidth}} . $$

Before it starts on its rows a rank tells the others what it was asked, so that ranks that were given different seeds, shapes or
conditions hear of it and do not mix two runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piadm.denoiser import DenoiserLike, Wrapper, each_tensor
from piadm.errors import RankError
from piadm.executors import Executor, cut, in_slices
from piadm.ranks import BEREFT, BROKE, FINE, Ranks

_QUESTION, _ANSWER = 1, 2
_SAMPLE = 4


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
        super().__init__(in_slices(denoiser))
        self.group = Ranks(group, timeout)
        self.rank, self.ranks, self.cost = self.group.rank, self.group.size, Cost()

    def __repr__(self) -> str:
        return f"Sharded({self.denoiser!r}, rank {self.rank} of {self.ranks})"

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        started, rows, group = time.perf_counter(), len(x), self.group
        part = group.share(rows, self.rank)

        question = _describe(x, t, condition)
        questions = {rank: torch.empty_like(question) for rank in group.others}
        asking = group.post(question, questions, _QUESTION)
        f = torch.zeros_like(x[part])
        failure: BaseException | None = None
        if part.stop > part.start:
            try:
                f = self.denoiser(x[part], t[part], **cut(condition, part, rows)).to(x.dtype).contiguous()
            except BaseException as error:  # Ctrl-C, too: the others are waiting and are told before it goes its way
                failure = error
        if f.is_cuda:
            torch.cuda.synchronize(f.device)
        network = time.perf_counter() - started

        try:
            lost = group.settle(asking)
        except RankError:
            if failure is not None:
                raise failure from None
            raise
        if not lost:
            group.check_questions(question, questions)
        shares = {rank: group.share(rows, rank) for rank in group.others if rank not in lost}
        status = BROKE if failure is not None else BEREFT if lost else FINE
        answer = torch.cat([x.new_tensor([status, network]), f.reshape(-1)])
        answers = {rank: x.new_empty(2 + (one.stop - one.start) * x[0].numel()) for rank, one in shares.items()}
        lost |= group.swap(answer, answers, _ANSWER)
        if failure is not None:
            raise failure
        heads = {rank: answers[rank][:2].tolist() for rank in shares if rank not in lost}
        group.check_states(lost, {rank: state for rank, (state, _) in heads.items()})

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
