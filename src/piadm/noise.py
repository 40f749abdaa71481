r"""The driving noise $ξ_m$ as a function of (seed, m), never of the order of execution.

Every sampler of a scheme draws the same $ξ_m$ for the same seed, whatever its window, blocks, micro-batches or
propagator; this is what makes "the same sample as the sequential one" a statement that can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

GeneratorLike = torch.Generator | Sequence[torch.Generator] | None


def read_generators(generator: GeneratorLike) -> list[torch.Generator | None]:
    """One generator, one per sample or `None`, as a list; raises `TypeError` for anything else."""
    listed = generator if isinstance(generator, Sequence) else [generator]
    if not all(isinstance(one, torch.Generator | None) for one in listed):
        raise TypeError(f"`generator` is {generator!r}: give torch.Generator().manual_seed(0), or a list of one per sample")
    return list(listed)


class NoiseSource(Protocol):
    """What solvers need of the driving noise."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, first: int, last: int) -> Tensor:
        """$ξ_m$ for $m$ from `first` up to but excluding `last`, shape `(last - first, k, S, D)`; not to be written to."""


class UniformSource(NoiseSource, Protocol):
    """What solvers that test need."""

    def uniform(self, first: int, last: int) -> Tensor:
        """$u_m$, uniform on [0, 1), likewise, shape `(last - first, S)`."""


AT_ONCE = 16384
"""Numbers that one seeding of the generator may give, in steps of which there are at most 32: seeding takes as long as some
thousand numbers do."""


def derived_seed(key: str) -> int:
    """A seed that is a function of a key."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


class Noise:
    r"""$ξ_m \sim N(0, I)$, shape `(k, S, D)`, and the standard normal start, shape `(S, D)`.

    A seed is drawn from the user's generator once per run, so two runs with one generator differ and two generators with
    one seed agree (for one shape, dtype and kind of device). With a list of generators, one per sample, a sample does not
    depend on its batch.

    Arguments:
        generator: A `torch.Generator`, one per sample, or `None` for torch's default one.
        samples: $S$, the batch size.
        size: $D$, numbers per sample.
        components: $k$, components of the state (2 for underdamped Langevin).
    """

    def __init__(
        self, generator: GeneratorLike, samples: int, size: int, components: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        generators = read_generators(generator)
        if len(generators) not in (1, samples) or (len(generators) == 1 != samples and isinstance(generator, Sequence)):
            raise ValueError(f"`generator` has {len(generators)} generators: give one, or one per sample ({samples})")
        for one in generators:
            if one is not None and one.device.type != device.type:
                raise ValueError(
                    f"`generator` lives on {one.device} but the samples on {device}: "
                    f"use torch.Generator({device.type!r}).manual_seed(0)"
                )
        self.seeds = [
            int(torch.randint(2**63 - 1, (1,), generator=one, device=one.device if one is not None else "cpu"))
            for one in generators
        ]
        self.samples, self.size, self.components = samples, size, components
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device)
        self._kept: dict[int, Tensor] = {}

    @classmethod
    def from_seeds(
        cls, seeds: Sequence[int], samples: int, size: int, components: int, device: torch.device, dtype: torch.dtype
    ) -> Noise:
        """The noise of a run whose seeds are known: one, or one per sample."""
        noise = cls(torch.Generator(device), samples, size, components, device, dtype)
        noise.seeds = list(seeds)
        return noise

    def _each(self, key: str, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """Numbers drawn from every seed and `key`, of shape `(shape[0], S, *shape[1:])`."""
        each = self.samples // len(self.seeds)
        parts = []
        for seed in self.seeds:
            self._generator.manual_seed(derived_seed(f"{seed}:{key}"))
            whole = (shape[0], each, *shape[1:])
            parts.append(draw(whole, generator=self._generator, device=self.device, dtype=self.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @cached_property
    def _stretch(self) -> int:
        """How many steps' noise one seeding gives: of a generator for each sample no more than of that generator alone."""
        return max(1, min(32, AT_ONCE // (self.components * self.size * (self.samples // len(self.seeds)))))

    def _normal(self, stretch: int) -> Tensor:
        """$ξ_m$ of a stretch of steps, shape `(steps, k, S, D)`."""
        drawn = self._each(f"{stretch}", torch.randn, (self._stretch * self.components, self.size))
        return drawn.reshape(self._stretch, self.components, self.samples, self.size)

    def uniform(self, first: int, last: int) -> Tensor:
        """$u_m$, uniform on [0, 1), for $m$ from `first` up to but excluding `last`, shape `(last - first, S)`."""
        return _cut(first, last, 256, {}, lambda stretch: self._each(f"{stretch}:u", torch.rand, (256,)))[0]

    def start(self) -> Tensor:
        """The starting state in units of the scheme's starting standard deviation, shape `(S, D)`."""
        return self._each("start", torch.randn, (1, self.size))[0]

    def __call__(self, first: int, last: int) -> Tensor:
        """$ξ_m$ for $m$ from `first` up to but excluding `last`, shape `(last - first, k, S, D)`."""
        out, drawn = _cut(first, last, self._stretch, self._kept, self._normal)
        if self._stretch > 1:  # the next call begins in one of the last, samples that slid apart a few before
            self._kept = dict(list(drawn.items())[-4:])
        return out


def _cut(
    first: int, last: int, length: int, known: dict[int, Tensor], draw: Callable[[int], Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Steps from `first` up to but excluding `last` out of the stretches of `length` steps that hold them, and these."""
    low, high = first // length, (last - 1) // length + 1
    drawn = {one: known[one] if one in known else draw(one) for one in range(low, high)}
    whole = drawn[low] if len(drawn) == 1 else torch.cat(list(drawn.values()))
    return whole[first - low * length : last - low * length], drawn


@dataclass(frozen=True, eq=False)
class Subset:
    """The noise of some samples of a batch, which they keep when the others leave.

    Arguments:
        noise: That of the whole batch.
        samples: Which ones, shape `(n,)`.
    """

    noise: Noise
    samples: Tensor

    @property
    def device(self) -> torch.device:
        return self.noise.device

    @property
    def dtype(self) -> torch.dtype:
        return self.noise.dtype

    def uniform(self, first: int, last: int) -> Tensor:
        """$u_m$, as in `Noise`, shape `(last - first, n)`."""
        return self.noise.uniform(first, last).index_select(1, self.samples.to(self.noise.device))

    def __call__(self, first: int, last: int) -> Tensor:
        """$ξ_m$ for $m$ from `first` up to but excluding `last`, shape `(last - first, k, n, D)`."""
        return self.noise(first, last).index_select(2, self.samples.to(self.noise.device))
