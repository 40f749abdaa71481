r"""Plans: theorems 3.3 and 3.5 of arXiv 2405.15986 as numbers, and what exact Gaussian laws say suffices.

With an exact score the theorems bound the distance of the output from $p_η$, the data at time $η$, by

| method | bound | rounds | memory |
|---|---|---|---|
| `"sde"` (3.3) | $\mathrm{KL} ≲ d e^{-T} + d ε T + d T e^{-K}$ | $N K$ | $M d$ |
| `"ode"` (3.5) | $\mathrm{TV}^2 ≲ d e^{-T} + d ε^2 T^2 + d N^2 e^{-K}$ and the corrector's | $N (K + N^† K^†)$ | $M d$ |

and ask for blocks short enough that a Picard round contracts, $L^2 h e^{7h/2} ≪ 1$. The orders are the theorems'. They name no
constants: **ours** are

- 1 for every constant hidden in ≲; a third of $δ^2$ for each of the three terms;
- $1/e$ for "≪ 1", so that a round is worth the factor $e$ that the last term credits it with;
- for the corrector friction $γ = \sqrt L$, $T^† = 1/\sqrt L$ in one block, $ε^† = T^† δ / \sqrt d$ and $K^† = K$.

`Plan.sufficient` answers the same question by exact laws (`piadm.gaussian_law`) for Gaussian data with half of the coordinates
of variance $1/L$ and half of variance 4: no theorem about other data, but a measure of how far the theorem's plan is from need.
There a third of $δ$ goes to each of start, steps and rounds (roots of small divergences add).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from piadm.denoiser import Denoiser
from piadm.errors import require, require_count, require_positive
from piadm.exponential import Corrector, ExponentialODE, ExponentialSDE
from piadm.fills import Copy
from piadm.gaussian_law import Law, gaussian_law, sequential_law
from piadm.propagators import Exponential
from piadm.samplers import Parallel
from piadm.schedules import OrnsteinUhlenbeck
from piadm.targets import Gaussian
from piadm.windows import Blocks, Window

Method = Literal["sde", "ode"]
WIDE = 4.0
"""The variance of the other half of the coordinates."""
FINE = 64
"""Steps a block from which laws are extrapolated, the error of a step being of first order."""


@dataclass(frozen=True)
class Plan:
    r"""A configuration of PIADM-SDE or PIADM-ODE, and what it costs.

    Attributes:
        method: `"sde"` or `"ode"`.
        dimension: $d$.
        tolerance: $δ$: $\mathrm{KL} \le δ^2$ for `"sde"`, $\mathrm{TV} \le δ$ for `"ode"`, from the data at time `early_stop`.
        lipschitz: $L$ of the score.
        horizon: $T$.
        block: $h$.
        step: $ε$.
        early_stop: $η$.
        iterations: $K$.
        corrector: $γ, T^†, N^†, ε^†, K^†$, for `"ode"`.
        sufficient: What the exact law of Gaussian data says suffices, itself a plan.
    """

    method: Method
    dimension: int
    tolerance: float
    lipschitz: float
    horizon: float
    block: float
    step: float
    early_stop: float
    iterations: int
    corrector: Corrector | None = None
    sufficient: Plan | None = None

    @property
    def blocks(self) -> int:
        """$N$."""
        return math.ceil(self.horizon / self.block - 1e-9)

    @property
    def block_steps(self) -> int:
        """$M$, the steps of a block."""
        return math.ceil(self.horizon / self.blocks / self.step - 1e-9)

    @property
    def last_steps(self) -> int:
        """The steps of the last block, which shrink with the time left: about $ε^{-1} \\log(1/η)$."""
        length = self.horizon / self.blocks
        whole = max(0, math.ceil((length - 1) / self.step - 1e-9))
        left = length - whole * self.step
        return whole + math.ceil(math.log(left / self.early_stop) / -math.log1p(-self.step) - 1e-9)

    @property
    def corrector_steps(self) -> int:
        r"""$N^† M^†$, after each block."""
        one = self.corrector
        return 0 if one is None else one.blocks * math.ceil(one.horizon / one.blocks / one.step - 1e-9)

    @property
    def steps(self) -> int:
        """Network calls of the sequential scheme."""
        return (self.blocks - 1) * self.block_steps + self.last_steps + self.blocks * self.corrector_steps

    @property
    def rounds(self) -> int:
        r"""$N (K + N^† K^†)$."""
        after = 0 if self.corrector is None else self.corrector.blocks * self.corrector.iterations
        return self.blocks * (self.iterations + after)

    @property
    def evaluations(self) -> int:
        """Network rows for each sample."""
        predictor = self.iterations * ((self.blocks - 1) * self.block_steps + self.last_steps)
        corrector = 0 if self.corrector is None else self.corrector.iterations * self.corrector_steps
        return predictor + self.blocks * corrector

    @property
    def memory(self) -> int:
        """Bytes of the states of the largest block, in float32, for each sample; the solver holds some six times as much."""
        components = 1 if self.corrector is None else 2
        return 4 * components * self.dimension * (1 + max(self.block_steps, self.last_steps, self.corrector_steps))

    def scheme(self) -> ExponentialSDE | ExponentialODE:
        """The sequential scheme."""
        numbers = self.horizon, self.block, self.step, self.early_stop
        return ExponentialSDE(*numbers) if self.method == "sde" else ExponentialODE(*numbers, self.corrector)


def plan(
    dimension: int, tolerance: float, *, lipschitz: float = 1.0, method: Method = "sde", early_stop: float | None = None
) -> Plan:
    """The theorem's configuration, with what exact laws say suffices as its `sufficient`; takes some seconds.

    Arguments and errors are those of `theorem`.
    """
    found = theorem(dimension, tolerance, lipschitz=lipschitz, method=method, early_stop=early_stop)
    return replace(found, sufficient=_sufficient(found))


def theorem(
    dimension: int, tolerance: float, *, lipschitz: float = 1.0, method: Method = "sde", early_stop: float | None = None
) -> Plan:
    r"""The configuration with which the theorem puts the output within `tolerance` of the data at time `early_stop`.

    Arguments:
        dimension: $d$.
        tolerance: $δ$: $\mathrm{KL} \le δ^2$ for `"sde"`, $\mathrm{TV} \le δ$ for `"ode"`.
        lipschitz: $L$, the score's Lipschitz constant from `early_stop` on; 1 at least.
        method: `"sde"` or `"ode"`.
        early_stop: $η$; 1e-3 by default, or half a block where that is less.

    Raises:
        ValueError: for numbers out of range.
    """
    require_count("dimension", dimension, "dimension=3072")
    ok = isinstance(tolerance, int | float) and 0 < tolerance < 1
    require(ok, "tolerance", tolerance, "give a number between 0 and 1, for example 0.1")
    require_positive("lipschitz", lipschitz, "lipschitz=1.0")
    require(lipschitz >= 1, "lipschitz", lipschitz, "noise alone has 1: give at least that")
    require(method in ("sde", "ode"), "method", method, "give 'sde' or 'ode'")
    block = _contracting(lipschitz)
    early_stop = min(1e-3, block / 2) if early_stop is None else early_stop
    require_positive("early_stop", early_stop, "early_stop=1e-3")
    require(early_stop < block, "early_stop", early_stop, f"must be below the block length {block:.3g}")
    third = tolerance**2 / 3
    horizon = max(math.log(dimension / third), block)
    common = (method, dimension, tolerance, lipschitz, horizon, block)
    if method == "sde":
        step = min(third / (dimension * horizon), block, 0.5)
        found = Plan(*common, step, early_stop, max(1, math.ceil(math.log(dimension * horizon / third))))
    else:
        step = min(math.sqrt(third / dimension) / horizon, block, 0.5)
        iterations = max(1, math.ceil(math.log(dimension * math.ceil(horizon / block) ** 2 / third)))
        time = 1 / math.sqrt(lipschitz)
        corrector = Corrector(1 / time, time, 1, time * min(1.0, tolerance / math.sqrt(dimension)), iterations)
        found = Plan(*common, step, early_stop, iterations, corrector)
    return found


def _contracting(lipschitz: float) -> float:
    """$h$ with $L^2 h e^{7h/2} = 1/e$."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lipschitz**2 * middle * math.exp(3.5 * middle) < math.exp(-1) else (low, middle)
    return low


def _kinds(one: Plan) -> tuple[Tensor, Tensor]:
    """The variances of the Gaussian target, and those of the data at time η."""
    v = torch.tensor([1 / one.lipschitz, WIDE], dtype=torch.float64)
    return v, math.exp(-one.early_stop) * v - math.expm1(-one.early_stop)


def _sufficient(wanted: Plan) -> Plan:
    """The fewest rounds among some block lengths, each with its own step and rounds by the exact law."""
    variance, data = _kinds(wanted)
    budget = wanted.tolerance**2 / 9 / wanted.dimension  # of each of three parts, for each coordinate
    horizon = sufficient_horizon(variance, data, wanted.early_stop, budget, wanted.method == "sde")
    found = []
    for block in (1.0, 2.0, 4.0):
        if not wanted.early_stop < block / 2:
            continue
        one = replace(wanted, horizon=max(horizon, block), block=block, sufficient=None)
        one = at_step(one, sufficient_step(one, variance, data, 4 * budget))
        found.append(with_rounds(one, sufficient_rounds(one, variance, budget)))
    return min(found, key=lambda one: (one.rounds, one.evaluations))


def divergence(variance: Tensor, reference: Tensor) -> float:
    """KL of centred Gaussians for each coordinate, averaged over kinds."""
    return Law(variance, 0.0, 0, 0.0).divergence(reference)


def sufficient_horizon(variance: Tensor, data: Tensor, early_stop: float, budget: float, noisy: bool) -> float:
    r"""$T$, in steps of a half, from which the exact reverse process started at $N(0, 1)$ ends within `budget` a coordinate.

    Of its start the reverse SDE keeps $e^{-(T-η)/2} v_η / v_T$, the probability flow $\sqrt{v_η / v_T}$.
    """
    horizon = 0.5
    while True:
        start = math.exp(-horizon) * variance - math.expm1(-horizon)
        slope = math.exp(-(horizon - early_stop) / 2) * data / start if noisy else (data / start).sqrt()
        if divergence(data + slope**2 * (1 - start), data) <= budget:
            return horizon
        horizon += 0.5


def at_step(one: Plan, step: float) -> Plan:
    """A plan with another step, and as many steps in a corrector's block as in a predictor's."""
    if one.corrector is None:
        return replace(one, step=step)
    fraction = step / (one.horizon / one.blocks)
    return replace(one, step=step, corrector=replace(one.corrector, step=one.corrector.horizon * min(1.0, fraction)))


def with_rounds(one: Plan, iterations: int) -> Plan:
    """A plan with another $K$, which is the corrector's too."""
    corrector = None if one.corrector is None else replace(one.corrector, iterations=iterations)
    return replace(one, iterations=iterations, corrector=corrector)


def sufficient_step(one: Plan, variance: Tensor, data: Tensor, budget: float) -> float:
    r"""The largest $h/2^i$ with which the sequential output is within `budget` a coordinate of the data at $η$.

    From `FINE` steps a block on the step's error in the output's variance is extrapolated, which is of first order. It alone
    then has to be within a fourth, half of the distance, the horizon's being taken care of.
    """
    schedule, length = OrnsteinUhlenbeck(), one.horizon / one.blocks

    def output(step: float) -> Tensor:
        return sequential_law(schedule, at_step(one, step).scheme()(schedule), variance).variance

    step = min(length, 1.0) / 2
    while length / step < FINE:
        if divergence(output(step), data) <= budget:
            return step
        step /= 2
    rate = (output(2 * step) - output(step)) / step
    return _bisect(lambda trial: divergence(data + rate * trial, data) <= budget / 4, step)


def _bisect(fits: Callable[[float], bool], high: float) -> float:
    """The largest step below `high` that fits, to one in a thousand."""
    low = high
    while not fits(low):
        low /= 2
        if low < 1e-30:
            raise ValueError("`horizon` is too short: no step is small enough")
    if low == high:
        return high
    high = 2 * low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def sufficient_rounds(
    one: Plan, variance: Tensor, budget: float, window: Callable[[int], Window] = Blocks, per_unit: int = 32
) -> int:
    r"""The least $K$ with which the parallel output is within `budget` a coordinate of the sequential one.

    At `per_unit` steps a block, and a unit of time, at most: how fast Picard rounds contract depends on the block's length,
    hardly on its steps (twice as many than that raised $K$ by none or one). Searched with a fourth of them first.

    Arguments:
        one: Everything but $K$.
        variance: $v$ of each kind of coordinate.
        budget: In nats.
        window: `Blocks`, or `Pipelined`.
        per_unit: The finest grid to look at.
    """
    low, high = 0, 1
    while not _close(one, variance, budget, window(high), per_unit // 4):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _close(one, variance, budget, window(middle), per_unit // 4) else (middle, high)
    while not _close(one, variance, budget, window(high), per_unit):
        high += 1
    return high


def _close(one: Plan, variance: Tensor, budget: float, window: Window, per_unit: int) -> bool:
    """Whether the law in that window is within `budget` of the sequential one."""
    length, schedule = one.horizon / one.blocks, OrnsteinUhlenbeck()
    scheme = at_step(one, max(one.step, min(length, 1.0) / per_unit)).scheme()
    denoiser = Denoiser(Gaussian(), schedule, "sample", variance=1.0)  # the law looks at its schedule alone
    sampler = Parallel(denoiser, scheme, propagator=Exponential(), window=window, fill=Copy(), audit=False)
    reference = sequential_law(schedule, sampler.table, variance).variance
    return divergence(gaussian_law(sampler, variance).variance, reference) <= budget
