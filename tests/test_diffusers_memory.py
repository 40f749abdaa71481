"""Pipelines within `max_memory`: calls are cut to what fits, the peak is kept, and no image depends on it."""

from __future__ import annotations

import re
import warnings
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from piadm.diffusers import parallelize
from piadm.memory import COPIES, WORKSPACE, peak, row_bytes
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
CPU = torch.device("cpu")
PHOTO = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8))
TEXT = {"prompt": "a red cat", "height": 16, "width": 16, "num_inference_steps": 14, "output_type": "latent"}
LATENTS = 4 * 8 * 8
PLENTY = 2**40
TIGHT = 1e-4


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def call(pipe: Any, options: dict[str, Any] = TEXT) -> torch.Tensor:
    latents: torch.Tensor = pipe(**options, generator=seeded())[0]
    return latents


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """A batched product may sum in another order, and the rounds carry that on, within the tolerance."""
    assert (one - other).square().mean().sqrt() < 2 * TIGHT * max(1.0, float(other.std()))


def watch(pipe: Any, limit: int | None = None) -> list[int]:
    """Rows of every call of the UNet, which runs out of memory, by the CPU allocator's own error, above `limit`."""
    rows: list[int] = []
    forward = pipe.unet.forward

    def watched(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        if limit is not None and len(sample) > limit:
            torch.empty(2**50)
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = watched
    return rows


def ddim(**options: Any) -> Any:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = diffusers.DDIMScheduler(**options)
    return pipe


def multistep() -> Any:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize(
    ("build", "components", "guided", "exact"),
    [(ddim, 1, 1, False), (ddim, 1, 2, False), (multistep, 2, 2, False), (lambda: ddim(clip_sample=False), 1, 2, True)],
    ids=["DDIM, no guidance", "DDIM", "multistep", "exact"],
)
def test_calls_are_cut_to_what_fits_and_the_image_is_the_same(build, components, guided, exact):
    """Room for the window's states and the network on 5 lanes, both measured here."""
    pipe = build()
    options = {**TEXT, "guidance_scale": 3.0 if guided == 2 else 1.0, **({"eta": 1.0} if exact else {})}
    whole = parallelize(pipe, window=8, exact=exact, tolerance=TIGHT, max_memory=PLENTY)
    expected = call(whole, options)

    @torch.no_grad()
    def network(lanes: int) -> None:
        rows = lanes * guided
        pipe.unet(torch.zeros(rows, 4, 8, 8), torch.zeros(rows), encoder_hidden_states=torch.zeros(rows, 16, 32))

    lane = row_bytes(network, CPU)
    states = 8 * (COPIES * components + 3 * guided) * LATENTS * 4
    rows = watch(pipe)
    cut = parallelize(pipe, window=8, exact=exact, tolerance=TIGHT, max_memory=states + 5 * lane)
    assert_same(call(cut, options), expected)
    assert cut.last_result.rounds == whole.last_result.rounds
    assert max(rows) in (4 * guided, 5 * guided)  # conditions are repeated for each lane besides
    assert all(count % guided == 0 for count in rows)  # whole lanes
    live = [stop - start for start, stop in cut.last_result.windows]
    assert sum(rows) == guided * (sum(live) + 1 + 4)  # a lane by itself, compared; 1, 1 and 2, measured
    rows.clear()
    call(cut, options)
    assert sum(rows) == guided * sum(live)  # neither happens again


@pytest.mark.parametrize("name", ["StableDiffusion", "ControlNet", "SD3"])
def test_the_peak_of_a_call_is_below_the_max_memory_that_a_refusal_asks_for(name):
    """All that is made during a whole call counts; with no bound the same window takes more."""
    builders = {
        "StableDiffusion": tiny.stable_diffusion,
        "ControlNet": tiny.stable_diffusion_control,
        "SD3": tiny.stable_diffusion_3,
    }
    pipe = builders[name]()
    options = {**TEXT, "height": 32, "width": 32, **({"image": PHOTO.resize((32, 32))} if name == "ControlNet" else {})}
    if name == "SD3":  # whose text encoders take more than its rounds
        kinds = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        options.update(zip(kinds, pipe.encode_prompt(options.pop("prompt"), None, None), strict=True))
    with pytest.raises(ValueError, match="does not fit") as refused:
        call(parallelize(pipe, window=10, max_memory=2**21 if name != "SD3" else 3 * 2**20), options)
    bound = int(re.findall(r"about (\d+) bytes", str(refused.value))[0])
    bounded, unbounded = parallelize(pipe, window=10, max_memory=bound), parallelize(pipe, window=10)
    call(bounded, options)
    took, free = (peak(lambda pipe=one: call(pipe, options), CPU) / WORKSPACE for one in (bounded, unbounded))
    assert took <= bound / 2 + bound / 2 / WORKSPACE  # the states' half and the network's, which has room for its kernels
    assert took < free
    assert (1, 11) in bounded.last_result.windows


@pytest.mark.parametrize("window", [12, None])
def test_a_window_whose_states_do_not_fit_is_refused_and_the_pipeline_is_as_before(window):
    pipe = tiny.stable_diffusion()
    before = type(pipe), pipe.scheduler, vars(pipe.unet).copy()
    lane = (COPIES + 3 * 2) * LATENTS * 4
    asked = 14 if window is None else window
    with pytest.raises(ValueError, match=rf"`window` is {asked}: does not fit in max_memory=.*give at most"):
        call(parallelize(pipe, window=window, max_memory=20 * lane))
    assert (type(pipe), pipe.scheduler, vars(pipe.unet)) == before
    with pytest.raises(ValueError, match=r"`max_memory` is 1000: one step and the smallest network call take about \d+ bytes"):
        call(parallelize(pipe, window=2, max_memory=1000))


@pytest.mark.parametrize("limit", [2, 6])
def test_running_out_of_memory_halves_the_slices_says_so_once_and_remembers(limit):
    pipe = tiny.stable_diffusion()
    expected = call(parallelize(pipe, window=12, tolerance=TIGHT))
    rows = watch(pipe, limit)
    made = parallelize(pipe, window=12, tolerance=TIGHT)
    with pytest.warns(UserWarning, match="`unet` ran out of memory: from now on it is called for at most") as told:
        together = call(made)
    assert len(told) == 1
    assert_same(together, expected)
    refused = [count for count in rows if count > limit]
    assert refused[0] == 24
    assert all(later == 2 * ((earlier // 2 + 1) // 2) for earlier, later in pairwise(refused))
    rows.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(call(made), together)
    assert max(rows) <= limit


def test_a_step_for_which_there_is_no_memory_is_the_allocators_error():
    pipe = tiny.stable_diffusion()
    watch(pipe, 1)
    with pytest.raises(RuntimeError, match="allocate memory"):
        call(parallelize(pipe, window=4))


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, True])
def test_what_is_no_amount_of_memory_is_refused_at_once(value):
    with pytest.raises(ValueError, match="`max_memory`"):
        parallelize(tiny.stable_diffusion(), max_memory=value)


def test_a_fraction_is_of_the_devices_memory_and_auto_is_refused():
    pipe = tiny.stable_diffusion()
    rows = watch(pipe)
    call(parallelize(pipe, window=6, max_memory=0.5))
    assert max(rows) == 12
    with pytest.raises(ValueError, match="`window` is 'auto': pipelines are not timed"):
        parallelize(pipe, window="auto")
