"""Several devices in one process, and states that live elsewhere: copies on the CPU, and on CUDA where there is one.

Networks are elementwise where samples are compared bit for bit, so that batches of any size round alike.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
import warnings

import pytest
import torch
from torch import nn

import piadm
from tests.ranks import BETAS, SAMPLERS, SLOW, condition, generator

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LOG: list[tuple[int, int, bool]] = []
"""Of every call: whose weight was asked, for how many rows, and whether gradients were on."""


class Net(nn.Module):
    """Elementwise; `act(self, x)` is called before each answer."""

    def __init__(self, act=None):
        super().__init__()
        self.act, self.scale = act, nn.Parameter(torch.ones(()))

    def __deepcopy__(self, memo):
        twin = Net(self.act)
        twin.scale = nn.Parameter(self.scale.detach().clone())
        return twin

    def forward(self, x, t, shift=None):
        LOG.append((id(self.scale), len(x), torch.is_grad_enabled()))
        if self.act is not None:
            self.act(self, x)
        f = self.scale * x / (1 + x.abs()) * (1 - 1e-4 * t.to(x.dtype)[:, None])
        return f if shift is None else f + 0.1 * shift.to(x.dtype)


@pytest.fixture(autouse=True)
def fresh():
    LOG.clear()


def denoiser(network=None, schedule=BETAS):
    return piadm.Denoiser(network or Net(), schedule, "sample", variance=0.3)


def weights(replicas):
    """The weight of each replica, by which a call is known."""
    found = []
    for one in replicas.replicas:
        while hasattr(one, "denoiser"):
            one = one.denoiser
        found.append(one.network.scale)
    return found


def sampler(one, **keywords):
    return piadm.Parallel(one, piadm.DDPM(40), window=8, tolerance=1e-6, propagator=SLOW, **keywords)


def whole(**keywords):
    return sampler(denoiser())((3, 4), generator=generator(), **keywords)


# --- the same sample ---


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sample_is_that_of_one_device_and_shares_are_even(name, samples, count):
    """Also with more devices than rows: the sequential sampler asks for one."""
    made = []

    def one(schedule):
        made.append(piadm.Replicas(denoiser(schedule=schedule), ["cpu"] * count))
        return made[-1]

    given = condition(name, samples)
    theirs = SAMPLERS[name](lambda schedule: denoiser(schedule=schedule))((samples, 4), generator=generator(), **given)
    alone = [rows for _, rows, _ in LOG]
    LOG.clear()
    mine = SAMPLERS[name](one)((samples, 4), generator=generator(), **given)
    assert torch.equal(mine.samples, theirs.samples)
    assert mine.rounds == theirs.rounds
    assert not any(grad for _, _, grad in LOG)
    shares = [sum(rows for who, rows, _ in LOG if who == id(weight)) for weight in weights(made[0])]
    assert sum(shares) == sum(alone)
    assert shares[0] == max(shares)  # rows that there are too few of stay where they are
    assert max(shares) - min(shares) <= len(alone)
    # no call of a round has more than its share
    assert max(rows for _, rows, _ in LOG) <= -(-max(alone) // count)
    assert len(LOG) == sum(min(count, rows) for rows in alone)


def test_the_embedded_network_agrees_to_float_precision_with_its_labels():
    digits, label = piadm.models.load("digits"), torch.tensor([1, 2])
    results = [
        piadm.Parallel(one, piadm.DDPM(60), window=16)((2, 1, 8, 8), generator=generator(), label=label)
        for one in (digits, piadm.Replicas(digits, ["cpu", "cpu"]))
    ]
    torch.testing.assert_close(results[1].samples, results[0].samples, rtol=0, atol=2e-5)


def test_guidance_may_be_inside_or_outside():
    given, none = condition("guided", 3), {"shift": torch.zeros(1, 1)}
    places = ["cpu", "cpu"]
    ways = [
        piadm.Guided(denoiser(), 2.0, none),
        piadm.Replicas(piadm.Guided(denoiser(), 2.0, none), places),
        piadm.Guided(piadm.Replicas(denoiser(), places), 2.0, none),
    ]
    samples = [sampler(one)((3, 4), generator=generator(), **given).samples for one in ways]
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])


def test_replicas_are_asked_at_the_same_time():
    """Each waits in its network for the other to come."""
    both = threading.Barrier(2)
    one = piadm.Replicas(denoiser(Net(lambda self, x: both.wait(30))), ["cpu", "cpu"])
    x = torch.randn(7, 4, generator=generator())
    f = one(x, torch.arange(7))
    assert [rows for _, rows, _ in sorted(LOG, key=lambda entry: -entry[1])] == [4, 3]
    assert torch.equal(f, denoiser()(x, torch.arange(7)))


def test_what_a_thread_has_set_for_itself_holds_in_all_of_them():
    seen = []

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, t):
            f = self.layer(x)
            seen.append((f.dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return f

    one = piadm.Replicas(denoiser(Linear()), ["cpu", "cpu"])
    x, t = torch.randn(4, 4), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        one(x, t)
    assert seen == [(torch.bfloat16, False, False)] * 2
    seen.clear()
    with torch.inference_mode():
        one(x, t)
    assert seen == [(torch.float32, False, True)] * 2
    seen.clear()
    one(x, t).sum().backward()
    assert seen == [(torch.float32, True, False)] * 2


# --- copies, and where things live ---


def test_the_users_module_stays_where_it_is_and_serves_its_own_device():
    network = Net()
    one = piadm.Replicas(denoiser(network), ["cpu", "meta", "cpu"])
    assert [weight.device.type for weight in weights(one)] == ["cpu", "meta", "cpu"]
    assert weights(one)[0] is network.scale
    assert weights(one)[2] is not network.scale
    assert network.scale.device == CPU
    assert one.denoiser.network is network


class Elsewhere(piadm.Wrapper):
    """A denoiser on the meta device, which holds no numbers: it notes where its rows are, and answers from the CPU."""

    def __init__(self):
        super().__init__(denoiser(Net().to("meta")))
        self.network, self.seen = nn.Linear(2, 2, device="meta"), []

    def __call__(self, x, t, **given):
        self.seen.append((x.device.type, t.device.type, {name: value.device.type for name, value in given.items()}, len(x)))
        return torch.full(x.shape, 0.5)


def test_states_live_at_home_and_rows_go_to_the_network_slice_by_slice():
    there = Elsewhere()
    assert there.device == torch.device("meta")
    one = piadm.Replicas(piadm.MicroBatch(there, 3), ["meta"], home="cpu")
    assert one.device == CPU
    noises = []
    result = piadm.Parallel(one, piadm.DDIM(8), window=8)(
        (1, 4),
        generator=generator(),
        scale=torch.ones(()),
        label=torch.ones(1, 2),
        callback=lambda *given: noises.append(given[2]),
    )
    assert result.samples.device == CPU
    assert {device.device for device in noises} == {CPU}
    assert {place for x, t, given, _ in there.seen for place in (x, t, *given.values())} == {"meta"}
    assert max(rows for *_, rows in there.seen) == 3
    assert there.seen[0][3] == 3


def test_the_first_device_is_home_unless_one_is_named():
    assert piadm.Replicas(denoiser(), ["cpu", "meta"]).device == CPU
    assert piadm.Replicas(denoiser(), ["meta"]).device == torch.device("meta")
    assert piadm.Replicas(denoiser(), ["meta"], home=CPU).device == CPU
    with pytest.raises(ValueError, match=r"`noise` is .*cpu.*: must live with the states on meta"):
        sampler(piadm.Replicas(denoiser(), ["cpu"], home="meta"))((3, 4), noise=torch.zeros(3, 4))


# --- whatever goes wrong ---


def failing_replica(which, error, at):
    """Replicas of which one raises at its call number `at`; and how to heal it."""
    calls, armed = [0], [True]

    def act(self, x):
        if id(self.scale) == id(weights(one)[which]):
            calls[0] += 1
            if calls[0] == at and armed[0]:
                raise error

    one = piadm.Replicas(denoiser(Net(act)), ["cpu", "cpu", "cpu"])
    return one, armed


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_error_names_its_device_and_the_run_goes_on_with_or_without_replicas(tmp_path, which):
    one, armed = failing_replica(which, LookupError("no such weight"), at=9)
    path = tmp_path / "run.safetensors"
    with pytest.raises(LookupError, match="no such weight") as caught:
        sampler(one)((3, 4), generator=generator(), checkpoint=path)
    if hasattr(caught.value, "__notes__"):
        assert f"piadm: raised by the network on cpu (`devices[{which}]`)" in caught.value.__notes__
    assert caught.value.checkpoint.state.rounds in (7, 8)  # one call was the question asked twice, of two rows
    armed[0] = False
    expected = whole().samples
    for given in (path, caught.value.checkpoint):
        assert torch.equal(sampler(one).resume(given).samples, expected)
    # the network's own type is all that a fingerprint knows of it
    assert torch.equal(sampler(denoiser()).resume(caught.value.checkpoint).samples, expected)


def test_a_run_begun_on_one_device_goes_on_with_replicas(tmp_path):
    def stop(round, window, residual):
        if round == 5:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        whole(callback=stop, checkpoint=path)
    assert torch.equal(sampler(piadm.Replicas(denoiser(), ["cpu"] * 3)).resume(path).samples, whole().samples)


def test_out_of_memory_one_device_halves_its_own_calls():
    def act(self, x):
        if id(self.scale) == id(weights(one)[1]) and len(x) > 3:
            torch.empty(2**50)

    one = piadm.Replicas(denoiser(Net(act)), ["cpu", "cpu"])
    with pytest.warns(UserWarning, match="ran out of memory: from now on it is called with at most 3 rows") as told:
        result = sampler(one)((3, 4), generator=generator())
    assert len(told) == 1
    assert torch.equal(result.samples, whole().samples)
    first, second = (id(weight) for weight in weights(one))
    assert max(rows for who, rows, _ in LOG if who == first) == 12
    LOG.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(one)((3, 4), generator=generator())
    assert max(rows for who, rows, _ in LOG if who == second) == 3


@pytest.mark.parametrize("waiting", [True, False], ids=["for another share", "in its own"])
def test_ctrl_c_is_heard_when_the_other_shares_are_done(waiting):
    """Both in the main thread's own share, and when it has done that."""
    calls, done = {True: 0, False: 0}, []

    def act(self, x):
        first = self.scale is network.scale
        calls[first] += 1
        if calls[first] != 6:
            return
        if not first:
            time.sleep(0.3)  # until the main thread is where it is to be
            _thread.interrupt_main()
            time.sleep(0.2)
            done.append(True)
        while first and not waiting and not done:  # until the signal is seen
            time.sleep(0.01)

    network = Net(act)
    one = piadm.Replicas(denoiser(network), ["cpu", "cpu"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test runner may have replaced
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            sampler(one)((3, 4), generator=generator())
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [True]
    assert caught.value.checkpoint.state.rounds == 4  # the sixth call was in the fifth round: one was a question asked twice
    assert torch.equal(sampler(denoiser()).resume(caught.value.checkpoint).samples, whole().samples)


# --- with what else there is ---


def test_executors_inside_cut_each_devices_share():
    inside = piadm.Replicas(piadm.MicroBatch(denoiser(), 5), ["cpu", "cpu"])
    assert torch.equal(sampler(inside)((3, 4), generator=generator()).samples, whole().samples)
    LOG.clear()
    inside(torch.zeros(24, 4), torch.zeros(24).long())
    assert sorted(rows for _, rows, _ in LOG) == [2, 2, 5, 5, 5, 5]
    LOG.clear()
    fixed = piadm.Replicas(piadm.FixedBatch(denoiser(), 5), ["cpu", "cpu"])
    assert torch.equal(sampler(fixed)((3, 4), generator=generator()).samples, whole().samples)
    assert {rows for _, rows, _ in LOG[: len(LOG) // 2]} == {5}


def test_the_window_is_measured_through_all_devices(monkeypatch):
    """On a clock on which a call takes as long as its longest share."""
    now = [0.0]
    lock = threading.Lock()

    class Priced(piadm.Replicas):
        def __call__(self, x, t, **given):
            now[0] += 1e-2 * -(-len(x) // len(self.devices)) + 1e-3
            with lock:
                return super().__call__(x, t, **given)

    monkeypatch.setattr(piadm.tuning.time, "perf_counter", lambda: now[0])
    choices = []
    for count in (1, 8):
        one = Priced(denoiser(), ["cpu"] * count)
        result = piadm.Parallel(one, piadm.DDPM(100), window="auto", tolerance=1e-4)((1, 4), generator=generator())
        choices.append(result.choice)
    # the one device is full with one row, eight are not
    assert choices[0].window == 1
    assert choices[1].window >= 8


def test_memory_is_bounded_on_one_device_and_refused_on_several():
    digits, label = piadm.models.load("digits"), torch.tensor([3])
    rows = []
    for one in (digits, piadm.Replicas(digits, ["cpu"])):
        forward, seen = digits.network.forward, []
        digits.network.forward = lambda x, t, seen=seen, forward=forward, **given: seen.append(len(x)) or forward(x, t, **given)
        try:
            run = piadm.Parallel(one, piadm.DDIM(20), window=16, max_memory=2_000_000)
            run((1, 1, 8, 8), generator=generator(), label=label)
        finally:
            del digits.network.forward
        rows.append(seen)
    assert max(rows[0]) < 16
    assert rows[0] == rows[1]
    with pytest.raises(
        ValueError, match=r"`max_memory` is 0.5: is measured by calls of some rows, which Replicas makes others of"
    ):
        piadm.Parallel(piadm.Replicas(digits, ["cpu", "cpu"]), piadm.DDIM(20), max_memory=0.5)


@pytest.mark.parametrize("samples", [1, 2])
def test_exact_and_its_resumption(samples):
    places = ["cpu", "cpu"]
    expected = piadm.Exact(denoiser(), piadm.DDPM(30), window=6)((samples, 4), generator=generator())

    def stop(round, window, residual):
        if round == 4:
            raise KeyboardInterrupt

    replicated = piadm.Exact(piadm.Replicas(denoiser(), places), piadm.DDPM(30), window=6)
    with pytest.raises(KeyboardInterrupt) as caught:
        replicated((samples, 4), generator=generator(), callback=stop)
    for one in (replicated, piadm.Exact(denoiser(), piadm.DDPM(30), window=6)):
        assert torch.equal(one.resume(caught.value.checkpoint).samples, expected.samples)


# --- what is refused ---


def test_what_cannot_be_copied_is_refused():
    plain = denoiser(lambda x, t: x)
    with pytest.raises(TypeError, match=r"`denoiser` has no torch.nn.Module in it but <function .*use piadm.Sharded"):
        piadm.Replicas(plain, ["cpu"])
    with pytest.raises(TypeError, match=r"`denoiser` has no torch.nn.Module in it but Gaussian"):
        piadm.Replicas(piadm.targets.Gaussian(), ["cpu"])
    with pytest.raises(TypeError, match="wrap the network"):
        piadm.Replicas(Net(), ["cpu"])
    one = piadm.Replicas(denoiser(), ["cpu"])
    with pytest.raises(TypeError, match=r"has Replicas in it.*Replicas\(Replicas"):
        piadm.Replicas(piadm.MicroBatch(one), ["cpu"])


@pytest.mark.parametrize("wrong", [[], "cpu", None, ["nowhere"], ["cuda:99"], [7.5]])
def test_devices_that_are_not_there_are_refused(wrong):
    with pytest.raises(ValueError, match="`devices`"):
        piadm.Replicas(denoiser(), wrong)
    with pytest.raises(ValueError, match="`home` names 'nowhere'"):
        piadm.Replicas(denoiser(), ["cpu"], home="nowhere")


# --- CUDA ---


@needs_cuda
@pytest.mark.parametrize("home", ["cuda", "cpu"])
def test_on_cuda_the_sample_is_that_of_one_device(home):
    digits, label = piadm.models.load("digits"), torch.tensor([1, 2])
    places = [f"cuda:{i}" for i in range(torch.cuda.device_count())] * 2
    one = piadm.Replicas(digits, places, home=home)
    source = torch.Generator(home).manual_seed(0)
    mine = piadm.Parallel(one, piadm.DDPM(60), window=16)((2, 1, 8, 8), generator=source, label=label)
    alone = digits if home == "cpu" else piadm.Replicas(digits, ["cuda"])
    source = torch.Generator(home).manual_seed(0)
    theirs = piadm.Parallel(alone, piadm.DDPM(60), window=16)((2, 1, 8, 8), generator=source, label=label)
    assert mine.samples.device.type == home
    assert next(digits.network.parameters()).device == CPU
    torch.testing.assert_close(mine.samples, theirs.samples, rtol=0, atol=1e-3)


@needs_cuda
def test_with_its_states_on_the_cpu_a_run_takes_what_its_calls_take():
    network, size = Net().cuda(), 2**20
    offloaded = piadm.Replicas(piadm.MicroBatch(denoiser(network), 1), ["cuda"], home="cpu")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    piadm.Parallel(offloaded, piadm.DDIM(16), window=16, max_rounds=3)((1, size), generator=generator())
    assert torch.cuda.max_memory_allocated() - before < 12 * size * 4  # a window's states alone are 16
