r"""The window from measurement, on a clock that only the network moves; and the memory that a run is allowed.

The network is an exact denoiser whose calls are said to take `price(rows)` seconds, so times are exact and the same every time.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest
import torch

import piadm
import piadm.tuning
from piadm.memory import COPIES, WORKSPACE, divide, lane_bytes, limit, peak, row_bytes
from piadm.tuning import Guarded, Timing, Tuner, sizes

SCHEDULE = piadm.schedules.DiscreteBetas.linear(1000)
PRICES = {
    "a wide accelerator": lambda rows: 1.0 + 0.0005 * rows,
    "a narrow accelerator": lambda rows: 1.0 + max(0.0, 0.1 * (rows - 8)),
    "a core that one row fills": lambda rows: float(rows),
    "two cores": lambda rows: 0.6 + 0.4 * rows,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture() -> piadm.targets.GaussianMixture:
    means = torch.randn(5, 16, generator=generator(), dtype=torch.float64)
    return piadm.targets.GaussianMixture(means, 0.1, schedule=SCHEDULE)


class Priced(piadm.Wrapper):
    """A denoiser whose calls move the clock."""

    def __init__(self, denoiser, price):
        super().__init__(denoiser)
        self.price, self.calls, self.now = price, [], 0.0

    def __call__(self, x, t, **condition):
        self.calls.append(len(x))
        self.now += self.price(len(x))
        return self.denoiser(x, t, **condition)


@pytest.fixture
def priced(monkeypatch):
    def make(price, denoiser=None) -> Priced:
        priced = Priced(denoiser or mixture(), price)
        monkeypatch.setattr(piadm.tuning.time, "perf_counter", lambda: priced.now)
        return priced

    return make


def test_a_call_between_two_measurements_lies_on_a_line_and_a_large_one_is_cut_into_the_cheapest_a_row():
    timing = Timing((1, 2, 4, 8), (1.0, 1.2, 1.6, 6.4))
    assert timing.at(1) == 1.0
    assert timing.at(3) == pytest.approx(1.4)
    assert timing.slice() == 4
    assert timing.at(10) == pytest.approx(1.6 + 1.6 + 1.2)
    assert timing.slice(3) == 2
    assert timing.at(4, most=2) == pytest.approx(2.4)


def test_rows_to_time_double_from_the_batch_to_the_run_or_to_what_memory_allows():
    assert sizes(1, 10, None) == [1, 2, 4, 8, 10]
    assert sizes(4, 10, None) == [4, 8, 16, 32, 40]
    assert sizes(4, 10, 20) == [4, 8, 16, 20]


@cache
def calls(window: int, samples: int, steps: int, seed: int) -> tuple[int, ...]:
    """The rows of every network call of a run in a window that was given."""
    denoiser = Priced(mixture(), lambda rows: 0.0)
    piadm.Parallel(denoiser, piadm.DDPM(steps), window=window)((samples, 16), generator=generator(seed))
    return tuple(denoiser.calls)


@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("price", PRICES.values(), ids=PRICES.keys())
def test_auto_is_near_the_best_window_there_is_and_never_5_percent_slower_than_sequential(priced, price, samples, steps):
    scheme = piadm.DDPM(steps)
    windows = [window for window in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000] if window <= steps]
    spent = {window: [sum(map(price, calls(window, samples, steps, seed))) for seed in range(3)] for window in windows}
    denoiser, taken = priced(price), []
    sampler = piadm.Parallel(denoiser, scheme, window="auto")
    for seed in (0, 0, 1, 2):
        before = denoiser.now
        result = sampler((samples, 16), generator=generator(seed))
        taken.append(denoiser.now - before)
    measuring, *runs = taken
    # measuring is paid for once
    assert measuring <= (1.05 + 2 * piadm.tuning.SHARE) * spent[1][0] + 5 * price(samples)
    assert all(took <= 1.05 * alone for took, alone in zip(runs, spent[1], strict=True))
    assert sum(runs) <= 1.25 * min(map(sum, spent.values())), (result.choice, spent)


def test_where_rows_cost_what_they_cost_alone_the_run_is_the_sequential_one_bit_for_bit(priced):
    denoiser = priced(PRICES["a core that one row fills"])
    result = piadm.Parallel(denoiser, piadm.DDPM(50), window="auto")((2, 16), generator=generator())
    sequential = piadm.Sequential(denoiser, piadm.DDPM(50))((2, 16), generator=generator())
    assert result.choice.window == 1
    assert torch.equal(result.samples, sequential.samples)
    assert result.rounds == 50


@pytest.mark.parametrize("price", ["a wide accelerator", "a core that one row fills"])
def test_exact_runs_in_a_measured_window_too_and_is_the_run_in_that_window(priced, price):
    denoiser, scheme = priced(PRICES[price]), piadm.DDPM(60)
    measured = piadm.Exact(denoiser, scheme, window="auto")((3, 16), generator=generator())
    if measured.choice.window == 1:
        given = piadm.Sequential(denoiser, scheme)((3, 16), generator=generator())
    else:
        given = piadm.Exact(denoiser, scheme, window=measured.choice.window)((3, 16), generator=generator())
        assert measured.acceptance.accepted.sum() > 0
    assert (measured.choice.window == 1) == (price == "a core that one row fills")
    assert torch.equal(measured.samples, given.samples)
    assert measured.certificate.kl == 0


def test_a_network_is_timed_once_for_a_shape_whoever_samples_it(priced):
    denoiser = priced(PRICES["a wide accelerator"])
    first = piadm.Parallel(denoiser, piadm.DDPM(50), window="auto")
    first((2, 16), generator=generator())
    before = len(denoiser.calls)
    result = piadm.Parallel(denoiser, piadm.DDPM(50), window="auto")((2, 16), generator=generator())
    assert len(denoiser.calls) - before == result.rounds + 1  # each sampler asks once more whether the network is a function
    before = len(denoiser.calls)
    first((4, 16), generator=generator())
    assert denoiser.calls[before : before + 4] == [4, 4, 8, 16]  # another batch has other rows: timed anew


def test_a_sampler_learns_how_many_rounds_its_runs_take(priced):
    denoiser = priced(PRICES["a narrow accelerator"])
    sampler = piadm.Parallel(denoiser, piadm.DDPM(1000), window="auto", tolerance=1e-6)
    result = sampler((1, 16), generator=generator())
    assert sampler._tuner.extra == pytest.approx(max(1.0, result.rounds - 1000 / result.choice.window))
    tuner = Tuner()
    tuner.learn(100, 10, 60, 0.6)
    assert (tuner.extra, tuner.own) == (50.0, 0.01)


@pytest.mark.parametrize("merge", [False, True])
def test_a_window_that_does_not_pay_is_given_up(priced, merge):
    """A network on which nothing converges: the run goes on one step after the other, and ends with the right sample, unless it
    left steps out before: what that changes, however little, such a network makes everything of."""

    def wild(x, t):
        return (40 * x).sin() * 3

    denoiser = priced(PRICES["two cores"], piadm.Denoiser(wild, SCHEDULE, "sample", event_shape=(16,)))
    scheme = piadm.DDIM(200)
    sampler = piadm.Parallel(denoiser, scheme, window="auto", merge=merge)
    sequential = piadm.Sequential(denoiser, scheme)((1, 16), generator=generator())
    alone = 200 * denoiser.price(1)
    for run in range(2):
        before = denoiser.now
        result = sampler((1, 16), generator=generator())
        if not merge:
            torch.testing.assert_close(result.samples, sequential.samples)
        assert denoiser.now - before <= (2.0 if run == 0 else 1.05) * alone, result.choice


def test_a_guarded_window_stays_narrow_once_it_is():
    table = piadm.DDIM(1000)(SCHEDULE)
    window = Guarded(64, price=8.0, patience=20)
    narrow = [window.advance(table, rounds, torch.tensor([rounds]))[1].item() - rounds for rounds in range(100)]
    assert narrow[:23] == [64] * 23
    assert set(narrow[23:]) == {1}
    fast = [window.advance(table, rounds, torch.tensor([20 * rounds]))[1].item() - 20 * rounds for rounds in range(40)]
    assert set(fast) == {64}


# Memory


def test_a_limit_is_bytes_or_a_fraction_of_the_machine():
    cpu = torch.device("cpu")
    assert limit(10**9, cpu) == limit(1e9, cpu) == 10**9
    assert limit(1, cpu) == 1
    assert 0.4 < limit(0.5, cpu) / limit(1.0, cpu) < 0.6
    for wrong in (0, -1, 0.0, -2e9, 1.5, 2e9 + 0.5, float("inf"), float("nan"), True, "2GB"):
        with pytest.raises(ValueError, match="max_memory"):
            limit(wrong, cpu)
    with pytest.raises(ValueError, match="max_memory"):
        piadm.Parallel(mixture(), piadm.DDPM(10), max_memory=-5)


def test_a_fraction_of_a_memory_of_unknown_size_is_refused(monkeypatch):
    """As on Windows."""
    monkeypatch.delattr("os.sysconf")
    with pytest.raises(ValueError, match=r"`max_memory` is 0.5: how much memory there is cannot be found out.*give bytes"):
        limit(0.5, torch.device("cpu"))
    assert limit(2e9, torch.device("cpu")) == 2 * 10**9


def test_peak_counts_what_lives_at_once():
    def call():
        a = torch.zeros(1000, dtype=torch.float64)
        b = a + 1
        del a
        c = b * 2
        return c.sum()

    assert peak(call, torch.device("cpu")) == pytest.approx(WORKSPACE * 16000, rel=0.01)


def test_a_room_is_divided_between_window_and_calls():
    cpu = torch.device("cpu")
    assert divide(1000, cpu, row=10, lane=10, lanes=100) == (50, 50)
    assert divide(1e3, cpu, row=10, lane=10, lanes=20) == (20, 80)
    with pytest.raises(ValueError, match=r"`max_memory` is 15: one step and the .* take about 20 bytes: give at least that"):
        divide(15, cpu, row=10, lane=10, lanes=20)
    with pytest.raises(ValueError, match=r"`max_memory` is 1e-10: .* take about 100 bytes and there are \d+: give at least"):
        divide(1e-10, cpu, row=10, lane=90, lanes=20)


@pytest.mark.parametrize("scheme", [piadm.DDPM(50), piadm.DDIM(50), piadm.ExponentialSDE(4.0, 1.0, 0.1, 1e-2)], ids=repr)
def test_a_round_of_the_solver_takes_no_more_than_it_is_said_to(scheme):
    """With a network that makes nothing of its own, the run's peak is the solver's."""
    schedule = piadm.schedules.OrnsteinUhlenbeck() if isinstance(scheme, piadm.ExponentialSDE) else SCHEDULE
    denoiser = piadm.Denoiser(lambda x, t: x, schedule, "sample", event_shape=(4096,))
    sampler = piadm.Parallel(denoiser, scheme, window=16, max_rounds=4)
    table = scheme(schedule)
    x = torch.zeros(2, 4096)
    most = peak(lambda: sampler((2, 4096), generator=generator()), torch.device("cpu")) / WORKSPACE
    assert 0.3 * 16 * lane_bytes(table, x) < most <= 16 * lane_bytes(table, x)
    assert lane_bytes(table, x) == COPIES * 2 * 4096 * 4


def test_calls_are_cut_to_what_fits_and_the_sample_is_the_same():
    denoiser = Priced(piadm.models.load("digits"), lambda rows: 0.0)
    label = torch.tensor([3])

    @torch.no_grad()
    def call(rows):
        denoiser(torch.zeros(rows, 1, 8, 8), torch.zeros(rows).long(), label=label.expand(rows))

    row = row_bytes(call, torch.device("cpu"))
    lane = lane_bytes(piadm.DDIM(20)(denoiser.schedule), torch.zeros(1, 64))
    whole = piadm.Parallel(denoiser, piadm.DDIM(20), window=16)((1, 1, 8, 8), generator=generator(), label=label)
    denoiser.calls.clear()
    sampler = piadm.Parallel(denoiser, piadm.DDIM(20), window=16, max_memory=16 * lane + 5 * row)
    cut = sampler((1, 1, 8, 8), generator=generator(), label=label)
    assert max(denoiser.calls) in (4, 5)  # a sampler's row has its condition and its states besides
    assert cut.rounds == whole.rounds
    torch.testing.assert_close(cut.samples, whole.samples, atol=1e-4, rtol=1e-4)


def test_a_window_that_does_not_fit_is_refused_and_auto_takes_one_that_does():
    denoiser = Priced(mixture(), lambda rows: 0.0)
    lane = lane_bytes(piadm.DDPM(50)(SCHEDULE), torch.zeros(1, 16))
    room = 20 * lane
    with pytest.raises(ValueError, match=r"`window` is 32.*give at most 10"):
        piadm.Parallel(denoiser, piadm.DDPM(50), window=32, max_memory=room)((1, 16), generator=generator())
    result = piadm.Parallel(denoiser, piadm.DDPM(50), window="auto", max_memory=room)((1, 16), generator=generator())
    assert result.converged
    assert all(last - first <= 10 for first, last in result.windows)


# VmHWM and not ru_maxrss: that of a child begins at what its parent held when it forked.
CHILD = """
import re, sys, torch, piadm
torch.set_num_threads(1)
denoiser = piadm.models.load("fashion")
label = torch.arange(8) % 10
def run(**how):
    piadm.Parallel(denoiser, piadm.DDIM(64), max_rounds=2, **how)((8, 1, 28, 28), label=label)
def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
run(window=1, max_memory=2**30)  # what counting imports is no part of it
before = most()
run(**eval(sys.argv[1]))
print(most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("how", ["window=64, merge=False", "window=36"])
def test_a_process_keeps_to_its_max_memory(how):
    def growth(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", CHILD, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    bound = 80 * 2**20
    assert growth(f"dict({how})") > 1.3 * bound  # the test could fail: unbounded, the same run takes more
    assert growth(f"dict({how}, max_memory={bound})") <= bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_keeps_to_its_max_memory():
    """By the device's own counter."""
    denoiser, label = piadm.models.load("fashion", device="cuda"), torch.arange(8, device="cuda")

    def growth(**how):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        source = torch.Generator("cuda").manual_seed(0)
        piadm.Parallel(denoiser, piadm.DDIM(32), window=32, max_rounds=2, **how)((8, 1, 28, 28), generator=source, label=label)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    growth()  # what libraries keep from their first call on is no part of it
    bound = int(0.7 * growth())
    assert growth(max_memory=bound) <= bound


# Resuming


@pytest.mark.parametrize("price", ["a narrow accelerator", "a core that one row fills"])
@pytest.mark.parametrize("from_file", [True, False])
def test_a_measured_run_goes_on_in_the_window_it_had(monkeypatch, tmp_path, price, from_file):
    class Stops(Priced):
        left = 10**9

        def __call__(self, x, t, **condition):
            self.left -= 1
            if self.left < 0:
                raise InterruptedError
            return super().__call__(x, t, **condition)

    scheme, noise = piadm.DDPM(60), torch.randn(2, 16, generator=generator(), dtype=torch.float64)
    denoiser = Stops(mixture(), PRICES[price])
    monkeypatch.setattr(piadm.tuning.time, "perf_counter", lambda: denoiser.now)
    sampler = piadm.Parallel(denoiser, scheme, window="auto")
    whole = sampler((2, 16), noise=noise, generator=generator())
    fresh = piadm.Parallel(denoiser, scheme, window="auto")
    denoiser.left = 5
    path = tmp_path / "run.safetensors"
    with pytest.raises(InterruptedError) as caught:
        fresh((2, 16), noise=noise, generator=generator(), checkpoint=path)
    denoiser.left = 10**9
    resumed = fresh.resume(path if from_file else caught.value.checkpoint)
    assert resumed.rounds == whole.rounds
    assert torch.equal(resumed.samples, whole.samples)
