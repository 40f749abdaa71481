"""A run's folder read back: `piadm.record` in reverse, with nothing taken on trust.

Only files of fixed names in the folder itself are opened, whatever the record says, and no code is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from piadm.errors import require
from piadm.pictures import is_image


@dataclass(frozen=True)
class Bound:
    """A `Certificate` as recorded: `None` where there is no number, `unbounded` where it is infinite."""

    kl: float | None
    standard_error: float | None
    tv: float | None
    rms: float | None
    rigorous: bool
    unbounded: bool
    calls: int
    evaluations: float


@dataclass(frozen=True)
class Cost:
    """What a run took, and its certificate; the names are those of `Result`."""

    steps: int
    rounds: int
    evaluations: float
    seconds: float
    network_seconds: float
    certificate: Bound


@dataclass(frozen=True)
class Comparison:
    """The sequential run beside it."""

    cost: Cost
    time_ratio: float
    rms_difference: list[float | None]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A run as its folder holds it; the names are those of `run.json` and of the tensors' files."""

    title: str
    denoiser: str
    scheme: str
    finished_at: str
    arguments: Mapping[str, Any]
    versions: Mapping[str, Any]
    machine: Mapping[str, Any]
    dtype: str
    cost: Cost
    converged: bool
    error: list[float | None]
    acceptance: Mapping[str, list[int]] | None
    sequential: Comparison | None
    windows: list[tuple[int, int]]
    residuals: list[list[float | None]]
    samples: Tensor
    condition: Mapping[str, Tensor]
    film: Mapping[str, Tensor] | None


def read_run(folder: Path) -> Recorded:
    """Reads `run.json`, `samples.safetensors` and, if it is there, `film.safetensors`.

    Raises:
        ValueError: if the folder holds no run, or one that is damaged; the message says where.
    """
    remedy = "give the --output folder of a piadm sample"
    require(folder.is_dir(), "folder", str(folder), f"there is no such folder: {remedy}")
    for name in ("run.json", "samples.safetensors"):
        require((folder / name).is_file(), "folder", str(folder), f"it holds no {name}: {remedy}")
    record = _Node(_json(folder / "run.json"), "")
    result = record["result"]
    cost = _cost(result)
    rounds = record["rounds"].each()
    if rounds and len(rounds) != cost.rounds:
        record["rounds"].damaged(f"holds {len(rounds)} rounds, `result.rounds` says {cost.rounds}")
    windows = [_window(one["window"], cost.steps) for one in rounds]
    residuals = [_residuals(one["residuals"], window) for one, window in zip(rounds, windows, strict=True)]

    tensors = _tensors(folder / "samples.safetensors")
    samples = tensors.pop("samples", None)
    shape = [one.count() for one in result["shape"].each()]
    if samples is None or list(samples.shape) != shape or not shape or min(shape) < 1:
        found = "no samples" if samples is None else f"samples of shape {list(samples.shape)}"
        result["shape"].damaged(f"is {shape}, samples.safetensors holds {found}")
    tensors.pop("sequential", None)
    counts, sequential = result["acceptance"], record["sequential"]
    return Recorded(
        title=record["title"].text(),
        denoiser=record["denoiser"].text(),
        scheme=record["scheme"].text(),
        finished_at=record["finished_at"].text(),
        arguments=record["arguments"].mapping(),
        versions=record["versions"].mapping(),
        machine=record["machine"].mapping(),
        dtype=result["dtype"].text(),
        cost=cost,
        converged=result["converged"].flag(),
        error=[one.number_or_none() for one in result["error"].each()],
        acceptance=None if counts.value is None else {name: _counts(counts[name], shape[0]) for name in _TESTS},
        sequential=None if sequential.value is None else _comparison(sequential, shape[0]),
        windows=windows,
        residuals=residuals,
        samples=samples.float(),
        condition={name: tensor for name, tensor in tensors.items() if tensor.ndim and len(tensor) == shape[0]},
        film=_film(folder / "film.safetensors", samples) if (folder / "film.safetensors").is_file() else None,
    )


_TESTS = ("accepted", "rejected", "recomputed")


class _Node:
    """A value of the record and where it stands; says so if it is not what it should be."""

    def __init__(self, value: Any, place: str) -> None:
        self.value, self.place = value, place

    def __getitem__(self, name: str) -> _Node:
        inner = _Node(None, f"{self.place}.{name}" if self.place else name)
        if name not in self.mapping():
            inner.damaged("is missing")
        return _Node(self.value[name], inner.place)

    def damaged(self, why: str) -> NoReturn:
        where = f"`{self.place}` {why}" if self.place else f"it {why}"
        raise ValueError(f"run.json is damaged: {where}. Draw the samples again with piadm sample")

    def _must(self, right: bool, what: str) -> None:
        if not right:
            self.damaged(f"is {str(self.value)[:60]!r}, not {what}")

    def mapping(self) -> Mapping[str, Any]:
        self._must(isinstance(self.value, dict), "an object")
        found: Mapping[str, Any] = self.value
        return found

    def each(self) -> list[_Node]:
        self._must(isinstance(self.value, list), "a list")
        return [_Node(one, f"{self.place}[{i}]") for i, one in enumerate(self.value)]

    def text(self) -> str:
        self._must(isinstance(self.value, str), "a text")
        return str(self.value)

    def flag(self) -> bool:
        self._must(isinstance(self.value, bool), "true or false")
        return bool(self.value)

    def number(self) -> float:
        right = isinstance(self.value, int | float) and not isinstance(self.value, bool) and 0 <= self.value < math.inf
        self._must(right, "a number of at least 0")
        return float(self.value)

    def number_or_none(self) -> float | None:
        return None if self.value is None else self.number()

    def count(self) -> int:
        right = isinstance(self.value, int) and not isinstance(self.value, bool) and 0 <= self.value < 2**63
        self._must(right, "an integer of at least 0")
        return int(self.value)


def _json(path: Path) -> Any:
    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        _Node(None, "").damaged(f"is not JSON ({error})")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path.name} is damaged: {error}. Draw the samples again with piadm sample") from error


def _cost(node: _Node) -> Cost:
    bound = node["certificate"]
    certificate = Bound(
        kl=bound["kl"].number_or_none(),
        standard_error=bound["standard_error"].number_or_none(),
        tv=bound["tv"].number_or_none(),
        rms=bound["rms"].number_or_none(),
        rigorous=bound["rigorous"].flag(),
        unbounded=bound["unbounded"].flag(),
        calls=bound["calls"].count(),
        evaluations=bound["evaluations"].number(),
    )
    steps = node["steps"].count()
    if steps < 1:
        node["steps"].damaged("is 0, not at least 1")
    return Cost(
        steps=steps,
        rounds=node["rounds"].count(),
        evaluations=node["evaluations"].number(),
        seconds=node["seconds"].number(),
        network_seconds=node["network_seconds"].number(),
        certificate=certificate,
    )


def _comparison(node: _Node, samples: int) -> Comparison:
    differences = [one.number_or_none() for one in node["rms_difference"].each()]
    if len(differences) != samples:
        node["rms_difference"].damaged(f"holds {len(differences)} numbers, one for each of {samples} samples is right")
    return Comparison(_cost(node), node["time_ratio"].number(), differences)


def _window(node: _Node, steps: int) -> tuple[int, int]:
    ends = [one.count() for one in node.each()]
    if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= steps:
        node.damaged(f"is {ends}, not a first step and one past the last of {steps}")
    return ends[0], ends[1]


def _residuals(node: _Node, window: tuple[int, int]) -> list[float | None]:
    found = [one.number_or_none() for one in node.each()]
    if len(found) > window[1] - window[0]:
        node.damaged(f"holds {len(found)} numbers for the {window[1] - window[0]} steps of its window")
    return found


def _counts(node: _Node, samples: int) -> list[int]:
    found = [one.count() for one in node.each()]
    if len(found) != samples:
        node.damaged(f"holds {len(found)} counts, one for each of {samples} samples is right")
    return found


def _film(path: Path, samples: Tensor) -> dict[str, Tensor]:
    film = _tensors(path)
    rounds, ahead, finished = (film.get(name, torch.empty(0)) for name in ("rounds", "ahead", "finished"))
    right = rounds.ndim == 1 and len(rounds) == len(ahead) == len(finished) > 0 and ahead.shape == finished.shape
    images = is_image(samples.shape[1:])
    right = right and ahead.ndim == (5 if images else 3) and min(ahead.shape) > 0 and ahead.shape[1] <= len(samples)
    right = right and (not images or is_image(ahead.shape[2:]))
    if not right:
        raise ValueError(
            f"{path.name} is damaged: rounds, ahead and finished have shapes {tuple(rounds.shape)}, {tuple(ahead.shape)} and "
            f"{tuple(finished.shape)}, not those of a film of these samples. Draw the samples again with piadm sample --report"
        )
    return {"rounds": rounds.long(), "ahead": ahead.float(), "finished": finished.float()}
