"""The benchmark commands run, and what they write holds together."""

import json

import pytest
import torch

from benchmarks import clock, compare, exact, promise, scaling
from piadm.stopping import SAFETY


def tables_of(path):
    tables = json.loads(path.read_text())
    return tables.pop("about"), tables


def test_compare_holds_every_method_to_the_same_final_error(tmp_path):
    compare.main(["--only", "flow Euler 50, window 8, 1 samples", "--pairs", "1", "--output", str(tmp_path)])
    about, tables = tables_of(tmp_path / "compare.json")
    rows = {row["method"]: row for row in tables["Final error at most 0.01"]}
    assert set(rows) == {"Sequential", "piadm.Parallel", "ParaDiGMS", "ParaTAA", "ParaSolver", "SRDS", "CHORDS"}
    assert all(row["error"] <= about["target"] == 1e-2 for row in rows.values())
    assert rows["Sequential"]["rounds"] == 50
    for name, row in rows.items():
        assert row["rounds"] <= 50 or name == "SRDS"
        least = 0 if name == "piadm.Parallel" else 1  # whose steps may share an evaluation
        assert least < row["evaluations a step"] + 1e-9 <= row["rounds"] * row["rows"] / 50 + 1e-9
        assert row["time"] > 0
    assert all(rows[name]["rows"] == 8 for name in ("piadm.Parallel", "ParaDiGMS", "ParaTAA", "ParaSolver"))
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert "| piadm.Parallel |" in (tmp_path / "compare.md").read_text()


def test_clock_holds_the_time_against_what_the_network_allows(tmp_path):
    clock.main(["--only", "policy DDPM 50", "--pairs", "1", "--output", str(tmp_path)])
    _, tables = tables_of(tmp_path / "clock.json")
    (row,) = tables[clock.TITLE]
    assert row["window"].startswith("auto: ")
    assert row["limit"] >= 1
    assert row["time / limit"] == pytest.approx(row["time"] / row["limit"])
    assert 0 < row["own"] < 1
    assert row["error"] <= 1e-2


def test_promise_counts_every_sample_and_searches_the_oracle(tmp_path):
    promise.main(["--only", "flow Euler 50, window 16", "--seeds", "1", "--output", str(tmp_path)])
    _, tables = tables_of(tmp_path / "promise.json")
    cases, totals = tables["By case"], {row["over"]: row for row in tables["In total"]}
    assert [row["τ"] for row in cases] == ["1e-01", "1e-02", "1e-03"]
    for row in cases:
        kept, count = map(int, row["kept"].split("/"))
        assert count == row["samples"] == 8
        assert (row["error/τ, max"] <= 1) == (kept == count)
        assert 50 / 16 <= row["rounds"] <= 50
    assert totals[f"SAFETY {SAFETY:g}"]["samples"] == 24
    first, default = (float(totals[f"SAFETY {value:g}"]["samples kept"].rstrip("%")) for value in (promise.GRID[0], SAFETY))
    assert first <= default
    assert default == pytest.approx(100 * sum(int(row["kept"].split("/")[0]) for row in cases) / 24, abs=0.1)


def test_the_search_puts_the_safety_factor_back():
    with promise.safety(123.0):
        assert promise.piadm.solver.SAFETY == 123.0
    assert promise.piadm.solver.SAFETY == SAFETY


def test_exact_counts_its_tests_and_holds_its_law_against_a_sequential_sample():
    case = exact.Case("digits", exact.DDPM(6), 4, 1)
    row = exact.cost(case, 2.0, seeds=2)
    assert 6 / 4 <= row["rounds, mean"] <= row["rounds, max"] <= 6
    assert row["rejections"] + row["recomputed"] <= row["rounds, mean"]
    rows = {row["against Sequential"]: row for row in exact.laws(exact.Case("digits", exact.DDPM(4), None, 20), 40, 1e9)}
    assert list(rows) == ["Sequential", "Exact", "NoReflection"]
    assert rows["Sequential"]["rounds"] == 4
    assert all(0 < row["p"] <= 1 and row["samples"] == 40 for row in rows.values())


def test_the_two_sample_test_sees_a_mean_a_variance_and_a_correlation_that_differ():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4000, 3, generator=generator, dtype=torch.float64)
    assert exact.evidence(one, other) > 1e-3
    turned = other.clone()
    turned[:, 0] = 0.8 * other[:, 0] + 0.6 * other[:, 1]
    for changed in (other + 0.2, other * 1.2, turned):
        assert exact.evidence(one, changed) < 1e-6


def test_scaling_counts_rounds_by_exact_laws_and_by_sampling(tmp_path):
    scaling.main(["--largest", "2", "--sampled", "1", "--output", str(tmp_path), "--report"])
    assert "With and without the corrector" in (tmp_path / "scaling.html").read_text()
    _, tables = tables_of(tmp_path / "scaling.json")
    low, high = tables["Rounds and bytes for KL ≤ 0.01"]
    assert (low["d"], high["d"]) == ("1e1", "1e2")
    # ten times the dimension is ten times the steps by the path, a logarithm more for the horizon, and about √10 by the output
    assert 10 < high["sequential SDE, path"] / low["sequential SDE, path"] < 14
    assert 2 < high["sequential SDE, output"] / low["sequential SDE, output"] < 6
    for row in (low, high):
        assert row["piadm.Parallel"] < row["pipelined"] < row["PIADM-SDE, output"] <= row["PIADM-SDE, path"]
        assert row["PIADM-SDE, output"] < row["sequential SDE, output"]
    (sampled,) = tables["By sampling"]
    assert sampled["PIADM-SDE rounds"] == low["PIADM-SDE, output"]
    assert abs(sampled["its certificate"] - sampled["expected"]) < 4.5 * sampled["±"]
    assert sampled["its KL, exact"] < sampled["expected"]
    assert 0 < sampled["its certificate (≤ 1.1e-3)"] <= scaling.DELTA**2 / 9
    earned = tables["With and without the corrector"]
    assert all(row["KL from sequential, with"] < row["KL from sequential, without"] for row in earned)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_memory_is_flat_over_many_short_runs_that_succeed_or_fail():
    """A share of `python benchmarks/soak.py 10000`, in a process of its own."""
    import subprocess
    import sys
    from pathlib import Path

    soak = Path(__file__).parent.parent / "benchmarks" / "soak.py"
    subprocess.run([sys.executable, str(soak), "500"], check=True, timeout=300)
