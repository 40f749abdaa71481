"""The documentation works as shown: every snippet, every command, every message, and the site that is built of it."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import diffusers
import pytest
import torch
from typer.testing import CliRunner

import piadm
from docs import pictures
from piadm.cli import app
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def run(page: str, names: dict[str, object]) -> None:
    for number, snippet in enumerate(snippets(page, "python")):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)


# what the pages below leave to the reader is supplied by a test of their own
ALONE = [page for page in PAGES if snippets(page, "python") and page not in ("diffusers.md", "azula.md", "devices.md")]


@pytest.mark.parametrize("page", ALONE)
def test_every_snippet_of_a_page_runs_in_order(page):
    run(page, {"__name__": "__main__"})  # as a script of these lines has it


def test_with_diffusers(monkeypatch, capsys, tmp_path):
    """Its process group has one member here; `test_sharded.py` has several."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    asked = []

    def from_pretrained(name):
        asked.append(name)
        return tiny.stable_diffusion()

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", from_pretrained)
    with torch.no_grad():
        run("diffusers.md", {})
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]
    shown = capsys.readouterr().out
    assert "rounds in place of 50 steps" in shown
    assert "step 19 is finished" in shown
    assert (tmp_path / "lighthouse.png").exists()


def test_with_azula_and_k_diffusion():
    network = torch.nn.Conv2d(3, 3, 1).requires_grad_(False)
    azula = type("Azula", (torch.nn.Module,), {"forward": lambda self, x, t: SimpleNamespace(mean=network(x))})()
    azula.schedule = lambda t: (torch.cos(1.5 * t), torch.sin(1.5 * t) + 1e-3)
    names = {"azula_denoiser": azula, "k_model": lambda x, sigma: network(x) / (1 + sigma[:, None, None, None] ** 2)}
    run("azula.md", names)
    assert names["result"].samples.shape == (4, 3, 32, 32)


def test_on_several_devices(tmp_path):
    """The page's programs, with fewer steps: in one process, and on two as accelerate starts them."""
    alone, program = snippets("devices.md", "python")
    names: dict[str, object] = {}
    exec(compile(alone.replace("steps=1000", "steps=30"), "devices.md", "exec"), names)
    assert len(names["denoiser"].replicas) == max(2, torch.cuda.device_count())
    assert names["result"].converged
    (command,) = re.findall(r"`(accelerate launch .* script\.py)`", PAGES["devices.md"])
    script = tmp_path / "script.py"
    script.write_text(program.replace("steps=1000", "steps=30"))
    launcher, options = "accelerate.commands.launch", shlex.split(command)[2:-1]
    run = [sys.executable, "-m", launcher, *options, "--main_process_port", "0", str(script)]
    told = subprocess.run(run, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("converged=True") == 1
    assert "Cost(" in told.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "pycon")])
def test_every_message_is_the_real_one(page):
    names: dict[str, object] = {}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for number, block in enumerate(snippets(page, "pycon")):
        test = parser.get_doctest(block, names, f"{page}, block {number}", page, 0)
        runner.run(test, clear_globs=False)
        names = test.globs
    assert runner.summarize(verbose=False).failed == 0


def test_every_command_shown_runs(tmp_path, monkeypatch):
    """`pip` is left out: test_packaging.py installs."""
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for page in PAGES for block in snippets(page, "sh") for line in block.splitlines()]
    own = [words for words in commands if words[0] == "piadm"]
    assert own
    assert {words[0] for words in commands} <= {"pip", "piadm"}
    for words in own:
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "report.html").exists()


def test_the_options_of_parallelize_named_exist():
    options = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", PAGES["diffusers.md"], re.MULTILINE)
    assert {name for pair in options for name in pair if name} == set(piadm.diffusers.parallelize.__kwdefaults__)


def test_the_pictures_are_drawn_by_the_code(tmp_path):
    pictures.main(tmp_path, steps=16)
    shown = set(re.findall(r"\]\((pictures/\w+\.png)\)", "".join(PAGES.values())))
    assert shown == {f"pictures/{path.name}" for path in tmp_path.iterdir()}
    assert all((ROOT / "docs" / name).stat().st_size < 200_000 for name in shown)


class Loaded(HTMLParser):
    """What a page has a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source") or (tag == "link" and given.get("rel") != "canonical"):
            self.found += [given[name] for name in ("src", "href") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def test_the_site_is_read_without_a_network(site):
    for page in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert not [name for name in loaded.found if "//" in name], page
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)]*", styles)


def test_formulas_are_drawn(site):
    page = (site / "mathematics.html").read_text()
    assert page.count("<math") > 100
    for path in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
        assert not re.findall(r'class="arithmatex"|\$\$|\\\(|\\frac', text), path


def test_the_api_pages_hold_every_public_name(site):
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split(" ", 1)[0] for line in zlib.decompress(packed).decode().splitlines()}
    public = {f"piadm.{name}": getattr(piadm, name) for name in piadm.__all__}
    for place, room in list(public.items()):
        if isinstance(room, ModuleType):
            own = [name for name, value in vars(room).items() if getattr(value, "__module__", None) == room.__name__]
            names = getattr(room, "__all__", [name for name in own if not name.startswith("_")])
            public |= {f"{place}.{name}": getattr(room, name) for name in names}
    assert {"piadm.schedules.RectifiedFlow", "piadm.diffusers.parallelize", "piadm.models.load"} <= set(public)
    for name, value in public.items():
        home = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
        assert {name, home} & documented, f"{name} is on no page of docs/api"
