"""The benchmark beside diffusers' own parallel pipeline, and the diffusion policy, run and say what they should."""

from __future__ import annotations

import json

import pytest

from benchmarks import pipelines
from examples import diffusion_policy

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_benchmark_holds_both_pipelines_to_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "TOLERANCES", [5.62, 1.78, 0.562, 0.178, 0.0562])
    pipelines.main(["--only", "DDIM 50, window 50, guidance 3", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "pipelines.json").read_text())
    sequential, ours, theirs, limit = written["Final error at most 0.01"]
    assert sequential["rounds"] == 50
    assert ours["error"] <= 0.01
    assert ours["off"] == theirs["off"] == 0
    assert limit["off"] > 1e-4  # its scheduler is not the sequential one
    assert ours["rounds"] < theirs["rounds"] < 50
    assert all(row["rounds"] <= row["evaluations a step"] * 50 for row in (ours, theirs, limit))


def test_the_policy_plans_the_same_in_fewer_rounds(capsys):
    figures = diffusion_policy.main(["--train-seconds", "3", "--steps", "30", "--window", "15", "--plans", "2"])
    assert figures["network calls before"] == 30
    assert figures["rounds after"] < 30
    assert figures["largest rms difference"] < 1e-2
    assert "loss" in capsys.readouterr().out
