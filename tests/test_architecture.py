"""The house holds: imports run downward, the core needs nothing but torch, and importing piadm imports no extra."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import piadm

ROOT = Path(piadm.__file__).parent
FLOORS = [
    {"errors"},
    {"schedules", "noise", "progress", "placement", "ranks"},
    {"denoiser", "tables"},
    {"merging", "inputs", "targets", "executors", "schemes", "exponential", "certificate"},
    {"propagators", "windows", "sweep", "memory", "fixed"},
    {"tuning", "replicas"},
    {"result"},
    {"fills", "stopping", "probed"},
    {"fingerprint", "sharded"},
    {"solver"},
    {"speculative", "merged"},
    {"checkpoint"},
    {"driver"},
    {"repeatable"},
    {"samplers"},
    {"exact", "gaussian_law"},
    {"planner"},
    {"published"},
    {"models", "diffusers", "pictures"},
    {"film", "record", "recorded", "choices"},
    {"racing"},
    {"words"},
    {"report"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
EXTRAS = ("typer", "matplotlib", "diffusers", "sklearn", "scipy", "rich", "gradio")


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    """`models/unet.py` belongs to the room `models`."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, everywhere: bool) -> set[str]:
    """Full names of the modules a file imports; at its top level only, or in its functions too."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            # `from piadm import fills` names rooms, `from piadm.fills import Copy` does not
            names |= {f"piadm.{alias.name}" for alias in node.names} if node.module == "piadm" else {str(node.module)}
    return names


def test_every_room_has_a_floor():
    assert {room(path) for path in files()} - set(FLOOR) - {"__init__"} == set()


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    own = room(path)
    if own not in FLOOR:
        return
    used = {name.split(".")[1] for name in imports(path, everywhere=True) if name.startswith("piadm.")}
    for other in used - {own}:
        assert FLOOR[other] < FLOOR[own], f"{own} imports {other}, which is not below it"


def test_the_solver_knows_neither_network_nor_process_group():
    for path in [ROOT / f"{name}.py" for name in ("solver", "sweep", "fills", "propagators", "stopping", "windows")]:
        used = imports(path, everywhere=True)
        assert not {name for name in used if name.startswith(("piadm.denoiser", "piadm.executors", "torch.distributed"))}, path
        assert "distributed" not in path.read_text().replace("distributed run", ""), path


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_below_the_models_nothing_but_torch_and_numpy_is_imported(path):
    if FLOOR.get(room(path), len(FLOORS)) > FLOOR["samplers"]:
        return
    outside = {name.split(".")[0] for name in imports(path, everywhere=False)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "numpy", "piadm"}


def test_importing_piadm_imports_no_extra_and_leaves_torch_alone():
    program = f"""
import sys, torch
before = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist(), torch.is_grad_enabled()
import piadm
after = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist(), torch.is_grad_enabled()
print(before == after, [name for name in {EXTRAS!r} if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "True []"


def test_every_public_name_exists_and_is_documented():
    for name in piadm.__all__:
        assert getattr(piadm, name).__doc__, name


def test_only_the_command_loads_code_and_nothing_unpickles():
    """Weights and checkpoints are safetensors; `--model path.py:function` is the one way in for code."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
    for path in files():
        assert not {name.split(".")[0] for name in imports(path, everywhere=True)} & forbidden, path
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "os.system"), path
            if called.endswith(("exec_module", "import_module", "run_path", "spec_from_file_location")):
                assert path.name == "cli.py", path


def test_what_is_read_from_a_checkpoint_names_no_file_to_open():
    """Only the user's own argument is ever opened: `load` reads one path, and no name from its header is one."""
    tree = ast.parse((ROOT / "checkpoint.py").read_text())
    opened = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call) and "open" in ast.unparse(node.func)]
    assert sorted(opened) == ["part.open('wb')", "safe_open(path, 'pt')"]
