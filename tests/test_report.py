"""The report: it says what the record says, needs nothing but itself, and trusts no record."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import piadm
from benchmarks import tables
from piadm import words
from piadm.cli import app
from piadm.film import FRAMES, SIDE, Film, thumbnail
from piadm.pictures import png
from piadm.recorded import read_run
from piadm.report import write_report

BETAS = piadm.schedules.DiscreteBetas.linear(1000)
OWN_MODEL = """
import torch
import piadm

def points():
    means = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    return piadm.targets.GaussianMixture(means, 0.01, schedule=piadm.schedules.DiscreteBetas.linear(1000))
"""
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DIGITS = ("--model", "digits", "--num-samples", 3, "--num-inference-steps", 20, "--label", "7,3")


def run(folder: Path, *options: object) -> Path:
    words = ["sample", "--no-progress", "--output", str(folder), *map(str, options)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("compared"), *DIGITS, "--window", 8, "--compare", "--report")


@pytest.fixture
def spoilt(compared: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a run whose record was changed at one place."""

    def spoil(value: Any, *place: Any) -> Path:
        folder = shutil.copytree(compared, tmp_path / "spoilt")
        record = json.loads((folder / "run.json").read_text())
        node = record
        for name in place[:-1]:
            node = node[name]
        node[place[-1]] = value
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    return spoil


class Page(HTMLParser):
    """What a page shows and what it asks for."""

    VOID = ("meta", "img", "input", "br", "link", "path", "use", "image", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.scripts: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self._row: list[str] | None = None
        self.feed(text)
        self.close()

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self._row = []
        elif tag in ("td", "th") and self._row is not None:
            self._row.append("")
        for name, value in attrs:
            self.handlers += [name] if name.startswith("on") else []
            self.ids += [value or ""] if name == "id" else []
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self.open.pop() == tag
        if tag == "tr" and self._row:
            self.rows[self._row[0].strip()] = [value.strip() for value in self._row[1:]]
            self._row = None

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] == "style":
            self.references += re.findall(r"url\(([^)]*)\)", data)
            self.references += re.findall(r"@import\s+(\S+)", data)
        else:
            self.words.append(data)
            if self._row:
                self._row[-1] += data


def report(folder: Path) -> Page:
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [], "tags left open"
    return page


def alone(page: Page) -> bool:
    assert len(page.ids) == len(set(page.ids)), "two figures share an id"
    return all(one.startswith(("data:image/png;base64,", "#")) for one in page.references)


def test_the_page_says_what_the_record_says(compared: Path) -> None:
    record = json.loads((compared / "run.json").read_text())
    page = report(compared)
    own, other = record["result"], record["sequential"]
    assert page.rows["rounds"] == [str(own["rounds"]), "20"]
    assert page.rows["evaluations per sample"] == [f"{own['evaluations']:.4g}", "20"]
    assert page.rows["wall time"] == [f"{own['seconds']:.4g} s", f"{other['seconds']:.4g} s"]
    assert page.rows["of it in the network"] == [f"{own['network_seconds']:.4g} s", f"{other['network_seconds']:.4g} s"]
    assert f"{other['time_ratio']:.3g} times as fast" in page.text
    assert f"{20 / own['rounds']:.3g} times fewer" in page.text
    assert f"the furthest is {max(other['rms_difference']):.2g} away" in page.text
    assert record["title"] in page.text
    for fact in (record["denoiser"], record["scheme"], record["finished_at"], record["versions"]["torch"]):
        assert fact in page.text
    assert page.tags.count("img") == 3
    captions = re.findall(r"<figcaption>(label \d)</figcaption>", (compared / "report.html").read_text())
    assert captions == ["label 7", "label 3", "label 7"]


def test_the_command_on_the_page_draws_the_same_samples(compared: Path, tmp_path: Path) -> None:
    text = (compared / "report.html").read_text()
    command = html.unescape(re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)[1]).split()
    assert command[:2] == ["piadm", "sample"]
    run(tmp_path, *command[2:])
    again, first = (load_file(folder / "samples.safetensors") for folder in (tmp_path, compared))
    assert torch.equal(again["samples"], first["samples"])


def test_the_page_needs_nothing_but_itself(compared: Path) -> None:
    page = report(compared)
    assert page.references, "nothing was looked at"
    assert alone(page)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    text = (compared / "report.html").read_text()
    assert not re.search(r"https?:|file:|//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]*", "", text))
    assert "default-src 'none'" in text
    # what the figures refer to is in the page
    assert {one[1:] for one in page.references if one.startswith("#")} <= set(page.ids)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_runs_the_pages_own_script_and_no_other(spoilt: Callable[..., Path]) -> None:
    """The policy lets the player through: its controls come alive. A script that got in, against all care, would not run."""
    path = write_report(spoilt("a title", "title"))
    foreign = "<script>document.title = 'taken over'</script></main>"
    path.write_text(path.read_text().replace("</main>", foreign))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    shown = subprocess.run(
        [str(CHROMIUM), *flags, path.as_uri()], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert 'class="controls live"' in shown
    assert "<title>a title</title>" in shown


def test_the_same_folder_gives_the_same_page(compared: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(compared, tmp_path / "copy")
    first, second = write_report(compared).read_bytes(), write_report(copy).read_bytes()
    assert first == second


def test_the_command_writes_what_the_option_wrote(compared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compared, tmp_path / "copy")
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0
    assert result.stdout == f"written to {folder / 'report.html'}\n"
    assert (folder / "report.html").read_bytes() == before


EVIL = "</pre></title><script>alert(1)</script><img src=http://x.invalid/a onerror=alert(1)>&'\"$\\frac"


@pytest.mark.parametrize(
    "place",
    [
        ("title",),
        ("denoiser",),
        ("scheme",),
        ("finished_at",),
        ("arguments", "label"),
        ("arguments", EVIL),
        ("versions", EVIL),
        ("machine", "platform"),
    ],
    ids=lambda place: place[-1][:12],
)
def test_text_of_the_record_is_only_ever_text(spoilt: Callable[..., Path], compared: Path, place: tuple[str, ...]) -> None:
    honest, page = report(compared), report(spoilt(EVIL, *place))
    assert "alert(1)" in page.text
    assert page.scripts == honest.scripts
    assert page.tags.count("img") == honest.tags.count("img")
    assert page.handlers == []
    assert alone(page)


def test_words_of_the_command_are_quoted_for_a_shell() -> None:
    given = {
        "label": "7; rm -rf ~",
        "num_samples": 3,
        "compare": True,
        "target_kl": None,
        "x": False,
        "model": "-x",
        "a`b": "$(c)",
    }
    assert words.command(given) == "piadm sample --label '7; rm -rf ~' --num-samples 3 --compare --model=-x '--a`b' '$(c)'"


_LISTENERS: list[Callable[[str], None]] = []
sys.addaudithook(lambda event, given: [hear(str(given[0])) for hear in _LISTENERS] and None if event == "open" else None)


def test_no_file_is_opened_because_a_record_names_it(spoilt: Callable[..., Path]) -> None:
    folder = spoilt("../secret.py:make", "arguments", "model")
    (folder.parent / "secret.py").write_text("raise SystemExit('the code of a record ran')")
    opened: list[str] = []
    _LISTENERS.append(opened.append)
    try:
        write_report(folder)
    finally:
        _LISTENERS.clear()
    ours = {str(Path(path).resolve().relative_to(folder.parent)) for path in opened if str(folder.parent) in path}
    files = ("run.json", "samples.safetensors", "film.safetensors", ".report.html.part")
    assert ours == {f"spoilt/{name}" for name in files}


DAMAGE = [
    ("rounds", ("result", "rounds"), 99, "`rounds` holds"),
    ("text", ("result", "rounds"), "many", "`result.rounds` is 'many', not an integer"),
    ("negative", ("result", "evaluations"), -1, "`result.evaluations` is '-1', not a number"),
    ("truth", ("result", "steps"), True, "`result.steps` is 'True', not an integer"),
    ("steps", ("result", "steps"), 0, "`result.steps` is 0"),
    ("object", ("result",), [], "`result` is '[]', not an object"),
    ("shape", ("result", "shape"), [3, 1, 8, 9], "`result.shape` is [3, 1, 8, 9], samples.safetensors holds"),
    ("window", ("rounds", 0, "window"), [0, 10**9], "`rounds[0].window` is [0, 1000000000]"),
    ("backwards", ("rounds", 1, "window"), [5, 5], "`rounds[1].window` is [5, 5]"),
    ("residuals", ("rounds", 0, "residuals"), [0.1] * 9, "`rounds[0].residuals` holds 9"),
    ("residual", ("rounds", 0, "residuals"), ["x"], "`rounds[0].residuals[0]` is 'x'"),
    ("counts", ("result", "acceptance"), {"accepted": [1], "rejected": [], "recomputed": []}, "accepted` holds 1 counts"),
    ("sequential", ("sequential",), {}, "`sequential.rms_difference` is missing"),
]


@pytest.mark.parametrize(("place", "value", "told"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_record_is_named(spoilt: Callable[..., Path], place: tuple[Any, ...], value: Any, told: str) -> None:
    folder = spoilt(value, *place)
    before = (folder / "report.html").read_bytes()
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "run.json is damaged" in result.stderr
    assert told in result.stderr
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"title": NaN}', "\x00\xff", "[" * 100_000])
def test_a_record_that_is_not_json_is_named(compared: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(compared, tmp_path / "copy")
    (folder / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        write_report(folder)


@pytest.mark.parametrize("name", ["samples.safetensors", "film.safetensors"])
def test_damaged_tensors_are_named(compared: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(compared, tmp_path / "copy")
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        write_report(folder)
    save_file({"samples": torch.zeros(2), "rounds": torch.zeros(1)}, folder / name)
    with pytest.raises(ValueError, match=r"is damaged"):
        write_report(folder)
    frames = torch.zeros(1, 2, 7)  # of samples that are no images
    save_file({"samples": frames + 0, "rounds": torch.ones(1), "ahead": frames, "finished": frames.clone()}, folder / name)
    with pytest.raises(ValueError, match=r"is damaged"):
        write_report(folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for folder, told in ((tmp_path / "gone", "no such folder"), (tmp_path, "holds no run.json")):
        result = CliRunner().invoke(app, ["report", str(folder)])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"piadm report: `folder` is '{folder}'")
        assert told in result.stderr
        assert "--output folder of a piadm sample" in result.stderr


def test_an_exact_run_counts_its_tests_and_claims_the_law(tmp_path: Path) -> None:
    page = report(run(tmp_path, *DIGITS, "--sampler", "exact", "--report"))
    counts = json.loads((tmp_path / "run.json").read_text())["result"]["acceptance"]
    assert "Exact: whatever the network, the samples follow the very law of the sequential scheme" in page.text
    accepted, rejected = sum(counts["accepted"]), sum(counts["rejected"])
    assert f"{accepted / 3:.4g} were drafts that passed their test ({100 * accepted / (accepted + rejected):.3g} %" in page.text
    assert f"{rejected / 3:.4g} were rejected and moved" in page.text
    for n in range(3):
        assert page.rows[str(n + 1)] == [str(counts[name][n]) for name in ("accepted", "rejected", "recomputed")]


def test_a_measured_bound_is_told_in_plain_words(tmp_path: Path) -> None:
    page = report(run(tmp_path, *DIGITS, "--target-kl", 0.1))
    bound = json.loads((tmp_path / "run.json").read_text())["result"]["certificate"]
    assert f"by at most {bound['kl']:.3g} nats (± {bound['standard_error']:.2g}" in page.text
    assert f"right at most {50 + 50 * bound['tv']:.3g} times in a hundred" in page.text
    assert "rigorous: the deviation of every step was measured" in page.text
    assert "estimate" not in page.text
    assert "How they emerged" not in page.text


def test_an_estimated_bound_is_said_to_be_one(compared: Path) -> None:
    page = report(compared)
    assert "estimates, not measured" in page.text
    assert "rigorous" not in page.text


def test_a_scheme_without_noise_has_no_bound(tmp_path: Path) -> None:
    page = report(run(tmp_path, *DIGITS, "--scheduler", "ddim"))
    rms = json.loads((tmp_path / "run.json").read_text())["result"]["certificate"]["rms"]
    assert f"predicted to lie {rms:.2g} (rms" in page.text
    assert "an estimate, not a bound" in page.text
    assert "nats" not in page.text


def test_an_infinite_bound_is_no_bound(spoilt: Callable[..., Path]) -> None:
    page = report(spoilt(True, "result", "certificate", "unbounded"))
    assert "No bound" in page.text
    assert "nats" not in page.text


def test_a_run_cut_short_has_no_certificate(spoilt: Callable[..., Path]) -> None:
    assert "nothing is certain of their law" in report(spoilt(False, "result", "converged")).text


def test_a_sequential_run_has_a_report_without_rounds(tmp_path: Path) -> None:
    page = report(run(tmp_path, *DIGITS, "--sampler", "sequential", "--report"))
    assert "One step after the other: 20 network calls" in page.text
    assert "How they converged" not in page.text
    assert "Step 1 of 20" in (tmp_path / "report.html").read_text()
    assert page.rows["rounds"] == ["20"]


def test_samples_that_are_no_images_are_drawn_and_listed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_MODEL)
    folder = tmp_path / "out"
    run(folder, "--model", f"{tmp_path / 'own.py'}:points", "--num-samples", 9, "--num-inference-steps", 20, "--report")
    page = report(folder)
    samples = load_file(folder / "samples.safetensors")["samples"]
    for n in range(8):
        assert page.rows[str(n + 1)][:2] == [f"{value:.4g}" for value in samples[n].tolist()]
    assert "first 2 of 2 numbers of the first 8 of 9 samples" in page.text
    assert page.tags.count("img") == 0
    assert page.tags.count("svg") == 3
    assert page.scripts == []
    assert alone(page)


@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (2, 2, 6, 6), (1, 3, 5, 7)])
def test_every_shape_of_sample_has_a_report(compared: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    record = json.loads((compared / "run.json").read_text())
    record["result"]["shape"], record["sequential"] = list(shape), None
    (folder / "run.json").write_text(json.dumps(record))
    samples = torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    save_file({"samples": samples}, folder / "samples.safetensors")
    count = record["result"]["rounds"] + 1
    frames = torch.stack([torch.stack([thumbnail(one) for one in samples[:4]])] * count)
    save_file({"rounds": torch.arange(count) + 1, "ahead": frames, "finished": frames.clone()}, folder / "film.safetensors")
    page = report(folder)
    assert page.tags.count("img") == (shape[0] if len(shape) == 4 and shape[1] in (1, 3) else 0)
    assert "How they emerged" in page.text


def filmed(sampler: Callable[..., Any], film: Film, shape: tuple[int, ...]) -> tuple[Any, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    result = sampler(shape, generator=generator, callback=film.callback, **film.condition(shape[0]))
    return result, film.tensors(result.rounds, result.samples)


def mixture() -> piadm.targets.GaussianMixture:
    return piadm.targets.GaussianMixture(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), 0.01, schedule=BETAS)


@pytest.mark.parametrize("wrap", [lambda film: film, lambda film: piadm.MicroBatch(film, 3)], ids=["whole", "slices"])
def test_a_film_holds_the_states_and_predictions_of_the_run_and_does_not_change_it(wrap: Callable[[Film], Any]) -> None:
    """Against the solver, driven by hand: the newest finished state, and f at the window's last one."""
    scheme, shape = piadm.DDPM(50), (6, 2)
    film = Film(mixture())
    result, frames = filmed(piadm.Parallel(wrap(film), scheme, window=8), film, shape)
    expected = piadm.Parallel(mixture(), scheme, window=8)
    plain = expected(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(result.samples, plain.samples)

    _, noise, x = expected._begin(shape, torch.Generator().manual_seed(0), None, {})
    solver = expected._solver(noise)
    state = solver.init(x)
    for round in range(result.rounds):
        assert frames["rounds"][round] == round + 1
        finished, iterated = state.finished()[:4].half(), state.start[:4] < 50
        torch.testing.assert_close(frames["finished"][round][iterated], finished[iterated], rtol=0, atol=0)
        request = solver.request(state)
        state = solver.update(state, mixture()(request.x, request.t))
        torch.testing.assert_close(frames["ahead"][round][iterated], state.newest[:4].half()[iterated], rtol=1e-2, atol=1e-3)
    assert state.done
    assert torch.equal(frames["ahead"][-1], result.samples[:4].half())
    assert torch.equal(frames["finished"][-1], result.samples[:4].half())


def test_a_film_of_an_audited_run_shows_the_window_not_the_audit() -> None:
    film, plain = Film(mixture()), Film(mixture())
    _, audited = filmed(piadm.Parallel(film, piadm.DDPM(40), window=8, audit=True), film, (3, 2))
    _, frames = filmed(piadm.Parallel(plain, piadm.DDPM(40), window=8), plain, (3, 2))
    assert torch.equal(audited["ahead"], frames["ahead"])
    assert torch.equal(audited["finished"], frames["finished"])


def test_a_film_of_a_tuned_run_begins_with_the_runs_own_noise() -> None:
    film = Film(mixture())
    result, frames = filmed(piadm.Parallel(film, piadm.DDPM(40), window="auto"), film, (3, 2))
    start = piadm.Parallel(mixture(), piadm.DDPM(40))._begin((3, 2), torch.Generator().manual_seed(0), None, {})[2]
    assert torch.equal(frames["finished"][0], start.half())
    assert frames["rounds"].tolist()[0] == 1
    assert frames["rounds"].tolist()[-1] == result.rounds + 1


def test_a_long_film_is_thinned_evenly() -> None:
    film = Film(mixture())
    _, frames = filmed(piadm.Sequential(film, piadm.DDPM(300)), film, (2, 2))
    rounds = frames["rounds"].tolist()
    assert FRAMES // 2 < len(rounds) - 1 <= FRAMES
    assert rounds[:-1] == list(range(1, 301, rounds[1] - rounds[0]))


def test_a_thumbnail_is_small_and_keeps_the_mean() -> None:
    image = torch.rand(3, 200, 100)
    small = thumbnail(image)
    assert small.shape == (3, SIDE, SIDE // 2)
    assert small.float().mean().item() == pytest.approx(image.mean().item(), abs=2e-3)
    assert thumbnail(torch.full((2,), 1e9)).isfinite().all()


def test_a_new_run_takes_away_the_report_of_the_old(tmp_path: Path) -> None:
    run(tmp_path, *DIGITS, "--report")
    assert {"report.html", "film.safetensors"} < {path.name for path in tmp_path.iterdir()}
    run(tmp_path, *DIGITS)
    assert not {"report.html", "film.safetensors"} & {path.name for path in tmp_path.iterdir()}


def test_a_record_of_very_many_steps_costs_no_memory(spoilt: Callable[..., Path]) -> None:
    folder = spoilt(10**12, "result", "steps")
    assert report(folder).rows["rounds"][1] == str(10**12)
    assert read_run(folder).cost.steps == 10**12


def test_a_benchmark_reports_its_tables(tmp_path: Path) -> None:
    rows = [{"case": "a", "rounds": 7, "time": 1 / 3}, {"case": "b", "rounds": 12, "time": None}]
    tables.write(tmp_path, "work", {"One": rows, "None": []}, {"command": "python work.py", "cores": 2})
    (tmp_path / "work.png").write_bytes(png(np.zeros((2, 3, 3), np.uint8)))
    tables.report(tmp_path, "work")
    page = Page((tmp_path / "work.html").read_text())
    assert page.open == []
    assert (page.rows["a"], page.rows["b"]) == (["7", "0.333"], ["12", "–"])
    assert (page.rows["command"], page.rows["cores"]) == (["python work.py"], ["2"])
    assert page.tags.count("img") == 1
    assert alone(page)
    assert "script" not in page.tags


def test_cells_of_a_benchmark_are_escaped(tmp_path: Path) -> None:
    tables.write(tmp_path, "odd", {EVIL: [{EVIL: EVIL}], "none": []}, {EVIL: EVIL})
    tables.report(tmp_path, "odd")
    page = Page((tmp_path / "odd.html").read_text())
    assert page.text.count(EVIL) == 5
    assert "script" not in page.tags
    assert page.handlers == []


INTERRUPTED = """
import torch
import piadm
once = ["once"]

def points():
    betas = piadm.schedules.DiscreteBetas.linear(1000)
    whole = piadm.targets.GaussianMixture(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), 0.01, schedule=betas)
    calls = []
    def network(x, t):
        calls.append(len(x))
        if len(calls) == 4 and once:
            raise KeyboardInterrupt
        return whole(x, t)
    return piadm.Denoiser(network, whole.schedule, "sample", event_shape=(2,))
"""


def test_a_resumed_run_is_filmed_from_where_it_goes_on(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(INTERRUPTED)
    options = ("--model", f"{own}:points", "--num-samples", 3, "--num-inference-steps", 20, "--window", 4, "--report")
    words = ["sample", "--no-progress", "--output", str(tmp_path / "out"), *map(str, options)]
    assert CliRunner().invoke(app, words).exit_code == 130
    kept = tmp_path / "out" / "checkpoint.safetensors"
    rounds = piadm.checkpoint.load(kept).state.rounds
    own.write_text(INTERRUPTED.replace('["once"]', "[]"))
    run(tmp_path / "out", *options, "--resume", kept)
    run(tmp_path / "whole", *options)
    again, whole = (load_file(tmp_path / name / "film.safetensors") for name in ("out", "whole"))
    assert again["rounds"].tolist() == whole["rounds"].tolist()[rounds:]
    assert torch.equal(again["ahead"], whole["ahead"][rounds:])
    report(tmp_path / "out")


@pytest.mark.parametrize("first", ["--report", None])
def test_an_interrupted_run_is_resumed_with_a_report_or_without(tmp_path: Path, first: str | None) -> None:
    own = tmp_path / "own.py"
    own.write_text(INTERRUPTED)
    options = ("--model", f"{own}:points", "--num-samples", 3, "--num-inference-steps", 20, "--window", 4)
    words = ["sample", "--no-progress", "--output", str(tmp_path / "out"), *map(str, options), *([first] if first else [])]
    assert CliRunner().invoke(app, words).exit_code == 130
    own.write_text(INTERRUPTED.replace('["once"]', "[]"))
    kept = tmp_path / "out" / "checkpoint.safetensors"
    run(tmp_path / "out", *options, "--resume", kept, *([] if first else ["--report"]))
    run(tmp_path / "whole", *options)
    resumed, whole = (load_file(tmp_path / name / "samples.safetensors")["samples"] for name in ("out", "whole"))
    assert torch.equal(resumed, whole)


def test_no_distance_is_told_as_rounding_not_as_nothing(spoilt: Callable[..., Path]) -> None:
    page = report(spoilt([0.0, 0.0, 0.0], "sequential", "rms_difference"))
    assert "the furthest is no more than rounding away" in page.text


def test_more_rounds_than_steps_are_not_called_fewer(tmp_path: Path) -> None:
    options = ("--model", "digits", "--num-samples", 1, "--num-inference-steps", 20, "--horizon", 6, "--block", 2)
    page = report(run(tmp_path, *options, "--sampler", "piadm-sde", "--iterations", 12))
    record = json.loads((tmp_path / "run.json").read_text())["result"]
    assert record["rounds"] > record["steps"]
    assert "more, not fewer" in page.text
