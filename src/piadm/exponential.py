r"""The paper's schemes (arXiv 2405.15986, algorithms 1 and 2) as tables.

In Ornstein-Uhlenbeck time the score $s = (α f - x)/σ^2$ is frozen over a step of length $ε$, and the linear part is
integrated exactly:

| scheme | $x'$ |
|---|---|
| `ExponentialSDE` | $e^{ε/2} x + 2 (e^{ε/2} - 1) s + \sqrt{e^ε - 1}\, ξ$ |
| `ExponentialODE` | $e^{ε/2} x + (e^{ε/2} - 1) s$ |
| `Corrector` | underdamped Langevin dynamics at a fixed time (below) |

On a network trained with another schedule the same steps are taken in the same log signal-to-noise ratio, with states
in that schedule's own scaling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from piadm.errors import require, require_count, require_positive
from piadm.schedules import OrnsteinUhlenbeck, Schedule
from piadm.tables import Table


def step_lengths(length: float, step: float, stop: float = 0.0) -> list[float]:
    r"""Steps of a block of the given length; with `stop` > 0, $\min(ε, ε (h - τ))$ until $h - $ `stop`, the last one clipped.

    Reference: arXiv 2405.15986, section 3.1.1 (the discretisation scheme with early stopping).
    """
    steps, left, end = [], length, stop
    while left - end > 1e-12 * length:
        wanted = min(step, step * left) if stop else step
        # a rounding's worth of remainder is not a step
        taken = left - end if left - end <= wanted * (1 + 1e-9) else wanted
        steps.append(taken)
        left -= taken
    return steps


@dataclass(frozen=True)
class Corrector:
    r"""Parallel underdamped Langevin dynamics $du = v\,dt$, $dv = -γ v\,dt + s(u)\,dt + \sqrt{2γ}\,dw$ at a block's end.

    A step of length $τ$ with $s$ frozen, $e = e^{-γτ}$, is exact:
    $u' = u + \frac{1-e}{γ} v + \frac{τ - (1-e)/γ}{γ} s + ζ_u$ and $v' = e v + \frac{1-e}{γ} s + ζ_v$ with
    $\mathrm{Var}\,ζ_v = 1 - e^2$, $\mathrm{Var}\,ζ_u = \frac{2}{γ} (τ - \frac{2(1-e)}{γ} + \frac{1-e^2}{2γ})$,
    $\mathrm{Cov} = (1-e)^2/γ$.

    Arguments:
        friction: $γ$.
        horizon: $T^†$, how long to run after each block.
        blocks: $N^†$, the number of blocks the horizon is cut into.
        step: $ε^†$, the step inside them.
        iterations: $K^†$, Picard rounds of each.

    Reference: arXiv 2405.15986, algorithm 2 and section B (parallel corrector).
    """

    friction: float = 2.0
    horizon: float = 1.0
    blocks: int = 1
    step: float = 0.1
    iterations: int = 8

    def __post_init__(self) -> None:
        for name in ("friction", "horizon", "step"):
            require_positive(name, getattr(self, name), f"Corrector({name}=0.5)")
        for name in ("blocks", "iterations"):
            require_count(name, getattr(self, name), f"Corrector({name}=2)")
        length = self.horizon / self.blocks
        require(self.step <= length * (1 + 1e-9), "step", self.step, f"exceeds a corrector block's length {length:g}")

    @classmethod
    def matched(cls, early_stop: float, steps: int = 10, iterations: int = 8) -> Corrector:
        r"""One block of `steps` steps with $γ = 1/\sqrt{η}$ over $T^† = \sqrt{η}$.

        At time $η$ the score's Lipschitz constant is $L ≈ 1/η$ at most; with friction of order $\sqrt L$ over times of order
        $1/\sqrt L$ steps are stable and the Picard rounds contract (theorem 3.5). Elsewhere it corrects less than it could.
        """
        require_positive("early_stop", early_stop, "Corrector.matched(early_stop=1e-3)")
        require_count("steps", steps, "Corrector.matched(1e-3, steps=10)")
        time = math.sqrt(early_stop)
        return cls(friction=1 / time, horizon=time, step=time / steps, iterations=iterations)

    def row(self, t: float, length: float) -> tuple[Tensor, Tensor, Tensor]:
        """$A, B, C$ of one step of the given length at Ornstein-Uhlenbeck time `t`."""
        gamma, x = self.friction, self.friction * length
        e, drift = math.exp(-x), -math.expm1(-x) / self.friction
        push = (length - drift) / gamma
        alpha, noise = math.exp(-t / 2), -math.expm1(-t)
        var_v, cov = -math.expm1(-2 * x), drift**2 * gamma
        if x < 0.5:  # x - 2(1 - e) + (1 - e²)/2 loses all digits as x → 0; its series does not
            bracket = math.fsum((-1) ** n * (2 - 2 ** (n - 1)) / math.factorial(n) * x**n for n in range(3, 24))
        else:
            bracket = x + 2 * math.expm1(-x) - math.expm1(-2 * x) / 2
        var_u = 2 / gamma**2 * bracket
        low = cov / math.sqrt(var_u)
        A = [[1 - push / noise, drift], [-drift / noise, e]]
        B = [alpha / noise * push, alpha / noise * drift]
        C = [[math.sqrt(var_u), 0.0], [low, math.sqrt(max(var_v - low**2, 0.0))]]
        return tuple(torch.tensor(v, dtype=torch.float64) for v in (A, B, C))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Exponential:
    r"""The paper's grid: $N = ⌈T/h⌉$ equal blocks of steps $ε$; in the last one the step shrinks with the time left."""

    horizon: float = 10.0
    block: float = 1.0
    step: float = 0.05
    early_stop: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("horizon", "block", "step", "early_stop"):
            require_positive(name, getattr(self, name), f"{type(self).__name__}({name}=0.5)")
        require(
            self.block <= self.horizon, "block", self.block, f"is longer than the horizon {self.horizon}: give at most that"
        )
        length = self._length
        require(self.step <= length, "step", self.step, f"is longer than a block ({length:g}): give at most that")
        require(self.step < 1, "step", self.step, "must be below 1, or the last block's shrinking steps never shrink")
        require(self.early_stop < length, "early_stop", self.early_stop, f"must be below the block length {length:g}")

    @property
    def count(self) -> int:
        """$N$, the number of blocks."""
        return math.ceil(self.horizon / self.block - 1e-9)

    @property
    def _length(self) -> float:
        return self.horizon / self.count

    def _blocks(self) -> Iterator[tuple[float, list[float]]]:
        """The time each block starts at, and its steps."""
        for n in range(self.count):
            last = n == self.count - 1
            start = self.horizon - n * self._length
            yield start, step_lengths(self._length, self.step, self.early_stop if last else 0.0)

    @classmethod
    def with_steps(cls, steps: int, horizon: float = 10.0, block: float = 1.0, early_stop: float = 1e-3) -> _Exponential:
        """The scheme of this horizon, block and early stop with at most `steps` steps, and as near to that as steps go."""
        require_count("steps", steps, "with_steps(1000)")
        low, high = 1e-7, min(block, 1.0) * (1 - 1e-9)

        def count(step: float) -> int:
            return sum(len(lengths) for _, lengths in cls(horizon, block, step, early_stop)._blocks())

        fewest = count(high)
        require(steps >= fewest, "steps", steps, f"this horizon, block and early stop need at least {fewest}")
        while high / low > 1 + 1e-6:
            middle = math.sqrt(low * high)
            # the bisection's lower end never needs counting far beyond what was asked
            too_many = horizon / middle > steps or count(middle) > steps
            low, high = (middle, high) if too_many else (low, middle)
        return cls(horizon, block, high, early_stop)


def _finish(
    schedule: Schedule, rows: list[tuple[Tensor, Tensor, Tensor]], clock: list[float], end: float, blocks: list[int]
) -> Table:
    """Stacks rows written in Ornstein-Uhlenbeck time and carries them to the schedule's own times and scaling."""
    A, B, C = (torch.stack(part) for part in zip(*rows, strict=True))
    t = torch.tensor([*clock, end], dtype=torch.float64)
    if isinstance(schedule, OrnsteinUhlenbeck):
        times = t
        scale = torch.ones_like(t)
    else:
        times = schedule.time(-torch.expm1(t).log() / 2)
        scale = schedule.alpha(times) / torch.exp(-t / 2)
    # component 0 is a position in the schedule's scaling, component 1 a velocity in the paper's
    left, right = torch.ones(2, len(rows), A.shape[-1], dtype=torch.float64)
    left[:, 0], right[:, 0] = scale[1:], scale[:-1]
    return Table(
        left[:, :, None] * A / right[:, None],
        left * B,
        left[:, :, None] * C,
        times[:-1],
        schedule.alpha(times),
        schedule.sigma(times),
        float(scale[0]),
        tuple(blocks),
    )


def _drift_row(t: float, length: float, weight: float, noise: float, components: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""$e^{ε/2} x + w (e^{ε/2} - 1) s$ on component 0, with the score written through the denoiser."""
    alpha, variance = math.exp(-t / 2), -math.expm1(-t)
    grow = math.expm1(length / 2)
    A, B, C = (torch.zeros(components, components, dtype=torch.float64) for _ in range(3))
    A[0, 0], B[0, 0], C[0, 0] = 1 + grow - weight * grow / variance, weight * grow * alpha / variance, noise
    return A, B[:, 0].clone(), C


@dataclass(frozen=True)
class ExponentialSDE(_Exponential):
    r"""$x' = e^{ε/2} x + 2 (e^{ε/2} - 1) s + \sqrt{e^ε - 1}\, ξ$: the scheme that PIADM-SDE runs in parallel.

    Arguments:
        horizon: $T$, the Ornstein-Uhlenbeck time at which sampling starts.
        block: $h$, at most; blocks of exactly $T/N$ fill the horizon.
        step: $ε$.
        early_stop: $η$, the time at which sampling ends.

    Reference: arXiv 2405.15986, algorithm 1.
    """

    def __call__(self, schedule: Schedule) -> Table:
        rows, clock, blocks = [], [], [0]
        for start, lengths in self._blocks():
            t = start
            for length in lengths:
                rows.append(_drift_row(t, length, 2.0, math.sqrt(math.expm1(length)), 1))
                clock.append(t)
                t -= length
            blocks.append(len(rows))
        return _finish(schedule, rows, clock, self.early_stop, blocks)


@dataclass(frozen=True)
class ExponentialODE(_Exponential):
    r"""$x' = e^{ε/2} x + (e^{ε/2} - 1) s$, each block followed by a corrector if one is given: what PIADM-ODE runs.

    Arguments:
        horizon: $T$, the Ornstein-Uhlenbeck time at which sampling starts.
        block: $h$, at most; blocks of exactly $T/N$ fill the horizon.
        step: $ε$.
        early_stop: $η$, the time at which sampling ends.
        corrector: Underdamped Langevin dynamics after every block; `None` for the predictor alone.

    Reference: arXiv 2405.15986, algorithm 2.
    """

    corrector: Corrector | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.corrector, Corrector | None):
            raise TypeError(
                f"`corrector` is {self.corrector!r}: give a Corrector, for example Corrector(friction=2.0), or None"
            )

    def __call__(self, schedule: Schedule) -> Table:
        k = 1 if self.corrector is None else 2
        rows, clock, blocks = [], [], [0]
        for n, (start, lengths) in enumerate(self._blocks()):
            t = start
            for length in lengths:
                rows.append(_drift_row(t, length, 1.0, 0.0, k))
                clock.append(t)
                t -= length
            blocks.append(len(rows))
            if self.corrector is None:
                continue
            rows[-1][2][1, 1] = 1.0  # the fresh velocity is the last predictor row's noise
            end = self.early_stop if n == self.count - 1 else start - self._length
            for _ in range(self.corrector.blocks):
                for length in step_lengths(self.corrector.horizon / self.corrector.blocks, self.corrector.step):
                    rows.append(self.corrector.row(end, length))
                    clock.append(end)
                blocks.append(len(rows))
        return _finish(schedule, rows, clock, self.early_stop, blocks)
