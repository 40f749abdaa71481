"""Is the network a function? The fixed point of the rounds is the sequential sample only if one input has one output."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from piadm.checkpoint import Checkpoint
from piadm.driver import Network
from piadm.schedules import Schedule
from piadm.solver import Request


def ask_again(run: Checkpoint, times: Tensor, network: Network, schedule: Schedule, dtype: torch.dtype) -> None:
    r"""Evaluates two rows of an earlier round once more, and warns if the answer is another: two, since batch norm left in
    training refuses one, and those of most noise, where the network has most to say.

    They may differ by what rounding does in a batch of another size, $\sqrt{\mathrm{eps}}$ of the network's dtype (at least
    1e-3) relative to $\|f\| + \|x\| / α$, the terms of which $f$ is the difference.
    """
    state = run.state
    lane, sample = state.seen.nonzero()[:2].unbind(1)
    step = state.step_of(lane, sample)
    x, f = state.x_seen[lane, 0, sample], state.f_seen[lane, sample]
    again = network(Request(x, times[step].to(x.device), run.alive[sample]))
    level = schedule.alpha(times[step]).clamp(min=1e-3).to(x)[:, None]
    difference, size = (again - f).norm(dim=1).cpu(), (f.norm(dim=1) + (x / level).norm(dim=1)).cpu()
    if not bool((difference <= max(torch.finfo(dtype).eps ** 0.5, 1e-3) * size).all()):
        relative = difference / size
        warnings.warn(
            f"the network is not a function: asked once more at step {int(step[relative.argmax()])}, it answered otherwise "
            f"(by {float(relative.max()):.1e} of its size), so there is no sequential sample to converge to. Is dropout on, "
            "or batch norm training? Call network.eval() first",
            RuntimeWarning,
            stacklevel=4,
        )
