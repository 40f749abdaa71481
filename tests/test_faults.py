"""Whatever goes wrong on one device: each fault is injected, nothing is lost, and what comes back is never wrong.

"Bit for bit" as in `test_solver`: elementwise denoisers, and the embedded network on batches of the same rows.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
import warnings
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

import piadm
from piadm import checkpoint, propagators, schedules, windows
from piadm.errors import NonFiniteError
from piadm.fingerprint import fingerprint

S, D = 3, 4
BETAS = schedules.DiscreteBetas.linear(1000)
PAPER = schedules.OrnsteinUhlenbeck()


def smooth(x, t):
    return x / (1 + x.abs()) * (1 - 1e-4 * t.to(x.dtype)[:, None])


def denoiser(network=smooth, schedule=BETAS, **keywords):
    return piadm.Denoiser(network, schedule, "sample", variance=0.3, **keywords)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(dtype=torch.float64, samples=S):
    return torch.randn(samples, D, generator=generator(11), dtype=torch.float64).to(dtype)


def make(kind, one=None, **keywords):
    """Samplers of every kind of table, window and state."""
    match kind:
        case "sequential":
            return piadm.Sequential(one or denoiser(), piadm.DDPM(12))
        case "paper's sde":
            return piadm.PIADMSDE(
                one or denoiser(schedule=PAPER), horizon=2.0, block=1.0, step=0.25, early_stop=0.05, iterations=3
            )
        case "paper's ode":
            return piadm.PIADMODE(
                one or denoiser(schedule=PAPER), horizon=2.0, block=1.0, step=0.25, early_stop=0.05, iterations=3
            )
        case "exact":
            return piadm.Exact(one or denoiser(), piadm.DDPM(12), window=5, threshold=1.0, **keywords)
        case "target":
            return piadm.Parallel(one or denoiser(), piadm.DDPM(12), window=5, target_kl=1e-3)
        case "deterministic":
            return piadm.Parallel(one or denoiser(), piadm.DDIM(12), window=5, tolerance=1e-4, **keywords)
        case "pipelined":
            return piadm.Parallel(
                one or denoiser(schedule=PAPER), piadm.ExponentialSDE(2.0, 1.0, 0.25, 0.05), window=windows.Pipelined(3)
            )
        case size:
            return piadm.Parallel(one or denoiser(), piadm.DDPM(12), window=size, tolerance=1e-4, **keywords)


KINDS = ["sequential", "paper's sde", "paper's ode", "deterministic", "pipelined", "exact", "target", 1, 5, None]


class Faulty:
    """A network with a fault: `act(self, x, t)` is called before each answer, from call `first` on."""

    def __init__(self, act, first=1, network=smooth):
        self.act, self.first, self.network, self.calls, self.healed = act, first, network, 0, False

    def __call__(self, x, t):
        self.calls += 1
        if self.calls >= self.first and not self.healed:
            self.act(self, x, t)
        return self.network(x, t)


def broken(self, x, t):
    raise RuntimeError("the device is gone")


# --- interrupted and resumed ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_run_interrupted_after_any_round_resumes_to_the_last_bit(tmp_path, kind, dtype):
    seeds = [generator(n) for n in range(S)]
    sampler = make(kind)
    whole = sampler((S, D), noise=start(dtype), generator=seeds)
    assert whole.rounds >= 3
    for stop in range(1, whole.rounds):
        path = tmp_path / f"{stop}.safetensors"

        def interrupt(round, window, residual, stop=stop):
            if round == stop:
                raise KeyboardInterrupt

        again = [generator(n) for n in range(S)]
        with pytest.raises(KeyboardInterrupt) as caught:
            make(kind)((S, D), noise=start(dtype), generator=again, callback=interrupt, checkpoint=path)
        kept = caught.value.checkpoint
        assert kept.state.rounds == stop
        for given in (kept, path):
            result = make(kind).resume(given)
            assert torch.equal(result.samples, whole.samples)
            assert result.samples.dtype == dtype
            assert (result.rounds, result.evaluations, result.windows) == (whole.rounds, whole.evaluations, whole.windows)
            for mine, theirs in zip(result.residuals, whole.residuals, strict=True):
                assert torch.equal(mine.nan_to_num(-1), theirs.nan_to_num(-1))
            assert torch.equal(result.error, whole.error)
            assert result.certificate == whole.certificate
            if whole.acceptance is not None:
                assert vars(result.acceptance).keys() == vars(whole.acceptance).keys()
                assert all(torch.equal(a, vars(whole.acceptance)[n]) for n, a in vars(result.acceptance).items())
            assert result.seconds > 0


def test_a_trained_network_resumes_to_the_last_bit_with_its_label(tmp_path):
    path, label = tmp_path / "run.safetensors", torch.tensor([3, 7])
    digits = piadm.models.load("digits")

    def sampler():
        return piadm.Parallel(digits, piadm.DDPM(50), window=16)

    def interrupt(round, window, residual):
        if round == 4:
            raise KeyboardInterrupt

    whole = sampler()((2, 1, 8, 8), generator=generator(), label=label)
    with pytest.raises(KeyboardInterrupt):
        sampler()((2, 1, 8, 8), generator=generator(), callback=interrupt, checkpoint=path, label=label)
    assert torch.equal(sampler().resume(path, label=label).samples, whole.samples)


@pytest.mark.parametrize("seconds", [0, 3600])
def test_a_checkpoint_is_written_every_so_often_and_at_the_end(tmp_path, seconds):
    path, seen = tmp_path / "run.safetensors", []

    def look(round, window, residual):
        seen.append(checkpoint.load(path).state.rounds if path.exists() else None)

    result = make(5)((S, D), generator=generator(), callback=look, checkpoint=path, checkpoint_seconds=seconds)
    assert seen == [None if seconds else r for r in range(1, result.rounds + 1)]
    done = checkpoint.load(path)
    assert done.state.done
    assert done.finished.tolist() == [12] * S
    assert torch.equal(done.x, result.samples)
    # a finished run is resumed without asking the network for anything
    silent = denoiser(Faulty(broken, network=smooth))
    with pytest.raises(ValueError, match="its denoiser differs"):
        make(5, silent).resume(path)
    calls = []
    assert torch.equal(make(5).resume(path, callback=calls.append).samples, result.samples)
    assert calls == []


@pytest.mark.parametrize("kind", ["sequential", 1, 5, None, "paper's ode", "exact"], ids=str)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_network_that_raises_leaves_every_round_before_it(kind, call):
    schedule = PAPER if kind == "paper's ode" else BETAS
    network = Faulty(broken, first=call)
    sampler = make(kind, denoiser(network, schedule))
    with pytest.raises(RuntimeError, match="the device is gone") as caught:
        sampler((S, D), noise=start(), generator=generator())
    kept = caught.value.checkpoint
    assert kept.state.rounds <= call - 1  # one call may have been the question asked twice
    assert kept.x.shape == (S, D)
    noted = getattr(caught.value, "__notes__", [])
    assert len(noted) == (kept.state.rounds > 0)
    network.healed = True
    whole = make(kind, denoiser(schedule=schedule))((S, D), noise=start(), generator=generator())
    assert torch.equal(sampler.resume(kept).samples, whole.samples)


def test_a_network_that_raises_at_one_row_leaves_the_steps_before_it():
    """The row is the last step's of one sample; without it every other step is done, and its state is the sequential one."""
    sampler = make(4)
    last = int(sampler.table.times[-1])

    def act(self, x, t):
        if (t == last).any():
            broken(self, x, t)

    network = Faulty(act)
    sampler = make(4, denoiser(network))
    with pytest.raises(RuntimeError, match="gone") as caught:
        sampler((S, D), noise=start(), generator=generator())
    kept = caught.value.checkpoint
    assert 12 - 4 <= kept.finished.max() < 12
    network.healed = True
    assert torch.equal(sampler.resume(kept).samples, make(4)((S, D), noise=start(), generator=generator()).samples)


@pytest.mark.parametrize("kind", ["sequential", 4, "exact", "paper's sde"], ids=str)
def test_a_signal_from_the_keyboard_loses_no_round(tmp_path, kind):
    """The signal itself, in the middle of a network call."""
    network = Faulty(lambda self, x, t: signal.raise_signal(signal.SIGINT), first=4)
    schedule = PAPER if kind == "paper's sde" else BETAS
    path = tmp_path / "run.safetensors"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test runner may have replaced
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            make(kind, denoiser(network, schedule))((S, D), noise=start(), generator=generator(), checkpoint=path)
    finally:
        signal.signal(signal.SIGINT, before)
    kept = caught.value.checkpoint
    assert kept.state.rounds == network.calls - (1 if kind == "sequential" else 2)  # one call was the question asked twice
    network.healed = True
    whole = make(kind, denoiser(schedule=schedule))((S, D), noise=start(), generator=generator())
    for given in (kept, path):
        assert torch.equal(make(kind, denoiser(network, schedule)).resume(given).samples, whole.samples)


def test_max_rounds_may_be_raised_on_resuming(tmp_path):
    whole = make(4)((S, D), noise=start(), generator=generator())
    path = tmp_path / "run.safetensors"
    short = make(4, max_rounds=2)((S, D), noise=start(), generator=generator(), checkpoint=path)
    assert not short.converged
    assert torch.equal(make(4).resume(path).samples, whole.samples)


# --- NaN and infinity ---


def failing(when, value=float("nan"), network=smooth):
    """Answers `value` in rows where `when(x, t)`."""

    def answer(x, t):
        f = network(x, t)
        f[when(x, t)] = value
        return f

    return answer


@pytest.mark.parametrize("kind", ["sequential", 1, 4, None], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_sample_is_reported_and_the_others_are_the_sequential_ones(kind, value):
    """Driven by noise: each sample keeps the noise of its own row."""
    wide = piadm.Sequential(denoiser(), piadm.DDPM(12))((8, D), noise=start(samples=8), generator=generator())
    times = wide_times = make("sequential").table.times
    marks = {1: 9, 4: 3, 5: 3}  # sample: the step that breaks
    x0 = start(samples=8)

    # a coordinate nobody else uses tells samples apart: sample n starts with n in it, and the network keeps it
    def tagged(x, t):
        f = smooth(x, t)
        return torch.cat([f[:, :-1], 0 * f[:, -1:]], 1)

    def when(x, t):
        bad = torch.zeros(len(x), dtype=torch.bool)
        for sample, step in marks.items():
            bad |= (t == wide_times[step]) & mine(x, t, sample)
        return bad

    path = {}

    def remember(x, t):
        path.setdefault(int(t[0]), x.clone())
        return smooth(x, t)

    piadm.Sequential(denoiser(remember), piadm.DDPM(12))((8, D), noise=x0, generator=generator())

    def mine(x, t, sample):
        # a row is a sample's if it is nearer to that sample's sequential state than to any other's
        near = torch.stack([torch.cdist(x[r : r + 1], path[int(t[r])])[0].argmin() for r in range(len(x))])
        return near == sample

    sampler = make(kind, denoiser(failing(when, value)))
    with pytest.raises(NonFiniteError) as caught:
        sampler((8, D), noise=x0, generator=generator())
    error = caught.value
    assert error.samples == [1, 4, 5]
    assert error.step == 3
    others = [0, 2, 3, 6, 7]
    assert error.finished[[1, 4, 5]].tolist() == [9, 3, 3]
    assert error.finished[others].tolist() == [12] * 5
    assert (error.result.samples - wide.samples[others]).square().mean(1).sqrt().max() <= 1e-4
    for sample in (1, 4, 5):
        reached = path[int(times[int(error.finished[sample])])][sample]
        assert (error.x[sample] - reached).square().mean().sqrt() <= 1e-4
    assert torch.equal(error.result.samples, error.x[others])
    assert "other 5 samples" in str(error)


@pytest.mark.parametrize("kind", ["sequential", 4], ids=str)
def test_the_others_keep_their_own_conditions(kind):
    def network(x, t, level):
        return level[:, None] * (0.5 * x).masked_fill((level == 2)[:, None] & (t < 500)[:, None], float("nan"))

    level = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    with pytest.raises(NonFiniteError) as caught:
        make(kind, denoiser(network))((4, D), noise=start(samples=4), generator=generator(), level=level)
    whole = piadm.Sequential(denoiser(lambda x, t, level: level[:, None] * 0.5 * x), piadm.DDPM(12))(
        (4, D), noise=start(samples=4), generator=generator(), level=level
    )
    assert caught.value.samples == [1]
    assert (caught.value.result.samples - whole.samples[[0, 2, 3]]).square().mean(1).sqrt().max() <= 1e-3


@pytest.mark.parametrize("published", [piadm.PIADMSDE, piadm.PIADMODE])
def test_a_step_still_broken_when_its_blocks_rounds_are_over_is_reported(published):
    """A block of fixed rounds is left whether or not it has converged: what it never reached must not be passed on."""
    numbers = {"horizon": 2.0, "block": 1.0, "step": 0.25, "early_stop": 0.05, "iterations": 2}
    broken = published(denoiser(schedule=PAPER), **numbers).table.times[3]
    network = failing(lambda x, t: t == broken.to(t.dtype))
    with pytest.raises(NonFiniteError) as caught:
        published(denoiser(network, PAPER), **numbers)((S, D), noise=start(), generator=generator())
    assert (caught.value.step, caught.value.round, caught.value.samples) == (3, 2, [0, 1, 2])
    assert caught.value.finished.tolist() == [0] * S


def test_a_sample_that_failed_costs_nothing_more_and_is_remembered_by_a_checkpoint(tmp_path):
    times, rows, path = make(4).table.times, [], tmp_path / "run.safetensors"

    def network(x, t):
        rows.append(int((x[:, 0] > 0).sum()))
        f = 0.5 * x
        f[(t <= times[2]) & (x[:, 0] > 0)] = float("nan")
        return f

    def stop(round, window, residual):
        if round == 6:
            raise KeyboardInterrupt

    x = start()
    x[:, 0] = torch.tensor([-1.0, 100.0, -1.0])
    sampler = piadm.Parallel(denoiser(network), piadm.DDIM(12), window=4, tolerance=1e-9, propagator=propagators.Jacobi())
    with pytest.raises(KeyboardInterrupt) as caught:
        sampler((S, D), noise=x, callback=stop, checkpoint=path)
    assert [failure.sample for failure in caught.value.checkpoint.failures] == [1]
    # the row that showed it was the last; from then on nobody asks about that sample
    gone = max(n for n, count in enumerate(rows) if count) + 1
    assert gone <= 4
    seen = len(rows)
    for given in (path, caught.value.checkpoint):
        with pytest.raises(NonFiniteError) as ended:
            sampler.resume(given)
        assert ended.value.samples == [1]
        assert ended.value.finished.tolist() == [12, 2, 12]
        assert ended.value.result.converged
    assert sum(rows[seen:]) == 0


def test_if_every_sample_breaks_there_is_no_result_and_the_network_is_left_alone():
    network = Faulty(lambda self, x, t: None, network=failing(lambda x, t: t <= make(4).table.times[5]))
    with pytest.raises(NonFiniteError) as caught:
        make(4, denoiser(network))((S, D), generator=generator())
    assert caught.value.result is None
    assert caught.value.finished.tolist() == [5] * S
    assert network.calls <= 7


@pytest.mark.parametrize("kind", ["sequential", 1, 4, None, "deterministic", "exact"], ids=str)
def test_a_state_that_overflows_is_reported_not_returned(kind):
    """The network's answer is finite, and too large for the state that the step makes of it."""
    last = int(make(kind).table.times[-1])
    huge = failing(lambda x, t: (t == last) & (x[:, 0] > 0), torch.finfo(torch.float32).max)
    # epsilon: x0 = (x - σ g) / α
    one = piadm.Denoiser(lambda x, t: -huge(x, t) * (1 + (t == last).float()[:, None]), BETAS, "epsilon")
    x = start(torch.float32)
    x[:, 0] = torch.tensor([-5.0, 5.0, -5.0])
    with pytest.raises(NonFiniteError) as caught:
        make(kind, one)((S, D), noise=x, generator=generator())
    assert 1 in caught.value.samples
    assert caught.value.x.isfinite().all()


@pytest.mark.parametrize("propagator", [propagators.Jacobi(), propagators.Identity(), propagators.Secant(0.3)], ids=repr)
def test_what_only_the_iteration_reaches_does_not_end_a_run(propagator):
    """A network undefined at states that no sequential run visits, and that the rounds' guesses do visit."""
    whole = piadm.Sequential(denoiser(), piadm.DDIM(20))((S, D), noise=start())
    seen = []

    def narrow(x, t):
        seen.append(x.abs().amax(1))
        return smooth(x, t)

    sampler = piadm.Parallel(denoiser(narrow), piadm.DDIM(20), propagator=propagator, window=None, tolerance=1e-9)
    piadm.Sequential(denoiser(narrow), piadm.DDIM(20))((S, D), noise=start())
    bound = torch.cat(seen).max() * 1.0001
    wild = Expanding(4.0)
    hits = []

    def undefined(x, t):
        far = x.abs().amax(1) > bound
        hits.append(int(far.sum()))
        return smooth(x, t).masked_fill(far[:, None], float("nan"))

    sampler = piadm.Parallel(denoiser(undefined), piadm.DDIM(20), propagator=wild, window=None, tolerance=1e-9)
    result = sampler((S, D), noise=start())
    assert sum(hits) > 0
    assert result.rounds <= 20
    torch.testing.assert_close(result.samples, whole.samples, rtol=0, atol=1e-9)


@dataclasses.dataclass(frozen=True)
class Expanding:
    """A propagator far off: it carries every correction on `factor` times enlarged."""

    factor: float

    def check(self, table):
        """Defined for every table."""

    def jacobian(self, rows, pair):
        return torch.full_like(rows.A, self.factor)


@pytest.mark.parametrize("factor", [-3.0, 10.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("window", [4, None])
def test_with_a_propagator_far_off_the_run_ends_within_m_rounds_at_the_sequential_sample(factor, dtype, window):
    steps = 40
    whole = piadm.Sequential(denoiser(), piadm.DDPM(steps))((S, D), noise=start(dtype), generator=generator())
    sampler = piadm.Parallel(denoiser(), piadm.DDPM(steps), propagator=Expanding(factor), window=window, tolerance=1e-6)
    result = sampler((S, D), noise=start(dtype), generator=generator())
    assert result.converged
    assert not result.error.isnan().any()
    assert steps // 2 <= result.rounds <= steps
    assert (result.samples - whole.samples).square().mean(1).sqrt().max() <= 1e-6


# --- a network that is no function ---


class Dropout(torch.nn.Module):
    def __init__(self, p):
        super().__init__()
        self.drop, self.scale = torch.nn.Dropout(p), torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        return self.drop(0.5 * self.scale * x)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("window", [8, None])
def test_dropout_left_on_is_found_out_and_told(prediction, window):
    network = Dropout(0.1)
    sampler = piadm.Parallel(piadm.Denoiser(network, BETAS, prediction), piadm.DDPM(20), window=window)
    with pytest.warns(RuntimeWarning, match=r"not a function.*network.eval\(\)"):
        sampler((2, 64), generator=generator())
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        piadm.Parallel(piadm.Denoiser(network, BETAS, prediction), piadm.DDPM(20), window=window)((2, 64))


def test_batch_norm_left_in_training_is_found_out():
    network = torch.nn.BatchNorm1d(16)

    def norm(x, t):
        return network(x)

    # few rounds: batch norm in training refuses the single row that the last ones may have
    sampler = piadm.Parallel(piadm.Denoiser(norm, BETAS, "sample"), piadm.DDPM(20), window=8, max_rounds=3)
    with pytest.warns(RuntimeWarning, match="not a function"), torch.no_grad():
        sampler((2, 16), generator=generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounding_alone_raises_no_doubt(dtype):
    """The embedded network in every precision: one row on its own rounds otherwise than in a batch."""
    digits = piadm.models.load("digits", dtype=dtype)
    piadm.Parallel(digits, piadm.DDPM(30), window=8)((2, 1, 8, 8), generator=generator(), label=torch.tensor([1, 2]))


def test_a_network_is_doubted_once_and_in_two_rows():
    network = Faulty(lambda self, x, t: rows.append(len(x)))
    rows, sampler = [], make(4, denoiser(network))
    first, second = sampler((S, D), generator=generator()), sampler((S, D), generator=generator())
    assert rows[1] == 2
    assert len(rows) == first.rounds + second.rounds + 1
    assert sum(rows) == S * (first.evaluations + second.evaluations) + 2
    assert torch.equal(first.samples, second.samples)


# --- memory ---


def hungry(limit):
    """A network that runs out of memory above so many rows: the CPU allocator's own error."""

    def act(self, x, t):
        calls.append(len(x))
        if len(x) > limit:
            torch.empty(2**50)

    calls = []
    return Faulty(act), calls


@pytest.mark.parametrize("limit", [1, 5, 7])
def test_running_out_of_memory_halves_the_slices_says_so_and_remembers(limit):
    network, calls = hungry(limit)
    sampler = make(None, denoiser(network))
    with pytest.warns(UserWarning, match="ran out of memory: from now on") as told:
        result = sampler((S, D), noise=start(), generator=generator())
    assert len(told) == 1
    assert torch.equal(result.samples, make(None)((S, D), noise=start(), generator=generator()).samples)
    refused = [rows for rows in calls if rows > limit]
    assert refused[0] == 36
    assert all(later == (earlier + 1) // 2 for earlier, later in pairwise(refused))
    seen = len(calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler((S, D), noise=start(), generator=generator())
    assert max(calls[seen:]) <= limit
    assert max(calls[seen:]) > limit // 2


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you tried to allocate"),
        MemoryError(),
    ],
    ids=["CUDA", "older CUDA", "Windows", "Python"],
)
def test_every_allocators_error_is_known(error):
    def act(self, x, t):
        if len(x) > 9:
            raise error

    with pytest.warns(UserWarning, match="at most 9 rows"):
        result = make(None, denoiser(Faulty(act)))((S, D), noise=start(), generator=generator())
    assert torch.equal(result.samples, make(None)((S, D), noise=start(), generator=generator()).samples)


def test_one_row_too_many_is_an_error_that_keeps_the_run():
    network, _ = hungry(0)
    network.first = 4
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        make(None, denoiser(network))((S, D), noise=start(), generator=generator())
    assert caught.value.checkpoint.state.rounds == 2


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    network = Faulty(broken)
    with pytest.raises(RuntimeError, match="gone"):
        make(None, denoiser(network))((S, D), generator=generator())
    assert network.calls == 1


# --- checkpoints that are refused ---


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A checkpoint after the third round, and the sampler's result."""
    path = tmp_path_factory.mktemp("kept") / "run.safetensors"

    def stop(round, window, residual):
        if round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(5)((S, D), noise=start(), generator=generator(), callback=stop, checkpoint=path)
    return path


def refused(sampler, path, message, **condition):
    with pytest.raises(ValueError, match=message) as caught:
        sampler.resume(path, **condition)
    assert "`checkpoint`" in str(caught.value)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_checkpoint_is_refused(tmp_path, kept, part):
    body, short = kept.read_bytes(), tmp_path / "short.safetensors"
    short.write_bytes(body[: int(part * len(body))])
    refused(make(5), short, "not a whole safetensors file")


def test_what_is_no_checkpoint_is_refused(tmp_path, kept):
    path = tmp_path / "file"
    refused(make(5), path, "there is no such file")
    refused(make(5), tmp_path, "not a whole safetensors file")
    path.write_text("not tensors at all, but long enough to be read as a header's length")
    refused(make(5), path, "not a whole safetensors file")
    save_file({"x": torch.ones(3)}, path)
    refused(make(5), path, "not a checkpoint of piadm")
    save_file({"x": torch.ones(3)}, path, {"piadm": "[]"})
    refused(make(5), path, "not a checkpoint of piadm")
    save_file({"x": torch.ones(3)}, path, {"piadm": json.dumps({"format": "piadm checkpoint", "version": 99})})
    refused(make(5), path, "format 99")
    torch.save({"x": torch.ones(3)}, path)  # a pickle
    refused(make(5), path, "not a whole safetensors file")


DAMAGE = {
    "a tensor gone": lambda header, tensors: tensors.pop("state.x"),
    "another batch": lambda header, tensors: tensors.update({"state.x_seen": tensors["state.x_seen"][:, :, :2]}),
    "another sample": lambda header, tensors: tensors.update({"alive": torch.tensor([0, 1, 7])}),
    "a field gone": lambda header, tensors: header.pop("seeds"),
    "a field too many": lambda header, tensors: header["state"].update({"state.odd": 1}),
    "residuals of other rounds": lambda header, tensors: header["lengths"].append(3),
    "a failure without its state": lambda header, tensors: header["failures"].append([0, 1, 2, 3]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(tmp_path, kept, damage):
    from safetensors import safe_open

    path = tmp_path / "damaged.safetensors"
    with safe_open(kept, "pt") as file:
        header = json.loads(file.metadata()["piadm"])
    tensors = load_file(kept)
    DAMAGE[damage](header, tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"piadm": json.dumps(header)})
    refused(make(5), path, "a damaged checkpoint")


OTHERS = {
    "scheme": lambda: piadm.Parallel(denoiser(), piadm.DDPM(13), window=5, tolerance=1e-4),
    "denoiser": lambda: make(5, denoiser(lambda x, t: smooth(x, t))),
    "propagator": lambda: make(5, propagator=propagators.Secant(0.31)),
    "window": lambda: make(6),
    "tolerance": lambda: piadm.Parallel(denoiser(), piadm.DDPM(12), window=5, tolerance=1e-3),
    "sampler": lambda: piadm.Sequential(denoiser(), piadm.DDPM(12)),
    "fill": lambda: make(5, fill=piadm.fills.Copy()),
}


@pytest.mark.parametrize("part", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(kept, part):
    refused(OTHERS[part](), kept, f"another run: its (.*, )?{part}(, .*)? differ")
    refused(OTHERS[part](), checkpoint.load(kept), f"{part}")


def test_conditions_belong_to_a_run(kept):
    refused(make(5), kept, "its conditions differs", label=torch.arange(3))


def test_executors_do_not_belong_to_a_run(kept):
    whole = make(5)((S, D), noise=start(), generator=generator())
    assert torch.equal(make(5, piadm.MicroBatch(denoiser(), 2)).resume(kept).samples, whole.samples)


def test_one_weight_makes_another_model():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3)
    before = fingerprint(piadm.Denoiser(net, BETAS))
    assert fingerprint(piadm.Denoiser(net, BETAS)) == before
    twin = torch.nn.Linear(3, 3)
    twin.load_state_dict(net.state_dict())
    assert fingerprint(piadm.Denoiser(twin, BETAS)) == before
    with torch.no_grad():
        net.weight[1, 2] += 1e-6
    assert fingerprint(piadm.Denoiser(net, BETAS)) != before
    others = [
        piadm.Denoiser(twin, BETAS, "sample"),
        piadm.Denoiser(twin, BETAS, variance=0.9),
        piadm.Denoiser(twin, schedules.DiscreteBetas.cosine(1000)),
        piadm.Denoiser(twin.double(), BETAS),
        piadm.Guided(piadm.Denoiser(twin, BETAS), 2.0, {}),
        piadm.Guided(piadm.Denoiser(twin, BETAS), 3.0, {}),
        piadm.Denoiser(lambda x, t: x, BETAS),
        piadm.Denoiser(lambda x, t: 2 * x, BETAS),
        piadm.targets.Gaussian(0.0, 1.0, BETAS),
        piadm.targets.Gaussian(0.0, 2.0, BETAS),
    ]
    assert len({before, *map(fingerprint, others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"checkpoint": "/no/such/folder/run.safetensors"}, "`checkpoint` is '/no/such/folder/run.safetensors': give"),
        ({"checkpoint": "."}, "`checkpoint` is"),
        ({"checkpoint": "run.safetensors", "checkpoint_seconds": -1}, "`checkpoint_seconds` is -1: give seconds"),
    ],
)
@pytest.mark.parametrize("kind", ["sequential", 4], ids=str)
def test_a_place_that_cannot_be_written_to_is_refused_before_the_network_runs(monkeypatch, tmp_path, kind, keywords, message):
    monkeypatch.chdir(tmp_path)
    network = Faulty(broken)
    with pytest.raises(ValueError, match=message):
        make(kind, denoiser(network))((S, D), **keywords)
    assert network.calls == 0


def test_a_full_disk_at_the_end_does_not_hide_what_ended_the_run(monkeypatch, tmp_path):
    def full(path, other):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RuntimeError, match="gone") as caught, pytest.warns(UserWarning, match="No space left"):
        make(5, denoiser(Faulty(broken, first=3)))((S, D), generator=generator(), checkpoint=tmp_path / "run.safetensors")
    assert caught.value.checkpoint.state.rounds > 0
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL while the file is written over and over: what lies there is read, and resumes to the last bit."""
    path = tmp_path / "run.safetensors"
    program = f"""
import torch, piadm
def network(x, t):
    return x / (1 + x.abs())
one = piadm.Denoiser(network, piadm.schedules.DiscreteBetas.linear(1000), "sample")
sampler = piadm.Parallel(one, piadm.DDPM(1000), window=8, tolerance=1e-9)
sampler((4, 50_000), generator=torch.Generator().manual_seed(0), checkpoint={str(path)!r}, checkpoint_seconds=0)
"""
    for pause in (0.0, 0.05, 0.13):
        path.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", program])
        try:
            limit = time.monotonic() + 120
            while not path.exists():
                assert child.poll() is None
                assert time.monotonic() < limit
                time.sleep(0.005)
            time.sleep(pause)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert checkpoint.load(path).state.rounds > 0
        for left in tmp_path.glob(".*.part"):
            left.unlink()


def test_a_checkpoint_holds_no_code_and_no_path(kept):
    body = kept.read_bytes()
    assert b"pickle" not in body
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    assert set(header["__metadata__"]) == {"piadm"}
    assert "/" not in header["__metadata__"]["piadm"]
