r"""Films: how the first samples of a run emerged, round by round.

A round's rows of a sample are the steps of its window. The first is evaluated at the newest finished state, $x_m$; the answer
to the last is the run's newest word on the sample, $f(x_{m + W - 1}) ≈ \mathbb{E}[x_0]$. A film keeps both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from piadm.denoiser import DenoiserLike
from piadm.executors import Executor, in_slices
from piadm.pictures import is_image

SAMPLES = 4
"""How many samples are filmed."""
FRAMES = 64
"""How many rounds are kept at most, besides the last: of longer runs every second, every fourth and so on."""
SIDE = 64
"""Pixels along an image's longer side, at most."""
NUMBERS = 256
"""Of samples that are no images, how many numbers are kept."""
_LARGEST = 6e4  # about what float16 holds


class Film(Executor):
    """A denoiser that keeps what each round saw of the first samples, and changes nothing.

    Give the sampler the film for its denoiser, `film.condition(samples)` among its conditions, and `film.callback`.

    Arguments:
        denoiser: The denoiser. Times must fall from noise to data, as those of all `piadm.schedules` do.

    Attributes:
        newest: Of each sample filmed, as the last round that saw it left it: the prediction and the finished state.
    """

    takes = ("film_sample",)

    def __init__(self, denoiser: DenoiserLike) -> None:
        super().__init__(in_slices(denoiser))
        self._name = repr(denoiser)
        self._finished: dict[int, tuple[float, Tensor]] = {}
        self._ahead: dict[int, tuple[float, Tensor]] = {}
        self._frames: list[tuple[int, dict[int, tuple[Tensor, Tensor]]]] = []
        self._every = 1
        self.newest: dict[int, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return self._name

    def condition(self, samples: int) -> dict[str, Tensor]:
        """What tells the film whose row is whose; the network never sees it."""
        return {"film_sample": torch.arange(samples)}

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        whose: Tensor = condition.pop("film_sample")
        f = self.denoiser(x, t, **condition)
        for sample in range(min(SAMPLES, int(whose.max()) + 1)):
            rows = (whose == sample).nonzero().flatten().tolist()
            if not rows:
                continue
            # rows of a sample run from noise to data; a round may take several calls, one of them an audit of earlier steps
            first, last = float(t[rows[0]]), float(t[rows[-1]])
            if first >= self._finished.get(sample, (-math.inf,))[0]:
                self._finished[sample] = first, thumbnail(x[rows[0]])
            if last < self._ahead.get(sample, (math.inf,))[0]:
                self._ahead[sample] = last, thumbnail(f[rows[-1]])
        return f

    def callback(self, round: int, window: tuple[int, int], residuals: Tensor) -> None:
        """Ends a round, as `callback` of a sampler's call."""
        seen = {n: (self._ahead[n][1], self._finished[n][1]) for n in self._finished.keys() & self._ahead.keys()}
        self.newest |= seen
        if (round - 1) % self._every == 0:
            self._frames.append((round, seen))
            if len(self._frames) > FRAMES:
                del self._frames[1::2]
                self._every *= 2
        self._finished, self._ahead = {}, {}

    def tensors(self, rounds: int, samples: Tensor) -> dict[str, Tensor]:
        """The film, which ends on the samples.

        Arguments:
            rounds: Rounds of the run.
            samples: What came of it, shape `(S, *event)`.

        Returns:
            `rounds`, shape `(F,)`, the last one more than there were; `ahead` and `finished`, predictions and finished states,
            float16, of shape `(F, n, 1 | 3, h, w)` for images, made smaller, and else `(F, n, D)`, cut short.
        """
        last = [thumbnail(sample) for sample in samples[:SAMPLES]]
        # a sample that has ended is not evaluated again: its last frame stays; one that had before the film began shows its end
        shown = {n: (end, end) for n, end in enumerate(last)}
        ahead, finished = [], []
        for _, seen in self._frames:
            shown.update(seen)
            ahead.append(torch.stack([shown[n][0] for n in range(len(last))]))
            finished.append(torch.stack([shown[n][1] for n in range(len(last))]))
        return {
            "rounds": torch.tensor([*(round for round, _ in self._frames), rounds + 1]),
            "ahead": torch.stack([*ahead, torch.stack(last)]),
            "finished": torch.stack([*finished, torch.stack(last)]),
        }


def thumbnail(event: Tensor) -> Tensor:
    """One sample's state small enough to be kept of every round, float16, on the CPU."""
    event = event.detach().float()
    if not is_image(event.shape):
        event = event.flatten()[:NUMBERS]
    elif max(event.shape[1:]) > SIDE:
        height, width = (max(1, size * SIDE // max(event.shape[1:])) for size in event.shape[1:])
        event = adaptive_avg_pool2d(event, (height, width))
    return event.cpu().clamp(-_LARGEST, _LARGEST).half()
