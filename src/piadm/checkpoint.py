r"""Checkpoints: all that a run is between two rounds, in memory and as a file.

The noise is a function of the seeds and the step, and `piadm.solver.State` is all that a round leaves to the next, so a
`Checkpoint` is small, and a run resumed from it gives bit for bit the sample of the run that was never interrupted.

The file is a safetensors file: tensors, and JSON in its header. Reading one runs no code and opens no path that it names. It
is written beside its place and then moved there, so that a crash leaves the old one or the new one, whole. It holds the
fingerprints of what it belongs to (table, denoiser, policies, conditions); resuming anything else is refused.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piadm.merged import Merger
from piadm.solver import State
from piadm.speculative import Speculation
from piadm.tuning import Guarded

FORMAT, VERSION = "piadm checkpoint", 4
SAMPLE_AXIS = {
    "start": 0,
    "stop": 0,
    "x": 2,
    "noise": 2,
    "seen": 1,
    "x_seen": 2,
    "f_seen": 1,
    "spent": 1,
    "variance": 0,
    "residual": 1,
    "evaluations": 0,
    "newest": 0,
    "mean": 2,
    "accepted": 0,
    "rejected": 0,
    "shifted": 0,
    "miss": 0,
    "along": 0,
    "stuck": 0,
}
"""The axis of a state's tensors along which samples lie."""
KINDS = {"State": State, "Speculation": Speculation, "Merger": Merger}
ON_CPU = ("start", "stop", "seen", "spent", "variance", "residual", "evaluations", "accepted", "rejected", "along", "stuck")
"""Those of them that live on the CPU, wherever the others do."""


@dataclass(frozen=True, eq=False)
class Failure:
    """A sample for which the network returned NaN or infinity.

    Attributes:
        sample: Its row of the batch.
        step: The step that broke.
        round: In which round.
        finished: How many steps it had finished.
        x: The state it had reached with them, shape `(D,)`.
    """

    sample: int
    step: int
    round: int
    finished: int
    x: Tensor


@dataclass(frozen=True, eq=False)
class Audit:
    """What measuring the defects of accepted steps has found; per sample that has not failed, shape `(n,)`.

    Attributes:
        nats: Their share of the divergence.
        drift: What noiseless ones add to the distance from the sequential sample.
        steps: How many were measured, int64, on the CPU.
        calls: In how many network calls.
    """

    nats: Tensor
    drift: Tensor
    steps: Tensor
    calls: int

    def take(self, samples: Tensor) -> Audit:
        """That of some samples."""
        return Audit(self.nats[samples], self.drift[samples], self.steps[samples], self.calls)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a run is between two rounds.

    Attributes:
        state: The solver's state of the samples that have not failed.
        alive: Their rows of the batch, shape `(n,)`.
        failures: The others.
        audit: What became of their measured defects.
        residuals: As in `Result`.
        windows: Likewise.
        shape: `(S, *event)`.
        steps: $M$.
        seconds: Wall time so far.
        network_seconds: Of that, time inside the denoiser.
        device: Kind of the device that the run is on.
        seeds: Of the noise, one, or one per sample.
        measured: The window that `"auto"` came to.
        identity: What the run is made of: a name, and its fingerprint.
    """

    state: State
    alive: Tensor
    failures: tuple[Failure, ...]
    audit: Audit
    residuals: tuple[Tensor, ...]
    windows: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    steps: int
    device: str
    seconds: float = 0.0
    network_seconds: float = 0.0
    seeds: tuple[int, ...] = ()
    measured: Guarded | None = None
    identity: Mapping[str, str] | None = None

    def __repr__(self) -> str:
        return (
            f"Checkpoint(shape={self.shape}, rounds={self.state.rounds}, "
            f"finished={int(self.finished.min())} to {int(self.finished.max())} of {self.steps} steps)"
        )

    @classmethod
    def begin(cls, state: State, shape: tuple[int, ...], steps: int, started: float) -> Checkpoint:
        """Before the first round of a call that began when the clock (`time.perf_counter`) stood at `started`."""
        zero = torch.zeros_like(state.error)
        audit = Audit(zero, zero, torch.zeros(shape[0], dtype=torch.long), 0)
        return cls(
            state, torch.arange(shape[0]), (), audit, (), (), shape, steps, state.x.device.type, time.perf_counter() - started
        )

    def clock(self) -> tuple[float, float]:
        """What to measure this process's share of `seconds` and `network_seconds` from."""
        return time.perf_counter() - self.seconds, self.network_seconds

    def timed(self, clock: tuple[float, float], network_seconds: float) -> Checkpoint:
        """With the times of now; `network_seconds` are this process's."""
        return replace(self, seconds=time.perf_counter() - clock[0], network_seconds=clock[1] + network_seconds)

    @property
    def finished(self) -> Tensor:
        """How many steps each sample of the batch has finished, shape `(S,)`."""
        out = torch.zeros(self.shape[0], dtype=torch.long)
        out[self.alive] = self.state.reached
        for failure in self.failures:
            out[failure.sample] = failure.finished
        return out

    @property
    def x(self) -> Tensor:
        """The state each sample has reached with them, shape `(S, *event)`."""
        reached = self.state.finished()
        out = reached.new_zeros(self.shape[0], reached.shape[-1])
        out[self.alive.to(out.device)] = reached
        for failure in self.failures:
            out[failure.sample] = failure.x
        return out.reshape(self.shape)

    def without(self, samples: list[int], step: int) -> Checkpoint:
        """The run goes on without some rows of `state`, which broke at `step` in the round to come."""
        state = self.state
        gone = tuple(
            Failure(int(self.alive[s]), step, state.rounds + 1, int(state.reached[s]), state.x[0, 0, s].clone())
            for s in samples
        )
        keep = torch.tensor([s for s in range(len(self.alive)) if s not in samples], dtype=torch.long)
        left = take(state, keep)
        left = replace(left, done=bool((left.reached == self.steps).all()))
        failures, audit = self.failures + gone, self.audit.take(keep)
        return replace(self, state=left, alive=self.alive[keep], failures=failures, audit=audit)

    def check(self, identity: Mapping[str, str], device: torch.device) -> None:
        """Raises `ValueError` unless this is a checkpoint of such a run, made on such a device."""
        known = self.identity or {}
        other = [name for name in identity if known.get(name) != identity[name]]
        if other:
            raise ValueError(
                f"`checkpoint` belongs to another run: its {', '.join(other)} differ{'s' * (len(other) == 1)}. Resume with the "
                "same denoiser, scheme, sampler and conditions"
            )
        if self.device != device.type:
            raise ValueError(
                f"`checkpoint` was made on {self.device} and the network lives on {device}, which draws other noise from a "
                f"seed: move the network to {self.device}"
            )

    def to(self, device: torch.device) -> Checkpoint:
        """With the state on a device."""
        tensors = {name: v for name, v in self.state.parts().items() if isinstance(v, Tensor) and name not in ON_CPU}
        moved: dict[str, Any] = {name: v.to(device) for name, v in tensors.items()}
        return replace(self, state=replace(self.state, **moved))


def take(state: State, samples: Tensor) -> State:
    """The state of some samples of the batch."""
    picked: dict[str, Any] = {}
    for name, value in state.parts().items():
        if isinstance(value, Tensor):
            picked[name] = value.index_select(SAMPLE_AXIS[name], samples.to(value.device))
    return replace(state, **picked)


def save(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint over an earlier one: atomically, so that there is always a whole one."""
    from safetensors.torch import save as serialize

    entries = {f"state.{name}": value for name, value in checkpoint.state.parts().items()}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    tensors["alive"] = checkpoint.alive
    tensors |= {f"audit.{name}": getattr(checkpoint.audit, name) for name in ("nats", "drift", "steps")}
    if checkpoint.residuals:
        tensors["residuals"] = torch.cat([residual.cpu() for residual in checkpoint.residuals])
    if checkpoint.failures:
        tensors["failures"] = torch.stack([failure.x.cpu() for failure in checkpoint.failures])
    header = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "kind": type(checkpoint.state).__name__,
        "audits": checkpoint.audit.calls,
        "state": {name: value for name, value in entries.items() if name not in tensors},
        "failures": [[f.sample, f.step, f.round, f.finished] for f in checkpoint.failures],
        "windows": checkpoint.windows,
        "lengths": [len(residual) for residual in checkpoint.residuals],
        "shape": checkpoint.shape,
        "steps": checkpoint.steps,
        "device": checkpoint.device,
        "seconds": checkpoint.seconds,
        "network_seconds": checkpoint.network_seconds,
        "seeds": checkpoint.seeds,
        "measured": None if checkpoint.measured is None else asdict(checkpoint.measured),
        "identity": checkpoint.identity,
    }
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # some share memory
    body = serialize(whole, metadata={"piadm": json.dumps(header)})
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint, onto the CPU.

    Raises:
        ValueError: for a file that is missing, truncated, damaged, no checkpoint, or one of another version; it says which.
    """
    from safetensors import SafetensorError, safe_open

    def refused(reason: str) -> ValueError:
        return ValueError(f"`checkpoint` is '{os.fspath(path)}': {reason}")

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
    except FileNotFoundError:
        raise refused("there is no such file") from None
    except (OSError, SafetensorError) as error:
        raise refused(f"not a whole safetensors file, truncated or something else ({error})") from error
    try:
        header = json.loads(metadata["piadm"])
        version = header["version"] if header["format"] == FORMAT else None
    except (KeyError, TypeError, ValueError):
        version = None
    if version is None:
        raise refused("a safetensors file, but not a checkpoint of piadm")
    if version != VERSION:
        raise refused(f"a checkpoint of format {version}; this piadm reads format {VERSION}")
    try:
        return _assemble(header, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise refused(f"a damaged checkpoint ({type(error).__name__}: {error})") from error


def _assemble(header: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    entries: dict[str, Any] = {
        name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")
    }
    entries.update({name.removeprefix("state."): value for name, value in header["state"].items()})
    state = KINDS[header["kind"]](
        **{name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}
    )
    alive = tensors["alive"]
    for name, value in state.parts().items():
        if isinstance(value, Tensor) and value.shape[SAMPLE_AXIS[name]] != len(alive):
            raise ValueError(f"{name} has shape {tuple(value.shape)} for {len(alive)} samples")
    audit = Audit(tensors["audit.nats"], tensors["audit.drift"], tensors["audit.steps"], header["audits"])
    reached = zip(header["failures"], tensors.get("failures", ()), strict=True)
    failures = tuple(Failure(int(s), int(m), int(r), int(n), x) for (s, m, r, n), x in reached)
    rows = sorted([*alive.tolist(), *(failure.sample for failure in failures)])
    if rows != list(range(header["shape"][0])):
        raise ValueError(f"samples {rows} of a batch of {header['shape'][0]}")
    lengths = header["lengths"]
    return Checkpoint(
        state=state,
        alive=alive,
        failures=failures,
        audit=audit,
        residuals=torch.split(tensors["residuals"], lengths) if lengths else (),
        windows=tuple((int(first), int(last)) for first, last in header["windows"]),
        shape=tuple(header["shape"]),
        steps=header["steps"],
        device=header["device"],
        seconds=header["seconds"],
        network_seconds=header["network_seconds"],
        seeds=tuple(header["seeds"]),
        measured=None if header["measured"] is None else Guarded(**header["measured"]),
        identity=header["identity"],
    )
