"""The pipeline's own progress bar, counting finished steps in place of rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Bar:
    """Stands for the bar that a pipeline asks for, as a context or around what it loops over.

    Arguments:
        bar: The pipeline's own (a tqdm bar).
        running: Whether steps are being run in parallel: the pipeline's own updates count rounds then and are left out.
        iterable: What the pipeline loops over, if it was given.
    """

    def __init__(self, bar: Any, running: Callable[[], bool], iterable: Iterable[Any] | None) -> None:
        self.bar, self.running, self.iterable = bar, running, iterable

    def __enter__(self) -> Bar:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        with self.bar:
            yield from () if self.iterable is None else self.iterable

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bar, name)

    def update(self, n: float = 1) -> None:
        """The pipeline's report that it went around its loop."""
        if not self.running():
            self.bar.update(n)

    def finished(self, steps: int, total: int) -> None:
        """`steps` of `total` steps are finished."""
        self.bar.n = round(steps * (self.bar.total or total) / total)
        self.bar.refresh()
