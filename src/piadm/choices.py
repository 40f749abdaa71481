"""What is asked for in words, on the command line or on a page, as the library's own objects."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor

from piadm import models
from piadm.denoiser import DenoiserLike
from piadm.errors import require
from piadm.published import PIADMODE, PIADMSDE
from piadm.samplers import Parallel
from piadm.schemes import DDIM, DDPM, Euler, Scheme

NO_CLASS = len(models.LABELS)
"""What stands for "no class" in the embedded models; the classes are the numbers below it."""


class SamplerName(str, Enum):
    piadm_sde = "piadm-sde"
    piadm_ode = "piadm-ode"
    parallel = "parallel"
    exact = "exact"
    sequential = "sequential"


class SchedulerName(str, Enum):
    ddpm = "ddpm"
    ddim = "ddim"
    euler = "euler"


PAPERS = (SamplerName.piadm_sde, SamplerName.piadm_ode)


def read_window(given: str) -> int | Literal["auto"] | None:
    """A window in words; `None` stands for all steps."""
    if given == "auto":
        return "auto"
    require(given == "all" or given.isdecimal(), "window", given, "give a number of steps such as 32, all, or auto")
    return None if given == "all" else int(given)


def make_scheme(scheduler: SchedulerName, denoiser: DenoiserLike, steps: int, eta: float) -> Scheme:
    """A scheduler's steps; `eta` is ddim's."""
    match scheduler:
        case SchedulerName.ddpm:
            return DDPM(steps)
        case SchedulerName.ddim:
            return DDIM(steps, eta)
        case SchedulerName.euler:
            scheme = Euler(steps)
            try:
                scheme(denoiser.schedule)
            except ValueError as error:
                raise ValueError(f"`scheduler` is 'euler': {error}") from error
            return scheme


def make_published(name: SamplerName, denoiser: DenoiserLike, steps: int, **settings: Any) -> Parallel:
    """The paper's samplers with about `steps` steps; `settings` as of `PIADMSDE.with_steps`."""
    sampler = PIADMSDE if name is SamplerName.piadm_sde else PIADMODE
    return sampler.with_steps(denoiser, steps, **settings)


def read_condition(label: str | None, samples: int, embedded: bool, denoiser: DenoiserLike) -> dict[str, Tensor]:
    """The labels of the samples, which cycle through the ones given (an embedded model: all of them by default)."""
    if label is None and not embedded:
        return {}
    words = [str(n) for n in range(NO_CLASS)] if label is None else label.split(",")
    limit = f"from 0 to {NO_CLASS - 1}" if embedded else "(integers of at least 0)"
    right = all(re.fullmatch(r"\s*\d{1,18}\s*", word) and (not embedded or int(word) < NO_CLASS) for word in words)
    require(right, "label", label, f"give classes {limit}, for example 7 or 0,1,2")
    classes = torch.tensor([int(word) for word in words], device=denoiser.device)
    return {"label": classes[torch.arange(samples, device=denoiser.device) % len(words)]}
