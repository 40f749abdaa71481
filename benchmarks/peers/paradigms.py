r"""ParaDiGMS: Picard iteration of the drifts in a sliding window.

With $Φ_m$ the sequential step, noise predrawn, and a window of steps $i … i+w-1$, a round evaluates all of them and sets

$$ x^{new}_{m+1} = x_i + \sum_{j=i}^{m} (Φ_j(x_j) - x_j). $$

The window then moves to the first state whose change is too large, $\frac1d ‖x^{new}_m - x_m‖^2 > τ^2 g_m^2$ for any sample
($g_m$: the noise scale of step $m$). That state itself is kept: it was computed from states which had settled. All samples
share the window. States that enter it are copies of the newest one.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.peers.common import Peer, Run, noise_scale, rms
from piadm.denoiser import DenoiserLike
from piadm.errors import require_count, require_positive
from piadm.schemes import Scheme


class ParaDiGMS(Peer):
    """ParaDiGMS (module docstring).

    Arguments:
        denoiser: The denoiser.
        scheme: The steps.
        window: $w$; all steps by default.
        tolerance: $τ$, a change relative to the noise scale; 0.1 in the paper for DDPM, 1e-3 to 0.05 for DDIM.

    References:
        Shih, Belkhale, Ermon, Sadigh, Anari, "Parallel Sampling of Diffusion Models", 2023 (arXiv 2305.16317), algorithm 1;
        diffusers' `StableDiffusionParadigmsPipeline`.
    """

    def __init__(self, denoiser: DenoiserLike, scheme: Scheme, *, window: int | None = None, tolerance: float = 0.1) -> None:
        super().__init__(denoiser, scheme)
        self.window = len(self.table) if window is None else window
        require_count("window", self.window, "window=32")
        require_positive("tolerance", tolerance, "tolerance=0.1")
        self.tolerance = tolerance

    def _solve(self, run: Run, x: Tensor) -> tuple[Tensor, bool]:
        limit = self.tolerance * noise_scale(self.table).to(x)[:, None]
        begin, states = self._start(run, x)
        end = min(begin + self.window, run.steps)
        while begin < run.steps:
            old = states[begin:end]
            f = run.evaluate(old, range(begin, end))
            drift = run.step(old, f, begin, end) - old
            new = states[begin] + drift.cumsum(0)
            change = rms(new - states[begin + 1 : end + 1])
            run.residuals.append(change.amax(1))
            # a state that is the last of its window, or of the run, may change as it likes: it moves the window no further
            moved = (change[:-1] > limit[begin + 1 : end]).any(1).nonzero()
            settled = int(moved[0]) if len(moved) else end - begin - 1
            states[begin + 1 : end + 1] = new
            after = begin + 1 + settled
            last = min(after + self.window, run.steps)
            states[end + 1 : last + 1] = self._enter(run, states[end], f[-1], end, last)
            begin, end = after, last
        return states[-1], True

    def _start(self, run: Run, x: Tensor) -> tuple[int, Tensor]:
        """The first step to iterate, and the states `(M + 1, S, D)` before the first round."""
        return 0, x.expand(run.steps + 1, *x.shape).clone()

    def _enter(self, run: Run, x: Tensor, f: Tensor, first: int, last: int) -> Tensor:
        """What states `first + 1` to `last` hold when they enter behind state `x`; `f`: the window's last prediction."""
        return x.expand(last - first, *x.shape)


def jump(run: Run, x: Tensor, f: Tensor, first: int, last: int) -> Tensor:
    """States `first + 1` to `last` by the scheme's steps from `x` with the prediction of $x_0$ held at `f`."""
    out = x.new_empty(last - first, *x.shape)
    for m in range(first, last):
        x = run.step(x[None], f[None], m, m + 1)[0]
        out[m - first] = x
    return out
