r"""A scheduler's table, read off the scheduler itself.

The `step` of a linear scheduler is a linear map of what it is given and of what it remembers,

$$ (x_{m+1}, h_{m+1}) = (x_m, h_m, g_m, ξ_m) \cdot \text{coefficients}, $$

with $g$ the network's raw output and $h$ the tensors that the scheduler keeps between steps: earlier outputs, a corrected
sample, the first half of a Heun step. So `step` is run once on *unit impulses*: entry $i$ of a tiny sample is 1 for the $i$-th
argument and 0 for the others, every remembered tensor being replaced by its own impulse and every `torch.randn` by that of
$ξ$. What comes out are the coefficients of the row. A second row of the same sample holds random numbers and must come out as
the coefficients predict: this refuses schedulers that are not linear. In the end the scheduler is run once more, on random
numbers from its first step to its last, beside its table.

Remembered tensors that no later sample depends on are dropped; those that are left are the further components of the state.
With $f = P x + Q g$, the prediction of $x_0$, in place of $g$, the rows are those of a `Table`.

Clipping and thresholding act on the prediction of $x_0$. They are switched off for the probe and belong to $f$: where a
scheduler builds the next state from the clipped $x_0$ alone, $f$ is the clipped prediction; where it also uses the raw
output, as DDIM does, $f = x_0 + κ (\mathrm{clip}(x_0) - x_0)$ with a $κ_m$ that a further probe reads off.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from piadm.tables import Table

BASIS = 64
"""Entries of an impulse: the state, the output, the noise, and what the scheduler remembers."""
STATE, OUTPUT, NOISE, MEMORY = 0, 1, 2, 3
SHAPE = (1, 1, 2, BASIS)
IMPULSES, TRIAL = 0, 1

Slot = tuple[str, int | None]


class UnsupportedError(ValueError):
    """A scheduler or pipeline that cannot be run in parallel, and why."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A scheduler's steps in the library's words.

    Attributes:
        table: The rows, in terms of $f = \\mathbb{E}[x_0 | x_t]$.
        times: The timesteps as the scheduler gives them to the network, shape `(M,)`.
        scaling: What `scale_model_input` multiplies the state with, shape `(M,)`.
        on_state, on_output: $P$ and $Q$ of $f = P x + Q g$, shape `(M,)`.
        clipping: $κ$, shape `(M,)`, where the scheduler clips or thresholds; else `None`.
        noise_slot: For each step where its noise is seen best (`None`: in the sample), and with which coefficient.
        output: The class that `step` returns.
        fields: Names of its entries, the next sample's first.
    """

    table: Table
    times: Tensor
    scaling: Tensor
    on_state: Tensor
    on_output: Tensor
    clipping: Tensor | None
    noise_slot: tuple[tuple[Slot | None, float], ...]
    output: type
    fields: tuple[str, ...]


class _Impulses(TorchFunctionMode):
    """Every draw of normal numbers of the sample's shape is the impulse of the noise, and a random number in the trial."""

    def __init__(self, trial: Tensor) -> None:
        super().__init__()
        self.trial, self.draws = trial, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like) and isinstance(out, Tensor) and tuple(out.shape) == SHAPE:
            self.draws += 1
            return _impulse(NOISE, self.trial[NOISE]).to(out.dtype)
        return out


def _impulse(entry: int, trial: Tensor) -> Tensor:
    out = torch.zeros(SHAPE, dtype=torch.float64)
    out[..., IMPULSES, entry] = 1
    out[..., TRIAL, 0] = trial
    return out


def memory(scheduler: Any, shape: tuple[int, ...]) -> dict[Slot, Tensor]:
    """The tensors of a sample's shape that a scheduler keeps, by attribute and place in a list."""
    found: dict[Slot, Tensor] = {}
    for name, value in vars(scheduler).items():
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        found |= {(name, i): one for i, one in entries if isinstance(one, Tensor) and tuple(one.shape) == shape}
    return found


def remember(scheduler: Any, slot: Slot, value: Tensor) -> None:
    """Replaces one of them."""
    name, place = slot
    if place is None:
        setattr(scheduler, name, value)
    else:
        getattr(scheduler, name)[place] = value


def first_output(result: Any) -> Tensor:
    """The next sample in what `step` returns."""
    sample: Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return sample


def check_scheduler(scheduler: Any) -> None:
    """Raises `UnsupportedError` for schedulers that are known not to have a table, before anything is run."""
    name = type(scheduler).__name__
    step, scale = getattr(scheduler, "step", None), getattr(scheduler, "set_timesteps", None)
    if not (callable(step) and callable(scale)):
        raise UnsupportedError(f"`scheduler` is a {name}, without `set_timesteps` and `step`: give a scheduler of diffusers")
    names = list(inspect.signature(step).parameters)[:3]
    if names != ["model_output", "timestep", "sample"]:
        raise UnsupportedError(
            f"`scheduler` is a {name}, whose step takes ({', '.join(names)}, …): piadm needs (model_output, timestep, sample), "
            "for example pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    required = [
        parameter.name
        for parameter in list(inspect.signature(step).parameters.values())[3:]
        if parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    if required:
        wanted = ", ".join(required)
        raise UnsupportedError(f"`scheduler` is a {name}, whose step also needs {wanted}: piadm cannot supply that")
    config = getattr(scheduler, "config", {})
    if str(config.get("variance_type", "")).startswith("learned"):
        raise UnsupportedError(
            f"`scheduler` is a {name} with variance_type={config['variance_type']!r}: its noise depends on the network, so its "
            "steps are no table; use 'fixed_small', or DDIMScheduler"
        )


def _restarted(scheduler: Any, **config: Any) -> Any:
    own = copy.deepcopy(scheduler)
    given = getattr(scheduler, "config", {})
    changed = {key: value for key, value in config.items() if key in given}
    if changed:
        own.register_to_config(**changed)
    return own


def probe(scheduler: Any, times: Tensor, step_options: Mapping[str, Any] | None = None) -> Probe:
    """The table of a scheduler that has been told its timesteps and has taken no step yet.

    Arguments:
        scheduler: One of diffusers' schedulers, or any with their `scale_model_input` and `step`; it is not changed.
        times: The timesteps that will be iterated, shape `(M,)`.
        step_options: Further arguments of `step` that change what it computes, such as `eta`.

    Raises:
        UnsupportedError: if `step` is not linear, draws more than one noise, or does not carry a constant prediction $c$
            anywhere near $α c + σ n$.
    """
    check_scheduler(scheduler)
    options = dict(step_options or {})
    name = type(scheduler).__name__
    clips = bool(scheduler.config.get("clip_sample", False) or scheduler.config.get("thresholding", False))
    plain = _restarted(scheduler, clip_sample=False, thresholding=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        rows = [_row(plain, t, options) for t in times]
    levels = _levels(scheduler, [row.index for row in rows], times, torch.tensor([row.scaling for row in rows]))
    P, Q = _prediction(plain, *levels, rows)
    table, slots = _compose(rows, P, Q, *levels, name)
    clipping = None
    if clips:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            kappa = _clipping(_restarted(scheduler, clip_sample=True, thresholding=False), times, options, Q, table, name)
        clipping = kappa if bool((kappa.abs() > 1e-6).any()) else None  # a setting that its `step` does not read
    scaling = torch.tensor([row.scaling for row in rows], dtype=torch.float64)
    found = Probe(table, times, scaling, P, Q, clipping, slots, *rows[0].returned)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _verify(copy.deepcopy(scheduler), found, options)
    return found


@dataclass(frozen=True, eq=False)
class _Row:
    """Coefficients of one step: of the next sample (slot `None`) and of all that is remembered, each of `BASIS` entries."""

    out: dict[Slot | None, Tensor]
    before: tuple[Slot, ...]
    scaling: float
    index: int | None
    precondition: tuple[float, float] | None
    returned: tuple[type, tuple[str, ...]]


def _row(scheduler: Any, t: Tensor, options: Mapping[str, Any]) -> _Row:
    """Runs one step on impulses and on random numbers, and compares."""
    name = type(scheduler).__name__
    generator = torch.Generator().manual_seed(int(torch.as_tensor(t).double() * 1000) % 2**31)
    trial = 5 * torch.randn(BASIS, generator=generator, dtype=torch.float64)
    x, g = _impulse(STATE, trial[STATE]), _impulse(OUTPUT, trial[OUTPUT])
    before = tuple(memory(scheduler, SHAPE))
    if len(before) > BASIS - MEMORY:
        raise UnsupportedError(f"`scheduler` is a {name}, which remembers {len(before)} tensors: more than {BASIS - MEMORY}")
    for entry, slot in enumerate(before, MEMORY):
        old = memory(scheduler, SHAPE)[slot]
        remember(scheduler, slot, _impulse(entry, trial[entry]).to(old.dtype))
    scaled = scheduler.scale_model_input(x.clone(), t) if hasattr(scheduler, "scale_model_input") else x
    with _Impulses(trial) as mode:
        returned = scheduler.step(g, t, x, **options)
    index = getattr(scheduler, "step_index", None)
    index = None if index is None else index - 1
    precondition = None
    if hasattr(scheduler, "precondition_outputs") and index is not None:
        both = scheduler.precondition_outputs(x, g, scheduler.sigmas[index])[0, 0, IMPULSES].double()
        precondition = float(both[STATE]), float(both[OUTPUT])
    if mode.draws > 1:
        raise UnsupportedError(f"`scheduler` is a {name}, which draws {mode.draws} noises in one step: piadm reproduces one")
    out: dict[Slot | None, Tensor] = {None: first_output(returned)}
    for slot, kept in memory(scheduler, SHAPE).items():
        out[slot] = kept
    coefficients: dict[Slot | None, Tensor] = {}
    for place, values in out.items():
        row = values[0, 0, IMPULSES].double()
        predicted, seen = row @ trial, values[0, 0, TRIAL, 0].double()
        size = (row.abs() @ trial.abs()).clamp(min=1e-6)
        if not bool(values.isfinite().all()) or bool((predicted - seen).abs() > 1e-3 * size):
            what = "the next sample" if place is None else f"`{place[0]}`"
            raise UnsupportedError(
                f"`scheduler` is a {name}: {what} after timestep {float(t):g} is not a linear, finite function of the state, "
                "the output and the noise, so it has no table; use a scheduler of the DDIM, Euler or DPM-Solver family"
            )
        coefficients[place] = row
    return _Row(coefficients, before, float(scaled[0, 0, IMPULSES, STATE]), index, precondition, _fields(returned))


def _fields(returned: Any) -> tuple[type, tuple[str, ...]]:
    if isinstance(returned, tuple):
        return tuple, ("prev_sample", *(f"extra_{i}" for i in range(1, len(returned))))
    return type(returned), tuple(returned.keys()) if isinstance(returned, Mapping) else ("prev_sample",)


def _levels(scheduler: Any, indices: list[int | None], times: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
    r"""$α, σ$ of the states that are evaluated, shape `(M,)`.

    In diffusers a state is $\sqrt{\barα} x_0 + \sqrt{1 - \barα} ε$ (schedulers with `alphas_cumprod` alone), $x_0 + σ ε$ (those
    with `sigmas` too, whose network sees the scaled state), what `_sigma_to_alpha_sigma_t` says, or $(1 - σ) x_0 + σ ε$.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, Tensor) and None not in indices:
        sigma = sigmas.double().cpu()[[index for index in indices if index is not None]]
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
            return torch.as_tensor(alpha, dtype=torch.float64).expand_as(sigma).clone(), sigma
        if hasattr(scheduler, "alphas_cumprod") or hasattr(scheduler, "precondition_outputs"):
            if hasattr(scheduler, "sigmas_interpol"):  # half of the states lie between the levels: the scaling tells
                sigma = (1 / scaling.double() ** 2 - 1).clamp(min=0).sqrt()
            return torch.ones_like(sigma), sigma
        return 1 - sigma, sigma
    bar = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(bar, Tensor):
        raise UnsupportedError(
            f"`scheduler` is a {type(scheduler).__name__}, with neither `alphas_cumprod` nor `sigmas`: "
            "its noise levels are unknown, so its steps are no table"
        )
    bar = bar.double().cpu()[times.long().cpu()]
    return bar.sqrt(), (1 - bar).sqrt()


def _prediction(scheduler: Any, alpha: Tensor, sigma: Tensor, rows: list[_Row]) -> tuple[Tensor, Tensor]:
    r"""$P, Q$ of $x_0 = P x + Q g$ for the scheduler's `prediction_type`."""
    if rows[0].precondition is not None:
        both = torch.tensor([row.precondition for row in rows], dtype=torch.float64)
        return both[:, 0], both[:, 1]
    length = (alpha**2 + sigma**2).sqrt()
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    match kind:
        case "epsilon":
            P, Q = 1 / alpha, -sigma / alpha
        case "sample":
            P, Q = torch.zeros_like(alpha), torch.ones_like(alpha)
        case "v_prediction":
            P, Q = alpha / length**2, -sigma / length
        case "flow_prediction":
            P, Q = 1 / (alpha + sigma), -sigma / (alpha + sigma)
        case _:
            raise UnsupportedError(f"`prediction_type` is {kind!r}: piadm knows epsilon, sample, v_prediction, flow_prediction")
    if not bool(P.isfinite().all() and Q.isfinite().all() and (Q != 0).all()):
        raise UnsupportedError(
            f"`scheduler` is a {type(scheduler).__name__} with prediction_type={kind!r} at a state without signal or without "
            "noise, where the network's output says nothing of the data; use v_prediction with zero-SNR schedules"
        )
    return P, Q


def _compose(
    rows: list[_Row], P: Tensor, Q: Tensor, alpha: Tensor, sigma: Tensor, name: str
) -> tuple[Table, tuple[tuple[Slot | None, float], ...]]:
    """Rows in $f$, with those remembered tensors as components that a later sample depends on."""
    steps = len(rows)
    alive: list[list[Slot | None]] = [[None]]
    for row in reversed(rows):
        used = torch.stack([row.out[slot] for slot in alive[0]]).ne(0).any(0)
        alive.insert(0, [None, *(slot for entry, slot in enumerate(row.before, MEMORY) if used[entry])])
    k = max(map(len, alive))
    A, B, C = torch.zeros(steps, k, k).double(), torch.zeros(steps, k).double(), torch.zeros(steps, k, k).double()
    noise_slot: list[tuple[Slot | None, float]] = []
    for m, row in enumerate(rows):
        entries = {slot: entry for entry, slot in enumerate(row.before, MEMORY)} | {None: STATE}
        best: tuple[Slot | None, float] = (None, 0.0)
        for i, slot in enumerate(alive[m + 1]):
            out = row.out[slot]
            B[m, i] = out[OUTPUT] / Q[m]
            for j, old in enumerate(alive[m]):
                A[m, i, j] = out[entries[old]]
            A[m, i, 0] -= B[m, i] * P[m]
            C[m, i, 0] = out[NOISE]
            if abs(float(out[NOISE])) > abs(best[1]):
                best = (slot, float(out[NOISE]))
        noise_slot.append(best)
    clean, noise = _carried(A, B, alpha, sigma)
    scale = (alpha**2 + sigma**2).sqrt()
    # A constant prediction must arrive near the levels of the states evaluated. Only near: DDIM steps by a fixed stride past
    # the timesteps of some spacings. Levels shape the linear model and the stopping rule, not what a run converges to.
    wrong = (clean[:-1] - alpha).abs() > 0.5 * scale
    if not bool(C.any()):
        wrong |= (noise[:-1] - sigma).abs() > 0.5 * scale
    if bool(wrong.any()):
        m = int(wrong.nonzero()[0])
        raise UnsupportedError(
            f"`scheduler` is a {name}: if a network always predicts the image c, step {m} has {clean[m]:.3g} c + "
            f"{noise[m]:.3g} n, where its noise levels say {alpha[m]:.3g} c + {sigma[m]:.3g} n; piadm does not understand it, "
            "use DDIM or Euler"
        )
    alpha, sigma = torch.cat([alpha, clean[-1:]]), torch.cat([sigma, noise[-1:].clamp(min=0)])
    return Table(A, B, C, torch.arange(steps), alpha, sigma, 1.0), tuple(noise_slot)


def _carried(A: Tensor, B: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of $c$ and $n$ in every state when $f = c$ throughout, noise left out, from $α_0 c + σ_0 n$."""
    state = torch.zeros(2, A.shape[1]).double()
    state[:, 0] = torch.stack([alpha[0], sigma[0]])
    path = [state]
    for a, b in zip(A, B, strict=True):
        state = state @ a.T
        state[0] += b
        path.append(state)
    return torch.stack(path)[:, 0, 0], torch.stack(path)[:, 1, 0]


def _clipping(scheduler: Any, times: Tensor, options: Mapping[str, Any], Q: Tensor, table: Table, name: str) -> Tensor:
    """$κ$: how much of a clip of the predicted $x_0$ arrives in the next sample, as a share of what $f$ itself does."""
    if "clip_sample" not in scheduler.config:
        return torch.ones(len(times), dtype=torch.float64)  # thresholding alone: all is built from the thresholded x_0
    limit = float(scheduler.config.get("clip_sample_range", 1.0))
    kappa = torch.ones(len(times), dtype=torch.float64)
    for m, t in enumerate(times):
        for slot, old in memory(scheduler, SHAPE).items():
            remember(scheduler, slot, torch.zeros_like(old))
        scaled_output = torch.full(SHAPE, 10 * limit / float(Q[m]), dtype=torch.float64)
        with _Impulses(torch.zeros(BASIS, dtype=torch.float64)):
            x = torch.zeros(SHAPE, dtype=torch.float64)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            out = first_output(scheduler.step(scaled_output, t, x, **options))
        B = float(table.B[m, 0])
        if B == 0:
            raise UnsupportedError(f"`scheduler` is a {name} that clips at a step which does not depend on the network")
        # entry TRIAL: no noise there; P x is zero
        kappa[m] = (float(out[0, 0, TRIAL, 1]) - 10 * limit * B) / (B * (limit - 10 * limit))
    return kappa


def clipped(scheduler: Any, x0: Tensor, kappa: Tensor) -> Tensor:
    """$f$ from predictions `x0` of shape `(rows, *event)`, as the scheduler clips or thresholds them; `kappa` broadcasts."""
    config = scheduler.config
    if config.get("thresholding", False):
        inside: Tensor = scheduler._threshold_sample(x0)
    else:
        limit = config.get("clip_sample_range", 1.0)
        inside = x0.clamp(-limit, limit)
    return x0 + kappa * (inside - x0)


class _Known(TorchFunctionMode):
    """Draws of the sample's shape are a given one."""

    noise: Tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        known = func in (torch.randn, torch.randn_like) and isinstance(out, Tensor) and tuple(out.shape) == SHAPE
        return self.noise.to(out.dtype) if known else out


def _verify(scheduler: Any, found: Probe, options: Mapping[str, Any]) -> None:
    """Runs the scheduler, clipping and all, from end to end on random numbers, and its table beside it.

    Raises:
        UnsupportedError: if they part.
    """
    generator = torch.Generator().manual_seed(0)
    table, known = found.table, _Known()
    columns = table.cast(torch.device("cpu"), torch.float64)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * float((table.alpha[0] ** 2 + table.sigma[0] ** 2).sqrt())
    state = torch.cat([x.reshape(1, -1), x.new_zeros(table.components - 1, x.numel())])[None, :, None]
    for m, t in enumerate(found.times):
        g, xi = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
        f = found.on_state[m] * state[0, 0, 0].reshape(SHAPE) + found.on_output[m] * g
        if found.clipping is not None:
            f = clipped(scheduler, f, found.clipping[m])
        noise = torch.cat([xi.reshape(1, -1), xi.new_zeros(table.components - 1, xi.numel())])[None, :, None]
        state = columns.take(torch.tensor([[m]])).step(state, f.reshape(1, 1, -1), noise)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        known.noise = xi
        with known:
            x = first_output(scheduler.step(g, t, x, **options)).double()
        gap = float((x - state[0, 0, 0].reshape(SHAPE)).abs().max())
        if not gap <= 1e-3 * max(1.0, float(x.abs().max())):
            raise UnsupportedError(
                f"`scheduler` is a {type(scheduler).__name__} whose table, read off it step by step, does not reproduce a "
                f"whole run: they are {gap:.2g} apart after step {m}; use a scheduler of the DDIM, Euler or DPM-Solver family"
            )
