"""The driver: rounds until a run is done, and what becomes of it when something goes wrong.

A sample for which the network returns NaN or infinity leaves the batch and the others go on. Whatever exception ends a run
(the network's own, Ctrl-C), it carries the last complete round as `error.checkpoint`, from which `sampler.resume` goes on.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from piadm.checkpoint import Audit, Checkpoint, save
from piadm.errors import NonFiniteError, require
from piadm.noise import Subset
from piadm.solver import Request, Solver

Place = str | os.PathLike[str]


class Network(Protocol):
    """A denoiser of flat rows, whose `sample` counts in the whole batch; `seconds` spent in it so far."""

    seconds: float

    def __call__(self, request: Request) -> Tensor: ...


def rounds(run: Checkpoint, solver: Solver, network: Network, max_rounds: int | None) -> Iterator[Checkpoint]:
    """The run after each further round."""
    whole = solver.noise

    def of_the_living() -> Solver:
        complete = len(run.alive) == run.shape[0]
        return solver if complete else replace(solver, noise=Subset(whole, run.alive))  # type: ignore[arg-type]

    current, clock = of_the_living(), run.clock()
    while not run.state.done and (max_rounds is None or run.state.rounds < max_rounds):
        request = current.request(run.state)
        f = network(replace(request, sample=run.alive[request.sample]))
        try:
            state = current.update(run.state, f)
        except NonFiniteError as error:
            stay = torch.isin(request.sample, torch.tensor(error.samples), invert=True)
            run = run.without(error.samples, error.step)
            current, state = of_the_living(), run.state
            if not state.done:
                state = current.update(state, f[stay.to(f.device)])
        if state.left is not None:
            left = current.request(state.left)
            nats, drift = current.measure(state.left, network(replace(left, sample=run.alive[left.sample])))
            steps, past = state.left.stop - state.left.start, run.audit
            audit = Audit(past.nats + nats, past.drift + drift, past.steps + steps, past.calls + 1)
            run, state = replace(run, audit=audit), replace(state, left=None)
        if state is not run.state:
            residual = state.residual.nan_to_num(-1.0).amax(1)
            residual = residual.masked_fill(residual < 0, torch.nan)
            run = replace(run, state=state, residuals=(*run.residuals, residual), windows=(*run.windows, state.window))
        run = run.timed(clock, network.seconds)
        yield run


class Keeper:
    """Keeps the newest state of a run: writes it down now and then, and hands it to the exception that ends the run.

    Arguments:
        run: The run before its next round.
        seeds: Those of its noise.
        identity: What it is made of, in fingerprints; asked only when needed.
        path: Where to write; `None`: nowhere.
        seconds: How long to wait before writing again.
        leads: Whether this process writes while all is well.
    """

    def __init__(
        self,
        run: Checkpoint,
        seeds: Callable[[], list[int]],
        identity: Callable[[], Mapping[str, str]],
        path: Place | None,
        seconds: float,
        leads: bool = True,
    ) -> None:
        self._run, self._seeds, self._identity = run, seeds, identity
        self._path, self._seconds, self._leads, self._known = path, seconds, leads, run.identity
        if path is not None:
            check_place(path, seconds)
            self._known = self._known or identity()
        self._written = time.monotonic()

    def __enter__(self) -> Keeper:
        return self

    def __call__(self, run: Checkpoint) -> None:
        """After each round."""
        self._run = run
        if self._path is not None and self._leads and time.monotonic() - self._written >= self._seconds:
            save(self._whole(), self._path)
            self._written = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            if self._path is not None and self._leads:
                save(self._whole(), self._path)
            return
        whole = self._whole()
        where = "`.checkpoint` of this exception"
        if self._path is not None and whole.state.rounds > 0:
            try:
                save(whole, self._path)
                where += f" and '{os.fspath(self._path)}'"
            except Exception as failed:  # the disk may be what broke: the first error is the one to be heard
                warnings.warn(f"the checkpoint could not be written: {failed}", stacklevel=2)
        error.checkpoint = whole  # type: ignore[attr-defined]
        if whole.state.rounds > 0 and hasattr(error, "add_note"):
            error.add_note(f"piadm: {whole.state.rounds} rounds are kept, go on from there by sampler.resume(…): {where}")

    def _whole(self) -> Checkpoint:
        if self._known is None:
            self._known = self._identity()
        return replace(self._run, seeds=tuple(self._seeds()), identity=self._known)


def check_place(path: Place, seconds: float) -> None:
    """A checkpoint can be written there: said before the run rather than found out after it."""
    folder = Path(path).parent
    remedy = "give the name of a file in a folder that can be written to"
    ok = folder.is_dir() and os.access(folder, os.W_OK) and not Path(path).is_dir()
    require(ok, "checkpoint", os.fspath(path), remedy)
    right = isinstance(seconds, int | float) and seconds >= 0
    require(right, "checkpoint_seconds", seconds, "give seconds of at least 0; 0 writes after every round")
