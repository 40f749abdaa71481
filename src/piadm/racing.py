r"""Races: the sequential and a parallel sampler side by side, a round at a time, each as if it had the machine to itself.

Two samplers that ran at once would take each other's processor, and neither's time would mean anything. They take turns: the
one whose clock is behind goes on by a round, and its clock runs in its own turns only. So both are shown at the same time since
their start, and the one that is first is the one that would be first alone. Several races share the machine in the same way,
network call by network call; the time that one waits for another is on nobody's clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm.checkpoint import Checkpoint
from piadm.denoiser import DenoiserLike
from piadm.executors import Executor, MicroBatch
from piadm.film import Film
from piadm.result import Result
from piadm.samplers import Parallel, Sequential

ROWS = 128
"""Rows of a network call, at most: so long does a stop wait, and so long another race."""


class Turns:
    """A lock that is had in the order in which it was asked for, as a plain one is not."""

    def __init__(self) -> None:
        self._changed, self._asked, self._served = threading.Condition(), 0, 0

    def __enter__(self) -> None:
        with self._changed:
            mine, self._asked = self._asked, self._asked + 1
            self._changed.wait_for(lambda: self._served == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()


class Stopped(Exception):
    """Ends a run from outside; its `checkpoint` holds the last complete round, as that of every exception does."""

    checkpoint: Checkpoint


class _Turn(Executor):
    """A denoiser that waits for its turn, and is not called any more once the race is stopped."""

    def __init__(self, denoiser: DenoiserLike, turns: Turns, stop: threading.Event) -> None:
        super().__init__(denoiser)
        self.waited, self._turns, self._stop = 0.0, turns, stop

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        asked = time.perf_counter()
        with self._turns:
            self.waited += time.perf_counter() - asked
            if self._stop.is_set():
                raise Stopped
            return self.denoiser(x, t, **condition)


@dataclass(frozen=True)
class Draw:
    """What is drawn: how many samples, from which seed, under which conditions (those of a sampler's call)."""

    samples: int
    seed: int
    condition: dict[str, Tensor]


class Lane:
    """A sampler's run, a round at a time.

    Attributes:
        seconds: What its clock says.
        windows, residuals: Those of each round so far, as `callback` hears of them.
        result: What came of it, once it is over.
        stopped: The exception that ended it early, if one was asked for.

    Arguments:
        make: The sampler, made for a denoiser.
        denoiser: The denoiser.
        draw: What is drawn.
        turns: Where races queue.
        stop: Ends the run at its next network call.

    Raises:
        ValueError, TypeError: for what `make` refuses, before any network call.
    """

    def __init__(
        self,
        make: Callable[[DenoiserLike], Parallel | Sequential],
        denoiser: DenoiserLike,
        draw: Draw,
        turns: Turns,
        stop: threading.Event,
    ) -> None:
        self._turn = _Turn(denoiser, turns, stop)
        self._film = Film(MicroBatch(self._turn, ROWS))
        self.sampler, self._draw, self._stop = make(self._film), draw, stop
        self.steps = len(self.sampler.table)
        self.seconds, self.windows, self.residuals = 0.0, list[tuple[int, int]](), list[Tensor]()
        self.result: Result | None = None
        self.stopped: Stopped | None = None
        self._error: BaseException | None = None
        # one thread waits for the other at any time: the run's is a coroutine that its callback suspends
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def over(self) -> bool:
        return self.result is not None or self.stopped is not None or self._error is not None

    @property
    def rounds(self) -> int:
        return len(self.windows)

    @property
    def finished(self) -> int:
        """Steps that need no more rounds."""
        if self.result is not None:
            return self.steps
        # a round's window begins where the finished steps end, and its first one is finished by it
        return min(self.windows[-1][0] + 1, self.steps) if self.windows else 0

    @property
    def ahead(self) -> Tensor | None:
        """The newest prediction of the first samples, shape `(n, *event)`: at the end the samples. `None` before it began."""
        if self.result is not None:
            return self.result.samples[: len(self._film.newest)]
        return self._newest(0)

    @property
    def state(self) -> Tensor | None:
        """The newest finished state of the first samples, noise and all; as `ahead`."""
        return self.ahead if self.result is not None else self._newest(1)

    def advance(self) -> None:
        """Goes on by a round, or to the end after the last one; raises what the run raises."""
        started, waited = time.perf_counter(), self._turn.waited
        if not self._thread.ident:
            self._thread.start()
        self._go.release()
        self._back.acquire()
        self.seconds += time.perf_counter() - started - (self._turn.waited - waited)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the run, if it is not over, and its thread."""
        self._stop.set()
        if not self._thread.ident:
            return
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(0.05)

    def _newest(self, which: int) -> Tensor | None:
        seen = self._film.newest
        return torch.stack([seen[n][which] for n in sorted(seen)]) if seen else None

    def _run(self) -> None:
        self._go.acquire()
        draw, event = self._draw, self.sampler.denoiser.event_shape or ()
        generator = torch.Generator(self.sampler.denoiser.device or "cpu").manual_seed(draw.seed)
        condition: dict[str, Any] = {**draw.condition, **self._film.condition(draw.samples)}
        try:
            self.result = self.sampler((draw.samples, *event), generator=generator, callback=self._callback, **condition)
        except Stopped as stopped:
            self.stopped = stopped
        except BaseException as error:
            self._error = error
        self._back.release()

    def _callback(self, round: int, window: tuple[int, int], residuals: Tensor) -> None:
        self._film.callback(round, window, residuals)
        self.windows.append(window)
        self.residuals.append(residuals)
        self._back.release()
        self._go.acquire()


def race(lanes: Sequence[Lane], stop: threading.Event, pause: float = 0.3) -> Iterator[None]:
    """Runs the lanes to their ends, and yields whenever there is something new to see, `pause` seconds apart, and at the end.

    Until it is asked to go on the lanes stand still. Once `stop` is set they end, each with the last complete round.
    """
    shown = time.monotonic()
    try:
        yield
        while waiting := [lane for lane in lanes if not lane.over]:
            min(waiting, key=lambda lane: lane.seconds).advance()
            if time.monotonic() - shown >= pause:
                yield
                shown = time.monotonic()
    finally:
        for lane in lanes:
            lane.close()
    yield
