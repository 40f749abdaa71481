r"""Lanes: the steps of a window as a hidden dimension of every tensor in a pipeline's loop.

A pipeline is called once, inside `torch.vmap`, and its code never learns of it. What does not depend on the step (text
encoders, embeddings, masks, random numbers, decoding) is computed once, in the shapes of a sequential call. The timestep that
the loop is given, and the states that `scheduler.step` returns, carry one value for every step of the window; guidance,
scaling, packing and concatenation act on each lane by themselves.

Where the network is called the hidden dimension becomes rows of the batch: lane $w$ of row $r$ is row $r W + w$, so that the
halves of a guided batch stay halves. Outside of it the same operator runs whatever else must see all lanes: the solver.

Samples of a batch finish steps each at their own pace. A lane belongs to one step, as a pipeline has one timestep for its whole
batch, and there is one for every step in the window of any sample; only the rows of those samples are evaluated in it whose
window it is. With guidance a pipeline repeats its batch as a whole, so row $r$ belongs to sample $r \bmod S$. What is not
evaluated is NaN, so that a pipeline which orders its rows otherwise cannot go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from piadm.diffusers.literals import Literals
from piadm.diffusers.probing import UnsupportedError
from piadm.diffusers.shares import Answer
from piadm.diffusers.slices import Slices

Values = list[tuple[Tensor, bool]]
"""Tensors with their lanes first, and whether they have any."""


class _Beneath(torch.autograd.Function):
    """Calls a function beneath `vmap`, with plain tensors whose lanes come first; what it returns has lanes first, too."""

    @staticmethod
    def forward(lane: Tensor, act: Callable[[Values], list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("lanes exist inside torch.vmap only")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is differentiated."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], lane: Tensor, act: Callable[[Values], list[Tensor]], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        values = [
            (tensor, False) if dim is None else (tensor.movedim(dim, 0), True)
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        out = tuple(act(values))
        return out, (0,) * len(out)


class Lanes:
    """The lanes of one call of a pipeline.

    Arguments:
        lane: A tensor of `width` lanes, as `vmap` hands it to the function it calls.
        width: How many there are.

    Attributes:
        literals: What the loop's body runs in.
    """

    def __init__(self, lane: Tensor, width: int) -> None:
        self.lane, self.width = lane, width
        self.literals = Literals()

    def beneath(self, act: Callable[[Values], list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs `act` on the tensors with their lanes first; its results, likewise of `width` lanes, hide them again."""
        out: tuple[Tensor, ...] = _Beneath.apply(self.lane, act, *tensors)  # type: ignore[no-untyped-call]
        return out

    def hide(self, values: Tensor) -> Tensor:
        """A tensor whose first dimension holds the lanes, at most `width`; idle lanes repeat the last."""
        return self.beneath(lambda _: [self.padded(values)])[0]

    def padded(self, values: Tensor) -> Tensor:
        missing = self.width - len(values)
        return values if missing == 0 else torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])

    def plainly(self, act: Callable[[], Any]) -> Any:
        """Runs a function that sees no lanes beneath `vmap`, as if there were none."""
        held: list[Any] = []

        def run(_: Values) -> list[Tensor]:
            held.append(act())
            return [torch.zeros(self.width)]

        self.beneath(run)
        return held[0]


def check_mode(module: nn.Module, name: str) -> None:
    """Raises `UnsupportedError` for a network that says itself that its rows influence each other or are drawn at random."""
    for part in module.modules():
        normalises = isinstance(part, _BatchNorm) and (part.training or part.running_mean is None)
        drops = isinstance(part, _DropoutNd) and part.training and part.p > 0
        if normalises or drops:
            what = "normalises over its batch" if normalises else "draws random numbers"
            raise UnsupportedError(
                f"`pipe.{name}` has a {type(part).__name__} that {what}, so the steps of a window cannot share a batch: call "
                f"pipe.{name}.eval()"
            )


class Network:
    """A module of the pipeline: lanes become rows of its batch.

    Arguments:
        forward: The module's own forward.
        name: Its name in the pipeline, for errors.
        slices: How many lanes it is called with at once.

    Attributes:
        watched: Whether `finite` is kept.
        finite: Whether all it answered was, where not all samples were evaluated.
    """

    def __init__(self, forward: Callable[..., Any], name: str, slices: Slices) -> None:
        self.forward, self.name, self.slices = forward, name, slices
        self.watched, self.finite = False, True

    def __call__(
        self,
        lanes: Lanes,
        live: int,
        active: Tensor | None,
        check: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        note: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> tuple[Any, bool]:
        """Output as the pipeline expects it, and whether the arguments had lanes.

        Arguments:
            lanes: The lanes.
            live: How many of them are evaluated; idle ones get copies of the last.
            active: Which samples are evaluated in which of them, shape `(live, S)`; `None` for all in all.
            check: Whether the first lane is evaluated by itself, too, and compared.
            args: The call's.
            kwargs: The call's.
            note: Is told the arguments of the first lane by itself.

        Raises:
            UnsupportedError: if rows cannot be told from other dimensions, or influence each other.
        """
        leaves, tree = pytree.tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        held: list[Any] = []

        def run(values: Values) -> list[Tensor]:
            hidden = any(has for _, has in values)
            if hidden and note is not None:
                note(*self._first(leaves, places, tree, values))
            out = self._rows(lanes, live, active, check, leaves, places, tree, values) if hidden else None
            if out is None:
                plain_args, plain_kwargs = args, kwargs
                held.append((self.forward(*plain_args, **plain_kwargs), False))
                return [torch.zeros(lanes.width)]
            tensors, others, out_tree = out
            held.append((others, out_tree))
            return tensors

        hidden = lanes.beneath(run, *(leaves[place] for place in places))
        first, second = held[0]
        if second is False:
            return first, False
        tensors = iter(hidden)
        restored = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in first]
        return pytree.tree_unflatten(restored, second), True

    def _rows(
        self,
        lanes: Lanes,
        live: int,
        active: Tensor | None,
        check: bool,
        leaves: list[Any],
        places: Sequence[int],
        tree: Any,
        values: Values,
    ) -> tuple[list[Tensor], list[Any], Any]:
        """The network on `rows × live` rows: its tensors with lanes first, its output's leaves and their structure."""
        rows = self._count(values)
        wanted = None if active is None or rows % active.shape[1] else active.repeat(1, rows // active.shape[1])

        def call(part: slice) -> Answer:
            flat, count = list(leaves), part.stop - part.start
            some = None if wanted is None or bool(wanted[part].all()) else wanted[part].T.flatten()
            asked = rows * count if some is None else int(some.sum())
            for place, (value, has) in zip(places, values, strict=True):
                flat[place] = self._spread(value[part] if has else value, has, rows, count, some)
            args, kwargs = pytree.tree_unflatten(flat, tree)
            out, out_tree = pytree.tree_flatten(self.forward(*args, **kwargs))
            for leaf in out:
                if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != asked):
                    raise UnsupportedError(
                        f"`{self.name}` returned a tensor of shape {tuple(leaf.shape)} for {asked} rows: its output "
                        "does not run along the batch, so the steps of a window cannot be evaluated in one batch"
                    )
            if some is not None:
                out = [_scattered(leaf, some) if isinstance(leaf, Tensor) else leaf for leaf in out]
            tensors = [leaf.reshape(rows, count, *leaf.shape[1:]).transpose(0, 1) for leaf in out if isinstance(leaf, Tensor)]
            return tensors, out, out_tree

        key = tuple((tuple(value.shape[has:]), has, value.dtype, value.device) for value, has in values)
        tensors, out, out_tree = self.slices(self.name, key, live, call, [value for value, _ in values])
        if self.watched and wanted is not None:  # here, where all ranks know the same
            self.finite &= all(bool(tensor[wanted].isfinite().all()) for tensor in tensors)
        if check:
            args, kwargs = self._first(leaves, places, tree, values)
            alone = [leaf for leaf in pytree.tree_leaves(self.forward(*args, **kwargs)) if isinstance(leaf, Tensor)]
            self._compare(alone, [tensor[0] for tensor in tensors])
        return [lanes.padded(tensor) for tensor in tensors], out, out_tree

    def _first(self, leaves: list[Any], places: Sequence[int], tree: Any, values: Values) -> tuple[Any, Any]:
        """The arguments of the first lane by itself."""
        single = list(leaves)
        for place, (value, has) in zip(places, values, strict=True):
            single[place] = value[0] if has else value
        args, kwargs = pytree.tree_unflatten(single, tree)
        return args, kwargs

    def separate(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> bool:
        """Whether the first sample of a batch is answered by itself as it is beside the others, given a call without lanes."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        rows = self._count([(leaf, False) for leaf in leaves if isinstance(leaf, Tensor)])
        if rows == 1:
            return True  # the same for all samples
        if rows % samples:
            return False
        along = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows for leaf in leaves]
        first = [leaf[::samples] if has else leaf for leaf, has in zip(leaves, along, strict=True)]
        try:
            whole, some = (pytree.tree_leaves(self._plain(one, tree)) for one in (leaves, first))
        except (RuntimeError, ValueError, IndexError):
            return False  # it cannot be asked about one sample
        pairs = [(one[::samples], same) for one, same in zip(whole, some, strict=True) if isinstance(one, Tensor)]
        return not any(one.shape != same.shape or _difference(one, same)[0] for one, same in pairs)

    def _plain(self, leaves: list[Any], tree: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        return self.forward(*args, **kwargs)

    def _count(self, values: Values) -> int:
        """Rows of one lane: those of the state, which is the first argument and may have no lanes in the first round."""
        hidden = [value.shape[1] for value, has in values if has and value.ndim >= 3]
        plain = [value.shape[0] for value, has in values if not has and value.ndim >= 2]
        return next(iter(hidden + plain), 1)

    def _spread(self, value: Tensor, hidden: bool, rows: int, lanes: int, some: Tensor | None) -> Tensor:
        """An argument for `rows × lanes` rows, or for `some` of them."""
        if not hidden and (value.ndim == 0 or value.shape[0] != rows):
            return value  # the same for all
        spread = self._along(value, hidden, rows, lanes)
        return spread if some is None else spread[some.to(spread.device)]

    def _along(self, value: Tensor, hidden: bool, rows: int, lanes: int) -> Tensor:
        if not hidden:
            return value.repeat_interleave(lanes, 0)
        if value.ndim == 1:  # a timestep without a batch dimension
            return value.repeat(rows)
        if value.shape[1] not in (1, rows):
            raise UnsupportedError(
                f"`{self.name}` is given a tensor of shape {tuple(value.shape[1:])} that differs from step to step, but its "
                f"batch has {rows} rows: the steps of a window cannot be evaluated in one batch"
            )
        return value.expand(-1, rows, *value.shape[2:]).transpose(0, 1).flatten(0, 1)

    def _compare(self, alone: list[Tensor], together: list[Tensor]) -> None:
        """A lane's rows must not depend on the other lanes."""
        for one, same in zip(alone, together, strict=True):
            if not one.is_floating_point():
                continue
            differs, gap, size = _difference(one, same)
            if differs:
                raise UnsupportedError(
                    f"`{self.name}` gives a step another answer in a batch with other steps than alone (they differ by "
                    f"{gap:.2g}, the answer's largest entry is {size:.2g}): its rows influence each other or it draws random "
                    "numbers (dropout, batch normalisation: call .eval()), so the steps of a window cannot share a batch"
                )


def _scattered(values: Tensor, places: Tensor) -> Tensor:
    """Rows in their places, and NaN (or 0) in the others."""
    blank = torch.nan if values.is_floating_point() else 0
    out = values.new_full((len(places), *values.shape[1:]), blank)
    out[places.to(out.device)] = values
    return out


def _difference(one: Tensor, same: Tensor) -> tuple[bool, float, float]:
    """Whether two answers differ by more than rounding, by how much, and how large they are."""
    loose = 1e-3 if one.dtype in (torch.float32, torch.float64) else 0.1
    size, gap = float(one.abs().max()), float((one - same).abs().nan_to_num(0.0).max())
    return gap > loose * size, gap, size
