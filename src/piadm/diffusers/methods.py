"""The parts of a pipeline that each round runs: the body of its loop, and what that calls of the pipeline's own.

Its own are its methods, `self.method(...)`, and functions of the file that the caller stands in. They are followed into what
they call in turn, and the timestep from the arguments of a call to the parameters that they are for. Networks, schedulers and
libraries are not read.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from piadm.diffusers.decisions import Part, follows

Function = Callable[..., Any]


@cache
def source(function: Function) -> ast.FunctionDef | None:
    """The definition of a function; `None` where it cannot be read."""
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return found if isinstance(found, ast.FunctionDef) else None


def parts(pipeline: type, caller: Function, loop: ast.For, numbers: Iterable[str]) -> Iterator[Part]:
    """What each round of a loop in `caller`, a method of the class, runs; `numbers`: names that count its rounds."""
    found = [(caller, Part.of_loop(loop, numbers))]
    seen = set()
    for caller, part in found:  # which grows
        yield part
        for function, given, conditional in _called(pipeline, caller, part):
            definition = source(function)
            if definition is not None and (function, given, conditional) not in seen:
                seen.add((function, given, conditional))
                found.append((function, Part(definition.body, given, frozenset(), conditional, f"{definition.name}: ")))


def _called(pipeline: type, caller: Function, part: Part) -> Iterator[tuple[Function, frozenset[str], bool]]:
    """Functions that a part calls, their parameters that are given the timestep, and whether it may never call them."""
    for node, _, conditional in part.nodes:
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                found = inspect.getattr_static(pipeline, name, None)
            case ast.Name(id=name) if name not in caller.__code__.co_varnames:
                found = caller.__globals__.get(name)
                found = found if getattr(found, "__module__", None) == caller.__module__ else None
            case _:
                continue
        function = inspect.unwrap(getattr(found, "__func__", found))
        if inspect.isfunction(function):
            bound = isinstance(node.func, ast.Attribute) and not isinstance(found, staticmethod)
            yield function, frozenset(_received(function, bound, node, part.timesteps)), conditional


def _received(function: Function, bound: bool, call: ast.Call, timesteps: frozenset[str]) -> Iterator[str]:
    """Parameters that a call gives something made of the timestep."""
    code = function.__code__
    names = code.co_varnames[bound : code.co_argcount]
    for name, value in zip(names, call.args, strict=False):
        if isinstance(value, ast.Starred):
            break  # what comes after it may be for any
        if follows(value, timesteps):
            yield name
    for one in call.keywords:
        if one.arg in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] and follows(one.value, timesteps):
            yield one.arg
