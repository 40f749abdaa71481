"""Races: a lane is the sampler's own run, its clock runs in its own turns, and whatever ends a race leaves nothing running."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import piadm
from piadm.denoiser import DenoiserLike
from piadm.errors import NonFiniteError
from piadm.executors import Executor
from piadm.racing import ROWS, Draw, Lane, Stopped, Turns, race

MIXTURE = piadm.targets.GaussianMixture(
    torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), 0.05, schedule=piadm.schedules.DiscreteBetas.linear(1000)
)
DRAW = Draw(3, 5, {})
SAMPLERS = {
    "parallel": lambda denoiser: piadm.Parallel(denoiser, piadm.DDPM(40), window=8),
    "every step": lambda denoiser: piadm.Parallel(denoiser, piadm.DDIM(70), window=None),
    "exact": lambda denoiser: piadm.Exact(denoiser, piadm.DDPM(40), window=8),
    "published": lambda denoiser: piadm.PIADMSDE.with_steps(denoiser, 60, iterations=3),
}


class Watched(Executor):
    """Counts its calls and how many run at once; may do something in a call."""

    def __init__(self, denoiser: DenoiserLike, act: Any = lambda calls: None) -> None:
        super().__init__(denoiser)
        self.calls, self.inside, self.most, self.rows, self._act = 0, 0, 0, 0, act

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        self.calls, self.inside, self.rows = self.calls + 1, self.inside + 1, max(self.rows, len(x))
        self.most = max(self.most, self.inside)
        act = self._act(self.calls)
        f = self.denoiser(x, t, **condition)
        self.inside -= 1
        return f if act is None else act


def lanes(
    make: Any, denoiser: DenoiserLike = MIXTURE, draw: Draw = DRAW, turns: Turns | None = None
) -> tuple[Lane, Lane, threading.Event]:
    turns, stop = turns or Turns(), threading.Event()
    first = Lane(make, denoiser, draw, turns, stop)
    second = Lane(lambda inner: piadm.Sequential(inner, first.sampler.scheme), denoiser, draw, turns, stop)
    return first, second, stop


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Any:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def alone(sampler: Any, seed: int = 5) -> piadm.Result:
    return sampler((3, 2), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_race_draws_what_its_samplers_draw_alone(name: str) -> None:
    make = SAMPLERS[name]
    first, second, stop = lanes(make)
    for _ in race((first, second), stop):
        pass
    want, oracle = alone(make(MIXTURE)), alone(piadm.Sequential(MIXTURE, make(MIXTURE).scheme))
    assert first.result is not None
    assert second.result is not None
    assert torch.equal(first.result.samples, want.samples)
    assert torch.equal(second.result.samples, oracle.samples)
    assert (first.rounds, tuple(first.windows)) == (want.rounds, want.windows)
    assert all(torch.equal(a, b) for a, b in zip(first.residuals, want.residuals, strict=True))
    assert (first.finished, second.finished, second.rounds) == (want.steps, want.steps, want.steps)


def test_the_one_behind_goes_on_by_one_round() -> None:
    first, second, stop = lanes(SAMPLERS["parallel"])
    both = (first, second)
    past, turns = [0.0, 0.0], []
    for _ in race(both, stop, pause=0):
        now = [lane.seconds for lane in both]
        moved = [n for n in range(2) if now[n] != past[n]]
        over = [lane.over for lane in both]
        if moved and not any(over):
            assert len(moved) == 1
            assert past[moved[0]] == min(past)
            turns += moved
        past = now
    assert {0, 1} <= set(turns), "both went on while neither was over"


def test_what_is_shown_is_what_the_last_round_left() -> None:
    first, second, stop = lanes(SAMPLERS["parallel"])
    frames = race((first, second), stop, pause=0)
    next(frames)
    assert first.ahead is None
    seen: list[int] = []
    for _ in frames:
        for lane in (first, second):
            if lane.rounds:
                assert lane.ahead is not None
                assert lane.ahead.shape == (3, 2)
                assert lane.state is not None
        seen.append(second.finished)
    assert seen == sorted(seen)
    assert len(set(seen)) == 41, "no step of the sequential run was left out"
    assert torch.equal(first.ahead, first.result.samples)


def test_a_stop_keeps_the_last_complete_round_and_nothing_is_asked_of_the_network_any_more() -> None:
    watched = Watched(MIXTURE)
    first, second, stop = lanes(SAMPLERS["parallel"], watched)
    for _ in race((first, second), stop, pause=0):
        if first.rounds == 3 and second.rounds >= 3 and not stop.is_set():
            stop.set()
            calls = watched.calls
    assert watched.calls == calls
    assert isinstance(first.stopped, Stopped)
    assert isinstance(second.stopped, Stopped)
    assert first.stopped.checkpoint.state.rounds == first.rounds == 3
    assert second.stopped.checkpoint.state.rounds == second.rounds
    condition = {"film_sample": torch.arange(3)}
    go_on = Lane(SAMPLERS["parallel"], MIXTURE, DRAW, Turns(), threading.Event()).sampler
    resumed = go_on.resume(first.stopped.checkpoint, **condition)
    assert torch.equal(resumed.samples, alone(SAMPLERS["parallel"](MIXTURE)).samples)


def test_a_stop_from_outside_ends_a_round_that_is_under_way() -> None:
    """A round of many calls is not waited for: the stop comes in the first of them."""
    stop: threading.Event

    def pressed(calls: int) -> None:
        if calls == 1:
            stop.set()

    watched = Watched(MIXTURE, pressed)
    first, second, stop = lanes(SAMPLERS["every step"], watched)  # 3 × 70 rows, two calls a round
    list(race((first, second), stop))
    assert watched.rows <= ROWS
    assert (watched.calls, first.rounds, second.rounds) == (1, 0, 0)
    assert first.stopped is not None


def test_a_race_that_is_left_ends() -> None:
    first, second, stop = lanes(SAMPLERS["parallel"])
    frames = race((first, second), stop, pause=0)
    while second.rounds < 2:
        next(frames)
    frames.close()
    assert first.over
    assert second.over


def test_a_race_stopped_before_it_began_calls_no_network() -> None:
    watched = Watched(MIXTURE)
    first, second, stop = lanes(SAMPLERS["parallel"], watched)
    stop.set()
    list(race((first, second), stop))
    assert (watched.calls, first.rounds) == (0, 0)


@pytest.mark.parametrize(("broken", "error"), [("raises", ZeroDivisionError), ("nan", NonFiniteError)])
def test_what_a_run_raises_is_raised_and_the_other_ends(broken: str, error: type[Exception]) -> None:
    def act(calls: int) -> Any:
        if calls < 6:
            return None
        return 1 / 0 if broken == "raises" else torch.full((3, 2), torch.nan)

    watched = Watched(MIXTURE, act)
    make = lambda denoiser: piadm.Parallel(denoiser, piadm.DDPM(40), window=1)  # noqa: E731
    first, second, stop = lanes(make, watched)
    with pytest.raises(error):
        list(race((first, second), stop))
    assert first.over
    assert second.over


def test_bad_values_are_refused_before_any_network_call() -> None:
    watched = Watched(MIXTURE)
    with pytest.raises(ValueError, match="give an integer of at least 1"):
        lanes(lambda denoiser: piadm.Parallel(denoiser, piadm.DDPM(40), window=0), watched)
    assert watched.calls == 0


def test_races_at_once_do_not_touch_each_other_and_call_the_network_one_at_a_time() -> None:
    watched, turns = Watched(MIXTURE, lambda calls: time.sleep(0.001)), Turns()
    found: dict[int, Tensor] = {}
    order: list[int] = []

    def whole(seed: int) -> None:
        first, second, stop = lanes(SAMPLERS["parallel"], watched, Draw(3, seed, {}), turns)
        for _ in race((first, second), stop, pause=0):
            order.append(seed)
        assert first.result is not None
        found[seed] = first.result.samples

    threads = [threading.Thread(target=whole, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watched.most == 1
    for seed in (1, 2):
        assert torch.equal(found[seed], alone(SAMPLERS["parallel"](MIXTURE), seed).samples)
    assert sum(a != b for a, b in itertools.pairwise(order)) > 10, "neither waited for the other's end"


def test_the_time_spent_waiting_for_another_race_is_on_no_clock() -> None:
    turns = Turns()
    first, second, stop = lanes(SAMPLERS["parallel"], MIXTURE, DRAW, turns)
    frames = race((first, second), stop, pause=0)
    next(frames)
    turns.__enter__()
    threading.Timer(0.5, turns.__exit__).start()
    started = time.perf_counter()
    next(frames)
    assert time.perf_counter() - started > 0.4
    assert first.seconds + second.seconds < 0.3
    frames.close()


def test_turns_are_had_in_the_order_in_which_they_were_asked_for() -> None:
    turns, had = Turns(), []

    def ask(n: int) -> None:
        with turns:
            had.append(n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    with turns:
        for thread in threads:
            thread.start()
            time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert had == list(range(6))
