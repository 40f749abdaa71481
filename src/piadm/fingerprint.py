"""Fingerprints: short names for tables, networks and policies, by which a checkpoint knows what it belongs to.

Two things of one fingerprint are the same to a run. It covers the values of tensors (weights and buffers among them), numbers,
words, and the types and attributes of piadm's own objects; of a function its name and code, of any other object its type and
the tensors and modules it holds. Executors (micro-batches, shards) change how a network is called, never what it says, and
leave no trace. What a function closes over is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from hashlib import blake2b
from types import CodeType, FunctionType, MethodType

import torch
from torch import Tensor, nn

from piadm.executors import Executor


def fingerprint(value: object) -> str:
    """32 hexadecimal digits; reads every weight once, about a second a gigabyte."""
    digest = blake2b(digest_size=16)
    _feed(value, digest.update)
    return digest.hexdigest()


def _feed(value: object, put: Callable[[bytes | memoryview], None]) -> None:
    def name(*words: object) -> None:
        put(("\x1f".join(map(str, words)) + "\x1e").encode())

    match value:
        case Executor():
            _feed(value.denoiser, put)
        case Tensor():
            name("tensor", value.dtype, tuple(value.shape))
            put(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        case nn.Module():
            name("module", type(value).__qualname__, value)
            _feed(value.state_dict(), put)
        case Mapping():
            name("mapping", len(value))
            for key in sorted(value, key=str):
                name(key)
                _feed(value[key], put)
        case tuple() | list():
            name("sequence", len(value))
            for entry in value:
                _feed(entry, put)
        case None | bool() | int() | float() | complex() | str() | bytes() | torch.dtype() | torch.device():
            name(type(value).__qualname__, repr(value))
        case MethodType():
            name("method", value.__func__.__qualname__)
            _feed(value.__self__, put)
        case FunctionType():
            name("function", value.__qualname__)
            _feed(value.__code__, put)
        case CodeType():
            name("code", value.co_code.hex(), *value.co_names)
            _feed(value.co_consts, put)
        case partial():
            _feed((value.func, value.args, value.keywords), put)
        case type():
            name("type", value.__qualname__)
        case _:
            own = is_dataclass(value) or type(value).__module__.split(".")[0] == "piadm"
            held = getattr(value, "__dict__", {})
            name("object", type(value).__qualname__)
            _feed({key: held[key] for key in held if own or isinstance(held[key], Tensor | nn.Module)}, put)
