r"""The window, from measurement: the one in which a run is predicted to take least time.

A run that evaluates $M$ steps in a sliding window of $W$ needs $M/W$ rounds to pass over the steps and $c$ more to converge,
many of them when the window nears the end and is no longer full. For $S$ samples and a network that takes $t(R)$ for $R$ rows
it takes about

$$ T(W) = \frac{M}{W} t(W S) + c\, t(θ W S) + \Big( \frac{M}{W} + c \Big) o, \qquad θ = \frac34 - \frac12 \sqrt{W/M}, $$

$o$ being the solver's own time in a round. $θ$ was fitted to runs of 50 to 1000 steps in windows of 16 to all of them on the
embedded networks; $c$ and $o$ are guesses in a sampler's first run and those of its last run from then on. Where no window is
predicted to be faster, the steps are taken one after the other.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from piadm.tables import Table
from piadm.windows import Sliding

EXTRA = 10.0
"""$c$ before the first run: 7 to 12 on the embedded networks at a tolerance of 1e-2."""

OWN = 2e-3
"""$o$ in seconds before the first run."""

SHARE, LEAST = 0.25, 0.05
"""Measuring goes on for at most this part of a sequential run's time, or this many seconds if that is more."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a network call against its rows.

    Attributes:
        rows: Rows measured, rising.
        seconds: What a call took.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: float, most: int | None = None) -> float:
        """Seconds of a call: between two measurements on a line, beyond them in calls of the cheapest size a row.

        `most` is the most rows that fit in a call.
        """
        best = self.slice(most)
        if rows > best:
            whole, rest = divmod(rows, best)
            return whole * self._line(best) + (self._line(rest) if rest >= 1 else 0.0)
        return self._line(rows)

    def slice(self, most: int | None = None) -> int:
        """Rows of the call that is cheapest a row, the largest within 5 % of it."""
        fits = [(n, s / n) for n, s in zip(self.rows, self.seconds, strict=True) if most is None or n <= most]
        least = min((price for _, price in fits), default=0.0)
        return max((n for n, price in fits if price <= 1.05 * least), default=most or 1)

    def _line(self, rows: float) -> float:
        if rows <= self.rows[0]:
            return self.seconds[0]
        for n0, n1, s0, s1 in zip(self.rows, self.rows[1:], self.seconds, self.seconds[1:], strict=False):
            if rows <= n1:
                return s0 + (s1 - s0) * (rows - n0) / (n1 - n0)
        return self.seconds[-1] * rows / self.rows[-1]


_MEASURED: dict[int, dict[Hashable, Timing]] = {}  # by identity: a denoiser need not be hashable


def timing(owner: object, key: Hashable, call: Callable[[int], object], sizes: Sequence[int], steps: int) -> Timing:
    """Times a network once for each owner and key: what it is given, on what, by how many threads.

    Arguments:
        owner: The denoiser.
        key: What else the time depends on.
        call: Runs the network with so many rows, and waits for it.
        sizes: Rows to try, rising.
        steps: Calls of a sequential run, of the first size.
    """
    if id(owner) not in _MEASURED:
        weakref.finalize(owner, _MEASURED.pop, id(owner), None)
    known = _MEASURED.setdefault(id(owner), {})
    if key not in known:
        known[key] = _measure(call, sizes, steps)
    return known[key]


def _measure(call: Callable[[int], object], sizes: Sequence[int], steps: int) -> Timing:
    rows: list[int] = []
    seconds: list[float] = []
    spent = 0.0
    call(sizes[0])  # what is built at the first call is not part of any round
    for size in sizes:
        runs: list[float] = []
        # a quick call is at the mercy of whatever else the machine does
        while len(runs) < 2 or (len(runs) < 5 and sum(runs) < 0.01):
            started = time.perf_counter()
            call(size)
            runs.append(time.perf_counter() - started)
            # a call far slower than its rows explain may have been compiling for them
            if runs[0] > 0.2 and (not rows or runs[0] < 1.5 * seconds[-1] * size / rows[-1]):
                break
        rows.append(size)
        seconds.append(min(runs))
        spent += sum(runs)
        prices = [s / n for n, s in zip(rows, seconds, strict=True)]
        settled = len(prices) > 2 and min(prices[-2:]) > 0.95 * prices[-3]
        if settled or spent > max(LEAST, SHARE * steps * seconds[0]):
            break
    return Timing(tuple(rows), tuple(seconds))


@dataclass(frozen=True)
class Choice:
    """A window and how many rows a network call may have.

    Attributes:
        window: Steps iterated at once; 1 is the sequential sampler.
        rows: Most rows in a call.
        seconds: The run's predicted time.
        sequential_seconds: The sequential run's.
    """

    window: int
    rows: int
    seconds: float
    sequential_seconds: float


class Tuner:
    """What a sampler knows of its runs: $c$ and $o$."""

    def __init__(self) -> None:
        self.extra, self.own = EXTRA, OWN

    def learn(self, steps: int, window: int, rounds: int, own: float) -> None:
        """From a complete run that evaluated so many steps: its rounds, and the seconds in which the network did not run."""
        self.extra = max(1.0, rounds - steps / window)
        self.own = own / rounds

    def choose(self, timing: Timing, steps: int, evaluated: int, samples: int, largest: int, most: int | None) -> Choice:
        """The fastest window.

        Arguments:
            timing: The network's.
            steps: Those of the sequential sampler.
            evaluated: $M$: as many, or fewer where steps share an evaluation.
            samples: $S$.
            largest: The largest window that fits in memory.
            most: Most rows in a call that do.
        """
        rows = timing.slice(most)
        sequential = steps * timing.at(samples, most)
        best = Choice(1, rows, sequential, sequential)
        for window in _powers(2, min(largest, evaluated)):
            passing = evaluated / window
            if passing + self.extra >= steps:
                continue
            narrow = max(1.0, (0.75 - 0.5 * math.sqrt(window / evaluated)) * window)
            network = passing * timing.at(window * samples, most) + self.extra * timing.at(narrow * samples, most)
            seconds = network + (passing + self.extra) * self.own
            if seconds < best.seconds:
                best = Choice(window, rows, seconds, sequential)
        return best


@dataclass(frozen=True)
class Guarded(Sliding):
    """A sliding window that goes on one step after the other where that would have been faster.

    Arguments:
        price: What a round costs, in rounds of one step.
        patience: Rounds to wait for the window to pay.
    """

    price: float = 1.0
    patience: int = 20

    def advance(self, table: Table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        # once true this stays true: a round of one step adds 1 on the right and `price` on the left
        hopeless = self.price * (rounds - self.patience) > int(ready.min())
        return Sliding(1).advance(table, rounds, ready) if hopeless else super().advance(table, rounds, ready)


def sizes(samples: int, steps: int, most: int | None) -> list[int]:
    """Rows to time: the batch, and twice as many as often as the run and the memory allow."""
    first = samples if most is None else min(samples, most)
    top = samples * steps if most is None else max(first, min(samples * steps, most))
    return [first, *_powers(2 * first, top)] if top > first else [first]


def _powers(first: int, last: int) -> list[int]:
    """`first`, doubled again and again up to `last`, and `last`."""
    out = []
    while first < last:
        out.append(first)
        first *= 2
    return [*out, last] if last >= 2 else out
