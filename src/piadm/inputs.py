"""Reading the arguments of a sampler's call: what is wrong is said before the network is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piadm.denoiser import DenoiserLike
from piadm.errors import require
from piadm.noise import GeneratorLike, read_generators


def read_shape(shape: Sequence[int], event: tuple[int, ...] | None) -> tuple[int, ...]:
    """`(batch, *event)` as a tuple of integers, checked against the denoiser's event shape."""
    given = tuple(shape) if isinstance(shape, Sequence) else None
    ok = given is not None and len(given) >= 1 and all(type(n) is int and n >= 1 for n in given)
    if given is None or not ok:
        raise ValueError(f"`shape` is {shape!r}: give (batch, *event), all at least 1, for example (16, 1, 28, 28)")
    wanted = ", ".join(map(str, (given[0], *(event or ()))))
    require(event is None or given[1:] == event, "shape", given, f"this denoiser's samples have shape {event}: give ({wanted})")
    return given


def read_home(denoiser: DenoiserLike, generator: GeneratorLike, noise: Tensor | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the states: the network's, else those of what was given, in float32 at least."""
    generators = read_generators(generator)
    if noise is not None and not isinstance(noise, Tensor):
        raise TypeError(f"`noise` is a {type(noise).__name__}: give a tensor, for example torch.as_tensor(noise)")
    dtype = torch.promote_types(denoiser.dtype, torch.float32)
    if noise is not None:
        dtype = torch.promote_types(dtype, noise.dtype)
    given = [noise, *generators]
    device = denoiser.device or next((one.device for one in given if one is not None), torch.device("cpu"))
    return device, dtype


def check_noise(noise: Tensor, shape: tuple[int, ...], home: torch.device) -> None:
    """The starting state fits the samples."""
    require(tuple(noise.shape) == shape, "noise", tuple(noise.shape), f"must have the samples' shape {shape}")
    require(noise.is_floating_point(), "noise", noise.dtype, "must be a floating tensor")
    require(bool(noise.isfinite().all()), "noise", noise, "has NaN or infinite entries")
    require(noise.device == home, "noise", noise.device, f"must live with the states on {home}")


def check_moments(owner: object, event: tuple[int, ...]) -> None:
    """A mean or variance given as a tensor has the shape of one sample, be it the denoiser's or a policy's."""
    for name in ("mean", "variance"):
        value = getattr(owner, name, 0.0)
        fits = not isinstance(value, Tensor) or value.numel() == 1 or tuple(value.shape) == event
        shape = tuple(value.shape) if isinstance(value, Tensor) else value
        require(fits, name, shape, f"a {type(owner).__name__}'s {name} must be a number or of one sample's shape {event}")
