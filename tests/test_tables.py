"""Tables and sweeps: a step is its row, its Jacobian is that of autograd, the forward substitution is its recursion."""

from __future__ import annotations

import pytest
import torch

import piadm
from piadm import sweep as sweeping
from piadm.exponential import Corrector
from piadm.schedules import DiscreteBetas, OrnsteinUhlenbeck
from piadm.sweep import carry, sweep
from piadm.tables import Table

DOUBLE = torch.float64
TABLES = {
    "k=1": piadm.DDPM(9)(DiscreteBetas.linear(100)),
    "k=2": piadm.ExponentialODE(1.0, 0.5, 0.2, 0.01, Corrector(step=0.5))(OrnsteinUhlenbeck()),
}
tables = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@tables
def test_a_step_is_its_row(table):
    M, k, S, D = len(table), table.components, 2, 3
    x, f, xi = draw(M, k, S, D), draw(M, S, D, seed=1), draw(M, k, S, D, seed=2)
    rows = table.cast(torch.device("cpu"), DOUBLE).take(torch.arange(M)[:, None])
    expected = (
        torch.einsum("mij,mjsd->misd", table.A, x)
        + torch.einsum("mi,msd->misd", table.B, f)
        + torch.einsum("mij,mjsd->misd", table.C, xi)
    )
    torch.testing.assert_close(rows.step(x, f, xi), expected, rtol=1e-13, atol=1e-13)
    noiseless = expected - torch.einsum("mij,mjsd->misd", table.C, xi)
    torch.testing.assert_close(rows.step(x, f, None), noiseless, rtol=1e-13, atol=1e-13)


@tables
def test_each_sample_may_be_at_another_step(table):
    index = torch.tensor([[0, 3], [1, 4], [2, 5]])
    x, f, xi = draw(3, table.components, 2, 4), draw(3, 2, 4, seed=1), draw(3, table.components, 2, 4, seed=2)
    rows = table.cast(torch.device("cpu"), DOUBLE)
    both = rows.take(index).step(x, f, xi)
    for s in range(2):
        one = rows.take(index[:, s : s + 1]).step(x[:, :, s : s + 1], f[:, s : s + 1], xi[:, :, s : s + 1])
        assert torch.equal(both[:, :, s : s + 1], one)


@tables
def test_the_jacobian_of_a_step_is_that_of_autograd_for_a_linear_denoiser(table):
    M, k, D = len(table), table.components, 3
    gain = draw(M, 1, D, seed=4)
    rows = table.cast(torch.device("cpu"), DOUBLE).take(torch.arange(M)[:, None])
    x = draw(M, k, 1, D)

    def step(x):
        return rows.step(x, gain * x[:, 0], None)

    full = torch.autograd.functional.jacobian(step, x)  # (M, k, 1, D, M, k, 1, D)
    diagonal = torch.einsum("miadmjad->mijad", full)
    torch.testing.assert_close(rows.jacobian(gain).expand(M, k, k, 1, D), diagonal, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(2, 1, 1)}, r"`A` is \(2, 1, 1\): expected shape \(3, 1, 1\)"),
        ({"B": torch.zeros(3)}, r"`B` is \(3,\): expected shape \(3, 1\)"),
        ({"C": torch.zeros(3, 2, 2)}, r"`C` is \(3, 2, 2\)"),
        ({"sigma": torch.zeros(3)}, r"`sigma` is \(3,\)"),
        ({"B": torch.full((3, 1), torch.nan)}, r"`B` is tensor\(\[\[nan\].*must be finite"),
        ({"A": torch.full((3, 1, 1), torch.inf)}, "`A` is .*must be finite"),
        ({"times": torch.zeros(0)}, "`times` is 0: a table needs at least one step"),
        ({"blocks": (0, 2, 2, 3)}, "`blocks` is .*must rise from 0 to 3"),
        ({"blocks": (0, 2)}, "`blocks` is .*must rise from 0 to 3"),
        ({"blocks": (1, 3)}, "`blocks` is .*must rise from 0 to 3"),
    ],
)
def test_a_table_that_does_not_fit_together_is_refused(change, message):
    good = {"A": torch.ones(3, 1, 1), "B": torch.ones(3, 1), "C": torch.ones(3, 1, 1)}
    good |= {"times": torch.ones(3), "alpha": torch.ones(4), "sigma": torch.ones(4)}
    assert Table(**good).blocks == (0, 3)
    with pytest.raises(ValueError, match=message):
        Table(**good | change)


def by_definition(phi, jacobian, x):
    """x_new[m + 1] = phi[m] + J[m] (x_new[m] - x[m])."""
    out = [x[0]]
    for m in range(len(phi)):
        out.append(phi[m] + torch.einsum("ijsd,jsd->isd", jacobian[m].expand(-1, -1, *x.shape[2:]), out[m] - x[m]))
    return torch.stack(out)


@pytest.mark.parametrize("route", ["loop", "scan"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("window", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("broadcast", [False, True])
def test_a_sweep_is_its_recursion(monkeypatch, route, k, window, broadcast):
    monkeypatch.setattr(sweeping, "LOOP_FROM", 0 if route == "loop" else 10**9)
    monkeypatch.setattr(sweeping, "LOOP_TO", 1)
    S, D = 2, 3
    phi, x = draw(window, k, S, D), draw(window + 1, k, S, D, seed=1)
    jacobian = draw(window, k, k, *((1, 1) if broadcast else (S, D)), seed=2)
    torch.testing.assert_close(sweep(phi, jacobian, x)[0], by_definition(phi, jacobian, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("route", ["loop", "scan"])
def test_a_sweep_keeps_exact_states_to_the_last_bit(monkeypatch, route):
    # where the old states already are the sequential ones, the new ones are phi itself: no division, no 0 * inf
    monkeypatch.setattr(sweeping, "LOOP_FROM", 0 if route == "loop" else 10**9)
    monkeypatch.setattr(sweeping, "LOOP_TO", 1)
    jacobian = 10.0 ** draw(20, 1, 1, 1, 1)
    jacobian[[3, 7]] = 0
    phi = draw(20, 1, 2, 3)
    x = torch.cat([draw(1, 1, 2, 3, seed=1), phi])
    assert torch.equal(sweep(phi, jacobian, x)[0], x)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 31])
@pytest.mark.parametrize("k", [1, 2])
def test_a_scan_is_its_recursion(monkeypatch, count, k):
    monkeypatch.setattr(sweeping, "LOOP_FROM", 10**9)
    monkeypatch.setattr(sweeping, "LOOP_TO", 1)
    jacobian, defect = draw(count - 1, k, k, 2, 3), draw(count, k, 2, 3, seed=1)
    expected = [defect[0]]
    for m in range(1, count):
        expected.append(defect[m] + torch.einsum("ijsd,jsd->isd", jacobian[m - 1], expected[-1]))
    torch.testing.assert_close(carry(jacobian, defect), torch.stack(expected), rtol=1e-10, atol=1e-10)
