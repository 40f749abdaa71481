"""The progress bar: steps finished, round, residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def progress_bar(steps: int, enabled: bool) -> Iterator[Callable[[int, int, Tensor | float], None]]:
    """Yields `show(finished, round, residuals)`; does nothing unless enabled."""
    if not enabled:
        yield lambda finished, round, residuals: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("round {task.fields[round]}  residual {task.fields[residual]:.1e}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=steps, round=0, residual=0.0)

        def show(finished: int, round: int, residuals: Tensor | float) -> None:
            worst = float(residuals.nan_to_num(0.0).max()) if isinstance(residuals, Tensor) else residuals
            bar.update(task, completed=finished, round=round, residual=worst)

        yield show
