"""piadm: diffusion and flow models sampled in parallel across time.

A denoiser (a network with its schedule), a scheme (the steps) and a sampler:

    denoiser = piadm.Denoiser(network, piadm.schedules.DiscreteBetas.linear(1000), "epsilon")
    result = piadm.Parallel(denoiser, piadm.DDPM(steps=1000), window=64)((16, 1, 28, 28), label=labels)
"""

from piadm import diffusers, fills, models, propagators, schedules, targets, windows
from piadm.certificate import Certificate
from piadm.checkpoint import Checkpoint
from piadm.denoiser import Denoiser, DenoiserLike, Guided, Wrapper
from piadm.errors import NonFiniteError, RankError
from piadm.exact import Exact
from piadm.executors import MicroBatch
from piadm.exponential import Corrector, ExponentialODE, ExponentialSDE
from piadm.fixed import FixedBatch
from piadm.planner import Plan, plan
from piadm.probed import Probed
from piadm.published import PIADMODE, PIADMSDE
from piadm.ranks import Ranks
from piadm.replicas import Replicas
from piadm.result import Result
from piadm.samplers import Parallel, Sequential
from piadm.schemes import DDIM, DDPM, Euler
from piadm.sharded import Sharded
from piadm.solver import Solver, State
from piadm.tables import Table

__all__ = [
    "DDIM",
    "DDPM",
    "PIADMODE",
    "PIADMSDE",
    "Certificate",
    "Checkpoint",
    "Corrector",
    "Denoiser",
    "DenoiserLike",
    "Euler",
    "Exact",
    "ExponentialODE",
    "ExponentialSDE",
    "FixedBatch",
    "Guided",
    "MicroBatch",
    "NonFiniteError",
    "Parallel",
    "Plan",
    "Probed",
    "RankError",
    "Ranks",
    "Replicas",
    "Result",
    "Sequential",
    "Sharded",
    "Solver",
    "State",
    "Table",
    "Wrapper",
    "diffusers",
    "fills",
    "models",
    "plan",
    "propagators",
    "schedules",
    "targets",
    "windows",
]
