"""The command line: what it runs, writes, and says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from matplotlib.image import imread
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import piadm
from piadm.cli import app
from piadm.pictures import draw_convergence, draw_samples

OWN_MODEL = """
import torch
import piadm

BETAS = piadm.schedules.DiscreteBetas.linear(1000)
OFF = ["once"]

def points():
    return piadm.targets.GaussianMixture(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), 0.01, schedule=BETAS)

def flow():
    return piadm.targets.GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.01, schedule=piadm.schedules.RectifiedFlow())

def breaks():
    network = lambda x, t: torch.where(t[:, None] < 500, float("nan"), x)
    return piadm.Denoiser(network, BETAS, event_shape=(2,))

def interrupted(after=None):
    calls = []
    def network(x, t):
        calls.append(len(x))
        if len(calls) == after or after is None:
            raise KeyboardInterrupt
        return x
    return piadm.Denoiser(network, BETAS, event_shape=(2,))

def interrupted_in_comparison():
    # with a window of all steps and no interaction between steps, ten steps take at most ten rounds
    return interrupted(after=12)

def stops():
    calls = []
    def network(x, t):
        calls.append(len(x))
        if len(calls) == 5 and OFF:
            OFF.pop()
            raise KeyboardInterrupt
        return 0.5 * x
    return piadm.Denoiser(network, BETAS, "sample", event_shape=(2,))

def fails():
    def network(x, t):
        if (t < 500).any():
            raise RuntimeError("the device is gone")
        return 0.5 * x
    return piadm.Denoiser(network, BETAS, "sample", event_shape=(2,))

def one_breaks():
    network = lambda x, t: torch.where((t[:, None] < 500) & (x[:, :1] > 0), float("nan"), 0.5 * x)
    return piadm.Denoiser(network, BETAS, "sample", event_shape=(2,))

def raises():
    return 1 / 0

def network_raises():
    def network(x, t):
        raise ValueError("odd input")
    return piadm.Denoiser(network, BETAS, event_shape=(2,))

def not_a_denoiser():
    return torch.nn.Identity()

def no_event_shape():
    return piadm.Denoiser(torch.nn.Identity(), BETAS)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN_MODEL)
    return path


def piadm_sample(output: Path, *options: object) -> Result:
    return CliRunner().invoke(app, ["sample", "--no-progress", "--output", str(output), *map(str, options)])


def good(output: Path, *options: object) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    """Output, record and tensors of a run that must succeed."""
    result = piadm_sample(output, *options)
    assert result.exit_code == 0, result.output
    return result.output, json.loads((output / "run.json").read_text()), load_file(output / "samples.safetensors")


DIGITS = ("--model", "digits", "--num-samples", 4, "--num-inference-steps", 20)


def test_a_run_writes_samples_pictures_and_a_record_that_agree(tmp_path: Path) -> None:
    text, record, tensors = good(tmp_path / "new" / "out", *DIGITS, "--label", 7, "--window", 8, "--compare")
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == [
        "convergence.png",
        "run.json",
        "samples.png",
        "samples.safetensors",
    ]
    result, sequential = record["result"], record["sequential"]
    assert result["steps"] == sequential["rounds"] == 20
    assert result["rounds"] == len(record["rounds"]) < 20
    assert f"{result['rounds']}" in text
    assert all(word in text for word in ("rounds", "evaluations per sample", "wall time", "time ratio", "rms difference"))
    difference = (tensors["samples"] - tensors["sequential"]).flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(torch.tensor(sequential["rms_difference"]), difference, rtol=1e-3, atol=1e-9)
    assert tensors["label"].tolist() == [7] * 4
    for entry in record["rounds"]:
        assert 0 < len(entry["residuals"]) <= entry["window"][1] - entry["window"][0]
        assert all(r is None or r == float(f"{r:.4g}") for r in entry["residuals"])


def test_the_samples_are_those_of_the_library(tmp_path: Path) -> None:
    _, _, tensors = good(tmp_path, *DIGITS, "--label", "3,5", "--scheduler", "ddim", "--eta", 0.5, "--seed", 4)
    sampler = piadm.Parallel(piadm.models.load("digits"), piadm.DDIM(20, eta=0.5), window=32)
    label = torch.tensor([3, 5, 3, 5])
    expected = sampler((4, 1, 8, 8), generator=torch.Generator().manual_seed(4), label=label)
    torch.testing.assert_close(tensors["samples"], expected.samples, rtol=0, atol=0)


def test_an_exact_run_counts_its_tests(tmp_path: Path) -> None:
    text, record, tensors = good(tmp_path, *DIGITS, "--label", 3, "--sampler", "exact", "--seed", 4)
    sampler = piadm.Exact(piadm.models.load("digits"), piadm.DDPM(20), window=32)
    expected = sampler((4, 1, 8, 8), generator=torch.Generator().manual_seed(4), label=torch.tensor([3] * 4))
    torch.testing.assert_close(tensors["samples"], expected.samples, rtol=0, atol=0)
    assert expected.acceptance is not None
    counts = record["result"]["acceptance"]
    assert counts == {name: value.tolist() for name, value in vars(expected.acceptance).items()}
    assert [sum(each) for each in zip(*counts.values(), strict=True)] == [20] * 4
    assert "tests accepted per sample" in text
    assert "rejected" in text


def test_the_certificate_is_in_the_table_and_in_the_record(tmp_path: Path) -> None:
    text, record, _ = good(tmp_path, *DIGITS, "--target-kl", 0.1, "--compare")
    certificate = record["result"]["certificate"]
    assert certificate["rigorous"]
    assert 0 < certificate["kl"] <= 0.1
    assert certificate["tv"] == pytest.approx((certificate["kl"] / 2) ** 0.5, rel=1e-3)
    assert 0 < certificate["standard_error"] < 0.1
    assert (certificate["calls"], certificate["evaluations"], certificate["rms"]) == (0, 0, 0)
    assert f"KL ≤ {certificate['kl']:.2g}" in text
    assert "rigorous" in text
    assert record["sequential"]["certificate"]["kl"] == 0

    _, record, _ = good(tmp_path, *DIGITS, "--scheduler", "ddim")
    certificate = record["result"]["certificate"]
    assert (certificate["kl"], certificate["standard_error"], certificate["tv"]) == (None, None, None)
    assert certificate["rms"] > 0
    assert not certificate["rigorous"]


@pytest.mark.parametrize("sampler", ["piadm-sde", "piadm-ode", "parallel", "exact", "sequential"])
def test_the_record_alone_reproduces_the_run(tmp_path: Path, own: Path, sampler: str) -> None:
    options = ("--iterations", 3) if sampler.startswith("piadm") else ("--scheduler", "ddim", "--eta", 0.3)
    run = ("--model", f"{own}:points", "--num-inference-steps", 30, "--seed", 3, "--sampler", sampler, *options)
    _, record, tensors = good(tmp_path / "first", *run)
    recorded = [
        (f"--{name.replace('_', '-')}", value)
        for name, value in record["arguments"].items()
        if value is not None and value is not False
    ]
    _, again, repeated = good(tmp_path / "second", *(word for pair in recorded for word in pair))
    assert torch.equal(repeated["samples"], tensors["samples"])
    assert again["rounds"] == record["rounds"]
    assert (tmp_path / "second" / "convergence.png").exists() == (sampler != "sequential")


@pytest.mark.parametrize(("sampler", "steps"), [("piadm-sde", 40), ("piadm-ode", 30)])
def test_the_papers_samplers_get_about_the_steps_asked_for_and_converge(tmp_path: Path, sampler: str, steps: int) -> None:
    options = ("--model", "digits", "--num-samples", 1, "--sampler", sampler, "--num-inference-steps", steps, "--compare")
    _, record, tensors = good(tmp_path, *options, "--horizon", 6, "--block", 2, "--iterations", 16)
    assert 0.75 * steps <= record["result"]["steps"] <= steps
    assert record["sequential"]["rms_difference"][0] < 1e-2
    # the corrector must not blow up at the end, where the score is stiffest
    assert tensors["samples"].abs().max() < 2


def test_classes_are_repeated_cycled_or_all_ten(tmp_path: Path) -> None:
    def labels(*options: object) -> list[int]:
        run = ("--model", "digits", "--num-samples", 12, "--num-inference-steps", 1, "--sampler", "sequential")
        return good(tmp_path, *run, *options)[2]["label"].tolist()

    assert labels("--label", 7) == [7] * 12
    assert labels("--label", "0,4,2") == [0, 4, 2] * 4
    assert labels() == [*range(10), 0, 1]


def test_without_weight_guidance_forgets_the_class(tmp_path: Path) -> None:
    def samples(label: int, scale: float) -> torch.Tensor:
        return good(tmp_path, *DIGITS, "--sampler", "sequential", "--label", label, "--guidance-scale", scale)[2]["samples"]

    unconditional = piadm.Sequential(piadm.models.load("digits"), piadm.DDPM(20))
    expected = unconditional((4, 1, 8, 8), generator=torch.Generator().manual_seed(0)).samples
    torch.testing.assert_close(samples(1, 0), expected, rtol=1e-4, atol=1e-4)
    assert (samples(1, 2.5) - samples(8, 2.5)).abs().max() > 0.1
    assert (samples(1, 2.5) - samples(1, 1)).abs().max() > 0.05


def test_a_users_model_runs_and_what_is_no_image_gets_no_grid(tmp_path: Path, own: Path) -> None:
    output = tmp_path / "out"
    good(output, *DIGITS)
    run = ("--num-samples", 300, "--num-inference-steps", 50, "--sampler", "sequential")
    text, record, tensors = good(output, "--model", f"{own}:points", *run)
    # two points, each with half of the samples
    assert tensors["samples"].shape == (300, 2)
    torch.testing.assert_close(tensors["samples"].sign(), tensors["samples"], rtol=0, atol=0.4)
    assert 0.35 < (tensors["samples"][:, 0] > 0).float().mean() < 0.65
    assert "no samples.png" in text
    assert record["denoiser"].startswith("GaussianMixture")
    assert "no convergence.png" in text
    pictures = [path.name for path in output.glob("*.png")]
    assert not pictures, "pictures of the earlier run are still there"


def test_euler_runs_on_a_flow_and_only_there(tmp_path: Path, own: Path) -> None:
    good(tmp_path, "--model", f"{own}:flow", "--scheduler", "euler", "--num-inference-steps", 10)
    refused = piadm_sample(tmp_path, *DIGITS, "--scheduler", "euler")
    assert refused.exit_code == 2
    assert "--scheduler is 'euler'" in refused.stderr


def line(text: str) -> int:
    return OWN_MODEL[: OWN_MODEL.index(text)].count("\n") + 1


BAD = [
    (("--model", "digit"), "--model is 'digit'", "digits, fashion"),
    (("--model", "gone.py:make"), "--model is 'gone.py:make'", "there is no file"),
    (("--model", "OWN:gone"), "--model is", "own.py has no function 'gone'"),
    (("--model", "OWN:raises"), "--model is", f"ZeroDivisionError: division by zero (own.py, line {line('1 / 0')})"),
    (("--model", "OWN:network_raises"), "odd input", f"(own.py, line {line('odd input')})"),
    (("--model", "OWN:not_a_denoiser"), "not_a_denoiser() returned Identity()", "return piadm.Denoiser("),
    (("--model", "OWN:no_event_shape"), "no denoiser with an event_shape", "return piadm.Denoiser("),
    (("--model", "OWN:points", "--label", "1"), "--label", "unexpected keyword argument"),
    (("--model", "OWN:points", "--guidance-scale", "2"), "--guidance-scale is 2.0", "piadm.Guided"),
    (("--label", "10"), "--label is '10'", "from 0 to 9"),
    (("--label", "1,,2"), "--label is '1,,2'", "from 0 to 9"),
    (("--label", "-1"), "--label is '-1'", "from 0 to 9"),
    (("--num-inference-steps", "0"), "--num-inference-steps is 0", "at least 1"),
    (("--num-inference-steps", "1001"), "--num-inference-steps is 1001", "1000"),
    (("--sampler", "piadm-sde", "--num-inference-steps", "3"), "--num-inference-steps is 3", "at least 10"),
    (("--sampler", "piadm-ode", "--num-inference-steps", "12"), "--num-inference-steps is 12", "give 24"),
    (("--num-samples", "0"), "--num-samples is 0", "at least 1"),
    (("--window", "0"), "--window is 0", "at least 1"),
    (("--tolerance", "-1"), "--tolerance is -1.0", "above 0"),
    (("--target-kl", "0"), "--target-kl is 0.0", "above 0"),
    (("--target-kl", "1", "--scheduler", "ddim"), "--target-kl is 1.0", "steps without noise"),
    (("--target-kl", "1", "--sampler", "sequential"), "--target-kl is 1.0", "parallel"),
    (("--target-kl", "1", "--tolerance", "0.1"), "--tolerance is 0.1", "--target-kl"),
    (("--seed", "-1"), "--seed is -1", "from 0"),
    (("--guidance-scale", "inf"), "--guidance-scale is inf", "finite"),
    (("--sampler", "piadm-sde", "--block", "11"), "--block is 11.0", "horizon"),
    (("--sampler", "piadm-sde", "--iterations", "0"), "--iterations is 0", "at least 1"),
    (("--iterations", "3"), "--iterations is 3", "piadm-sde or piadm-ode"),
    (("--eta", "0.5"), "--eta is 0.5", "--scheduler ddim"),
    (("--scheduler", "ddim", "--eta", "2"), "--eta is 2.0", "from 0"),
    (("--sampler", "sequential", "--compare"), "--compare", "parallel"),
    (("--sampler", "exact", "--compare"), "--compare", "parallel"),
    (("--sampler", "exact", "--tolerance", "0.1"), "--tolerance is 0.1", "only to parallel"),
    (("--sampler", "exact", "--scheduler", "ddim"), "--scheduler is 'ddim'", "--eta above 0"),
]


@pytest.mark.parametrize(("options", "problem", "remedy"), BAD, ids=[" ".join(options) for options, _, _ in BAD])
def test_bad_input_is_one_line_naming_option_value_and_remedy(
    tmp_path: Path, own: Path, options: tuple[str, ...], problem: str, remedy: str
) -> None:
    options = tuple(option.replace("OWN", str(own)) for option in options)
    result = piadm_sample(tmp_path / "out", "--model", "digits", "--num-samples", 1, *options)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert problem in result.stderr
    assert remedy in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("output", ["own.py", "own.py/below"])
def test_an_output_that_cannot_be_a_folder_is_refused_before_the_run(own: Path, output: str) -> None:
    result = piadm_sample(own.parent / output, "--model", f"{own}:interrupted")
    assert result.exit_code == 2
    assert "--output is" in result.stderr
    assert own.read_text() == OWN_MODEL


@pytest.mark.parametrize("sampler", ["parallel", "sequential"])
def test_a_network_that_breaks_leaves_the_finished_states(tmp_path: Path, own: Path, sampler: str) -> None:
    output = tmp_path / "out"
    run = ("--model", f"{own}:breaks", "--num-samples", 3, "--num-inference-steps", 10, "--sampler", sampler)
    result = piadm_sample(output, *run, *(("--window", 2) if sampler == "parallel" else ()))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "NaN or infinity at step 5" in result.stderr
    with safe_open(output / "finished.safetensors", "pt") as file:
        assert json.loads(file.metadata()["arguments"])["sampler"] == sampler
        assert file.get_tensor("x").shape == (3, 2)
        assert file.get_tensor("x").isfinite().all()
        finished = file.get_tensor("finished")
        assert finished.max() >= 4  # step 5 was in a window of 2
        assert finished.min() >= 3


def test_an_interrupt_ends_with_130_and_no_traceback(tmp_path: Path, own: Path) -> None:
    result = piadm_sample(tmp_path / "out", "--model", f"{own}:interrupted")
    assert result.exit_code == 130
    assert result.stderr == "piadm sample: interrupted\n"


def test_an_interrupted_comparison_keeps_the_samples(tmp_path: Path, own: Path) -> None:
    output = tmp_path / "out"
    result = piadm_sample(output, "--model", f"{own}:interrupted_in_comparison", "--num-inference-steps", 10, "--compare")
    assert result.exit_code == 130
    assert load_file(output / "samples.safetensors")["samples"].isfinite().all()
    assert json.loads((output / "run.json").read_text())["sequential"] is None
    assert not (output / "checkpoint.safetensors").exists()  # the sequential run's would be taken for the other's
    assert "--resume" not in result.stderr


def test_a_measured_window_is_in_the_table_and_in_the_record(tmp_path: Path) -> None:
    text, record, _ = good(
        tmp_path / "out", "--model", "digits", "--window", "auto", "--num-inference-steps", 30, "--num-samples", 1
    )
    choice = record["result"]["choice"]
    assert choice.keys() == {"window", "rows", "seconds", "sequential_seconds"}
    assert re.search(rf"window, as measured\D+{int(choice['window'])}\b", text)


@pytest.mark.parametrize("sampler", ["parallel", "sequential"])
@pytest.mark.parametrize("named", [False, True], ids=["in the output", "in a file of one's own"])
def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path: Path, own: Path, sampler: str, named: bool) -> None:
    output, place = tmp_path / "out", tmp_path / "my.safetensors" if named else tmp_path / "out/checkpoint.safetensors"
    run = ["--model", f"{own}:stops", "--num-samples", 3, "--num-inference-steps", 20, "--sampler", sampler]
    run += ["--window", 2] if sampler == "parallel" else []
    broken = piadm_sample(output, *run, *(["--checkpoint", place] if named else []))
    assert broken.exit_code == 130
    kept = piadm.checkpoint.load(place)
    told = f"{kept.state.rounds} rounds are kept: go on by the same command with --resume {place}"
    assert broken.stderr == f"piadm sample: interrupted; {told}\n"
    assert 3 <= kept.state.rounds <= 4
    assert not (output / "samples.safetensors").exists()
    own.write_text(OWN_MODEL.replace('["once"]', "[]"))
    record, _, tensors = good_at(output, *run, "--resume", place)
    assert record["result"]["rounds"] > kept.state.rounds
    _, _, whole = good_at(tmp_path / "whole", *run)
    assert torch.equal(tensors["samples"], whole["samples"])
    for wrong, problem in (
        (["--seed", 1], "--seed is 1: the run to resume has another"),
        (["--num-samples", 2], "--num-samples is 2: the run to resume has 3"),
        (["--num-inference-steps", 21], "its scheme differs"),
        (["--checkpoint", place], "leave out --checkpoint"),
    ):
        refused = piadm_sample(output, *run, "--resume", place, *wrong)
        assert refused.exit_code == 2
        assert refused.stderr.count("\n") == 1
        assert problem in refused.stderr


def good_at(output: Path, *options: object) -> tuple[dict[str, Any], str, dict[str, torch.Tensor]]:
    result = piadm_sample(output, *options)
    assert result.exit_code == 0, result.stderr
    return json.loads((output / "run.json").read_text()), result.stdout, load_file(output / "samples.safetensors")


def test_a_network_that_fails_on_the_way_leaves_a_checkpoint(tmp_path: Path, own: Path) -> None:
    result = piadm_sample(tmp_path / "out", "--model", f"{own}:fails", "--num-inference-steps", 20, "--window", 2)
    assert isinstance(result.exception, RuntimeError)
    assert "RuntimeError; " in result.stderr
    assert piadm.checkpoint.load(tmp_path / "out/checkpoint.safetensors").finished.min() >= 8


def test_of_a_batch_in_which_one_sample_breaks_the_others_are_written(tmp_path: Path, own: Path) -> None:
    output = tmp_path / "out"
    result = piadm_sample(
        output, "--model", f"{own}:one_breaks", "--num-samples", 8, "--num-inference-steps", 10, "--scheduler", "ddim"
    )
    assert result.exit_code == 1
    finished, samples = load_file(output / "finished.safetensors"), load_file(output / "samples.safetensors")["samples"]
    good = finished["finished"] == 10
    assert 0 < good.sum() < 8
    assert torch.equal(samples, finished["x"][good])
    assert "the other samples beside it" in result.stderr


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, own: Path) -> None:
    result = piadm_sample(tmp_path / "out", "--model", f"{own}:points", "--resume", own)
    assert result.exit_code == 2
    assert "--resume is" in result.stderr
    assert "not a whole safetensors file" in result.stderr


def test_the_grid_shows_every_sample_in_reading_order(tmp_path: Path) -> None:
    shades = torch.tensor([-1.0, -0.5, 0.0, 0.5, 3.0])
    draw_samples(tmp_path / "grid.png", shades.reshape(5, 1, 1, 1).expand(5, 1, 8, 6))
    picture = imread(tmp_path / "grid.png")[..., 0]
    rows, columns = np.array(picture.shape) / (2, 3)
    seen = [picture[int((n // 3 + 0.5) * rows), int((n % 3 + 0.5) * columns)] for n in range(6)]
    np.testing.assert_allclose(seen, [0, 0.25, 0.5, 0.75, 1, 1], atol=0.01)


def test_the_convergence_map_is_coloured_where_a_round_had_residuals(tmp_path: Path) -> None:
    draw_convergence(tmp_path / "map.png", 4, [(0, 2), (2, 4)], [[1.0, 0.1], [0.01, None]], "a run")
    picture = imread(tmp_path / "map.png")[..., :3]
    coloured = picture.std(axis=2) > 0.05
    height, width = coloured.shape
    # the axes take most of the figure: look at the middle of each quarter of them, away from the line
    lower_left, upper_right = coloured[int(0.6 * height), int(0.25 * width)], coloured[int(0.2 * height), int(0.55 * width)]
    assert lower_left
    assert upper_right
    assert not coloured[int(0.2 * height), int(0.75 * width)], "a step without residual is coloured"
    assert not coloured[int(0.6 * height), int(0.6 * width)], "a step outside the window is coloured"
