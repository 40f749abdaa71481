r"""What the peers share: a run that counts network calls, the noise scale of their tolerances, and one long step of an ODE."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from piadm.certificate import Certificate
from piadm.denoiser import DenoiserLike
from piadm.errors import NonFiniteError, require
from piadm.noise import GeneratorLike, Noise
from piadm.samplers import Result, _Network, _Sampler
from piadm.schemes import Euler, Scheme
from piadm.solver import Request
from piadm.tables import Table


class Run:
    r"""One call of a sampler: the table's columns, the noise $ξ$ (`None` if nothing is drawn), and counted network calls.

    Arguments:
        table: A table of one component.
        network: The denoiser, flat rows in and out.
        source: The driving noise.
        samples: $S$.
    """

    def __init__(self, table: Table, network: _Network, source: Noise, samples: int) -> None:
        self.steps, self.network, self.samples = len(table), network, samples
        rows = table.cast(source.device, source.dtype)
        self.A, self.B = rows.A.reshape(-1, 1, 1), rows.B.reshape(-1, 1, 1)
        self.times = table.times.to(source.device)
        self.push = None  # $C_m ξ_m$, shape `(M, S, D)`: predrawn, as all of the methods ask
        if rows.C is not None:
            self.push = rows.C.reshape(-1, 1, 1) * source(0, self.steps)[:, 0]
        self.rounds, self.rows = 0, 0
        self.residuals: list[Tensor] = []
        self.windows: list[tuple[int, int]] = []

    def evaluate(self, x: Tensor, steps: Sequence[int] | range) -> Tensor:
        """One round: $f$ at states `(W, S, D)` of the given steps, `(W, S, D)`."""
        index = torch.tensor(list(steps), device=x.device)
        clock = self.times[index].repeat_interleave(self.samples)
        sample = torch.arange(self.samples).repeat(len(index))
        f = self.network(Request(x.flatten(0, 1), clock, sample)).reshape(x.shape)
        self.rounds += 1
        self.rows += len(index)
        self.windows.append((min(steps), max(steps) + 1))
        if not bool(f.isfinite().all()):
            bad = (~f.isfinite().all(-1)).nonzero()
            first = int(index[bad[:, 0]].min())
            finished = torch.full((self.samples,), min(steps))
            raise NonFiniteError(first, self.rounds, sorted(set(bad[:, 1].tolist())), finished, x[0])
        return f

    def step(self, x: Tensor, f: Tensor, first: int, last: int) -> Tensor:
        r"""$Φ_m(x_m)$ for $m$ from `first` up to `last`, `(W, S, D)`."""
        out = self.A[first:last].to(x) * x + self.B[first:last].to(x) * f.to(x)
        return out if self.push is None else out + self.push[first:last].to(x)


class Peer(_Sampler):
    """A sampler whose method is `_solve`; see `piadm.Parallel` for the arguments of a call.

    Arguments:
        denoiser: The denoiser.
        scheme: The steps; one component a state.
    """

    def __init__(self, denoiser: DenoiserLike, scheme: Scheme) -> None:
        super().__init__(denoiser, scheme)
        require(self.table.components == 1, "scheme", scheme, f"{type(self).__name__} is for schemes of one component")

    @abstractmethod
    def _solve(self, run: Run, x: Tensor) -> tuple[Tensor, bool]:
        """Samples `(S, D)` from starting states `(S, D)`, and whether the method's own rule was met."""

    def _finish(self, result: dict[str, Any]) -> Result:
        return Result(**result)

    @torch.no_grad()
    def __call__(
        self,
        shape: Sequence[int],
        *,
        generator: GeneratorLike = None,
        noise: Tensor | None = None,
        **condition: Any,
    ) -> Result:
        """Draws samples. `error` of the result is NaN: none of the methods estimates its distance from sequential."""
        started = time.perf_counter()
        event, source, x = self._begin(shape, generator, noise, condition)
        run = Run(self.table, _Network(self.denoiser, event, len(x), condition), source, len(x))
        out, converged = self._solve(run, x)
        return self._finish(
            {
                "samples": out.to(x.dtype).reshape(len(x), *event),
                "steps": run.steps,
                "rounds": run.rounds,
                "evaluations": float(run.rows),
                "residuals": tuple(run.residuals),
                "windows": tuple(run.windows),
                "converged": converged,
                "error": x.new_full((len(x),), torch.nan),
                "certificate": Certificate(kl=None, standard_error=None, rms=math.nan, rigorous=False),
                "seconds": time.perf_counter() - started,
                "network_seconds": run.network.seconds,
            }
        )


def noise_scale(table: Table) -> Tensor:
    r"""$g_m$, the deviation of DDPM's step $m$, to which ParaDiGMS, ParaTAA and ParaSolver scale their tolerances; `(M,)`.

    $g_m = \frac{σ'}{σ} \sqrt{σ^2 - (α σ'/α')^2}$ whatever noise the scheme itself draws. The last step, into clean data, has
    $g = 0$, which no change could meet: it takes the value of the step before.
    """
    alpha, sigma = table.alpha[: len(table)], table.sigma[: len(table)]
    if len(table) == 1:
        return sigma
    a0, s0, a1, s1 = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    g = s1 / s0 * (s0**2 - (a0 / a1 * s1) ** 2).clamp(min=0).sqrt()
    return torch.cat([g, g[-1:]])


def rms(x: Tensor) -> Tensor:
    """Root mean square over coordinates."""
    return x.square().mean(-1).sqrt()


class Leap:
    r"""One step of an ODE scheme from grid point $i$ to $j > i$ with a single network call, $x_j ≈ a_{ij} x_i + b_{ij} f_i$.

    For `Euler` it is Euler's step of that length. For the others it is the table's rows $i … j-1$ composed with $f$ held, which
    for DDIM is DDIM's own step from $i$ to $j$.

    Raises:
        ValueError: for a scheme that draws noise: parareal needs a coarse solver that maps states to states.
    """

    def __init__(self, table: Table, scheme: Scheme, denoiser: DenoiserLike, method: str) -> None:
        if table.stochastic:
            raise ValueError(f"`scheme` is {scheme!r}, which draws noise: {method} is for ODE schemes, such as DDIM(steps=50)")
        self.A, self.B = table.A.flatten().tolist(), table.B.flatten().tolist()
        self.euler = None
        if isinstance(scheme, Euler):
            grid = denoiser.schedule.grid(scheme.steps)
            alpha, sigma = denoiser.schedule.alpha(grid[:-1]), denoiser.schedule.sigma(grid[:-1])
            d_alpha, d_sigma = denoiser.schedule.velocity(grid[:-1])
            self.euler = (grid, d_sigma / sigma, d_alpha - d_sigma * alpha / sigma)

    def __call__(self, x: Tensor, f: Tensor, i: int, j: int) -> Tensor:
        a, b = self.coefficients(i, j)
        return a * x + b * f

    def coefficients(self, i: int, j: int) -> tuple[float, float]:
        """$a_{ij}, b_{ij}$."""
        if self.euler is not None:
            grid, on_x, on_f = self.euler
            width = float(grid[j] - grid[i])
            return 1 + width * float(on_x[i]), width * float(on_f[i])
        a, b = 1.0, 0.0
        for m in range(i, j):
            a, b = self.A[m] * a, self.A[m] * b + self.B[m]
        return a, b
