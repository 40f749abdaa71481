r"""Exact laws of samplers on Gaussian data, without sampling: at $d = 10^{12}$ as at $d = 1$.

For data $N(0, v)$ in a coordinate the denoiser is linear, so every state is a linear form in the start and the noises. A
sampler run on their unit impulses in place of random numbers returns its coefficients, and the sum of their squares is its
output's variance, exactly. Coordinates do not meet, so a target of $d$ of them is known from one of each kind.

That is exact for propagators that do not look at the run, in a fixed number of rounds. Secants, stopping rules and targets
look at averages over the coordinates of a sample; as $d \to ∞$ with the kinds in equal shares these tend to their
expectations, which are what one sample made of all impulses shows them. For those the law is that limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from piadm.errors import require
from piadm.noise import Noise
from piadm.samplers import Parallel
from piadm.schedules import Schedule
from piadm.solver import Request
from piadm.tables import Table
from piadm.targets import Gaussian


@dataclass(frozen=True, eq=False)
class Law:
    r"""What a sampler returns for data $N(0, v)$, one entry for each kind of coordinate.

    Attributes:
        variance: The output's, shape `(n,)`, float64.
        nats: The certificate's expectation for each coordinate, $\mathbb{E} \sum_m δ_m^2 / (2 C_m^2)$, averaged over kinds:
            measured where the sampler audits or has a target, else estimated; 0 for a sequential run.
        rounds: Rounds.
        evaluations: Network rows.
    """

    variance: Tensor
    nats: float
    rounds: int
    evaluations: float

    def divergence(self, reference: Tensor) -> float:
        r"""$\mathrm{KL}(N(0, \text{variance}) ‖ N(0, \text{reference}))$ for each coordinate, averaged over kinds."""
        excess = self.variance / reference - 1
        return float((excess - torch.log1p(excess)).mean() / 2)


class _Impulses(Noise):
    r"""One sample whose coordinates are (kind, impulse): $ξ_m$ is 1 in its own coordinate of every kind, in units of `unit`.

    With `unit` the root of the number of impulses, averages over coordinates are averages over kinds of expected squares.
    """

    def __init__(self, kinds: int, steps: int, components: int) -> None:
        self.kinds, self.count, self.components = kinds, 1 + steps * components, components
        self.device, self.dtype = torch.device("cpu"), torch.float64

    @property
    def unit(self) -> float:
        return math.sqrt(self.count)

    def start(self) -> Tensor:
        x = torch.zeros(self.kinds, self.count, dtype=self.dtype)
        x[:, 0] = self.unit
        return x.reshape(1, -1)

    def __call__(self, first: int, last: int) -> Tensor:
        k = self.components
        out = torch.zeros(last - first, k, self.kinds, self.count, dtype=self.dtype)
        for step in range(first, last):
            for component in range(k):
                out[step - first, component, :, 1 + k * step + component] = self.unit
        return out.reshape(last - first, k, 1, -1)


def gaussian_law(sampler: Parallel, variance: Tensor, dimension: float | None = None) -> Law:
    r"""The law of a sampler's output for Gaussian data that its own denoiser need not be.

    Of the sampler's denoiser only the schedule is used, and what it says of the data (mean 0 and a variance, as numbers).

    Arguments:
        sampler: The sampler.
        variance: $v$ of each kind of coordinate, shape `(n,)`; kinds have equal shares.
        dimension: $d$, to which a `target_kl` refers, and which the stopping rule looks at; $n$ by default.
    """
    variance = torch.as_tensor(variance, dtype=torch.float64).reshape(-1)
    table, told = sampler.table, sampler.denoiser
    plain = all(not isinstance(value, Tensor) or value.numel() == 1 for value in (told.mean, told.variance))
    require(
        plain and float(told.mean) == 0, "sampler", sampler, "its denoiser must tell a mean of 0 and one number as variance"
    )
    noise = _Impulses(len(variance), len(table), table.components)
    per_coordinate = noise.count * len(variance)
    size = len(variance) if dimension is None else dimension
    target = None if sampler.target_kl is None else sampler.target_kl * (per_coordinate / size)
    solver = replace(Parallel._solver(sampler, noise), target_kl=target, size=size)
    denoiser = Gaussian(0.0, variance.repeat_interleave(noise.count), schedule=told.schedule)

    def network(request: Request) -> Tensor:
        return denoiser(request.x, request.t)

    state, nats = solver.init(noise.start() * table.scale), 0.0
    while not state.done:
        state = solver.update(state, network(solver.request(state)))
        if state.left is not None:
            nats += float(solver.measure(state.left, network(solver.request(state.left)))[0])
    if not sampler.audit:
        nats = float(state.nats)
    spread = state.finished().reshape(len(variance), -1).square().mean(1)
    return Law(spread, nats / per_coordinate, state.rounds, float(state.evaluations))


def sequential_law(schedule: Schedule, table: Table, variance: Tensor) -> Law:
    r"""The law of the sequential run of a table, $Σ' = F Σ F^\top + C C^\top$ with $F = A + B L e_0^\top$, step by step.

    Arguments:
        schedule: What the table's times mean.
        table: The steps.
        variance: $v$ of each kind of coordinate, shape `(n,)`.
    """
    v = torch.as_tensor(variance, dtype=torch.float64).reshape(-1, 1)
    alpha, sigma = schedule.alpha(table.times), schedule.sigma(table.times)
    gain = alpha * v / (alpha**2 * v + sigma**2)  # (n, M)
    F = table.A.repeat(len(v), 1, 1, 1)
    F[..., 0] += gain[..., None] * table.B
    Q = (table.C @ table.C.mT).expand_as(F)
    while F.shape[1] > 1:  # neighbours composed, two by two
        if F.shape[1] % 2:
            F = torch.cat([F, torch.eye(table.components, dtype=F.dtype).expand_as(F[:, :1])], dim=1)
            Q = torch.cat([Q, torch.zeros_like(Q[:, :1])], dim=1)
        first, then = slice(0, None, 2), slice(1, None, 2)
        Q = F[:, then] @ Q[:, first] @ F[:, then].mT + Q[:, then]
        F = F[:, then] @ F[:, first]
    start = torch.zeros(table.components, table.components, dtype=F.dtype)
    start[0, 0] = table.scale**2
    covariance = F[:, 0] @ start @ F[:, 0].mT + Q[:, 0]
    return Law(covariance[:, 0, 0], 0.0, len(table), float(len(table)))
