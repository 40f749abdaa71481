"""Errors: what was given, what would be right, and for a run that broke, what had already been finished."""

from __future__ import annotations

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
    """The network returned NaN or infinity.

    Attributes:
        step: The first step, counted from 0 at pure noise, whose network output is not finite.
        round: The round in which that happened, counted from 1.
        samples: Rows of the batch concerned.
        finished: How many steps each sample had finished, shape `(S,)`.
        x: The state each sample had reached with them, shape `(S, *event)`.
    """

    def __init__(self, step: int, round: int, samples: list[int], finished: Tensor, x: Tensor) -> None:
        super().__init__(step, round, samples, finished, x)
        self.step, self.round, self.samples, self.finished, self.x = step, round, samples, finished, x

    def __str__(self) -> str:
        return (
            f"the network returned NaN or infinity at step {self.step} in round {self.round} (samples {self.samples}); "
            f"the first {int(self.finished.min())} steps are finished and kept on this exception: `.x`, `.finished`"
        )
