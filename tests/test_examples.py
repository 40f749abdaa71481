"""Each script under examples/ runs and says what it should; the diffusion policy's own test is in test_diffusers_side.py."""

from __future__ import annotations

from pathlib import Path

from examples import k_diffusion, own_network, posterior

FOLDER = Path(__file__).parents[1] / "examples"


def test_there_is_a_test_for_every_example():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"diffusion_policy", "k_diffusion", "own_network", "posterior"}


def test_a_users_own_flow_is_sampled_in_fewer_rounds():
    figures = own_network.main(["--train-seconds", "2", "--steps", "40", "--samples", "4"])
    assert figures["rounds"] < 20
    assert figures["rms difference from sequential"] < 1e-2


def test_the_posterior_is_sampled_without_bias_and_certified():
    figures = posterior.main(["--steps", "100", "--samples", "200"])
    assert figures["rounds, Exact"] < 25
    assert figures["rounds, target_kl"] < 25
    assert 0 < figures["bound on the KL"] <= 0.01
    # of the 48 coordinates, which move together, a handful are independent: 2 is far out for their rms
    assert figures["error of the mean, in standard errors (rms)"] < 2
    assert 0.8 < figures["spread, measured / true (rms)"] < 1.1  # 100 DDPM steps fall short by a tenth


def test_k_diffusions_own_loop_is_reproduced():
    figures = k_diffusion.main(["--steps", "30", "--window", "15"])
    assert figures["rounds, Parallel"] < 15
    assert figures["rms difference"] < 1e-2
