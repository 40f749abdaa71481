"""What a sampler returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from piadm.certificate import Certificate
from piadm.tuning import Choice


@dataclass(frozen=True, eq=False)
class Acceptance:
    """How `Exact` finished each sample's steps; per sample, shape `(S,)`, int64, on the CPU. They add up to the steps.

    Attributes:
        accepted: Tests that kept the draft.
        rejected: Tests that moved it.
        recomputed: Steps taken from their true mean without a test.
    """

    accepted: Tensor
    rejected: Tensor
    recomputed: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What a sampler returns.

    Attributes:
        samples: The samples, shape `(S, *event)`.
        steps: $M$, the sequential scheme's network calls.
        rounds: Batched network calls, one after the other, that made the samples; the certificate has its own.
        evaluations: Network rows (state × time) per sample, averaged over the batch, likewise.
        residuals: For each round the rms defect of every step of its window, the largest over samples, shape `(W,)`; NaN at
            a step that no sample iterated.
        windows: For each round its first step and one past its last, over all samples.
        converged: Whether every step was finished (`False` when `max_rounds` ended the run first).
        error: Estimated rms distance of each sample from the sequential one, held against `tolerance`; shape `(S,)`; 0 for
            `Sequential` and `Exact`, infinite for a sample that `max_rounds` cut short. See `piadm.stopping`.
        certificate: How far the law of the samples is, at most, from the sequential scheme's. See `piadm.certificate`.
        seconds: Wall time, network included.
        network_seconds: Of that, time inside the denoiser.
        acceptance: Of `Exact`, what became of its tests.
        choice: Of `window="auto"`, the window, and the times predicted.
    """

    samples: Tensor
    steps: int
    rounds: int
    evaluations: float
    residuals: tuple[Tensor, ...]
    windows: tuple[tuple[int, int], ...]
    converged: bool
    error: Tensor
    certificate: Certificate
    seconds: float
    network_seconds: float
    acceptance: Acceptance | None = field(default=None, kw_only=True)
    choice: Choice | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        return (
            f"Result(samples={tuple(self.samples.shape)} {self.samples.dtype}, steps={self.steps}, rounds={self.rounds}, "
            f"evaluations={self.evaluations:.4g} ({self.evaluations / self.steps:.3g} a step), converged={self.converged}, "
            f"error≈{self.error.max():.1e}, {self.certificate}, seconds={self.seconds:.3g})"
        )
