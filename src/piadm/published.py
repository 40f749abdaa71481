r"""The paper's two samplers, exactly as published (arXiv 2405.15986), as instances of `Parallel`."""

from __future__ import annotations

from piadm.denoiser import DenoiserLike
from piadm.errors import require, require_count
from piadm.exponential import Corrector, ExponentialODE, ExponentialSDE
from piadm.fills import Copy
from piadm.planner import Plan
from piadm.propagators import Exponential
from piadm.samplers import Parallel
from piadm.windows import Blocks


class PIADMSDE(Parallel):
    r"""PIADM-SDE exactly as published: blocks of $O(1)$ time, $K$ Picard rounds each, exponential integrator.

    It is `Parallel` with the scheme `ExponentialSDE`, the propagator `Exponential`, the window `Blocks(iterations)` and the
    fill `Copy` (every state of a block starts at the block's first).

    Arguments:
        denoiser: The denoiser.
        horizon: $T$.
        block: $h$.
        step: $ε$.
        early_stop: $η$.
        iterations: $K$. The exponential integrator contracts slowly: on the embedded `digits` with these defaults 16 rounds
            end 8e-2 rms from the sequential scheme, 24 rounds 1e-3.

    Reference: arXiv 2405.15986, algorithm 1.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        *,
        horizon: float = 10.0,
        block: float = 1.0,
        step: float = 0.05,
        early_stop: float = 1e-3,
        iterations: int = 24,
    ) -> None:
        require_count("iterations", iterations, "iterations=24")
        scheme = ExponentialSDE(horizon, block, step, early_stop)
        super().__init__(denoiser, scheme, propagator=Exponential(), window=Blocks(iterations), fill=Copy())

    @classmethod
    def with_steps(
        cls,
        denoiser: DenoiserLike,
        steps: int,
        *,
        horizon: float = 10.0,
        block: float = 1.0,
        early_stop: float = 1e-3,
        iterations: int = 24,
    ) -> PIADMSDE:
        """With the smallest step for which the whole run has at most `steps` of them."""
        step = ExponentialSDE.with_steps(steps, horizon, block, early_stop).step
        return cls(denoiser, horizon=horizon, block=block, step=step, early_stop=early_stop, iterations=iterations)

    @classmethod
    def from_plan(cls, plan: Plan, denoiser: DenoiserLike) -> PIADMSDE:
        """The sampler that `piadm.plan(…, method="sde")`, or its `sufficient`, describes."""
        require(plan.method == "sde", "plan", plan.method, "is for PIADMODE")
        return cls(
            denoiser,
            horizon=plan.horizon,
            block=plan.block,
            step=plan.step,
            early_stop=plan.early_stop,
            iterations=plan.iterations,
        )


class PIADMODE(Parallel):
    r"""PIADM-ODE as published: after each block of the probability-flow ODE, parallel underdamped Langevin dynamics.

    Predictor and corrector are blocks of one table (`ExponentialODE`), which the same solver runs.

    Arguments:
        denoiser: The denoiser.
        horizon: $T$.
        block: $h$.
        step: $ε$.
        early_stop: $η$.
        iterations: $K$, the predictor's rounds a block.
        corrector: Its friction, horizon, blocks, step and rounds; `Corrector.matched(early_stop)` by default.

    Reference: arXiv 2405.15986, algorithm 2.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        *,
        horizon: float = 10.0,
        block: float = 1.0,
        step: float = 0.05,
        early_stop: float = 1e-3,
        iterations: int = 24,
        corrector: Corrector | None = None,
    ) -> None:
        require_count("iterations", iterations, "iterations=24")
        corrector = Corrector.matched(early_stop, iterations=iterations) if corrector is None else corrector
        scheme = ExponentialODE(horizon, block, step, early_stop, corrector)
        per_block = [iterations] + [corrector.iterations] * corrector.blocks
        window = Blocks(per_block * scheme.count)
        super().__init__(denoiser, scheme, propagator=Exponential(), window=window, fill=Copy())

    @classmethod
    def with_steps(
        cls,
        denoiser: DenoiserLike,
        steps: int,
        *,
        horizon: float = 10.0,
        block: float = 1.0,
        early_stop: float = 1e-3,
        iterations: int = 24,
    ) -> PIADMODE:
        """With at most `steps` steps in the whole run, half of them the correctors' (both need the same order of them)."""
        require_count("steps", steps, "steps=1000")
        blocks = ExponentialODE(horizon, block, min(block, 0.5), early_stop).count
        each = max(1, steps // (2 * blocks))
        try:
            step = ExponentialODE.with_steps(steps - each * blocks, horizon, block, early_stop).step
        except ValueError as error:
            remedy = f"too few for a corrector after each of {blocks} blocks: give {2 * steps}, or a longer block"
            raise ValueError(f"`steps` is {steps}: {remedy}") from error
        corrector = Corrector.matched(early_stop, each, iterations)
        return cls(
            denoiser,
            horizon=horizon,
            block=block,
            step=step,
            early_stop=early_stop,
            iterations=iterations,
            corrector=corrector,
        )

    @classmethod
    def from_plan(cls, plan: Plan, denoiser: DenoiserLike) -> PIADMODE:
        """The sampler that `piadm.plan(…, method="ode")`, or its `sufficient`, describes."""
        require(plan.method == "ode", "plan", plan.method, "is for PIADMSDE")
        return cls(
            denoiser,
            horizon=plan.horizon,
            block=plan.block,
            step=plan.step,
            early_stop=plan.early_stop,
            iterations=plan.iterations,
            corrector=plan.corrector,
        )
