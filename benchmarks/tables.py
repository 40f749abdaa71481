"""How the benchmark commands show and keep their tables: the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as Grid

from piadm.report import render_tables

Value = str | int | float | None
Row = Mapping[str, Value]


def machine(command: Sequence[str]) -> dict[str, Value]:
    """Date, command and machine."""
    model = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "command": shlex.join(command),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def text(value: Value) -> str:
    """A cell: three significant digits, – for nothing."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(title: str, rows: Sequence[Row]) -> None:
    """A table on the terminal."""
    grid = Grid(title=title)
    for i, name in enumerate(rows[0]):
        grid.add_column(
            name, justify="right" if any(isinstance(list(row.values())[i], int | float) for row in rows) else "left"
        )
    for row in rows:
        grid.add_row(*map(text, row.values()))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(grid)


def markdown(title: str, rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([text(value) for value in row.values()] for row in rows)]
    return f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(folder: Path, name: str, tables: Mapping[str, Sequence[Row]], about: Mapping[str, Value]) -> None:
    """`name.md` and `name.json` hold all tables (those without rows are left out), `name.csv` the first."""
    folder.mkdir(parents=True, exist_ok=True)
    filled = {title: rows for title, rows in tables.items() if rows}
    head = "; ".join(f"{key}: {value}" for key, value in about.items())
    body = "\n".join(markdown(title, rows) for title, rows in filled.items())
    (folder / f"{name}.md").write_text(f"{head}\n\n{body}", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps({"about": about, **filled}, indent=1), encoding="utf-8")
    first = next(iter(filled.values()), [])
    if first:
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(first[0]))
            writer.writeheader()
            writer.writerows(first)


def report(folder: Path, name: str) -> None:
    """`name.html`, one page that needs nothing else, from `name.json` and, if it is there, `name.png`."""
    written = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    about, picture = written.pop("about"), folder / f"{name}.png"
    page = render_tables(f"piadm: {name}", about, written, picture.read_bytes() if picture.is_file() else None)
    (folder / f"{name}.html").write_text(page, encoding="utf-8")


def add_report(parser: argparse.ArgumentParser) -> None:
    """The option `--report`."""
    parser.add_argument("--report", action="store_true", help="also write all of it on one page, .html, that opens anywhere")
