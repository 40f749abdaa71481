"""`torch.tensor` of a timestep with lanes: for each lane what torch makes of its number, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from piadm.diffusers import UnsupportedError, parallelize
from piadm.diffusers.literals import Literals
from tests import tiny

LISTS = {
    "copies": lambda t: torch.tensor([t] * 3, device="cpu"),
    "tuple": lambda t: torch.tensor((t, t)),
    "nested": lambda t: torch.tensor([[t, 2 * t], (t / 7, t)]),
    "beside numbers": lambda t: torch.tensor([0.5, t, 3]),
    "of one entry": lambda t: torch.tensor([t[None], t]),
    "dtype": lambda t: torch.tensor([t, t], dtype=torch.float16),
    "dtype beside numbers": lambda t: torch.tensor([t, 0.1], dtype=torch.float64),
    "by name": lambda t: torch.tensor(data=[t]),
    "of kinds": lambda t: torch.tensor([t, t.float() / 3, t > 300]),
    "no list": lambda t: torch.tensor(t) + torch.tensor(1.5) + torch.tensor([[1, 2], [3, 4]]),
    "long": lambda t: torch.tensor(t[None, None].repeat(2, 3)),
}


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LISTS)
def test_each_lane_is_what_torch_makes_of_its_timestep(name, dtype):
    make, times = LISTS[name], torch.tensor([981.0, 500.5, 1.0]).to(dtype)
    expected = torch.stack([make(t) for t in times])
    with Literals():
        together, alone = torch.vmap(make)(times), torch.stack([make(t) for t in times])
    for found in (together, alone):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_the_default_dtype_and_device_are_those_of_the_caller():
    with torch.device("meta"), Literals():
        made = torch.tensor([torch.ones((), device="cpu"), 2])
    assert made.device.type == "meta"


@pytest.mark.parametrize("make", [lambda t: torch.tensor([t], t), lambda t: torch.tensor([[t], [t, t]])], ids=["type", "shape"])
def test_what_torch_refuses_is_refused_likewise(make):
    with pytest.raises((TypeError, ValueError)) as alone:
        make(torch.ones(()))
    with pytest.raises(alone.type) as together, Literals():
        torch.vmap(make)(torch.ones(3))
    assert str(together.value) == str(alone.value)


def modes() -> list[Any]:
    return _get_current_function_mode_stack()  # type: ignore[no-untyped-call]


class Listing(tiny.LoopPipeline):
    """Keeps what its own loop runs in, makes its network's timesteps of lists, and ends when it is told to."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=10, generator=None, callback_on_step_end=None, end=None):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, 4, 4, 4, generator=generator)
        self.before, self.inside = modes(), []
        for i, t in enumerate(self.scheduler.timesteps):
            self.inside.append(modes())
            output = self.unet(latents, torch.tensor([t] * len(latents), dtype=torch.float32)).sample
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {"latents": latents})
            if end is not None:
                end()
        self.after = modes()
        return (latents,)


def listing() -> Any:
    return Listing(tiny.seeded(tiny.Small), tiny.ddim())


def test_only_the_body_of_the_loop_runs_in_it():
    pipe, seen = listing(), {"network": [], "callback": []}
    forward = pipe.unet.forward

    def watched(*args: Any) -> Any:
        seen["network"].append(modes())
        return forward(*args)

    pipe.unet.forward = watched
    alone = pipe(generator=torch.Generator().manual_seed(3))[0]
    fast = parallelize(pipe, window=4, tolerance=1e-5)
    with torch.device("cpu"):
        (own,) = modes()
        together = fast(
            generator=torch.Generator().manual_seed(3), callback_on_step_end=lambda *_: seen["callback"].append(modes()) or {}
        )[0]
        assert modes() == [own]
    assert torch.allclose(together, alone, atol=1e-4)
    assert fast.last_result.rounds < 10
    assert pipe.before == pipe.after == [own]
    assert all(one[0] is own and isinstance(one[1], Literals) and len(one) == 2 for one in pipe.inside)
    assert seen["callback"] == [[own]] * fast.last_result.rounds
    assert len(seen["network"]) > 10
    assert not any(seen["network"])


@pytest.mark.parametrize("kind", [KeyError, UnsupportedError, KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_nothing_of_it_behind(kind):
    def end():
        raise kind("now")

    with pytest.raises(kind) as caught:
        parallelize(listing(), window=4)(end=end)
    assert caught.traceback  # which keeps the loop alive
    assert modes() == []
