r"""Exact in law: a sampler whose samples follow the sequential scheme's law, not its path."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from piadm.certificate import EXACT, Certificate
from piadm.checkpoint import Audit
from piadm.denoiser import DenoiserLike
from piadm.errors import require_positive
from piadm.fills import Fill
from piadm.noise import Noise
from piadm.propagators import Propagator
from piadm.samplers import Parallel
from piadm.schemes import Scheme
from piadm.solver import State
from piadm.speculative import THRESHOLD, SpeculativeSolver, check_speculative
from piadm.windows import Window


class Exact(Parallel):
    r"""Samples whose law is exactly that of the sequential stochastic scheme: no tolerance, no bias.

    Rounds are those of `Parallel`, but a step is finished by a test, which keeps the draft or reflects it such that the state's
    law given the one before is the scheme's; `piadm.speculative` has the algorithm, the proof and what is left to rounding.
    One seed gives one sample for one window, propagator, fill and threshold; other ones, and `Sequential`, give other samples
    of the same law. A run takes at most as many rounds as there are steps, and one for every step whose noise the network does
    not see.

    Arguments:
        denoiser: The denoiser.
        scheme: The steps, at least one of them with noise, such as `DDPM(steps=1000)`.
        propagator: The linear model $J$ of a step; `Secant` with the denoiser's variance by default.
        window: How many steps are iterated at once, `None` for all, `"auto"` for the measured fastest (then a seed gives one
            sample on one machine only, where the same window is found), or a `Window` that begins at the first unfinished step.
        threshold: $θ$, in units of a step's noise: drafts whose mean is further off are recomputed, not tested. It changes the
            number of rounds, never the law. Chosen by the mean rounds of `digits`, DDPM 1000, at window 128 and the full one
            (`benchmarks/exact.py`): from 1 on they are the same to 2 %, 0.1 takes 7 % more.
        max_rounds: Ends the run early; the samples are then the newest predictions of $x_0$, of no promised law, and
            `converged` is `False`.
        fill: What unvisited states hold; `Jump` with the denoiser's mean and variance by default.
        max_memory: As in `Parallel`.

    A call's arguments, result and errors are those of `Parallel`; `result.acceptance` counts the tests.

    Raises:
        ValueError, TypeError: for arguments that do not fit, among them a deterministic scheme, before any network call.
        NonFiniteError: as `Parallel`.
    """

    _kind = "exact"
    _settings = ("propagator", "window", "fill", "threshold")

    def __init__(
        self,
        denoiser: DenoiserLike,
        scheme: Scheme,
        *,
        propagator: Propagator | None = None,
        window: int | Window | Literal["auto"] | None = 32,
        threshold: float = THRESHOLD,
        max_rounds: int | None = None,
        fill: Fill | None = None,
        max_memory: float | None = None,
    ) -> None:
        how: dict[str, Any] = {"propagator": propagator, "window": window, "max_rounds": max_rounds, "fill": fill}
        super().__init__(denoiser, scheme, max_memory=max_memory, merge=False, **how)
        require_positive("threshold", threshold, f"threshold={THRESHOLD}")
        check_speculative(self.table, self.window, scheme)
        self.threshold = threshold

    def __repr__(self) -> str:
        window = self.window if self._tuner is None else "auto"
        how = f"propagator={self.propagator}, window={window}, threshold={self.threshold:g}"
        return f"{type(self).__name__}({self.denoiser!r}, {self.scheme!r}, {how})"

    def _solver(self, noise: Noise) -> SpeculativeSolver:
        policies = self.propagator, self.window, self.fill, self.tolerance, self.denoiser.variance
        return SpeculativeSolver(self.table, noise, *policies, threshold=self.threshold)

    def _certificate(self, state: State, audit: Audit, short: Tensor) -> Certificate:
        return replace(EXACT, kl=math.inf) if bool(short.any()) else EXACT
