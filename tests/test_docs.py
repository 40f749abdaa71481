"""The page "Use it with diffusers" works as shown, with a tiny pipeline in place of the downloaded one."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

import piadm
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_snippet_runs_in_order(monkeypatch, capsys):
    asked = []

    def from_pretrained(name):
        asked.append(name)
        return tiny.stable_diffusion()

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", from_pretrained)
    network = torch.nn.Conv2d(3, 3, 1)
    azula = SimpleNamespace(schedule=lambda t: (torch.cos(1.5 * t), torch.sin(1.5 * t) + 1e-3))
    names = {
        "azula_denoiser": type("Azula", (torch.nn.Module,), {"forward": lambda self, x, t: SimpleNamespace(mean=network(x))})(),
        "k_model": lambda x, sigma: network(x) / (1 + sigma[:, None, None, None] ** 2),
    }
    names["azula_denoiser"].schedule = azula.schedule
    with torch.no_grad():
        for snippet in SNIPPETS:
            exec(snippet, names)
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]
    shown = capsys.readouterr().out
    assert "rounds in place of 50 steps" in shown
    assert "step 19 is finished" in shown
    assert names["result"].samples.shape == (4, 3, 32, 32)


def test_the_schedulers_and_options_named_exist():
    options = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", PAGE, re.MULTILINE)
    named = {name for pair in options for name in pair if name}
    parameters = piadm.diffusers.parallelize.__kwdefaults__
    assert named == set(parameters)
