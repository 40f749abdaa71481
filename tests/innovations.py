r"""The law of a run, tested on its innovations $ζ_m = C_m^+ (x_{m+1} - A_m x_m - B_m f(x_m))$ between finished states.

If every step has the scheme's law, $ζ_m$ is $N(0, I)$ given all that was drawn for earlier steps, whatever the target. So

- $z_m = ⟨ζ_m, a_m⟩$ is $N(0, 1)$ and independent from step to step, for unit vectors $a_m$ made from what was drawn before;
- $\sum_m w_m z_m / \sqrt{\sum w_m^2}$ and $\sum_m w_m (z_m^2 - 1) / \sqrt{2 \sum w_m^2}$ are standard normal in the limit of
  many terms, for weights $w_m$ made likewise: the joint moments of noise and state.

What the noise cannot explain, $x_{m+1} - A_m x_m - B_m f(x_m) - C_m ζ_m$, must be zero.

$a_m$ is the direction of the draft's error $e_m$ when a scan first came to step $m$: whatever is wrong with a test shows there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import piadm
from piadm.fills import Jump
from piadm.noise import Noise
from piadm.samplers import _Network
from piadm.speculative import Speculation, SpeculativeSolver


@dataclass(frozen=True)
class Run:
    """What a run did: finished states, draft errors when a scan first came to a step, innovations, and its last state."""

    path: Tensor  # (M + 1, k, S, D)
    error: Tensor  # (M, k, S, D), e_m
    innovation: Tensor  # (M', k', S, D), of the steps whose noise the network sees, and of the components that are drawn
    steps: Tensor  # (M',)
    off: float  # the largest part of any step that its noise cannot explain
    state: Speculation


def observe(
    denoiser,
    scheme,
    samples: int,
    *,
    solver: type[SpeculativeSolver] = SpeculativeSolver,
    propagator=None,
    window=None,
    threshold: float = 1e9,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **condition,
) -> Run:
    """Drives a solver by hand and keeps what it finishes."""
    table, event = scheme(denoiser.schedule), tuple(denoiser.event_shape)
    k, size, total = table.components, math.prod(event), len(table)
    noise = Noise(torch.Generator().manual_seed(seed), samples, size, k, torch.device("cpu"), dtype)
    propagator = piadm.propagators.Secant(denoiser.variance) if propagator is None else propagator
    policies = propagator, piadm.windows.Sliding(window), Jump(denoiser.mean, denoiser.variance)
    scans: list[tuple[Tensor, Tensor]] = []

    class Watched(solver):
        def _recalled(self, *given):
            scans.append(super()._recalled(*given))
            return scans[-1]

    one = Watched(table, noise, *policies, 1.0, denoiser.variance, threshold=threshold)
    network = _Network(denoiser, event, samples, condition)
    rows = table.cast(noise.device, dtype)
    lift = torch.linalg.pinv(table.C[:, :1]).to(dtype)
    path = torch.full((total + 1, k, samples, size), torch.nan, dtype=dtype)
    error = torch.full((total, k, samples, size), torch.nan, dtype=dtype)
    state = one.init(noise.start() * table.scale)
    path[0] = state.x[0]
    while not state.done:
        request = one.request(state)
        answer = network(request)
        after = one.update(state, answer)
        steps, valid = state.placement.steps.clamp(max=total - 1), state.placement.valid
        drafted, mean = scans[-1]
        e = torch.einsum("wsij,wjsd->wsid", lift[steps], (state.mean - mean)[:, :1])
        kept = drafted + torch.einsum("wsij,wjsd->wisd", table.C[steps].to(dtype), state.noise)
        lane, count = torch.arange(len(valid))[:, None], after.start - state.start
        # the scan may have looked at the lane after the last finished one
        first = (lane <= count) & valid & error[steps, 0, torch.arange(samples), 0].isnan()
        w, s = first.nonzero(as_tuple=True)
        error[steps[w, s], :, s] = e[w, s]
        w, s = ((lane + 1 < count) & valid).nonzero(as_tuple=True)
        path[steps[w, s] + 1, :, s] = kept[w, :, s]
        path[after.start, :, torch.arange(samples)] = after.x[0].movedim(1, 0)
        state = after
    seen = (table.C[:, 0] != 0).any(1).nonzero().flatten()
    drawn = (table.C != 0).any(0).any(0)
    innovation, off = [], 0.0
    for m in range(total):
        x = path[m]
        f = denoiser(x[0].reshape(samples, *event), table.times[m].expand(samples), **condition).reshape(samples, size)
        gap = path[m + 1] - rows.take(torch.tensor([[m]])).step(x[None], f[None], None)[0]
        C = table.C[m].to(dtype)
        zeta = torch.einsum("ij,jsd->isd", torch.linalg.pinv(C), gap)
        off = max(off, float((gap - torch.einsum("ij,jsd->isd", C, zeta)).abs().max()))
        if m in seen:
            innovation.append(zeta[drawn])
    return Run(path, error[seen][:, drawn], torch.stack(innovation), seen, off, state)


def evidence(run: Run) -> float:
    """The smallest p-value of the module's statistics, times their number."""
    zeta = run.innovation.double()
    e = run.error.double()
    length = e.square().sum((1, 3), keepdim=True).sqrt()
    far = (length > 0.05).expand_as(length)[:, 0, :, 0]
    z = (zeta * e / length.clamp(min=1e-300)).sum((1, 3))
    x = run.path[run.steps].double()
    before = torch.zeros_like(z)
    before[1:] = z[:-1].nan_to_num() * (run.steps.diff() == 1)[:, None] * far[:-1]
    along = (x[:, :1] * e / length.clamp(min=1e-300)).sum((1, 3))
    weights = {"one": torch.ones_like(z), "length": length[:, 0, :, 0], "state": along, "noise before": before}
    p = [stats.kstest(z[far].numpy(), "norm").pvalue, stats.kstest(zeta.flatten().numpy(), "norm").pvalue]
    for w in weights.values():
        w = torch.where(far, w, 0.0)
        for value, variance in ((z, 1.0), (z.square() - 1, 2.0)):
            t = float((w * value)[far].sum() / (variance * w.square().sum()).sqrt())
            p.append(2 * stats.norm.sf(abs(t)))
    return float(np.min(p)) * len(p)
