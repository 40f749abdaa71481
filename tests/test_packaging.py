"""What is shipped is whole and nothing else: it is built, installed in a folder of its own and run without the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}


def command(*words: str | Path, cwd: Path, **environment: str) -> str:
    """Runs Python with nothing of this repository on its path but what is given."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = (sys.executable, *words)
    run = subprocess.run(words, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command("-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel, installed without what it depends on, which this environment has."""
    folder = tmp_path_factory.mktemp("installed")
    command("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, built[1], cwd=folder)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == {name for name in SOURCES if "__pycache__" not in name}
    assert {"piadm/py.typed", "piadm/models/digits.safetensors", "piadm/templates/report.html"} <= inside
    assert built[1].stat().st_size < 20e6


def test_the_sdist_holds_sources_and_no_junk(built):
    with tarfile.open(built[0]) as sdist:
        paths = [Path(*Path(member.name).parts[1:]) for member in sdist.getmembers()]
    allowed = {"src", "tests", "docs", "examples", "benchmarks", "mkdocs.yml", "constraints.txt", "pyproject.toml", "PKG-INFO"}
    allowed |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "NOTICE", ".gitignore"}
    assert {path.parts[0] for path in paths} == allowed
    assert {path.suffix for path in paths} <= {"", ".py", ".md", ".yml", ".css", ".png", ".html", ".js"} | {
        ".toml", ".txt", ".safetensors", ".typed"
    }  # fmt: skip
    assert built[0].stat().st_size < 20e6


def test_the_installed_command_samples_and_reports(installed, tmp_path):
    words = "sample --model digits --label 7 --num-samples 1 --num-inference-steps 20 --report --output out"
    command("-m", "piadm", *words.split(), cwd=tmp_path, PYTHONPATH=str(installed))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert 0 < len(record["rounds"]) < 20
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()


def test_the_installed_package_is_the_one_imported_and_imports_little(installed, tmp_path):
    """Beyond torch's own modules: the standard library's, numpy's, safetensors' and ours."""
    program = """
import sys, torch
before = set(sys.modules)
import piadm
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(piadm.__file__, sorted(new))
"""
    shown = command("-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert shown.strip() == f"{installed / 'piadm' / '__init__.py'} ['numpy', 'piadm', 'safetensors']"


def test_a_users_type_checker_sees_the_types(installed, tmp_path):
    (tmp_path / "program.py").write_text("import piadm\n\nreveal_type(piadm.DDPM(steps=9).steps)\npiadm.DDPM(steps='9')\n")
    # reading all of torch takes a minute
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,safetensors.*]\nfollow_imports = skip\n")
    words = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "program.py"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "MYPYPATH": ""}
    shown = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300).stdout
    assert re.search(r'program.py:3: note: Revealed type is "(builtins\.)?int"', shown), shown
    assert 'program.py:4: error: Argument "steps" to "DDPM" has incompatible type "str"' in shown
