"""The scheduler that a pipeline sees while it runs in parallel: it has its own timesteps, options and signatures."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from hashlib import blake2b
from typing import Any, Protocol

import torch
from torch import Tensor

from piadm.diffusers.probing import Probe, first_output, memory, remember
from piadm.noise import derived_seed, read_generators


class Driver(Protocol):
    """What the scheduler asks of a run."""

    def rounds(self, times: Tensor) -> Iterator[Tensor]: ...

    def scale(self, sample: Tensor, plain: Callable[[], Tensor]) -> Tensor: ...

    def noised(self, original: Tensor, noise: Tensor, plain: Callable[[], Tensor]) -> Tensor: ...

    def step(self, output: Tensor, sample: Tensor, options: dict[str, Any]) -> Any: ...


class Rounds(Tensor):
    """Timesteps that are a tensor like any other, but a loop over them runs once a round."""

    driver: Driver

    @classmethod
    def of(cls, times: Tensor, driver: Driver) -> Rounds:
        out: Rounds = times.as_subclass(cls)
        out.driver = driver
        return out

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        # img2img cuts its timesteps and moves them; all else, such as one timestep for a batch, is a plain tensor
        cut = func is Tensor.__getitem__ and isinstance(args[1], slice)
        if (cut or func in (Tensor.to, Tensor.cpu)) and isinstance(args[0], Rounds):
            return Rounds.of(out, args[0].driver)
        return out

    def __deepcopy__(self, memo: Any) -> Rounds:
        return Rounds.of(self.as_subclass(Tensor).clone(), self.driver)

    def __iter__(self) -> Iterator[Tensor]:
        return self.driver.rounds(self.as_subclass(Tensor))


def in_lanes(scheduler: Any, driver: Driver) -> Any:
    """A copy of a scheduler, of a subclass of its class, whose loop is the driver's."""
    base = type(scheduler)

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.set_timesteps(self, *args, **kwargs)
        self.timesteps = Rounds.of(self.timesteps, driver)
        return out

    def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return driver.scale(sample, lambda: base.scale_model_input(self, sample, *args, **kwargs))

    def add_noise(self: Any, original_samples: Tensor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return driver.noised(original_samples, noise, lambda: base.add_noise(self, original_samples, noise, *args, **kwargs))

    def scale_noise(self: Any, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        return driver.noised(sample, noise, lambda: base.scale_noise(self, sample, timestep, noise))

    signature = inspect.signature(base.step)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given["self"]
        output, sample = given.pop("model_output"), given.pop("sample")
        del given["timestep"]
        return driver.step(output, sample, given)

    own: set[Callable[..., Any]] = {set_timesteps, scale_model_input, add_noise, scale_noise, step}
    methods = {one.__name__: wraps(getattr(base, one.__name__))(one) for one in own if hasattr(base, one.__name__)}
    out = copy.deepcopy(scheduler)
    out.__class__ = type(base.__name__, (base,), {"__module__": base.__module__, **methods})
    return out


def recorded(scheduler: Any, record: Callable[[Tensor], None]) -> Any:
    """A copy of a scheduler that shows every next sample, and is otherwise itself."""
    base = type(scheduler)

    @wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.step(self, *args, **kwargs)
        record(first_output(out))
        return out

    out = copy.deepcopy(scheduler)
    out.__class__ = type(base.__name__, (base,), {"__module__": base.__module__, "step": step})
    return out


def out_of_lanes(scheduler: Any, base: type) -> Any:
    """A plain scheduler with the timesteps and the place in them that one in lanes has."""
    plain = copy.copy(scheduler)
    plain.__class__ = base
    plain.timesteps = torch.as_tensor(scheduler.timesteps).as_subclass(Tensor)
    return copy.deepcopy(plain)


class SchedulerNoise:
    r"""$ξ_m$ as the scheduler itself draws it: from the user's generator, in the order of a sequential run.

    The scheduler is stepped along with a state and outputs of zero; what comes out is $C_m ξ_m$. Steps are drawn as they
    enter the window of any sample, and kept until `forget`.

    Arguments:
        scheduler: A plain scheduler that has taken no step; it is stepped.
        probe: Its table.
        output, sample: Tensors like the network's output and the state, shape `(S, *event)`.
        options: Of `step`, the generator among them.
        dtype: Of the noise.
    """

    def __init__(
        self, scheduler: Any, probe: Probe, output: Tensor, sample: Tensor, options: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        self.scheduler, self.probe, self.options = scheduler, probe, dict(options)
        self.output, self.sample = torch.zeros_like(output), torch.zeros_like(sample)
        self.device, self.dtype = sample.device, dtype
        self._drawn: dict[int, Tensor] = {}
        self._next = 0
        generators = read_generators(self.options.get("generator"))
        states = [torch.get_rng_state() if one is None else one.get_state() for one in generators]
        seeds = [blake2b(bytes(state.tolist()), digest_size=8).hexdigest() for state in states]
        self._seeds = seeds if len(seeds) == len(sample) else ["".join(seeds)]

    def __call__(self, first: int, last: int) -> Tensor:
        """$ξ_m$ for $m$ from `first` up to but excluding `last`, in the first component; shape `(last - first, k, S, D)`."""
        while self._next < last:
            self._drawn[self._next] = self._draw(self._next)
            self._next += 1
        xi = torch.stack([self._drawn[step] for step in range(first, last)])[:, None]
        return torch.cat([xi, xi.new_zeros(len(xi), self.probe.table.components - 1, *xi.shape[2:])], 1)

    def forget(self, first: int) -> None:
        """Drops what was drawn for steps before `first`, which every sample has finished."""
        for step in [step for step in self._drawn if step < first]:
            del self._drawn[step]

    def uniform(self, first: int, last: int) -> Tensor:
        """$u_m$ for exact runs, a function of the generators' state at the start and of $m$; shape `(last - first, S)`."""
        each = len(self.sample) // len(self._seeds)
        rows = []
        for step in range(first, last):
            sources = [torch.Generator().manual_seed(derived_seed(f"{seed}:{step}")) for seed in self._seeds]
            rows.append(torch.cat([torch.rand(each, generator=one, dtype=self.dtype) for one in sources]))
        return torch.stack(rows).to(self.device)

    def _draw(self, step: int) -> Tensor:
        shape = tuple(self.sample.shape)
        for kept, old in memory(self.scheduler, shape).items():
            remember(self.scheduler, kept, torch.zeros_like(old))
        t = self.probe.times[step]
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(self.sample, t)
        out = first_output(self.scheduler.step(self.output, t, self.sample, **self.options))
        slot, coefficient = self.probe.noise_slot[step]
        if coefficient == 0:
            return torch.zeros(shape[0], self.sample[0].numel(), device=self.device, dtype=self.dtype)
        seen = out if slot is None else memory(self.scheduler, shape)[slot]
        return seen.to(self.device, self.dtype).reshape(shape[0], -1) / coefficient
