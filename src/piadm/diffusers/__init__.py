"""diffusers pipelines, sampled in parallel across time: one line, no pipeline rewritten.

    pipe = piadm.diffusers.parallelize(StableDiffusionPipeline.from_pretrained(...))
    image = pipe("a lighthouse", num_inference_steps=50, guidance_scale=7.5).images[0]
    print(pipe.last_result)

The scheduler's steps are read off the scheduler itself (`piadm.diffusers.probe`); the pipeline's own loop runs once a round,
the steps of a window being a hidden dimension of its tensors (`piadm.diffusers.lanes`).
"""

from piadm.diffusers.pipeline import Parallelized, parallel, parallelize
from piadm.diffusers.probing import Probe, UnsupportedError, probe

__all__ = ["Parallelized", "Probe", "UnsupportedError", "parallel", "parallelize", "probe"]
