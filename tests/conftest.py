"""What every test is held to: the library changes no global state of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# the files run side by side (`-n auto`): processes that each use every core are in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


def _settings() -> dict[str, object]:
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Iterator[None]:
    before = _settings()
    yield
    assert _settings() == before
