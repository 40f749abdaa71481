"""What the README shows works as shown."""

import re
from pathlib import Path

import torch

import piadm

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_three_lines_sample_from_a_users_network():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    # the README's numbers with fewer steps and samples; the network and the labels are the reader's own
    code = code.replace("steps=1000", "steps=20").replace("(16, 1, 28, 28)", "(2, 1, 28, 28)")
    names = {"unet": piadm.models.load("fashion").network, "labels": torch.tensor([1, 7])}
    exec(code, names)
    result = names["result"]
    expected = piadm.Sequential(names["denoiser"], piadm.DDPM(steps=20))(
        (2, 1, 28, 28), generator=torch.Generator().manual_seed(0), label=names["labels"]
    )
    assert result.rounds < result.steps
    assert (result.samples - expected.samples).square().mean().sqrt() < 1e-2


def test_the_names_in_the_tables_exist():
    rooms = (piadm, piadm.schedules, piadm.propagators, piadm.windows, piadm.targets)
    table = README.split("| part | choices |")[1].split("\n\n")[0]
    for name in re.findall(r"`(?:targets\.)?([A-Z]\w+)", table):
        assert any(hasattr(room, name) for room in rooms), name
