"""Tensors that the body of a pipeline's loop makes of its timestep, such as `torch.tensor([t] * rows)`.

torch makes such a tensor of the entries' numbers. A timestep with lanes has no one number, but it can be put in its place as it
is: what comes out is, for each lane, what torch makes of that lane's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils import _pytree as pytree


class Literals(TorchFunctionMode):
    """Within it `torch.tensor` keeps the lanes of the tensors that it is given; all else is as it is without.

    Networks do not run in it: what `Lanes.beneath` runs is one operator to it, like any other.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (_tensor if func is torch.tensor else func)(*args, **(kwargs or {}))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Without it, for callbacks, which are not the pipeline's."""
        if _get_current_function_mode() is not self:  # type: ignore[no-untyped-call]
            yield
            return
        with _pop_mode_temporarily():
            yield


def _tensor(data: Any, *args: Any, **options: Any) -> Tensor:
    entries = pytree.tree_leaves(data)
    if not any(isinstance(one, Tensor) for one in entries):
        return torch.tensor(data, *args, **options)
    # shape, dtype and device are torch's choice, which does not look at values
    zeros = pytree.tree_map_only(Tensor, lambda one: torch.zeros(one.shape, dtype=one.dtype, device=one.device), data)
    like = torch.tensor(zeros, *args, **options)
    parts = [one.detach().to(like.device, like.dtype) if isinstance(one, Tensor) else like.new_tensor(one) for one in entries]
    return torch.cat([one.reshape(-1) for one in parts]).reshape(like.shape)
