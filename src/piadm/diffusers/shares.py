"""A network's lanes over the ranks of a process group: each is asked about its share, and all get all answers.

Every rank runs the same call of the same pipeline. What travels is what networks answer, as bytes; shapes and dtypes are those
of a rank's own answer, for which a rank with no lanes of its own asks about the first.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from piadm.errors import RankError
from piadm.ranks import BROKE, FINE, Ranks

Answer = tuple[list[Tensor], list[Any], Any]
"""A network's tensors with lanes first, all leaves of its output, and their structure."""

_HEAD, _BODY = 3, 4
_SAMPLE = 4
_QUESTION = 16


def shared(ranks: Ranks, asked: list[Tensor], lanes: int, call: Callable[[slice], Answer]) -> Answer:
    """What a network answers for so many lanes.

    Arguments:
        ranks: Who takes part.
        asked: The call's tensors, of which a few entries tell whether all ranks were asked the same.
        lanes: How many.
        call: Asks the network for some of them.

    Raises:
        ValueError: if the ranks were asked different things.
        RankError: if another rank died, fell silent or raised an error.
    """
    part = ranks.share(lanes, ranks.rank)
    failure: BaseException | None = None
    try:
        answer = call(part if part.start < part.stop else slice(0, 1))
        own = _packed(answer[0])
    except BaseException as error:  # Ctrl-C, too: the others are waiting and are told before it goes its way
        failure, own = error, torch.zeros(1, 0, dtype=torch.uint8, device=asked[0].device)
    head = torch.cat([asked[0].new_tensor([FINE if failure is None else BROKE, lanes], dtype=torch.float64), _describe(asked)])
    heads = {rank: torch.empty_like(head) for rank in ranks.others}
    try:
        lost = ranks.swap(head, heads, _HEAD)
    except RankError:
        if failure is not None:
            raise failure from None
        raise
    if failure is not None:
        raise failure
    states = {rank: float(one[0]) for rank, one in heads.items() if rank not in lost}
    if any(states.values()):
        ranks.check_states(lost, states)
    ranks.check_questions(head[1:], {rank: heads[rank][1:] for rank in states})
    shares = {rank: ranks.share(lanes, rank) for rank in states}
    bodies = {rank: own.new_empty(one.stop - one.start, own.shape[1]) for rank, one in shares.items()}
    # a rank that knows of a dead one still answers the others, which may not
    lost |= ranks.swap(own[: part.stop - part.start], bodies, _BODY)
    ranks.check_states(lost, states)
    whole = torch.cat([own[: part.stop - part.start] if rank == ranks.rank else bodies[rank] for rank in range(ranks.size)])
    return _unpacked(whole, answer[0]), *answer[1:]


def _packed(tensors: list[Tensor]) -> Tensor:
    """All bytes of each lane, shape `(lanes, bytes)`."""
    return torch.cat([one.reshape(len(one), -1).contiguous().view(torch.uint8) for one in tensors], 1)


def _unpacked(lanes: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The tensors again, with as many lanes."""
    bounds = list(accumulate((one[0].nbytes for one in like), initial=0))
    return [
        lanes[:, first:last].flatten().clone().view(one.dtype).reshape(len(lanes), *one.shape[1:])
        for one, (first, last) in zip(like, pairwise(bounds), strict=True)
    ]


def _describe(asked: list[Tensor]) -> Tensor:
    """A few entries of every tensor."""
    entries = torch.cat([one.reshape(-1)[:_SAMPLE].to(asked[0].device, torch.float64) for one in asked])[:_QUESTION]
    return torch.nn.functional.pad(entries, (0, _QUESTION - len(entries)))
