r"""Certificates: how far the law of the samples is, at most, from that of the sequential scheme.

A parallel run is the sequential scheme with its steps shifted by defects,

$$ x_{m+1} = Φ_m(x_m) + δ_m, \qquad δ_m = Φ_m(x^{old}_m) + J_m (x_m - x^{old}_m) - Φ_m(x_m) , $$

$x^{old}_m$ being the state at which the last round evaluated the network. States, propagator and the decision to accept
step $m$ look at $ξ_0 … ξ_{m-1}$ only (causality), so $δ_m$ is known before $ξ_m$ is drawn: given the past, $x_{m+1}$ is
Gaussian in both runs, with one covariance $C_m^2$ and means $δ_m$ apart. By the chain rule the sum of these is the divergence
of the whole paths, exactly, and the last state, being a function of the path, is no further apart (data processing):

$$ \mathrm{KL}(\text{parallel} \,‖\, \text{sequential}) \le \mathbb{E} \sum_m \frac{‖δ_m‖^2}{2 C_m^2},
   \qquad \mathrm{TV} \le \sqrt{\mathrm{KL} / 2} \quad \text{(Pinsker)}. $$

The expectation is over samples; a batch gives its mean and the mean's standard error.

*Measured* defects come from evaluating the network at the accepted states; *estimated* ones are what the stopping rule holds
them to be, times `piadm.stopping.CAUTION`.

Steps without noise have no such bound. Where they come last, as DDPM's last step does, the divergence speaks of the samples
that the last noisy state, taken through exact steps, would give, and `rms` says how far the returned ones are from those. In
schemes of the probability flow, with or without a corrector, `kl` is `None` and `rms` is the predicted distance from the
sequential sample: defects weighted by the Gaussian model's sensitivity (`piadm.stopping`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from piadm.tables import Table


@dataclass(frozen=True)
class Certificate:
    r"""How far the samples' law is from the sequential scheme's.

    Attributes:
        kl: Bound on $\mathrm{KL}(\text{parallel} ‖ \text{sequential})$ in nats: the mean over the batch of
            $\sum_m ‖δ_m‖^2 / (2 C_m^2)$. `None` where noiseless steps come before noisy ones or all are noiseless; infinite
            if the run was cut short or the network is not finite at an accepted state.
        standard_error: Of `kl`, over the batch; `None` for a batch of one.
        rms: Predicted rms distance, per coordinate in data units, that noiseless steps add: see above.
        rigorous: Whether the defects were measured. Estimated ones can be too small.
        calls: Network calls that measuring took, besides those that made the samples: one whenever steps left the window. None
            waits for another, and all but the last could run beside a later round, so a machine wide enough is a round late.
        evaluations: Likewise in network rows per sample.
    """

    kl: float | None
    standard_error: float | None
    rms: float
    rigorous: bool
    calls: int = 0
    evaluations: float = 0.0

    @property
    def tv(self) -> float | None:
        """Bound on the total variation distance, by Pinsker's inequality; at most 1."""
        return None if self.kl is None else min(1.0, math.sqrt(self.kl / 2))

    def __str__(self) -> str:
        how = "measured" if self.rigorous else "estimated"
        if self.kl is None:
            return f"rms {self.rms:.1e} to sequential ({how})"
        error = "" if self.standard_error is None else f" ± {self.standard_error:.1e}"
        shift = f", rms {self.rms:.1e} by steps without noise" if self.rms > 0 else ""
        return f"KL ≤ {self.kl:.2g}{error}, TV ≤ {self.tv:.2g}{shift} ({'rigorous' if self.rigorous else how})"

    @classmethod
    def of(
        cls, table: Table, nats: Tensor, rms: Tensor, rigorous: bool, calls: int = 0, evaluations: float = 0.0
    ) -> Certificate:
        r"""From every sample's $\sum_m ‖δ_m‖^2 / (2 C_m^2)$ and predicted rms, both of shape `(S,)`."""
        known = information(table) is not None
        nats = nats.double()
        return cls(
            kl=float(nats.mean()) if known else None,
            standard_error=float(nats.std()) / math.sqrt(len(nats)) if known and len(nats) > 1 else None,
            rms=float(rms.double().square().mean().sqrt()),
            rigorous=rigorous,
            calls=calls,
            evaluations=evaluations,
        )


EXACT = Certificate(kl=0.0, standard_error=None, rms=0.0, rigorous=True)
"""The sequential sampler's own."""


def information(table: Table) -> Tensor | None:
    r"""$1 / (2 C_m^2)$ by step, 0 in noiseless last steps, float64, shape `(M,)`; `None` if other steps are noiseless.

    With several components $C_m$ stands for its smallest singular value, whose bound is above the exact one.
    """
    scale = table.noise_scale
    noisy = scale > 0
    last = int(noisy.sum())
    if last == 0 or not bool(noisy[:last].all()):
        return None
    return torch.where(noisy, 1 / (2 * scale**2), 0.0)
