r"""Denoisers: $f(x, t) = \mathbb{E}[x_0 | x_t = x]$, whatever the network was trained to predict.

| prediction | network output $g$ | $f$ |
|---|---|---|
| `"epsilon"` | $\mathbb{E}[ε | x_t]$ | $(x - σ g)/α$ |
| `"sample"` | $\mathbb{E}[x_0 | x_t]$ | $g$ |
| `"v_prediction"` | $\mathbb{E}[α ε - σ x_0 | x_t]$ | $(α x - σ g)/(α^2 + σ^2)$ |
| `"flow_prediction"` | $\mathbb{E}[ε - x_0 | x_t]$ | $(x - σ g)/(α + σ)$ |
| `"score"` | $∇ \log p_t(x)$ | $(x + σ^2 g)/α$ |

Wrappers take the place of options: a guided denoiser is a denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from piadm.errors import require
from piadm.schedules import Continuous, Schedule, VarianceExploding

Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "score"]


class DenoiserLike(Protocol):
    r"""What samplers need: $f(x, t)$ with its schedule, and what is known of the data.

    `mean` and `variance` (number or tensor broadcastable to one sample) describe the data to the Gaussian propagator and
    the stopping rule: they change how fast a run converges and when it is held to have, never what it converges to.
    `event_shape` is the shape of one sample (`None`: any). `dtype` is the least precise dtype that states may have,
    `device` where they live (`None`: anywhere).
    """

    schedule: Schedule
    mean: float | Tensor
    variance: float | Tensor
    event_shape: tuple[int, ...] | None

    @property
    def device(self) -> torch.device | None: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def check(self, times: Tensor) -> None:
        """Raises `ValueError` if $f$ is undefined at one of the times."""

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """$f$ for rows `x` of shape `(B, *event)` at times `(B,)`."""


class Denoiser:
    r"""A network with its schedule and prediction, as $f(x, t) = \mathbb{E}[x_0 | x_t = x]$.

    Arguments:
        network: Any `torch.nn.Module` or callable, called as `network(x, t, **condition)` with `x` of shape `(B, *event)` in
            the network's own dtype and `t` of shape `(B,)`: int64 on a discrete grid, else float32 or wider. It may return a
            tensor, a tuple whose first entry is one, or an object with `.sample` as diffusers' models do.
        schedule: The noise schedule it was trained with.
        prediction: What it predicts, in diffusers' words (table above).
        mean: Mean of the data (a guess costs rounds).
        variance: Variance of the data per coordinate (a bad guess costs rounds and misleads the stopping rule).
        event_shape: Shape of one sample, if the network takes only one: samplers then refuse another before they start.

    Raises:
        ValueError: for an unknown prediction or a negative variance.
        TypeError: for a network that cannot be called, or whose output is not a floating tensor of `x`'s shape.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Any],
        schedule: Schedule,
        prediction: Prediction = "epsilon",
        *,
        mean: float | Tensor = 0.0,
        variance: float | Tensor = 1.0,
        event_shape: tuple[int, ...] | None = None,
    ) -> None:
        if not callable(network):
            raise TypeError(f"`network` is a {type(network).__name__}: give a torch.nn.Module or a function (x, t) -> tensor")
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"`schedule` is a {type(schedule).__name__}: give one of piadm.schedules, such as DiscreteBetas.linear(1000)"
            )
        known = get_args(Prediction)
        require(prediction in known, "prediction", prediction, f"give one of {', '.join(known)}")
        require_moments(mean, variance)
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.mean, self.variance, self.event_shape = mean, variance, event_shape

    @classmethod
    def from_azula(
        cls,
        denoiser: nn.Module,
        *,
        mean: float | Tensor = 0.0,
        variance: float | Tensor = 1.0,
        event_shape: tuple[int, ...] | None = None,
    ) -> Denoiser:
        r"""A denoiser of azula: it returns a posterior with a `mean` and has a `schedule`, $t \mapsto (α_t, σ_t)$ on $[0, 1]$.

        `DDPM(steps)` and `DDIM(steps)` then take azula's `DDPMSampler` and `DDIMSampler` steps. Arguments besides the denoiser
        are those of the class. Raises `TypeError` for anything else, `ValueError` for a schedule that does not fall.
        """
        levels: Any = getattr(denoiser, "schedule", None)
        if not (callable(denoiser) and callable(levels)):
            raise TypeError(f"`denoiser` is a {type(denoiser).__name__}: give an azula.denoise.Denoiser, with its `schedule`")
        network, schedule = _PosteriorMean(denoiser), Continuous(levels)
        return cls(network, schedule, "sample", mean=mean, variance=variance, event_shape=event_shape)

    @classmethod
    def from_k_diffusion(
        cls,
        model: nn.Module | Callable[..., Any],
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        mean: float | Tensor = 0.0,
        variance: float | Tensor = 1.0,
        event_shape: tuple[int, ...] | None = None,
    ) -> Denoiser:
        r"""A model as k-diffusion's samplers call it: `model(x, sigma, **condition)` is the denoised `x`, $x = x_0 + σ ε$.

        `Euler(steps)` then takes the steps of `sample_euler` on `get_sigmas_karras(steps, sigma_min, sigma_max, rho)`.

        Arguments:
            model: The model.
            sigma_min: Lowest noise level; by default the model's own attribute of this name.
            sigma_max: Highest noise level, likewise.
            rho: $ρ$ of Karras et al. (arXiv 2206.00364), eq. 5.
            mean: As for the class.
            variance: Likewise.
            event_shape: Likewise.

        Raises:
            ValueError: if the ends are neither given nor known to the model, or do not fit.
        """
        ends = {"sigma_min": sigma_min, "sigma_max": sigma_max}
        for name, given in ends.items():
            known = getattr(model, name, None) if given is None else given
            require(known is not None, name, given, f"the model does not say; give from_k_diffusion(model, {name}=…)")
            ends[name] = float(known) if known is not None else None
        schedule = VarianceExploding(ends["sigma_min"] or 0.0, ends["sigma_max"] or 0.0, rho)
        return cls(model, schedule, "sample", mean=mean, variance=variance, event_shape=event_shape)

    def __repr__(self) -> str:
        return f"Denoiser({type(self.network).__name__}, {self.schedule!r}, {self.prediction!r})"

    def _weights(self) -> Tensor | None:
        if not isinstance(self.network, nn.Module):
            return None
        candidates = chain(self.network.parameters(), self.network.buffers())
        return next((tensor for tensor in candidates if tensor.is_floating_point()), None)

    @property
    def device(self) -> torch.device | None:
        weights = self._weights()
        return None if weights is None else weights.device

    @property
    def dtype(self) -> torch.dtype:
        weights = self._weights()
        return torch.float32 if weights is None else weights.dtype

    def check(self, times: Tensor) -> None:
        alpha = self.schedule.alpha(times)
        if self.prediction in ("epsilon", "score") and bool((alpha <= 0).any()):
            raise ValueError(
                f"`prediction` is {self.prediction!r}, which says nothing of the data where α = 0 (time "
                f"{times[alpha <= 0][0].item()}): use one that predicts 'sample', 'v_prediction' or 'flow_prediction'"
            )

    def _combine(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """$p, q$ with $f = p x + q g$."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        match self.prediction:
            case "epsilon":
                return 1 / alpha, -sigma / alpha
            case "sample":
                return torch.zeros_like(alpha), torch.ones_like(alpha)
            case "v_prediction":
                norm = alpha**2 + sigma**2
                return alpha / norm, -sigma / norm
            case "flow_prediction":
                return 1 / (alpha + sigma), -sigma / (alpha + sigma)
            case "score":
                return 1 / alpha, sigma**2 / alpha

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        weights = self._weights()
        dtype = x.dtype if weights is None else weights.dtype
        clock = t if not t.is_floating_point() else t.to(torch.promote_types(dtype, torch.float32))
        out = self.network(x.to(dtype), clock, **condition)
        out = getattr(out, "sample", out)
        out = out[0] if isinstance(out, tuple | list) and out else out
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.shape != x.shape:
            got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(
                f"`network` returned {got} for an input of shape {tuple(x.shape)}: it must return a floating tensor of that "
                "shape (a network that also predicts variances needs a wrapper keeping only its first half)"
            )
        p, q = (c.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for c in self._combine(t))
        return p * x + q * out.to(x.dtype)


def check_denoiser(denoiser: object) -> None:
    """Raises `TypeError` if the denoiser is a bare network."""
    if not all(hasattr(denoiser, name) for name in ("schedule", "check", "mean", "variance", "event_shape")):
        raise TypeError(
            f"`denoiser` is a {type(denoiser).__name__}: wrap the network, "
            "piadm.Denoiser(network, piadm.schedules.DiscreteBetas.linear(1000), 'epsilon')"
        )


class Wrapper:
    """A denoiser made from another: it answers for that one's schedule, data, device and times."""

    def __init__(self, denoiser: DenoiserLike) -> None:
        check_denoiser(denoiser)
        self.denoiser = denoiser
        self.schedule, self.event_shape = denoiser.schedule, denoiser.event_shape
        self.mean, self.variance = denoiser.mean, denoiser.variance

    @property
    def device(self) -> torch.device | None:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    def check(self, times: Tensor) -> None:
        self.denoiser.check(times)


class Guided(Wrapper):
    r"""Classifier-free guidance, $f = f_\varnothing + w (f_c - f_\varnothing)$, in one network call of twice the rows.

    Arguments:
        denoiser: The conditional denoiser.
        guidance_scale: $w$; 1 is no guidance.
        unconditional: For each condition that guidance removes, the value that stands for "none": a tensor whose first
            dimension is 1, for example `{"label": torch.tensor([10])}`. Other conditions go to both halves.

    References:
        Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022 (arXiv 2207.12598).
    """

    def __init__(self, denoiser: DenoiserLike, guidance_scale: float, unconditional: Mapping[str, Tensor]) -> None:
        if not isinstance(unconditional, Mapping):
            raise TypeError(f"`unconditional` is {unconditional!r}: give a dictionary such as {{'label': torch.tensor([10])}}")
        for name, value in unconditional.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != 1:
                raise ValueError(f"`unconditional[{name!r}]` is {value!r}: give a tensor whose first dimension is 1")
        finite = isinstance(guidance_scale, int | float) and abs(guidance_scale) < float("inf")
        require(finite, "guidance_scale", guidance_scale, "give a finite number, for example 7.5")
        super().__init__(denoiser)
        self.guidance_scale, self.unconditional = guidance_scale, dict(unconditional)

    def __repr__(self) -> str:
        return f"Guided({self.denoiser!r}, guidance_scale={self.guidance_scale})"

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        rows = len(x)
        both = each_tensor(lambda value: torch.cat([value, value]) if len(value) == rows else value, condition)
        for name, absent in self.unconditional.items():
            value = condition.get(name)
            if not (isinstance(value, Tensor) and value.ndim and len(value) == rows):
                given = "was not given" if value is None else f"is {value!r}, which guidance cannot take away"
                raise ValueError(
                    f"`{name}` has an unconditional value but {given}: pass a tensor {name}=… with one entry a sample"
                )
            if absent.shape[1:] != value.shape[1:]:
                raise ValueError(f"`unconditional[{name!r}]` has shape {tuple(absent.shape)}: expected {(1, *value.shape[1:])}")
            both[name] = torch.cat([absent.to(value.device, value.dtype).expand_as(value), value])
        without, within = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return without + self.guidance_scale * (within - without)


class _PosteriorMean(nn.Module):
    """What an azula denoiser says of the data, as a network."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        mean: Tensor = self.denoiser(x, t, **condition).mean
        return mean


def require_moments(mean: float | Tensor, variance: float | Tensor) -> None:
    """What is said of the data must be numbers or tensors, finite, and a variance not negative."""
    for name, value in (("mean", mean), ("variance", variance)):
        if not isinstance(value, int | float | Tensor):
            raise TypeError(f"`{name}` is {value!r}: give a number or a tensor of one sample's shape")
        values = torch.as_tensor(value)
        require(
            bool(values.isfinite().all()), name, value, "must be finite and ≥ 0" if name == "variance" else "must be finite"
        )
    require(bool((torch.as_tensor(variance) >= 0).all()), "variance", variance, "must be finite and ≥ 0")


def each_tensor(act: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A condition with every tensor of at least one dimension acted upon, in mappings, tuples and lists too."""
    if isinstance(value, Mapping):
        return {name: each_tensor(act, entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        entries = [each_tensor(act, entry) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    return act(value) if isinstance(value, Tensor) and value.ndim else value


def check_condition(condition: Mapping[str, Any], samples: int) -> None:
    """Every tensor condition has one entry per sample, or one for all, or no dimension; `ValueError` otherwise."""
    for name, value in condition.items():
        if isinstance(value, Mapping):
            check_condition(value, samples)
        elif isinstance(value, tuple | list) and any(isinstance(entry, Tensor | Mapping | tuple | list) for entry in value):
            check_condition({f"{name}[{i}]": entry for i, entry in enumerate(value)}, samples)
        elif isinstance(value, Tensor):
            if value.ndim and value.shape[0] not in (1, samples):
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)}: "
                    f"its first dimension must be the batch's, {samples}, or 1 to share it"
                )
        elif isinstance(value, tuple | list) or hasattr(value, "__array__"):
            raise TypeError(
                f"`{name}` is a {type(value).__name__}, which is not repeated along the window: "
                f"give a tensor, {name}=torch.as_tensor({name})"
            )


def spread(condition: Mapping[str, Any], sample: Tensor, samples: int) -> dict[str, Any]:
    """Conditions for network rows: row `r` gets the entry of sample `sample[r]`; shape `(R,)`."""

    def repeat(value: Tensor) -> Tensor:
        return value.expand(samples, *value.shape[1:])[sample.to(value.device)]

    out: dict[str, Any] = each_tensor(repeat, condition)
    return out
