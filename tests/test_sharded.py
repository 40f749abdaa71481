"""Several devices: real processes, gloo on loopback. What each rank does is in `ranks.py`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import piadm
from tests.ranks import SAMPLERS

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(**more: object) -> dict[str, str]:
    paths = os.pathsep.join([str(Path(piadm.__file__).parent.parent), str(HERE.parent)])
    here = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **here, **{name: str(value) for name, value in more.items()}}


Seen = dict[str, list[dict[str, Any]]]


def launch(scenarios: list[str], ranks: int, folder: Path, silent: tuple[int, ...] = (), **more: object) -> Seen:
    """What every rank has seen in each scenario; `silent`: those that do not live to tell."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), *scenarios, str(folder)],
            env=environment(RANK=rank, WORLD_SIZE=ranks, MASTER_PORT=port, **more),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    limit = time.monotonic() + 180
    try:
        for rank, process in enumerate(processes):
            if rank not in silent:
                _, told = process.communicate(timeout=max(1.0, limit - time.monotonic()))
                assert process.returncode == 0, told
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    alive = [rank for rank in range(ranks) if rank not in silent]
    return {one: [json.loads((folder / f"{one}.{rank}.json").read_text()) for rank in alive] for one in scenarios}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch(["same"], 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """One launch for all that ends well: starting a process takes longer than its tests."""
    return launch(["same", "subgroup", "different", "raising", "interrupted", "lanes"], 3, tmp_path_factory.mktemp("three"))


def check_shares(ranks: list[dict[str, Any]]) -> None:
    """The same samples as alone, every row evaluated once, shares even, costs in order."""
    for name in ranks[0]:
        seen = [rank[name] for rank in ranks]
        assert all(one["equal"] for one in seen), name
        alone = seen[0]["rows"][1]
        assert sum(one["rows"][0] for one in seen) == alone
        for one in seen:
            mine, _, counted = one["rows"]
            assert mine == counted
            rounds, lonely, calls = one["rounds"]
            assert rounds == lonely
            # each call's share is even to within a row
            assert abs(mine - alone / len(ranks)) <= calls
            width = 4 * 4
            assert one["received"] == (alone - mine) * width
            network, slowest, inside, timed, whole = one["times"]
            assert 0 <= network <= slowest + 1e-3
            assert slowest <= inside * 1.01 + 1e-3
            assert inside <= timed <= whole


@pytest.mark.parametrize("ranks", ["two", "three"])
def test_the_sample_is_that_of_one_process_and_every_row_is_evaluated_once(request, ranks):
    seen = request.getfixturevalue(ranks)["same"]
    assert set(seen[0]["elementwise"]) == {f"{name}, {samples}" for name in SAMPLERS for samples in (3, 1)}
    check_shares([one["elementwise"] for one in seen])
    # one row a round: the last rank alone has something to do, and is not waited for with a call
    lonely = [one["elementwise"]["sequential, 1"]["calls"][0] for one in seen]
    assert lonely == [0] * (len(seen) - 1) + [12]
    assert all(max(one["digits"]) < 2e-5 for one in seen)  # by themselves, and with replicas on every rank


def test_ranks_of_a_users_own_group_share_a_run_and_the_others_do_not_take_part(three):
    seen = three["subgroup"]
    assert "`group` does not contain this process" in seen[1]["refused"]
    check_shares([seen[0], seen[2]])


def test_ranks_that_are_asked_different_things_hear_of_it(three):
    for rank, seen in enumerate(three["different"]):
        for name, message in seen.items():
            blamed = "0, 2" if rank == 1 else "1"
            assert f"rank {rank} was asked something else than rank {blamed}: give all the same" in message, name


@pytest.mark.parametrize("how", ["raising", "interrupted"])
def test_an_error_or_ctrl_c_in_one_ranks_network_ends_all_and_all_can_go_on(three, how):
    zero, one, two = three[how]
    assert (one["error"], one["message"]) == (
        ("LookupError", "no such weight") if how == "raising" else ("KeyboardInterrupt", "")
    )
    for other in (zero, two):
        assert (other["error"], other["ranks"]) == ("RankError", [1])
        assert "rank 1 of 3 broke off with an error of its own; resume" in other["message"]
        assert other["seconds"] < 30
    assert len({seen["rounds"] for seen in (zero, one, two)}) == 1
    assert all(seen["equal"] for seen in (zero, one, two))


@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_kill_the_others_stop_soon_name_the_rank_and_fewer_ranks_resume(tmp_path, victim):
    survivors = launch(["killed"], 3, tmp_path, silent=(victim,), VICTIM=victim)["killed"]
    for seen in survivors:
        assert seen["ranks"] == [victim]
        assert f"rank {victim} of 3 died" in seen["message"]
        assert seen["seconds"] < 20
        assert 6 <= seen["rounds"] <= 8
    for seen in launch(["resumed"], 2, tmp_path)["resumed"]:
        assert 6 <= seen["before"] <= 8
        assert seen["rounds"] > seen["before"]
        assert seen["equal"]


def test_a_rank_that_falls_silent_is_given_up_after_the_timeout(tmp_path):
    try:
        survivors = launch(["stopped"], 3, tmp_path, silent=(1,), VICTIM=1)["stopped"]
    finally:
        pid = tmp_path / "dying"
        if pid.exists():
            with suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
    for seen in survivors:
        assert seen["ranks"] == [1]
        assert "rank 1 of 3 was not heard of for 3 s" in seen["message"]
        assert 2 < seen["seconds"] < 20


def test_torchrun_runs_the_command_once_for_all_ranks(tmp_path):
    options = ["sample", "--model", "digits", "--num-samples", "3", "--num-inference-steps", "40", "--no-progress", "--output"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "piadm", *options]
    both = subprocess.run([*run, str(tmp_path / "two")], env=environment(), capture_output=True, text=True, timeout=180)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("written to") == 1
    for row in ("slowest of 2 ranks", "communication", "own arithmetic"):
        assert row in both.stdout
    alone = [sys.executable, "-m", "piadm", *options, str(tmp_path / "one")]
    subprocess.run(alone, env=environment(), capture_output=True, timeout=180, check=True)
    one, two = (load_file(tmp_path / name / "samples.safetensors")["samples"] for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=2e-5)


def test_lanes_are_shared_out_and_every_rank_gets_all_answers(three):
    for rank, seen in enumerate(three["lanes"]):
        for count in range(1, 8):
            mine = (rank + 1) * count // 3 - rank * count // 3
            assert seen[str(count)] == {"same": True, "asked": max(1, mine)}  # who has none asks what answers look like
        blamed = "0, 2" if rank == 1 else "1"
        assert f"rank {rank} was asked something else than rank {blamed}: give all the same" in seen["different"]
        broke = "rank 1 of 3 broke off with an error of its own; start again, with as many ranks as are left"
        assert seen["raised"] == (["LookupError", "no such weight"] if rank == 1 else ["RankError", broke])
        assert seen["after"] == 5


def test_after_a_kill_the_other_ranks_of_a_call_stop_soon_and_name_it(tmp_path):
    for seen in launch(["lanes_killed"], 3, tmp_path, silent=(0,))["lanes_killed"]:
        assert seen["ranks"] == [0]
        assert "rank 0 of 3 died; start again" in seen["message"]
        assert seen["seconds"] < 20


def test_a_pipeline_shared_by_ranks_gives_the_image_of_one_process(tmp_path):
    zero, one = launch(["pipeline"], 2, tmp_path)["pipeline"]
    for name in zero:
        rounds, rows, most = zero[name]["alone"]
        for seen in (zero[name], one[name]):
            assert seen["gap"] < 1e-3, name
            assert seen["shared"][0] == rounds
            # half of it, and what every rank does by itself: the first step, the first lane again to compare, what is measured
            assert rows / 2 - 2 * rounds <= seen["shared"][1] <= rows / 2 + 2 * rounds + 16
            assert seen["shared"][2] <= most
        assert zero[name]["sum"] == one[name]["sum"]


def test_without_a_process_group_one_is_told_how_to_start():
    one = piadm.targets.Gaussian()
    with pytest.raises(
        ValueError, match=r"there is no process group: start with torchrun, and call torch.distributed.init_process_group\(\)"
    ):
        piadm.Sharded(one)
    with pytest.raises(ValueError, match="`timeout` is 0"):
        piadm.Sharded(one, timeout=0)
    with pytest.raises(TypeError, match="wrap the network"):
        piadm.Sharded(lambda x, t: x)
