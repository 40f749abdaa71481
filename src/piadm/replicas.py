r"""Several devices, one process: a copy of the network on each, which evaluate their shares of a round at the same time.

The states, the noise and the history live on one device, `home`. In a round of $R$ rows of $D$ numbers on $n$ devices each
evaluates at most $\lceil R/n \rceil$ rows. What leaves home for the other devices, and comes back, is

$$ \Big( 1 - \frac{1}{n} \Big) R \, (2 D b + 8 + c) \quad \text{bytes}, $$

$b$ bytes a number, 8 for a time, $c$ the conditions of a row; with a home that holds no network, all of $R (2 D b + 8 + c)$.

Threads do the asking: what a network does in Python, its threads do in turns. A network whose kernels are so short that its
device waits for Python gains more from `piadm.Sharded`, which has a process for each device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from piadm.denoiser import DenoiserLike, Wrapper
from piadm.errors import require
from piadm.executors import Executor, MicroBatch, cut, in_slices, layers
from piadm.fixed import FixedBatch

Place = str | torch.device
_Setting = Callable[[torch.device], AbstractContextManager[None]]


class Replicas(Executor):
    """Evaluates a round on several local devices, a share on each: the same sample, to float precision.

    Shares differ by at most one row; with more devices than rows some have none. The denoiser is left where it is: each
    device has a copy of its network, made here, but the first one on which the network lives already. Weights that are
    changed afterwards are changed on that one alone. A network that does not fit twice on its device while it is copied is
    better kept on the CPU.

    With one device and another `home` this is offload: a large window's states and history stay in the CPU's memory.

    Rows go to their device beneath the executors in the denoiser, call by call: `Replicas(MicroBatch(denoiser, 64), …)` has 64
    rows on each device at a time. Out of memory, a device halves its own calls.

    Arguments:
        denoiser: The denoiser, its network a `torch.nn.Module`.
        devices: Such as `["cuda:0", "cuda:1"]`; one may be named twice.
        home: Where the states live, and the noise is drawn: a function of the seed and of the *kind* of this device. The first
            of `devices` by default.

    Raises:
        TypeError: for a network that is no module, which cannot be copied, and for a denoiser that has an executor of several
            devices in it.
        ValueError: for devices that are not there.
        Exception: from a call, what a network raises, with a note of its device, once the others are done with their shares.
    """

    def __init__(self, denoiser: DenoiserLike, devices: Sequence[Place], home: Place | None = None) -> None:
        super().__init__(denoiser)
        given = isinstance(devices, Sequence) and not isinstance(devices, str) and len(devices) > 0
        require(given, "devices", devices, 'give a list, such as ["cuda:0", "cuda:1"]')
        self.devices = [_device("devices", place) for place in devices]
        self.home = self.devices[0] if home is None else _device("home", home)
        _check_copies(denoiser)
        here = denoiser.device
        own = next((i for i, device in enumerate(self.devices) if device == here), None)
        self.replicas = [in_slices(_on(device, denoiser, i == own)) for i, device in enumerate(self.devices)]

    def __repr__(self) -> str:
        return f"Replicas({self.denoiser!r}, {[str(device) for device in self.devices]}, home='{self.home}')"

    @property
    def device(self) -> torch.device:
        return self.home

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        rows, count = len(x), len(self.replicas)
        bounds = [-(-i * rows // count) for i in range(count + 1)]
        asked = [
            partial(self._ask, place, x[first:last], t[first:last], cut(condition, slice(first, last), rows))
            for place, (first, last) in enumerate(pairwise(bounds))
            if first < last
        ]
        as_here = _settings(x.device, self.devices)
        if len(asked) == 1:
            return asked[0](as_here)
        with ThreadPoolExecutor(len(asked) - 1) as pool:  # left when all are done, whatever becomes of one
            others = [pool.submit(ask, as_here) for ask in asked[1:]]
            return torch.cat([asked[0](as_here), *(other.result() for other in others)])

    def _ask(self, place: int, x: Tensor, t: Tensor, condition: dict[str, Any], as_here: _Setting) -> Tensor:
        """One replica's answer."""
        try:
            with as_here(self.devices[place]):
                return self.replicas[place](x, t, **condition)
        except Exception as error:
            if hasattr(error, "add_note"):
                error.add_note(f"piadm: raised by the network on {self.devices[place]} (`devices[{place}]`)")
            raise


class _There(Wrapper):
    """A denoiser on another device: what it is asked goes there, its answer comes back."""

    def __init__(self, denoiser: DenoiserLike, there: torch.device) -> None:
        super().__init__(denoiser)
        self.there = there

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        there: dict[str, Any] = tree_map_only(Tensor, lambda value: value.to(self.there), condition)
        return self.denoiser(x.to(self.there), t.to(self.there), **there).to(x.device)


def _on(device: torch.device, denoiser: DenoiserLike, own: bool) -> DenoiserLike:
    """A denoiser on a device, and above it the executors it has; `own`: its network is there already."""
    if not any(isinstance(layer, Executor) for layer in layers(denoiser)):
        return _There(denoiser if own else _copied(denoiser, device), device)
    assert isinstance(denoiser, Wrapper)
    above = copy.copy(denoiser)
    above.denoiser = _on(device, denoiser.denoiser, own)
    return above


def _copied(denoiser: DenoiserLike, device: torch.device) -> DenoiserLike:
    """A denoiser with copies of its modules and tensors on a device."""
    one = copy.copy(denoiser)
    for name, value in vars(denoiser).items():
        if isinstance(value, nn.Module):
            vars(one)[name] = copy.deepcopy(value).to(device)
        elif isinstance(value, Tensor):
            vars(one)[name] = value.to(device)
    if isinstance(one, Wrapper):
        one.denoiser = _copied(one.denoiser, device)
    return one


def _check_copies(denoiser: DenoiserLike) -> None:
    """Raises `TypeError` if a denoiser cannot be copied."""
    *_, inner = layers(denoiser)
    for layer in layers(denoiser):
        if isinstance(layer, Executor) and not isinstance(layer, MicroBatch | FixedBatch):
            name = type(layer).__name__
            raise TypeError(f"`denoiser` has {name} in it, of which there can be one: wrap the other way, {name}(Replicas(…))")
    if not any(isinstance(value, nn.Module) for value in vars(inner).values()):
        held = getattr(inner, "network", inner)
        raise TypeError(
            f"`denoiser` has no torch.nn.Module in it but {held!r}, which cannot be copied to another device: make its network "
            "a module, or start a process for each device and use piadm.Sharded"
        )


def _device(argument: str, place: Place) -> torch.device:
    """A device that is there, with its index."""
    try:
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`{argument}` names {place!r}, which torch does not know here: {reason}") from None


def _settings(home: torch.device, devices: Sequence[torch.device]) -> _Setting:
    """What this thread has set for itself alone (gradients, autocast, streams), to be set in another one, for a device."""
    there = {home, *devices}
    kinds = [kind for kind in {device.type for device in there} if torch.amp.is_autocast_available(kind)]
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
    streams = {device: torch.cuda.current_stream(device) for device in there if device.type == "cuda"}
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    @contextmanager
    def as_here(device: torch.device) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype))
            for one in (home, device):  # the second becomes the current one
                if one in streams:
                    stack.enter_context(torch.cuda.stream(streams[one]))
            yield

    return as_here
