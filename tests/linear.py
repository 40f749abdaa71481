r"""Exact laws of the paper's algorithms on diagonal Gaussian targets, by linear algebra and from the paper's formulas alone.

For data $N(μ, v)$ per coordinate the score is $s(x, t) = -(x - e^{-t/2} μ) / (e^{-t} v + 1 - e^{-t})$, so every state of every
round is a linear form in $y_0$, in $μ$ and in the noises. A state is held as the vector of its coefficients, in the basis
$(y_0, μ, \text{noise of step } 0, \text{of step } 1, …)$ with two entries a step, and a run of the algorithm is a run on
vectors. Nothing here goes through piadm's tables, propagators or solver; `responses` is the other side of the comparison: it
reads the same coefficients off a piadm sampler, which is run on unit impulses instead of random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import piadm


@dataclass(frozen=True)
class Underdamped:
    """The corrector's numbers: friction, how long, in how many blocks, step, rounds (`None`: sequentially)."""

    friction: float
    horizon: float
    blocks: int
    step: float
    iterations: int | None


@dataclass(frozen=True)
class Law:
    """Output as a linear form: coefficients of $y_0$ and $μ$, and for every step what its noise contributes."""

    start: float
    mean: float
    noise: np.ndarray  # (M, 2), coefficients of each step's two noises
    covariance: np.ndarray  # (M, 2, 2), their covariances

    @property
    def contributions(self) -> np.ndarray:
        """Variance due to each step's noise, shape `(M,)`: it does not depend on how a covariance is factored."""
        return np.einsum("mi,mij,mj->m", self.noise, self.covariance, self.noise)

    @property
    def variance(self) -> float:
        return self.start**2 + self.contributions.sum()


def grid(T: float, h: float, eps: float, eta: float) -> list[list[tuple[float, float]]]:
    """(forward time, length) of every step of every block: N = ⌈T/h⌉, and in the last block min(ε, ε (h - τ)) up to h - η."""
    N = math.ceil(T / h - 1e-9)
    h = T / N
    blocks = []
    for n in range(N):
        last, tau, steps = n == N - 1, 0.0, []
        end = h - eta if last else h
        while end - tau > 1e-12:
            width = min(eps, eps * (h - tau)) if last else eps
            width = min(width, end - tau)
            steps.append((T - n * h - tau, width))
            tau += width
        blocks.append(steps)
    return blocks


def pieces(length: float, step: float) -> list[float]:
    """A stretch cut into steps, the last one clipped."""
    whole = math.floor(length / step + 1e-9)
    rest = length - whole * step
    return [step] * whole + ([rest] if rest > 1e-9 else [])


def langevin(gamma: float, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flow of (u, v), response to the frozen score, and covariance of (ζ_u, ζ_v), as section 2 of the design has them."""
    e = math.exp(-gamma * tau)
    flow = np.array([[1, (1 - e) / gamma], [0, e]])
    push = np.array([(tau - (1 - e) / gamma) / gamma, (1 - e) / gamma])
    var_u = 2 / gamma * (tau - 2 * (1 - e) / gamma + (1 - e * e) / (2 * gamma))
    cov = (1 - e) ** 2 / gamma
    return flow, push, np.array([[var_u, cov], [cov, 1 - e * e]])


def law(
    v: float,
    T: float,
    h: float,
    eps: float,
    eta: float,
    K: int | None,
    *,
    weight: float = 2.0,
    corrector: Underdamped | None = None,
) -> Law:
    """Output of PIADM-SDE (`weight` 2) or of PIADM-ODE (1) after K rounds a block; `None`: of the sequential scheme."""
    blocks = grid(T, h, eps, eta)
    per_block = 0
    if corrector is not None:
        per_block = corrector.blocks * len(pieces(corrector.horizon / corrector.blocks, corrector.step))
    M = sum(map(len, blocks)) + per_block * len(blocks)
    width = 2 + 2 * M
    covariance = np.zeros((M, 2, 2))
    unit = np.eye(width)

    def score(x: np.ndarray, t: float) -> np.ndarray:
        return -(x - math.exp(-t / 2) * unit[1]) / (math.exp(-t) * v - math.expm1(-t))

    y, m = unit[0], 0
    for n, steps in enumerate(blocks):
        # Picard rounds: all states start at the block's first; the score is that of the round before
        Y = [y] * (len(steps) + 1)
        for _ in range(1 if K is None else K):
            new = [y]
            for j, (t, e) in enumerate(steps):
                s = score(new[j] if K is None else Y[j], t)
                xi = math.sqrt(math.expm1(e)) * unit[2 + 2 * (m + j)] if weight == 2 else 0
                new.append(math.exp(e / 2) * new[j] + weight * math.expm1(e / 2) * s + xi)
            Y = new
        if weight == 2:
            covariance[m : m + len(steps), 0, 0] = 1
        y, m = Y[-1], m + len(steps)
        if corrector is None:
            continue
        # a fresh velocity, which piadm draws as the second noise of the last predictor step
        end = eta if n == len(blocks) - 1 else steps[0][0] - T / len(blocks)
        u, w = y, unit[2 + 2 * (m - 1) + 1]
        covariance[m - 1, 1, 1] = 1
        for _ in range(corrector.blocks):
            lengths = pieces(corrector.horizon / corrector.blocks, corrector.step)
            U, W = [u] * (len(lengths) + 1), [w] * (len(lengths) + 1)
            for _ in range(1 if corrector.iterations is None else corrector.iterations):
                U_new, W_new = [u], [w]
                for j, tau in enumerate(lengths):
                    flow, push, covariance[m + j] = langevin(corrector.friction, tau)
                    s = score(U_new[j] if corrector.iterations is None else U[j], end)
                    zeta_u, zeta_w = unit[2 + 2 * (m + j)], unit[3 + 2 * (m + j)]
                    U_new.append(flow[0, 0] * U_new[j] + flow[0, 1] * W_new[j] + push[0] * s + zeta_u)
                    W_new.append(flow[1, 1] * W_new[j] + push[1] * s + zeta_w)
                U, W = U_new, W_new
            u, w, m = U[-1], W[-1], m + len(lengths)
        y = u
    assert m == M
    return Law(y[0], y[1], y[2:].reshape(M, 2), covariance)


Slope = Callable[[float, float, float], float]
"""J of a step of length ε at forward time t, for data of variance v: `slope(v, t, ε)`."""


def score_slope(v: float, t: float) -> float:
    """ds/dx for data N(μ, v)."""
    return -1 / (math.exp(-t) * v - math.expm1(-t))


def path(v: float, T: float, h: float, eps: float, eta: float, K: int | None, slope: Slope) -> np.ndarray:
    """All states of the SDE scheme, as linear forms in (y_0, ξ_0, ξ_1, …): shape (M + 1, M + 1), lower triangular.

    K rounds a block of y'[m+1] = Φ(y[m]) + J (y'[m] - y[m]), all its states starting at its first; `None`: sequentially.
    """
    blocks = grid(T, h, eps, eta)
    unit = np.eye(1 + sum(map(len, blocks)))
    states = [unit[0]]
    for steps in blocks:
        m, Y = len(states) - 1, [states[-1]] * (len(steps) + 1)
        for _ in range(1 if K is None else K):
            new = [states[-1]]
            for j, (t, e) in enumerate(steps):
                old = new[j] if K is None else Y[j]
                drift = math.exp(e / 2) * old + 2 * math.expm1(e / 2) * score_slope(v, t) * old
                new.append(drift + slope(v, t, e) * (new[j] - old) + math.sqrt(math.expm1(e)) * unit[1 + m + j])
            Y = new
        states += Y[1:]
    return np.array(states)


def path_kl(states: np.ndarray, reference: np.ndarray) -> float:
    """KL between centred Gaussian paths X = A z and X = B z, z standard normal: (tr RᵀR - n)/2 - log |det R|, R = B⁻¹A."""
    ratio = np.linalg.solve(reference, states)
    return ((ratio**2).sum() - len(ratio)) / 2 - np.log(np.abs(np.diag(ratio))).sum()


def kl(variance: float, reference: float) -> float:
    """KL(N(0, a) ‖ N(0, b))."""
    excess = variance / reference - 1
    return (excess - math.log1p(excess)) / 2


class Impulses:
    """Takes the place of `piadm.noise.Noise`: sample 1 + k m + c has ξ_m = 1 in component c, and zero everywhere else."""

    def __init__(self, generator, samples, size, components, device, dtype) -> None:
        self.samples, self.size, self.components = samples, size, components
        self.device, self.dtype = device, dtype

    def __call__(self, first: int, last: int) -> torch.Tensor:
        k = self.components
        out = torch.zeros(last - first, k, self.samples, self.size, dtype=self.dtype, device=self.device)
        for m in range(first, last):
            for c in range(k):
                out[m - first, c, 1 + k * m + c] = 1
        return out


@dataclass(frozen=True)
class Responses:
    """Coefficients of a sampler's output, per coordinate of the event."""

    start: torch.Tensor  # (D,)
    mean: torch.Tensor  # (D,), the output of a run without any noise
    noise: torch.Tensor  # (M, k, D)
    rounds: int
    nats: float | None  # expected Σ ‖δ‖²/(2 C²) over all coordinates, were the data centred: impulses are orthonormal

    @property
    def variance(self) -> torch.Tensor:
        return self.start**2 + self.noise.square().sum((0, 1))


def responses(monkeypatch, sampler, event: tuple[int, ...]) -> Responses:
    """Runs a sampler of a linear denoiser on one impulse per sample of a batch: the start, every noise, and none at all."""
    monkeypatch.setattr(piadm.samplers, "Noise", Impulses)
    M, k = len(sampler.table), sampler.table.components
    start = torch.zeros(2 + M * k, *event, dtype=torch.float64)
    start[0] = 1
    result = sampler(tuple(start.shape), noise=start)
    out = result.samples.reshape(len(start), -1)
    linear = out - out[-1]
    nats = None if result.certificate.kl is None else len(start) * result.certificate.kl
    return Responses(linear[0], out[-1], linear[1:-1].reshape(M, k, -1), result.rounds, nats)
