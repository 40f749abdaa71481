"""The rival parallel-in-time samplers, each built from its paper inside piadm's interface.

All take piadm's denoiser and scheme, draw the noise of `piadm.Sequential`, and return a `piadm.Result`; with a tight tolerance
all end at the sequential sample. Each keeps its own stopping rule, so tolerances do not compare between methods: compare at
equal final error.
"""

from benchmarks.peers.chords import CHORDS
from benchmarks.peers.paradigms import ParaDiGMS
from benchmarks.peers.parasolver import ParaSolver
from benchmarks.peers.parataa import ParaTAA
from benchmarks.peers.picard import Picard
from benchmarks.peers.srds import SRDS

__all__ = ["CHORDS", "SRDS", "ParaDiGMS", "ParaSolver", "ParaTAA", "Picard"]
