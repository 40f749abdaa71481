"""Denoisers: one model in five predictions, conditions that stay with their sample, guidance, micro-batches, dtypes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import piadm
from piadm.denoiser import spread
from piadm.schedules import DiscreteBetas, OrnsteinUhlenbeck, RectifiedFlow, VarianceExploding

DOUBLE = torch.float64
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction", "score")
SCHEDULES = {
    "ornstein-uhlenbeck": OrnsteinUhlenbeck(),
    "betas": DiscreteBetas.linear(1000),
    "variance-exploding": VarianceExploding(),
    "rectified-flow": RectifiedFlow(1000),
}


def best_guess(a: Tensor, b: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, mean: float, variance: float) -> Tensor:
    """E[a x_0 + b noise | x_t = x] for x_0 ~ N(mean, variance), by linear regression on x_t = alpha x_0 + sigma noise."""
    slope = (a * alpha * variance + b * sigma) / (alpha**2 * variance + sigma**2)
    return a * mean + slope * (x - alpha * mean)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_of_one_model_is_the_same_denoiser(schedule, prediction):
    mean, variance = 0.7, 0.3
    t = schedule.grid(20)[1:-1]
    x = 3 * torch.randn(len(t), 2, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    shape = (-1, 1, 1)
    alpha, sigma = schedule.alpha(t).reshape(shape), schedule.sigma(t).reshape(shape)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    targets = {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-sigma, alpha), "flow_prediction": (-one, one)}

    def network(x: Tensor, t: Tensor) -> Tensor:
        if prediction == "score":  # of N(alpha mean, alpha^2 variance + sigma^2)
            return -(x - alpha * mean) / (alpha**2 * variance + sigma**2)
        return best_guess(*targets[prediction], x, alpha, sigma, mean, variance)

    f = piadm.Denoiser(network, schedule, prediction)(x, t)
    # f = (x - sigma g)/alpha loses 1/alpha digits, 1/alpha < 200 at the noisiest time here
    torch.testing.assert_close(f, best_guess(one, zero, x, alpha, sigma, mean, variance), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(f, piadm.targets.Gaussian(mean, variance, schedule)(x, t), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_predictions_that_say_nothing_without_signal_are_refused_before_the_network_is_called(prediction):
    network = Counter()
    with pytest.raises(ValueError, match=rf"`prediction` is '{prediction}'.*use one that predicts 'sample'"):
        piadm.Sequential(piadm.Denoiser(network, RectifiedFlow(), prediction), piadm.Euler(10))
    assert network.rows == []


class Counter:
    """Returns its input, or what it is given, and counts its calls."""

    def __init__(self, answer=lambda x: x) -> None:
        self.rows: list[int] = []
        self.answer = answer

    def __call__(self, x: Tensor, t: Tensor, **condition) -> object:
        self.rows.append(len(x))
        return self.answer(x)


# --- conditions stay with their sample ---

SAMPLES = 5


class Compass:
    """Each sample moves along its own direction for ever: f = speed(label) * x, started at angle(label).

    So a row's direction says which sample it is, whatever the sampler did to it, and its label must say the same.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels, self.rows = labels, []

    def start(self) -> Tensor:
        angle = self.labels.double()
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def __call__(
        self, x: Tensor, t: Tensor, *, label: Tensor, extra: dict, shared: Tensor, scalar: Tensor, word: str
    ) -> Tensor:
        rows = len(x)
        assert (t.shape, label.shape) == ((rows,), (rows,))
        assert (extra["deep"]["label"] == label).all()
        assert (extra["deep"]["wide"] == label[:, None].double() * torch.ones(3)).all()
        assert extra["scalar"].ndim == scalar.ndim == 0
        assert shared.tolist() == [[7.0, 8.0]] * rows
        assert (word, extra["word"]) == ("a", "b")
        angle = label.double()
        across = x[:, 0] * angle.sin() - x[:, 1] * angle.cos()
        torch.testing.assert_close(across, torch.zeros_like(across), rtol=0, atol=1e-12)
        self.rows.append(rows)
        return x * torch.tanh(angle * (x.norm(dim=1) + t / 300)).unsqueeze(1)


def compass_condition(labels: Tensor) -> dict:
    wide = labels[:, None].double() * torch.ones(3)
    scalar = torch.tensor(0.5)
    extra = {"deep": {"label": labels, "wide": wide}, "scalar": scalar, "word": "b"}
    return {"label": labels, "extra": extra, "shared": torch.tensor([[7.0, 8.0]]), "scalar": scalar, "word": "a"}


class Staggered:
    """A sliding window of another size for every sample, so that rows of a round belong to unequal stretches."""

    def check(self, table) -> None:
        pass

    def advance(self, table, rounds: int, ready: Tensor) -> tuple[Tensor, Tensor]:
        return ready, (ready + 1 + torch.arange(len(ready))).clamp(max=len(table))


@pytest.mark.parametrize("size", [None, 3, 1000], ids="size={}".format)
@pytest.mark.parametrize("window", ["sequential", 1, 4, None, Staggered()], ids=["sequential", "1", "4", "all", "staggered"])
def test_conditions_stay_with_their_sample_along_the_window(window, size):
    labels = torch.tensor([3, 1, 4, 2, 6])
    network = Compass(labels)
    denoiser = piadm.Denoiser(network, DiscreteBetas.linear(1000), "sample")
    if size is not None:
        denoiser = piadm.MicroBatch(denoiser, size)
    scheme = piadm.DDIM(20)
    if window == "sequential":
        sampler = piadm.Sequential(denoiser, scheme)
    else:
        sampler = piadm.Parallel(denoiser, scheme, window=window, tolerance=1e-3)
    result = sampler(
        (SAMPLES, 2), noise=network.start(), generator=torch.Generator().manual_seed(0), **compass_condition(labels)
    )
    assert result.converged
    if isinstance(window, Staggered) and size is None:
        assert any(rows % SAMPLES for rows in network.rows)


def test_guidance_doubles_conditions_at_every_depth_and_leaves_the_others():
    seen = {}

    def network(x: Tensor, t: Tensor, **condition) -> Tensor:
        seen.update(condition)
        return x

    denoiser = piadm.Guided(
        piadm.Denoiser(network, OrnsteinUhlenbeck(), "sample"), 2.0, unconditional={"label": torch.tensor([10])}
    )
    label, mask = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    denoiser(torch.zeros(3, 2), torch.ones(3), label=label, extra={"mask": mask, "word": "a"}, scalar=torch.tensor(1.0))
    assert seen["label"].tolist() == [10, 10, 10, 1, 2, 3]
    assert seen["extra"]["mask"].tolist() == [4, 5, 6, 4, 5, 6]
    assert (seen["extra"]["word"], seen["scalar"].item()) == ("a", 1.0)


@pytest.mark.parametrize("condition", [{}, {"label": 3}, {"label": torch.tensor(3)}], ids=["missing", "int", "0-d"])
def test_guidance_without_a_condition_to_take_away_is_refused_not_ignored(condition):
    network = Counter()
    denoiser = piadm.Guided(piadm.Denoiser(network, OrnsteinUhlenbeck(), "sample"), 2.0, {"label": torch.tensor([10])})
    with pytest.raises(ValueError, match=r"`label` has an unconditional value but .*pass a tensor label="):
        piadm.Sequential(denoiser, piadm.DDIM(5))((3, 2), **condition)
    assert network.rows == []


def test_spread_gives_row_r_the_entry_of_its_sample():
    sample = torch.tensor([2, 0, 0, 1, 2])
    one, each = torch.tensor([[1.0, 2.0]]), torch.arange(6).reshape(3, 2)
    out = spread({"one": one, "each": each, "none": None, "in": {"each": each}, "pair": (each, one)}, sample, 3)
    assert torch.equal(out["one"], one.expand(5, 2))
    assert torch.equal(out["each"], each[sample])
    assert torch.equal(out["in"]["each"], each[sample])
    assert isinstance(out["pair"], tuple)
    assert torch.equal(out["pair"][0], each[sample])
    assert out["none"] is None


# --- wrappers ---


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance_is_its_formula_in_one_call(scale):
    g = torch.Generator().manual_seed(0)
    x, t, c = torch.randn(3, 2, dtype=DOUBLE, generator=g), torch.full((3,), 0.5), torch.randn(3, 2, dtype=DOUBLE, generator=g)
    rows = []

    def network(x: Tensor, t: Tensor, *, c: Tensor) -> Tensor:
        rows.append(len(x))
        return torch.sin(x) * t.to(DOUBLE)[:, None] + c**2

    plain = piadm.Denoiser(network, OrnsteinUhlenbeck(), "epsilon")
    none = torch.full((1, 2), 3.0, dtype=DOUBLE)
    without, with_ = plain(x, t, c=none.expand(3, 2)), plain(x, t, c=c)
    rows.clear()
    guided = piadm.Guided(plain, scale, unconditional={"c": none})(x, t, c=c)
    torch.testing.assert_close(guided, without + scale * (with_ - without), rtol=1e-13, atol=1e-13)
    assert rows == [6]


@pytest.mark.parametrize("size", [1, 3, 7, 8, 100])
def test_micro_batches_hold_at_most_their_size_and_change_nothing(size):
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(7, 2, 3, generator=g), torch.rand(7, generator=g) + 0.1
    label, mean = torch.arange(7), {"mean": torch.randn(7, 1, 1, generator=g)}
    rows = []

    def network(x: Tensor, t: Tensor, *, label: Tensor, extra: dict, scalar: Tensor) -> Tensor:
        rows.append(len(x))
        assert len(label) == len(extra["mean"]) == len(t) == len(x)
        return x * t[:, None, None] + extra["mean"] * label[:, None, None] + scalar

    plain = piadm.Denoiser(network, OrnsteinUhlenbeck(), "sample")
    condition = {"label": label, "extra": mean, "scalar": torch.tensor(0.25)}
    whole = plain(x, t, **condition)
    rows.clear()
    # the network acts number by number, so even the last bit must agree
    assert torch.equal(piadm.MicroBatch(plain, size)(x, t, **condition), whole)
    assert max(rows) <= size
    assert len(rows) == math.ceil(7 / size)


def test_a_micro_batched_run_is_the_same_run():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 6)).double().requires_grad_(False)
    rows = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return layer(x)

    plain = piadm.Denoiser(network, DiscreteBetas.linear(1000), "sample")

    def run(denoiser):
        sampler = piadm.Parallel(denoiser, piadm.DDPM(30), window=10, tolerance=1e-3)
        noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
        return sampler((4, 6), generator=torch.Generator().manual_seed(0), noise=noise)

    whole = run(plain)
    assert max(rows) == 40
    rows.clear()
    cut = run(piadm.MicroBatch(plain, 7))
    assert max(rows) == 7
    # a matrix product may add in another order for other numbers of rows: rounding, in float64
    torch.testing.assert_close(cut.samples, whole.samples, rtol=1e-12, atol=1e-12)
    assert (cut.rounds, cut.evaluations) == (whole.rounds, whole.evaluations)


@pytest.mark.parametrize(
    "wrap",
    [lambda d: piadm.MicroBatch(d, 2), lambda d: piadm.Guided(d, 1.0, {})],
    ids=["MicroBatch", "Guided"],
)
def test_a_wrapped_denoiser_answers_for_the_one_inside(wrap):
    inner = piadm.Denoiser(nn.Linear(3, 3).double(), RectifiedFlow(), "epsilon", mean=0.5, variance=2.0, event_shape=(3,))
    outer = wrap(inner)
    names = ("schedule", "mean", "variance", "event_shape", "dtype", "device")
    assert [getattr(outer, name) for name in names] == [getattr(inner, name) for name in names]
    with pytest.raises(ValueError, match="says nothing of the data"):
        outer.check(torch.tensor([1.0]))


# --- dtypes, outputs, shapes ---


class Half(nn.Module):
    """A linear layer that keeps the dtypes it was called with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=dtype)
        self.seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.add((x.dtype, t.dtype))
        return self.layer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("scheme", "schedule"), [(piadm.DDPM(20), "betas"), (piadm.ExponentialSDE(6.0, step=0.2), "betas")])
@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_networks_run_in_their_own_dtype_and_states_in_float32_at_least(dtype, scheme, schedule, parallel):
    torch.manual_seed(0)
    network = Half(dtype)
    denoiser = piadm.Denoiser(network, SCHEDULES[schedule], "sample")
    sampler = (piadm.Parallel if parallel else piadm.Sequential)(denoiser, scheme)
    samples = sampler((2, 3), generator=torch.Generator().manual_seed(0)).samples
    wide = torch.promote_types(dtype, torch.float32)
    assert samples.dtype == wide
    # whole times stay whole: bfloat16 cannot tell 999 from 1000
    assert network.seen == {(dtype, torch.int64 if isinstance(scheme, piadm.DDPM) else wide)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_output_is_combined_with_the_state_in_float32(dtype):
    schedule = DiscreteBetas.linear(1000)
    torch.manual_seed(0)
    network = Half(dtype)
    x, t = torch.randn(4, 3), torch.tensor([0, 10, 500, 999])
    f = piadm.Denoiser(network, schedule, "epsilon")(x, t)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    expected = (x.double() - sigma * network.layer(x.to(dtype)).double()) / alpha
    # float32 rounding of terms of size 1/alpha
    assert ((f - expected).abs() <= 4 * torch.finfo(torch.float32).eps * (1 + x.abs()) / alpha).all()


@pytest.mark.parametrize(
    "wrap",
    [lambda g: g, lambda g: (g, "more"), lambda g: [g], lambda g: SimpleNamespace(sample=g)],
    ids=["tensor", "tuple", "list", ".sample"],
)
def test_networks_may_return_what_diffusers_models_return(wrap):
    denoiser = piadm.Denoiser(lambda x, t: wrap(2 * x), OrnsteinUhlenbeck(), "sample")
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoiser(x, torch.ones(2)), 2 * x)


@pytest.mark.parametrize("event", [(), (6,), (2, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["network", "guided", "gaussian"])
def test_every_event_shape_gives_the_numbers_of_the_flat_one(event, kind):
    def build():
        if kind == "gaussian":
            return piadm.targets.Gaussian(0.5, 2.0, DiscreteBetas.linear(1000))
        plain = piadm.Denoiser(lambda x, t, **_: torch.tanh(x), DiscreteBetas.linear(1000), "sample")
        return piadm.MicroBatch(piadm.Guided(plain, 2.0, {}), 5) if kind == "guided" else plain

    flat = (4, math.prod(event))
    for sampler in (
        piadm.Sequential(build(), piadm.DDPM(12)),
        piadm.Parallel(build(), piadm.DDPM(12), window=5, tolerance=1e-3),
    ):
        shaped = sampler((4, *event), generator=torch.Generator().manual_seed(0)).samples
        assert shaped.shape == (4, *event)
        assert torch.equal(shaped.reshape(flat), sampler(flat, generator=torch.Generator().manual_seed(0)).samples)
