r"""Picard iteration with the exponential integrator, as the paper that piadm follows has it, in a sliding window."""

from __future__ import annotations

from piadm import Parallel, fills, propagators
from piadm.denoiser import DenoiserLike
from piadm.schemes import Scheme


def Picard(denoiser: DenoiserLike, scheme: Scheme, *, window: int | None = None, tolerance: float = 1e-2) -> Parallel:
    """`piadm.Parallel` with the linear part integrated exactly and the score lagging a round, states filled by copies.

    The published algorithm fixes the rounds of a block in advance and so has no stopping rule; this one has piadm's.

    References:
        Chen, Ren, Ying, Rotskoff, "Accelerating Diffusion Models with Parallel Sampling", 2024 (arXiv 2405.15986).
    """
    propagator, fill = propagators.Exponential(), fills.Copy()
    return Parallel(denoiser, scheme, propagator=propagator, fill=fill, window=window, tolerance=tolerance)
