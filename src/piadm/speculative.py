r"""Rounds that are exact in law: a solver whose samples follow the sequential scheme's law, whatever the drafts.

A window holds for every step a *draft mean* $\tilde μ_m$ and the draft $\tilde μ_m + C_m ξ_m$ of $x_{m+1}$. A round evaluates
$f$ at the drafts. Then every sample is scanned on its own, from its first unfinished step on, whose state $x_m$ is final and
gives the mean that the draft ought to have had, $μ_m = A_m x_m + B_m f(x_m)$. With $c_m$ the first row of $C_m$, and
$e_m = c_m^⊤ (\tilde μ_m - μ_m)^{(0)} / ‖c_m‖^2$ the least change of noise that makes up for the difference in component 0:

- if $‖e_m‖ \le θ$, the `threshold`, draw $u_m$ and keep the draft if $\log u_m \le -⟨ξ_m, e_m⟩ - ‖e_m‖^2/2$, which makes
  $x_{m+1} = μ_m + C_m (ξ_m + e_m)$; otherwise reflect, $x_{m+1} = μ_m + C_m (ξ_m - 2 ⟨e_m, ξ_m⟩ e_m / ‖e_m‖^2)$, and stop;
- if $‖e_m‖ > θ$ or $c_m = 0$, recompute, $x_{m+1} = μ_m + C_m ξ_m$, and stop.

What is kept is component 0, all that the network sees: $(μ_m + C_m e_m)^{(0)} = \tilde μ_m^{(0)}$, so $f$ was evaluated where a
kept $x_{m+1}$ is, and the scan goes on. Its other components (a velocity, the outputs that a multistep scheme remembers) need
no network. They differ from the draft's by a $d_{m+1}$ that obeys, with $G_m$ the matrix of $e_m = G_m (\tilde μ_m - μ_m)$,

$$ d_{m+1} = (I - C_m G_m) (Φ_m - \tilde μ_m + A_m d_m), \qquad d^{(0)} = 0, $$

where $Φ_m$ is the mean at the draft of $x_m$, and $μ_m = Φ_m + A_m d_m$: one forward substitution for the whole window.

The step at which a scan stops is finished too, since its $x_m$ is final and $f$ was evaluated there; so every round finishes at
least one. Component 0 of its $x_{m+1}$ moved, and what the network said of later states is about other ones: they are refined
as in `piadm.solver`, where $J$ carries the move on, and tested in a later round.

*Why it is exact.* Let $F_m$ be what was drawn for the steps before $m$, their $ξ$ and $u$. In every round $\tilde μ_m$ is a
function of $F_m$ (causality). When a scan comes to $m$ so are $x_m$, made of earlier steps' noise, $μ_m$, $e_m$ and the choice
between testing and recomputing, since a scan comes to $m$ by the tests of earlier steps alone. $(ξ_m, u_m)$ is independent of
$F_m$ and used once: a step that a scan came to is finished. So given $F_m$ a test is the reflection maximal coupling of
$N(e_m, I)$, the law of $ξ_m + e_m$, with $N(0, I)$: whatever $e_m$, $x_{m+1} = μ_m + C_m ξ'_m$ for a $ξ'_m$ of the latter law,
which is the scheme's step. No inverse of $C_m$ is asked for: where noise does not reach, $x_{m+1}$ is the scheme's own.

A test rejects with probability $2 Φ(‖e_m‖/2) - 1 < 0.4 ‖e_m‖$.

*In floating point* draft means are kept beside the drafts, so that the choice to test does not depend on $ξ_m$ to the last
bit. What remains is rounding, as in the sequential sampler: with means off by $C_m δ_m$, a few units in the last place, the law
is off by $\mathrm{KL} \le \sum_m E ‖δ_m‖^2 / 2$; and $u_m$ is a multiple of $2^{-24}$ (float32) or $2^{-53}$, to which
the probability of keeping a draft is rounded.

References: reflection maximal coupling: Jacob, O'Leary, Atchadé, 2020 (arXiv 1708.03625), section 4; tests of drafts in
diffusion: De Bortoli et al., 2025 (arXiv 2501.05370), whose drafts come from one frozen network output.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from piadm.errors import require
from piadm.noise import UniformSource
from piadm.placement import pick
from piadm.propagators import Pair
from piadm.result import Acceptance
from piadm.solver import Solver, State
from piadm.stopping import rms
from piadm.sweep import sweep
from piadm.tables import Rows, Table, mix
from piadm.windows import Window

THRESHOLD = 2.0
"""$θ$: see `piadm.Exact`."""


def check_speculative(table: Table, window: Window, scheme: object) -> None:
    """Raises `ValueError` if no step of a scheme has noise or a window does not begin at the first unfinished step."""
    remedy = "its steps have no noise, so no law to be exact in; use Parallel, or a scheme with noise such as DDPM(steps=1000)"
    require(table.stochastic, "scheme", scheme, remedy)
    every = torch.arange(len(table) + 1)
    start, _ = window.advance(table, len(table), every)
    remedy = "must begin at the first unfinished step of each sample: give a number of steps, or None for all"
    require(bool((start == every).all()), "window", window, remedy)


@dataclass(frozen=True, eq=False)
class Speculation(State):
    r"""Everything between two rounds.

    Attributes:
        mean: $\tilde μ_m$ of the window's steps, shape `(W, k, S, D)`; `x[1:]` is `mean` plus $C_m ξ_m$.
        accepted: Tests that kept the draft, per sample, shape `(S,)`, on the CPU.
        rejected: Tests that reflected it, likewise.
    """

    mean: Tensor
    accepted: Tensor
    rejected: Tensor


@dataclass(frozen=True, eq=False)
class Scan:
    """What a scan decided: per lane and sample, `(W, S)`.

    Attributes:
        kept: The tests that kept their draft.
        ended: The step at which the scan ended, finished by a reflection or from its true mean.
        rejected: Of these, the reflected ones.
        noise: What a reflection makes of $ξ_m$, shape `(W, k, S, D)`.
    """

    kept: Tensor
    ended: Tensor
    rejected: Tensor
    noise: Tensor


@dataclass(frozen=True, eq=False)
class SpeculativeSolver(Solver):
    """`Solver` with tests in place of a stopping rule; `tolerance` and `variance` are not used.

    Arguments:
        threshold: $θ$.
    """

    noise: UniformSource
    threshold: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_speculative(self.table, self.window, self.table)

    @cached_property
    def _lift(self) -> Tensor:
        """$G_m$, in float64, shape `(M, k, k)`; zero where no noise reaches component 0."""
        lift = torch.zeros_like(self.table.C)
        size = torch.linalg.vector_norm(self.table.C[:, 0], dim=1, keepdim=True)
        lift[:, :, 0] = torch.where(size > 0, self.table.C[:, 0] / size / size, 0.0)  # of one component: 1/C to the last bit
        return lift

    @cached_property
    def _testing(self) -> tuple[Tensor, Tensor]:
        """$G_m$, and whether a draft of the step can be kept, shape `(M,)`."""
        return self._here(self._lift), (self.table.C[:, 0] != 0).any(1).to(self.noise.device)

    @cached_property
    def _recalling(self) -> tuple[Tensor, Tensor]:
        """$I - C_m G_m$ and $(I - C_m G_m) A_m$, shape `(M, k, k)`."""
        rest = torch.eye(self.table.components, dtype=torch.float64) - self.table.C @ self._lift
        rest[self._lift.any(-1).any(-1), 0] = 0.0
        return self._here(rest), self._here(rest @ self.table.A)

    def _here(self, values: Tensor) -> Tensor:
        return values.to(self.noise.device, self.noise.dtype)

    @cached_property
    def _log_uniform(self) -> Tensor:
        """log $u_m$, shape `(M, S)`."""
        return self.noise.uniform(0, len(self.table)).log()

    def init(self, x: Tensor) -> Speculation:
        state = super().init(x)
        zero = torch.zeros_like(state.start)
        none = state.x.new_zeros(0, *state.x.shape[1:])
        empty = Speculation(**state.parts(), mean=none, accepted=zero, rejected=zero)
        return self._draft(empty, none, zero, zero)

    def update(self, state: State, f: Tensor) -> Speculation:
        """The state after a round, given the network's answers to `request`, shape `(R, D)`.

        Raises:
            NonFiniteError: if the network is not finite at the first step of a sample's window, whose state is exact; beyond
                it the window is cut, as in `Solver`, by what is known before that step's noise.
        """
        f = state.placement.dense(f)
        evaluations = state.evaluations + (state.stop - state.start)
        rows = self._rows_at(state.start, state.placement.count)
        x, xi, C = state.x, state.noise, rows.C
        if not isinstance(state, Speculation) or xi is None or C is None:
            raise TypeError(f"`state` is a {type(state).__name__}: give one that this solver's `init` made")
        mean = rows.step(x[:-1], f, None)
        sound, f = self._sound(state, f, mean)
        placed = sound.placement
        inside = placed.valid.to(f.device)

        residual = placed.by_step(rms(mean - sound.mean).cpu())
        steps = placed.steps.clamp(max=len(self.table) - 1)
        drafted, true = self._recalled(sound, steps, rows, mean)
        scan = self._scan(sound, steps, inside, true, xi)
        pair = None
        if again := len(sound.x_seen):
            pair = Pair.between(x[:again] - sound.x_seen, f[:again] - sound.f_seen, sound.seen)
        # the sweep runs on means, whose noise is the same before and after, but for the reflected one
        kept, ended, rejected = (one[:, None, :, None] for one in (scan.kept, scan.ended, scan.rejected))
        old = sound.mean
        if self.table.components > 1:
            mean, old = torch.where(ended, true, mean), torch.where(kept, drafted, old)
        mean = torch.where(rejected, mean + mix(C, scan.noise - xi), mean)
        mean = torch.where(kept, drafted, mean)
        mean = sweep(mean, self.propagator.jacobian(rows, pair), torch.cat([x[:1], old]))[0][1:]
        new = _states(x, mean, rows, xi)

        after = replace(
            sound,
            x_seen=x[:-1],
            f_seen=f,
            residual=residual,
            window=(placed.low, placed.high),
            rounds=sound.rounds + 1,
            evaluations=evaluations,
            newest=placed.at_last(f),
            accepted=sound.accepted + scan.kept.sum(0).cpu(),
            rejected=sound.rejected + scan.rejected.sum(0).cpu(),
        )
        ready = sound.start + (scan.kept | scan.ended).sum(0).cpu()
        moved = self._advance(after, ready, new, sound.spent[:, None].expand(-1, len(new), -1).numpy())
        return self._draft(moved, mean, moved.start - sound.start, sound.stop - moved.start)

    def acceptance(self, state: State) -> Acceptance | None:
        if not isinstance(state, Speculation):
            return None
        return Acceptance(state.accepted, state.rejected, state.start - state.accepted - state.rejected)

    def _recalled(self, state: Speculation, steps: Tensor, rows: Rows, mean: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\tilde μ_m + d_{m+1}$ and $μ_m$ as a scan that keeps all earlier drafts finds them, given $Φ_m$; `(W, k, S, D)`."""
        if self.table.components == 1:
            return state.mean, mean
        rest, carried = (by_lane(values[steps.to(values.device)]) for values in self._recalling)
        before = torch.cat([state.x[:1], state.mean])
        drafted, change = sweep(state.mean + mix(rest, mean - state.mean), carried, before)
        return drafted[1:], torch.cat([mean[:1], mean[1:] + mix(rows.A[1:], change)])

    def _scan(self, state: Speculation, steps: Tensor, inside: Tensor, mean: Tensor, xi: Tensor) -> Scan:
        """Tests every sample's steps in order, up to the first that does not keep its draft; `mean`: $μ_m$, `(W, k, S, D)`."""
        steps = steps.to(mean.device)
        lift, reached = (values[steps] for values in self._testing)
        e = mix(by_lane(lift), state.mean - mean)
        square, along = e.square().sum((1, 3)), (xi * e).sum((1, 3))
        tested = reached & inside & (square.sqrt() <= self.threshold)
        passed = tested & (self._log_uniform.gather(0, steps) <= -along - square / 2)
        kept = passed.long().cumprod(0).bool()
        lane = torch.arange(len(kept), device=kept.device)[:, None]
        ended = (lane == kept.sum(0)) & inside
        factor = 2 * along / torch.where(square > 0, square, 1.0)
        return Scan(kept, ended, ended & tested, xi - factor[:, None, :, None] * e)

    def _draft(self, state: Speculation, mean: Tensor, shift: Tensor, known: Tensor) -> Speculation:
        """Gives a window that moved by `shift` its draft means: those of the `known` first lanes, and the fill's beyond."""
        lane = torch.arange(len(state.x) - 1)[:, None]
        rows = self._rows_at(state.start, len(lane))
        jacobian, offset = self.fill.model(rows, None, state.newest)
        entered = mix(jacobian, state.x[:-1]) + offset
        stays = (lane < known).to(entered.device)[:, None, :, None]
        mean = torch.where(stays, pick(mean, shift.tolist(), len(lane)), entered)
        return replace(state, mean=mean, x=_states(state.x, mean, rows, state.noise))


def by_lane(matrices: Tensor) -> Tensor:
    """Matrices `(W, S, k, k)` shaped to act on states `(W, k, S, D)`."""
    return matrices.movedim(1, -1).unsqueeze(-1)


def _states(x: Tensor, mean: Tensor, rows: Rows, noise: Tensor | None) -> Tensor:
    """The window's states, `(W + 1, k, S, D)`: the first of `x`, then means with their noise."""
    return torch.cat([x[:1], mean if rows.C is None or noise is None else mean + mix(rows.C, noise)])
