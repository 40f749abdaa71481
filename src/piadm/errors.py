"""Errors: what was given, what would be right, and for a run that broke, what had already been finished."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def require(condition: bool, argument: str, value: object, remedy: str) -> None:
    """Raises a `ValueError` that names the argument, its value and the remedy, unless the condition holds."""
    if not condition:
        large = isinstance(value, Tensor) and value.numel() > 8
        shown = f"a tensor of shape {tuple(getattr(value, 'shape', ()))}" if large else " ".join(repr(value).split())
        raise ValueError(f"`{argument}` is {shown}: {remedy}")


def require_positive(argument: str, value: object, example: str) -> None:
    """A finite number above zero."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    require(ok, argument, value, f"give a finite number above 0, for example {example}")


def require_count(argument: str, value: object, example: str) -> None:
    """An integer of at least one."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(ok, argument, value, f"give an integer of at least 1, for example {example}")


class NonFiniteError(ArithmeticError):
    """The network returned NaN or infinity, or values that overflow a state, for some samples of a batch.

    A sampler finishes the other samples before it raises this.

    Attributes:
        step: The first step, counted from 0 at pure noise, whose result is not finite.
        round: The round in which that happened, counted from 1.
        samples: Rows of the batch concerned.
        finished: How many steps each sample had finished, shape `(S,)`.
        x: The state each sample had reached with them, shape `(S, *event)`: the sample itself where all steps are finished.
        result: The `piadm.Result` of the other samples, in their order; `None` if there are none, or if a solver raised this.
    """

    def __init__(self, step: int, round: int, samples: list[int], finished: Tensor, x: Tensor, result: Any = None) -> None:
        super().__init__(step, round, samples, finished, x, result)
        self.step, self.round, self.samples, self.finished, self.x, self.result = step, round, samples, finished, x, result

    def __str__(self) -> str:
        others = "" if self.result is None else f"; the other {len(self.result.samples)} samples are complete: `.result`"
        return (
            f"the network returned NaN or infinity at step {self.step} in round {self.round} (samples {self.samples}); "
            f"the first {int(self.finished.min())} steps are finished and kept on this exception: `.x`, `.finished`{others}"
        )


class RankError(RuntimeError):
    """A run on several processes ended because others of them did not go on.

    Attributes:
        ranks: Which ones, counted in the run's process group.
    """

    def __init__(self, ranks: list[int], what: str) -> None:
        super().__init__(ranks, what)
        self.ranks, self.what = ranks, what

    def __str__(self) -> str:
        named = ", ".join(map(str, self.ranks))
        kept = hasattr(self, "checkpoint")  # not where a pipeline was run
        remedy = "resume from `.checkpoint`" if kept else "start again"
        return f"rank{'s' * (len(self.ranks) > 1)} {named} {self.what}; {remedy}, with as many ranks as are left"
