"""Bad input: an error names the argument, its value and the remedy, before any network call wherever it can be known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import piadm
from piadm import NonFiniteError, fills, propagators, schedules, targets, windows
from piadm.errors import require

CALLS: list[int] = []


@pytest.fixture(autouse=True)
def _forget_calls():
    CALLS.clear()


def network(x: Tensor, t: Tensor, **condition) -> Tensor:
    CALLS.append(len(x))
    return x


BETAS, PAPER, FLOW = schedules.DiscreteBetas.linear(1000), schedules.OrnsteinUhlenbeck(), schedules.RectifiedFlow()


def denoiser(schedule=BETAS, **keywords) -> piadm.Denoiser:
    return piadm.Denoiser(network, schedule, "sample", **keywords)


def parallel(scheme=None, schedule=BETAS, **keywords) -> piadm.Parallel:
    return piadm.Parallel(denoiser(schedule), piadm.DDPM(10) if scheme is None else scheme, **keywords)


def sequential(one=None) -> piadm.Sequential:
    return piadm.Sequential(denoiser() if one is None else one, piadm.DDPM(10))


def sampler(kind: str):
    return sequential() if kind == "sequential" else parallel(window=4)


def seeded(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def on_meta() -> piadm.Denoiser:
    """A network on another device than the CPU, which nothing can compute on: the calls below must not get that far."""
    return piadm.Denoiser(nn.Linear(3, 3, device="meta"), BETAS, "sample")


LONG = torch.linspace(-1, 0.02, 1000)
LANGEVIN = piadm.ExponentialODE(corrector=piadm.Corrector())

# what is done, and what the message says: argument, value, remedy
CONSTRUCTION = {
    "DDPM steps 0": (lambda: piadm.DDPM(0), r"`steps` is 0: .*DDPM\(steps=1000\)"),
    "DDIM steps -1": (lambda: piadm.DDIM(-1), r"`steps` is -1: .*DDIM\(steps=50\)"),
    "Euler steps 1.5": (lambda: piadm.Euler(1.5), r"`steps` is 1.5: .*integer.*Euler\(steps=50\)"),
    "Euler steps True": (lambda: piadm.Euler(True), "`steps` is True: give an integer"),
    "more steps than betas": (lambda: parallel(piadm.DDPM(1001)), "`steps` is 1001: the schedule has 1000 steps"),
    "eta": (lambda: piadm.DDIM(10, 2.0), "`eta` is 2.0: give a number from 0 .* to 1"),
    "eta nan": (lambda: piadm.DDIM(10, float("nan")), "`eta` is nan: give a number"),
    "eta text": (lambda: piadm.DDIM(10, "a"), "`eta` is 'a': give a number"),
    "spacing": (lambda: parallel(piadm.DDPM(10, "even")), "`timestep_spacing` is 'even': give 'leading', 'trailing' or"),
    "spacing of DDIM": (lambda: piadm.DDIM(5, 0.0, "even"), "`timestep_spacing` is 'even': give 'leading', 'trailing' or"),
    "Euler on betas": (lambda: parallel(piadm.Euler(10)), "`schedule` is DiscreteBetas.*use DDIM in place of Euler"),
    "block beyond horizon": (
        lambda: piadm.PIADMSDE(denoiser(PAPER), horizon=1.0, block=2.0),
        "`block` is 2.0: is longer than the horizon 1.0: give at most that",
    ),
    "ODE block beyond horizon": (
        lambda: piadm.PIADMODE(denoiser(PAPER), horizon=1.0, block=2.0),
        "`block` is 2.0: is longer than the horizon",
    ),
    "step beyond block": (lambda: piadm.ExponentialSDE(2.0, 0.5, 0.6), r"`step` is 0.6: is longer than a block \(0.5\)"),
    "step 0": (lambda: piadm.ExponentialSDE(step=0.0), r"`step` is 0.0: .*above 0.*ExponentialSDE\(step=0.5\)"),
    "step 1": (lambda: piadm.ExponentialODE(4.0, 2.0, 1.0), "`step` is 1.0: must be below 1"),
    "early stop beyond block": (lambda: piadm.ExponentialSDE(early_stop=2.0), "`early_stop` is 2.0: must be below the block"),
    "early stop 0": (lambda: piadm.ExponentialSDE(early_stop=0.0), "`early_stop` is 0.0: give a finite number above 0"),
    "horizon infinite": (lambda: piadm.ExponentialSDE(horizon=float("inf")), "`horizon` is inf: give a finite number"),
    "horizon nan": (lambda: piadm.ExponentialSDE(horizon=float("nan")), "`horizon` is nan: give a finite number"),
    "too few steps": (lambda: piadm.ExponentialSDE.with_steps(3), "`steps` is 3: .*need at least 10"),
    "horizon beyond betas": (lambda: piadm.PIADMSDE(denoiser(), horizon=20.0), "outside this schedule's.*`horizon` inside"),
    "early stop beyond betas": (lambda: piadm.PIADMSDE(denoiser(), early_stop=1e-6), "outside this schedule's.*`early_stop`"),
    "iterations 0": (lambda: piadm.PIADMSDE(denoiser(PAPER), iterations=0), "`iterations` is 0: .*iterations=24"),
    "ODE iterations 0": (lambda: piadm.PIADMODE(denoiser(PAPER), iterations=0), "`iterations` is 0: .*iterations=24"),
    "corrector friction": (lambda: piadm.Corrector(friction=0.0), r"`friction` is 0.0: .*Corrector\(friction=0.5\)"),
    "corrector step": (lambda: piadm.Corrector(blocks=4, step=0.5), "`step` is 0.5: exceeds a corrector block's length 0.25"),
    "corrector blocks": (lambda: piadm.Corrector(blocks=0), r"`blocks` is 0: .*Corrector\(blocks=2\)"),
    "corrector iterations": (lambda: piadm.Corrector(iterations=-1), r"`iterations` is -1: .*Corrector\(iterations=2\)"),
    "corrector type": (lambda: piadm.PIADMODE(denoiser(PAPER), corrector=3), r"`corrector` is 3: give a Corrector"),
    "Identity on Langevin": (
        lambda: parallel(LANGEVIN, PAPER, propagator=propagators.Identity()),
        r"`propagator` is Identity\(\): is for schemes of one component; use Exponential\(\) or Gaussian\(\)",
    ),
    "Exponential without signal": (
        lambda: parallel(piadm.Euler(10), FLOW, propagator=propagators.Exponential()),
        r"`propagator` is Exponential\(\): needs α > 0 .*use Gaussian\(\)",
    ),
    "propagator text": (lambda: parallel(propagator="identity"), "`propagator` is 'identity': give an instance"),
    "propagator class": (lambda: parallel(propagator=propagators.Identity), "`propagator` is <class .*give an instance"),
    "propagator variance": (lambda: propagators.Gaussian(-1.0), "`variance` is -1.0: must be finite and ≥ 0"),
    "secant variance": (lambda: propagators.Secant(float("inf")), "`variance` is inf: must be finite and ≥ 0"),
    "fill text": (lambda: parallel(fill="copy"), "`fill` is 'copy': give an instance"),
    "fill class": (lambda: parallel(fill=fills.Copy), "`fill` is <class .*give an instance"),
    "window 0": (lambda: parallel(window=0), "`window` is 0: .*window=32"),
    "window -3": (lambda: parallel(window=-3), "`window` is -3: .*window=32"),
    "window 2.5": (
        lambda: parallel(window=2.5),
        "`window` is 2.5: give an integer, None for all steps, 'auto', or an instance",
    ),
    "window class": (lambda: parallel(window=windows.Blocks), "`window` is <class .*or an instance with `check` and `advance`"),
    "Blocks 0": (lambda: windows.Blocks(0), "`iterations` is 0: .*iterations=8"),
    "Blocks fractional": (lambda: windows.Blocks(1.5), "`iterations` is 1.5: .*iterations=8"),
    "Pipelined 0": (lambda: windows.Pipelined(0), "`iterations` is 0: .*iterations=8"),
    "Blocks of another scheme": (
        lambda: parallel(piadm.ExponentialSDE(), PAPER, window=windows.Blocks([1, 2])),
        r"`iterations` is \[1, 2\]: give one number, or one for each of the scheme's 10 blocks",
    ),
    "tolerance 0": (lambda: parallel(tolerance=0.0), "`tolerance` is 0.0: .*tolerance=1e-2"),
    "tolerance -1": (lambda: parallel(tolerance=-1), "`tolerance` is -1: .*tolerance=1e-2"),
    "tolerance nan": (lambda: parallel(tolerance=float("nan")), "`tolerance` is nan: .*tolerance=1e-2"),
    "tolerance text": (lambda: parallel(tolerance="low"), "`tolerance` is 'low': .*tolerance=1e-2"),
    "max_rounds": (lambda: parallel(max_rounds=0), "`max_rounds` is 0: .*max_rounds=100"),
    "denoiser": (
        lambda: piadm.Sequential(network, piadm.DDPM(10)),
        r"`denoiser` is a function: wrap the network, piadm.Denoiser\(",
    ),
    "scheme class": (lambda: piadm.Sequential(denoiser(), piadm.DDPM), "`scheme` is <class .*piadm.DDPM.steps=1000"),
    "scheme text": (lambda: piadm.Sequential(denoiser(), "ddpm"), "`scheme` is 'ddpm': give an instance such as piadm.DDPM"),
    "network": (lambda: piadm.Denoiser(None, PAPER), "`network` is a NoneType: give a torch.nn.Module"),
    "schedule": (lambda: piadm.Denoiser(network, "linear"), r"`schedule` is a str: .*DiscreteBetas.linear\(1000\)"),
    "prediction": (lambda: piadm.Denoiser(network, PAPER, "eps"), "`prediction` is 'eps': give one of epsilon, sample, v_pred"),
    "denoiser variance": (lambda: denoiser(variance=-1.0), "`variance` is -1.0: must be finite and ≥ 0"),
    "denoiser mean": (lambda: denoiser(mean=float("nan")), "`mean` is nan: must be finite"),
    "denoiser mean text": (lambda: denoiser(mean="a"), "`mean` is 'a': give a number or a tensor"),
    "guidance scale": (lambda: piadm.Guided(denoiser(), float("nan"), {}), "`guidance_scale` is nan: .*for example 7.5"),
    "unconditional batch": (
        lambda: piadm.Guided(denoiser(), 1.0, {"label": torch.zeros(2)}),
        r"`unconditional\['label'\]` is tensor\(\[0., 0.\]\): give a tensor whose first dimension is 1",
    ),
    "unconditional number": (
        lambda: piadm.Guided(denoiser(), 1.0, {"label": 3}),
        r"`unconditional\['label'\]` is 3: give a tensor whose first dimension is 1",
    ),
    "unconditional none": (lambda: piadm.Guided(denoiser(), 1.0, None), "`unconditional` is None: give a dictionary such as"),
    "guided network": (lambda: piadm.Guided(network, 1.0, {}), r"`denoiser` is a function: wrap the network, piadm.Denoiser\("),
    "micro-batch size": (lambda: piadm.MicroBatch(denoiser(), 0), r"`size` is 0: .*MicroBatch\(denoiser, size=64\)"),
    "micro-batched network": (lambda: piadm.MicroBatch(network, 2), "`denoiser` is a function: wrap the network"),
    "betas not monotone": (
        lambda: schedules.DiscreteBetas([0.1, -0.1]),
        r"`betas` is \[0.1, -0.1\]: .*decreases monotonically",
    ),
    "betas not in (0, 1)": (
        lambda: schedules.DiscreteBetas([0.1, 0.0]),
        r"`betas` is \[0.1, 0.0\]: every β must be in \(0, 1\)",
    ),
    "betas end early": (lambda: schedules.DiscreteBetas([0.1, 1.0, 0.1]), r"`betas` is \[0.1, 1.0, 0.1\]: .*monotonically"),
    "betas nan": (lambda: schedules.DiscreteBetas([0.1, float("nan")]), r"`betas` is \[0.1, nan\]: .*monotonically"),
    "betas long": (lambda: schedules.DiscreteBetas(LONG), r"`betas` is a tensor of shape \(1000,\): .*monotonically"),
    "betas 2-d": (lambda: schedules.DiscreteBetas(torch.ones(2, 2)), r"`betas` is \(2, 2\): give a one-dimensional sequence"),
    "betas none": (lambda: schedules.DiscreteBetas([]), r"`betas` is \(0,\): give a one-dimensional sequence"),
    "linear": (lambda: schedules.DiscreteBetas.linear(0), r"`num_train_timesteps` is 0: .*linear\(1000\)"),
    "scaled_linear": (lambda: schedules.DiscreteBetas.scaled_linear(-1), r"`num_train_timesteps` is -1: .*scaled_linear"),
    "cosine": (lambda: schedules.DiscreteBetas.cosine(2.5), r"`num_train_timesteps` is 2.5: .*cosine\(1000\)"),
    "sigmas reversed": (lambda: schedules.VarianceExploding(1.0, 0.5), "`sigma_min` is 1.0: must be below sigma_max=0.5"),
    "sigma negative": (lambda: schedules.VarianceExploding(-1.0), "`sigma_min` is -1.0: give a finite number above 0"),
    "paper horizon": (lambda: schedules.OrnsteinUhlenbeck(0.0), r"`horizon` is 0.0: .*OrnsteinUhlenbeck\(horizon=10.0\)"),
    "flow steps": (lambda: schedules.RectifiedFlow(0), r"`num_train_timesteps` is 0: .*RectifiedFlow"),
    "flow shift": (lambda: schedules.RectifiedFlow(shift=-1.0), r"`shift` is -1.0: .*RectifiedFlow\(shift=3.0\)"),
    "target variance": (lambda: targets.Gaussian(0.0, -1.0), "`variance` is -1.0: must be finite and ≥ 0"),
    "target mean": (lambda: targets.Gaussian(float("inf")), "`mean` is inf: must be finite"),
    "target schedule": (lambda: targets.Gaussian(schedule="linear"), "`schedule` is a str: give one of piadm.schedules"),
    "means 0-d": (
        lambda: targets.GaussianMixture(torch.tensor(1.0), 1.0),
        r"`means` is \(\): give shape \(components, \*event\)",
    ),
    "means list": (lambda: targets.GaussianMixture([[0.0]], 1.0), "`means` is a list: give a tensor"),
    "means nan": (lambda: targets.Empirical(torch.full((2, 2), torch.nan)), r"`means` is tensor\(\[\[nan.*must be finite"),
    "means none": (lambda: targets.Empirical(torch.zeros(0, 3)), r"`means` is \(0, 3\): give shape \(components"),
    "mixture variance": (
        lambda: targets.GaussianMixture(torch.zeros(4, 3), torch.ones(3)),
        r"`variance` is \(3,\): give a number, shape \(4,\) or \(4, 3\)",
    ),
    "mixture weights": (
        lambda: targets.GaussianMixture(torch.zeros(2, 3), 1.0, torch.tensor([1.0, -1.0])),
        r"`weights` is tensor\(\[ 1., -1.\]\): give 2 numbers above 0",
    ),
    "mixture weights infinite": (
        lambda: targets.GaussianMixture(torch.zeros(2, 3), 1.0, torch.tensor([1.0, torch.inf])),
        r"`weights` is tensor\(\[1., inf\]\): give 2 numbers above 0",
    ),
    "mixture schedule": (lambda: targets.Empirical(torch.zeros(2, 3), PAPER.alpha), "`schedule` is a method: give one of"),
    "model": (lambda: piadm.models.load("cats"), "`name` is 'cats': the embedded models are digits"),
}


@pytest.mark.parametrize(("do", "message"), CONSTRUCTION.values(), ids=CONSTRUCTION.keys())
def test_bad_parts_are_refused_when_they_are_put_together(do, message):
    with pytest.raises((ValueError, TypeError), match=message):
        do()
    assert CALLS == []


CALL = {
    "shape empty": ((), {}, r"`shape` is \(\): give \(batch, \*event\)"),
    "shape 0": ((0, 3), {}, r"`shape` is \(0, 3\): .*all at least 1"),
    "shape a number": (4, {}, r"`shape` is 4: give \(batch, \*event\)"),
    "generator a seed": ((2, 3), {"generator": 0}, r"`generator` is 0: give torch.Generator\(\).manual_seed"),
    "generators seeds": ((2, 3), {"generator": [1, 2]}, r"`generator` is \[1, 2\]: give torch.Generator"),
    "noise of numpy": ((2, 3), {"noise": np.zeros((2, 3))}, "`noise` is a ndarray: give a tensor"),
    "shape negative": ((2, -1), {}, r"`shape` is \(2, -1\): .*all at least 1"),
    "shape fractional": ((2.0, 3), {}, r"`shape` is \(2.0, 3\): give \(batch, \*event\)"),
    "generators too many": (
        (2, 3),
        {"generator": seeded(3)},
        r"`generator` has 3 generators: give one, or one per sample \(2\)",
    ),
    "generators too few": (
        (3, 3),
        {"generator": seeded(2)},
        r"`generator` has 2 generators: give one, or one per sample \(3\)",
    ),
    "one generator in a list": ((3, 3), {"generator": seeded(1)}, "`generator` has 1 generators: give one"),
    "no generators": ((2, 3), {"generator": []}, "`generator` has 0 generators: give one"),
    "noise shape": ((2, 3), {"noise": torch.zeros(2, 4)}, r"`noise` is \(2, 4\): must have the samples' shape \(2, 3\)"),
    "noise integers": ((2, 3), {"noise": torch.zeros(2, 3).long()}, "`noise` is torch.int64: must be a floating tensor"),
    "noise nan": ((2, 3), {"noise": torch.full((2, 3), torch.nan)}, r"`noise` is tensor\(.*has NaN or infinite entries"),
    "condition batch": (
        (2, 3),
        {"label": torch.zeros(3)},
        r"`label` has shape \(3,\): its first dimension must be the batch's, 2",
    ),
    "condition nested": ((2, 3), {"more": {"mask": torch.zeros(3, 1)}}, r"`mask` has shape \(3, 1\): its first dimension"),
    "condition in a tuple": ((2, 3), {"more": (torch.zeros(2), torch.zeros(3))}, r"`more\[1\]` has shape \(3,\)"),
    "condition list": ((2, 3), {"label": [1, 2]}, r"`label` is a list, .*give a tensor, label=torch.as_tensor\(label\)"),
    "condition array": (
        (2, 3),
        {"label": np.zeros(2)},
        r"`label` is a ndarray, .*give a tensor, label=torch.as_tensor\(label\)",
    ),
}


@pytest.mark.parametrize(("shape", "keywords", "message"), CALL.values(), ids=CALL.keys())
@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_bad_calls_are_refused_before_the_network_runs(kind, shape, keywords, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sampler(kind)(shape, **keywords)
    assert CALLS == []


FITS = {
    "event shape": (
        lambda: denoiser(event_shape=(1, 8, 8)),
        r"`shape` is \(2, 3\): .*have shape \(1, 8, 8\): give \(2, 1, 8, 8\)",
    ),
    "mixture's event": (lambda: targets.Empirical(torch.zeros(2, 4)), r"`shape` is \(2, 3\): .*have shape \(4,\)"),
    "mean": (
        lambda: denoiser(mean=torch.zeros(5)),
        r"`mean` is \(5,\): a Denoiser's mean must be a number or of .* shape \(3,\)",
    ),
    "variance": (lambda: targets.Gaussian(0.0, torch.ones(5)), r"`variance` is \(5,\): a Gaussian's variance .* shape \(3,\)"),
}


@pytest.mark.parametrize(("one", "message"), FITS.values(), ids=FITS.keys())
def test_a_denoiser_of_other_samples_is_refused_before_it_runs(one, message):
    with pytest.raises(ValueError, match=message):
        sequential(one())((2, 3))
    assert CALLS == []


@pytest.mark.parametrize(
    "policy",
    [
        {"propagator": piadm.propagators.Gaussian(torch.ones(5))},
        {"propagator": piadm.propagators.Secant(torch.ones(5))},
        {"fill": piadm.fills.Jump(0.0, torch.ones(5))},
    ],
    ids=["Gaussian", "Secant", "Jump"],
)
def test_a_policy_made_for_other_samples_is_refused_before_the_network_runs(policy):
    with pytest.raises(ValueError, match=r"`variance` is \(5,\): a (Gaussian|Secant|Jump)'s variance must be .*\(3,\)"):
        piadm.Parallel(denoiser(), piadm.DDPM(10), **policy)((2, 3))
    assert CALLS == []


def test_guidance_towards_a_condition_of_another_shape_is_refused_before_the_network_runs():
    guided = piadm.Guided(denoiser(), 2.0, {"text": torch.zeros(1, 5)})
    with pytest.raises(ValueError, match=r"`unconditional\['text'\]` has shape \(1, 5\): expected \(1, 4\)"):
        sequential(guided)((2, 3), text=torch.zeros(2, 4))
    assert CALLS == []


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"generator": seeded(1)[0]}, r"`generator` lives on cpu but the samples on meta: use torch.Generator\('meta'\)"),
        ({"generator": seeded(2)}, "`generator` lives on cpu but the samples on meta"),
        ({"noise": torch.zeros(2, 3)}, r"`noise` is device\(type='cpu'\): must live with the states on meta"),
    ],
    ids=["generator", "generators", "noise"],
)
def test_what_lives_on_another_device_than_the_network_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        sequential(on_meta())((2, 3), **keywords)


ANSWERS = {
    "shape": (lambda x: x[:, :-1], r"`network` returned \(2, 2\) torch.float32 for an input of shape \(2, 3\)"),
    "channels doubled": (lambda x: torch.cat([x, x], 1), "a network that also predicts variances needs a wrapper"),
    "broadcastable": (lambda x: x[:1], r"`network` returned \(1, 3\)"),
    "integers": (lambda x: x.long(), r"`network` returned \(2, 3\) torch.int64"),
    "complex": (lambda x: x + 0j, r"`network` returned \(2, 3\) torch.complex64"),
    "nothing": (lambda x: None, "`network` returned NoneType"),
    "an empty tuple": (lambda x: (), "`network` returned tuple"),
    "a number": (lambda x: 1.0, "`network` returned float"),
}


@pytest.mark.parametrize(("answer", "message"), ANSWERS.values(), ids=ANSWERS.keys())
def test_a_network_that_returns_something_else_is_told_what_it_must_return(answer, message):
    one = piadm.Denoiser(lambda x, t: answer(x), BETAS, "sample")
    with pytest.raises(TypeError, match=message):
        sequential(one)((2, 3))


# --- a network that breaks down on the way ---


class Breaking:
    """A smooth network that returns `value` for one sample (whose state is negative) from one time on; keeps what it saw."""

    def __init__(self, time: float | None, value: float = float("nan")) -> None:
        self.time, self.value = time, value
        self.states: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.states.append(x.clone())
        f = torch.tanh(x) + 0.1 * torch.sign(x) * x.abs().max(1, keepdim=True).values
        if self.time is not None:
            f[(t <= self.time) & (x[:, 0] < 0)] = self.value
        return f


STEPS, BAD = 20, 13
START = torch.tensor([[1.0, 2.0, 0.5], [-1.0, -2.0, -0.5], [2.0, 1.0, 1.0]], dtype=torch.float64)
TIMES = piadm.DDIM(STEPS)(BETAS).times


def broken(value: float, **keywords) -> NonFiniteError:
    one = piadm.Denoiser(Breaking(float(TIMES[BAD]), value), BETAS, "sample")
    scheme = piadm.DDIM(STEPS)
    run = piadm.Parallel(one, scheme, **keywords) if keywords else piadm.Sequential(one, scheme)
    with pytest.raises(NonFiniteError) as caught:
        run((3, 3), noise=START)
    return caught.value


@pytest.fixture(scope="module")
def healthy() -> list[Tensor]:
    """Every state of the sequential run of the same network without its defect."""
    whole = Breaking(None)
    samples = piadm.Sequential(piadm.Denoiser(whole, BETAS, "sample"), piadm.DDIM(STEPS))((3, 3), noise=START).samples
    return [*whole.states, samples]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_sequential_run_that_breaks_keeps_its_finished_prefix_and_finishes_the_others(healthy, value):
    error = broken(value)
    assert (error.step, error.round, error.samples) == (BAD, BAD + 1, [1])
    assert error.finished.tolist() == [STEPS, BAD, STEPS]
    for sample, finished in enumerate(error.finished.tolist()):
        assert torch.equal(error.x[sample], healthy[finished][sample])
    assert torch.equal(error.result.samples, healthy[STEPS][[0, 2]])
    assert f"at step {BAD} in round {BAD + 1} (samples [1])" in str(error)
    assert f"first {BAD} steps are finished" in str(error)
    assert "other 2 samples are complete" in str(error)


@pytest.mark.parametrize("window", [1, 4, None])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parallel_run_that_breaks_keeps_its_finished_prefix_and_finishes_the_others(healthy, value, window):
    tolerance = 1e-6
    error = broken(value, window=window, tolerance=tolerance)
    # the step breaks once its own state is reached, and not while states beyond it are guesses
    assert (error.step, error.samples) == (BAD, [1])
    assert 1 <= error.round <= BAD + 1
    assert error.finished.tolist() == [STEPS, BAD, STEPS]
    for sample, finished in enumerate(error.finished.tolist()):
        difference = error.x[sample] - healthy[finished][sample]
        assert difference.square().mean().sqrt() <= tolerance
    assert torch.equal(error.result.samples, error.x[[0, 2]])
    assert error.result.converged
    if window == 1:
        assert error.round == BAD + 1
        assert torch.equal(error.x[1], healthy[BAD][1])


def test_an_error_is_readable_even_for_large_values():
    with pytest.raises(ValueError, match=r"^`x` is a tensor of shape \(3, 1000\): too large$"):
        require(False, "x", torch.zeros(3, 1000), "too large")
    with pytest.raises(ValueError, match=r"^`x` is tensor\(\[\[1.\], \[1.\]\]\): too small$"):
        require(False, "x", torch.ones(2, 1), "too small")
    require(True, "x", 1, "never raised")
