"""Every scheduler with a table, in lanes: the pipeline's sequential sample at every window."""

from __future__ import annotations

import pytest
import torch

from piadm.diffusers import parallelize
from tests import tiny
from tests.test_diffusers_probe import OPTIONS, SCHEDULERS

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_with_this_scheduler_returns_its_sequential_sample(name):
    pipe = tiny.quiet(tiny.LoopPipeline(tiny.Small(), SCHEDULERS[name]()))
    options = {"num_inference_steps": 15, **OPTIONS.get(name, {})}

    def sample(one):
        torch.manual_seed(2)  # for schedulers that draw from torch's own
        return one(**options, generator=torch.Generator().manual_seed(2))[0].double()

    alone = sample(pipe)
    size = max(1.0, float(alone.square().mean().sqrt()))
    for window in (1, 2, 7, None):
        made = parallelize(pipe, window=window, tolerance=1e-3 * size)
        together = sample(made)
        result = made.last_result
        gap = float((together - alone).square().mean().sqrt())
        assert gap <= (0 if window == 1 else 1e-3 * size), window
        assert result.rounds <= result.steps - (window in (7, None))
        assert result.steps == len(pipe.scheduler.timesteps)
