"""The command line: reads arguments, runs a sampler, prints a table. What is written is in `piadm.record`."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypedDict

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table as Grid

from piadm import models
from piadm.checkpoint import Checkpoint, load, save
from piadm.choices import NO_CLASS, PAPERS, SamplerName, SchedulerName, make_published, make_scheme, read_condition, read_window
from piadm.denoiser import DenoiserLike, Guided
from piadm.errors import NonFiniteError, RankError, require, require_count
from piadm.exact import Exact
from piadm.executors import cut
from piadm.exponential import Corrector, ExponentialSDE
from piadm.film import Film
from piadm.noise import Noise
from piadm.pictures import is_image
from piadm.planner import Method, Plan
from piadm.planner import plan as make_plan
from piadm.record import Run, distance, forget_run, write_finished, write_run
from piadm.report import write_report
from piadm.result import Result
from piadm.samplers import Parallel, Sequential
from piadm.sharded import Cost, Sharded, sharding

# plain errors keep a message on one line and tracebacks free of every local tensor
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)


@app.callback()
def piadm() -> None:
    """Diffusion and flow models sampled in parallel across time."""


class MethodName(str, Enum):
    sde = "sde"
    ode = "ode"


_SERVES = {
    **dict.fromkeys(("scheduler", "eta"), (SamplerName.parallel, SamplerName.exact, SamplerName.sequential)),
    **dict.fromkeys(("window", "max_memory"), (SamplerName.parallel, SamplerName.exact)),
    **dict.fromkeys(("tolerance", "target_kl"), (SamplerName.parallel,)),
    **dict.fromkeys(("iterations", "horizon", "block", "early_stop"), PAPERS),
    "compare": (*PAPERS, SamplerName.parallel),
}
"""The samplers an option means something to; options not listed serve all."""
_LOCAL = ("output", "progress", "checkpoint", "resume", "report")
"""Options that change nothing of what is drawn."""


@app.command()
def sample(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help=f"An embedded model ({', '.join(models.NAMES)}), or your own as path.py:function. That file is run as Python "
            "code, the only code this command ever loads; function() returns a piadm.Denoiser with its event_shape."
        ),
    ] = "fashion",
    label: Annotated[
        str | None,
        typer.Option(help="Class of the samples, or several that they cycle through: 7 or 0,1,2. All classes by default."),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="How many samples.")] = 16,
    sampler: Annotated[
        SamplerName,
        typer.Option(
            help="The paper's algorithms; or a scheduler's steps: in parallel, in parallel with exactly the scheduler's law "
            "(exact), or one after the other."
        ),
    ] = SamplerName.parallel,
    scheduler: Annotated[
        SchedulerName, typer.Option(help="Steps of parallel, exact and sequential; euler is for flow models.")
    ] = SchedulerName.ddpm,
    eta: Annotated[float, typer.Option(help="Noise of ddim, from 0 (none) to 1 (ddpm).")] = 0.0,
    num_inference_steps: Annotated[
        int,
        typer.Option(
            help="Network calls of the sequential scheme. piadm-sde and piadm-ode choose their step for at most that many; "
            "half of piadm-ode's go to its corrector."
        ),
    ] = 1000,
    window: Annotated[
        str,
        typer.Option(
            help="parallel, exact: steps iterated at once, more take fewer rounds and more memory; all; or auto: time the "
            "network first, and take what is fastest here."
        ),
    ] = "32",
    tolerance: Annotated[float, typer.Option(help="parallel: rms distance from the sequential sample.")] = 1e-2,
    target_kl: Annotated[
        float | None,
        typer.Option(help="parallel: in place of the tolerance, divergence from the sequential law, in nats, at most."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="parallel, exact: bytes that a run may take besides the weights, or a fraction of the machine's: 0.5."
        ),
    ] = None,
    iterations: Annotated[int, typer.Option(help="piadm-*: rounds of each block.")] = 24,
    horizon: Annotated[float, typer.Option(help="piadm-*: time at which sampling starts.")] = ExponentialSDE.horizon,
    block: Annotated[float, typer.Option(help="piadm-*: time that a block spans.")] = ExponentialSDE.block,
    early_stop: Annotated[float, typer.Option(help="piadm-*: time at which sampling ends.")] = ExponentialSDE.early_stop,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance of an embedded model; 1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for samples, pictures and run.json.")] = Path("out"),
    compare: Annotated[bool, typer.Option("--compare", help="Also run the scheme sequentially, with the same noise.")] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A file in which the run is kept every 30 s. An interrupted run leaves one in the output in any case."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on from such a file, and keep it up to date: give the interrupted run's options too."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also keep how the first samples emerge, and write it all on a page, report.html.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Draws samples, prints what they cost, and writes them with pictures and a record of the run.

    Started by torchrun or accelerate launch, each process evaluates its share of every round.
    """
    kept = checkpoint or resume or output / "checkpoint.safetensors"
    try:
        require(
            checkpoint is None or resume is None, "resume", str(resume), "that file is kept up to date: leave out --checkpoint"
        )
        arguments = _arguments(context, sampler, scheduler)
        require_count("num_samples", num_samples, "16")
        require_count("num_inference_steps", num_inference_steps, "1000")
        require(0 <= seed < 2**63, "seed", seed, "give an integer from 0 to 2**63 - 1")
        context.with_resource(_processes())
        denoiser = _load(model, guidance_scale)
        if dist.is_available() and dist.is_initialized():
            denoiser = Sharded(denoiser)
        film = Film(denoiser) if report else None
        if film is not None:
            denoiser = film
        condition = read_condition(label, num_samples, model in models.NAMES, denoiser)
        chosen: Parallel | Sequential
        fit: _Fit = {"window": read_window(window), "max_memory": _memory(max_memory)}
        if sampler in PAPERS:
            grid = {"horizon": horizon, "block": block, "early_stop": early_stop}
            chosen = make_published(sampler, denoiser, num_inference_steps, iterations=iterations, **grid)
        elif sampler is SamplerName.parallel:
            scheme = make_scheme(scheduler, denoiser, num_inference_steps, eta)
            chosen = Parallel(denoiser, scheme, tolerance=tolerance, target_kl=target_kl, **fit)
        elif sampler is SamplerName.exact:
            scheme = make_scheme(scheduler, denoiser, num_inference_steps, eta)
            remedy = "its steps have no noise, so no law to be exact in; use ddpm, or ddim with --eta above 0"
            require(scheme(denoiser.schedule).stochastic, "scheduler", scheduler.value, remedy)
            chosen = Exact(denoiser, scheme, **fit)
        else:
            chosen = Sequential(denoiser, make_scheme(scheduler, denoiser, num_inference_steps, eta))
        _prepare(output)
        title = f"{sampler.value} on {Path(model).name}: {num_samples} samples, {len(chosen.table)} steps"
        run = Run(arguments, repr(denoiser), repr(chosen.scheme), condition, title)
        _run(run, chosen, denoiser, num_samples, seed, output, compare, progress, checkpoint, resume, film)
    except (ValueError, TypeError) as error:
        message = str(error) if resume is None else str(error).replace("`checkpoint`", "`resume`")
        _fail(_in_options(message, context) + _place(error, model) + _keep(error, kept), 2)
    except RankError as error:
        _fail(str(error) + _keep(error, kept), 1)
    except KeyboardInterrupt as error:
        _fail("interrupted" + _keep(error, kept), 130)
    except Exception as error:
        if told := _keep(error, kept):
            typer.echo(f"piadm sample: {type(error).__name__}{told}", err=True)
        raise


class _Fit(TypedDict):
    """What the machine has a say in."""

    window: int | Literal["auto"] | None
    max_memory: float | None


def _memory(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        return int(given) if given.isdecimal() else float(given)
    except ValueError:
        raise ValueError(f"`max_memory` is {given!r}: give bytes, such as 2000000000, or a fraction, such as 0.5") from None


@app.command("report")
def report_run(folder: Annotated[Path, typer.Argument(help="The --output of a piadm sample.")]) -> None:
    """Writes a run on one page, report.html in its folder: samples, rounds, certificate, what it cost.

    The page needs no network and no other file. Runs with --report show how their samples emerged as well.
    """
    try:
        path = write_report(folder)
    except (ValueError, OSError) as error:
        typer.echo(f"piadm report: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"written to {path}")


@app.command("demo")
def demo_page(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on the loopback address.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Serves a page on which a parallel sampler runs beside the sequential one and both fill in; Ctrl-C ends it.

    Only this machine can reach it, and it asks nothing of any other. It needs the extra demo.
    """
    try:
        from piadm.demo import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        typer.echo("piadm demo: the page needs gradio: pip install 'piadm[demo]'", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"serving on http://127.0.0.1:{port}")
    try:
        serve(port, browser)
    except OSError as error:
        typer.echo(f"piadm demo: --port is {port}: it cannot be had ({error}): give another", err=True)
        raise typer.Exit(2) from None


@app.command()
def plan(
    context: typer.Context,
    dimension: Annotated[int, typer.Option(help="d, the numbers in a sample.")],
    tolerance: Annotated[
        float, typer.Option(help="δ: KL ≤ δ² for sde, TV ≤ δ for ode, from data noised for early_stop.")
    ] = 0.1,
    lipschitz: Annotated[float, typer.Option(help="Lipschitz constant of the score, at least 1.")] = 1.0,
    method: Annotated[MethodName, typer.Option(help="PIADM-SDE or PIADM-ODE.")] = MethodName.sde,
    early_stop: Annotated[
        float | None, typer.Option(help="Time at which sampling ends; 1e-3, or less for short blocks.")
    ] = None,
) -> None:
    """Says how arXiv 2405.15986 would set its samplers, and what exact laws of Gaussian data say suffices."""
    try:
        name: Method = "sde" if method is MethodName.sde else "ode"
        theorem = make_plan(dimension, tolerance, lipschitz=lipschitz, method=name, early_stop=early_stop)
    except (ValueError, TypeError) as error:
        typer.echo(f"piadm plan: {_in_options(str(error), context)}", err=True)
        raise typer.Exit(2) from None
    Console().print(_plan_table(theorem))


def _plan_table(theorem: Plan) -> Grid:
    plans = [one for one in (theorem, theorem.sufficient) if one is not None]
    grid = Grid(f"PIADM-{theorem.method.upper()}, d = {theorem.dimension:.3g}, δ = {theorem.tolerance:g}")
    for name in (f"theorem {'3.3' if theorem.method == 'sde' else '3.5'}", "Gaussian data need"):
        grid.add_column(name, justify="right")
    rows: dict[str, Callable[[Plan], float]] = {
        "horizon T": lambda one: one.horizon,
        "block h": lambda one: one.block,
        "blocks N": lambda one: one.blocks,
        "step ε": lambda one: one.step,
        "steps a block M": lambda one: one.block_steps,
        "rounds a block K": lambda one: one.iterations,
        "early stop η": lambda one: one.early_stop,
    }
    corrector: dict[str, Callable[[Corrector], float]] = {
        "corrector: friction γ": lambda one: one.friction,
        "horizon T†": lambda one: one.horizon,
        "blocks N†": lambda one: one.blocks,
        "step ε†": lambda one: one.step,
        "rounds K†": lambda one: one.iterations,
    }
    costs: dict[str, Callable[[Plan], float]] = {
        "rounds": lambda one: one.rounds,
        "evaluations per sample": lambda one: one.evaluations,
        "network calls one by one": lambda one: one.steps,
        "bytes of a block's states": lambda one: one.memory,
    }
    for name, value in rows.items():
        grid.add_row(name, *(f"{value(one):.3g}" for one in plans))
    for name, number in corrector.items() if theorem.corrector is not None else ():
        grid.add_row(name, *(f"{number(one.corrector):.3g}" for one in plans if one.corrector is not None))
    for name, value in costs.items():
        grid.add_row(name, *(f"{value(one):.3g}" for one in plans))
    return grid


def _run(
    run: Run,
    sampler: Parallel | Sequential,
    denoiser: DenoiserLike,
    samples: int,
    seed: int,
    folder: Path,
    compare: bool,
    progress: bool,
    checkpoint: Path | None,
    resume: Path | None,
    film: Film | None,
) -> None:
    shards = sharding(denoiser)
    leads = shards is None or shards.rank == 0

    def source() -> torch.Generator:
        return torch.Generator(denoiser.device or "cpu").manual_seed(seed)

    def draw(one: Parallel | Sequential, path: Path | None = None, **filmed: Any) -> Result:
        shape = (samples, *(denoiser.event_shape or ()))
        return one(shape, generator=source(), progress=progress and leads, checkpoint=path, **run.condition, **filmed)

    filmed: dict[str, Any] = {} if film is None else {"callback": film.callback, **film.condition(samples)}

    console = Console(quiet=not leads)
    sequential, cost, drawn = None, None, False
    try:
        if resume is None:
            result = draw(sampler, checkpoint, **filmed)
        else:
            kept = load(resume)
            require(kept.shape[0] == samples, "num_samples", samples, f"the run to resume has {kept.shape[0]}")
            seeds = Noise(source(), samples, 1, 1, source().device, torch.float32).seeds
            require(list(kept.seeds) == seeds, "seed", seed, "the run to resume has another")
            result = sampler.resume(resume, progress=progress and leads, **run.condition, **filmed)
        cost, drawn = None if shards is None else shards.cost, True
        try:
            if compare:
                console.print("once more, one step after the other:")
                sequential = draw(Sequential(denoiser if film is None else film.denoiser, sampler.scheme))
        except BaseException as error:
            if hasattr(error, "checkpoint"):
                del error.checkpoint  # the sequential run's, which --resume has no use for
            raise
        finally:  # whatever becomes of the comparison, the samples are there
            if leads:
                frames = None if film is None else film.tensors(result.rounds, result.samples)
                write_run(folder, run, result, sequential, frames)
    except NonFiniteError as error:
        others = [row for row in range(samples) if row not in error.samples]
        if error.result is not None and leads:
            write_run(folder, replace(run, condition=cut(run.condition, others, samples)), error.result)
        elif not drawn and leads:
            forget_run(folder)
        path = write_finished(folder, run, error) if leads else folder
        _fail(
            f"the network returned NaN or infinity at step {error.step} in round {error.round} (samples {error.samples}); "
            f"the states reached before that are in {path}" + ", the other samples beside it" * (error.result is not None),
            1,
        )
    console.print(_table(run, result, sequential, cost))
    if not is_image(result.samples.shape[1:]):
        console.print(f"no samples.png: samples of shape {tuple(result.samples.shape[1:])} are not images (1 or 3, H, W)")
    if not result.windows:
        console.print("no convergence.png: a sequential run has no rounds to compare")
    if film is not None and leads:
        write_report(folder)
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)


def _table(run: Run, result: Result, sequential: Result | None, cost: Cost | None) -> Grid:
    grid = Grid(f"{Path(run.arguments['model']).name}, {result.steps} steps")
    grid.add_column(run.arguments["sampler"].value, justify="right")
    runs = [result]
    if sequential is not None:
        grid.add_column("sequential", justify="right")
        runs.append(sequential)
    if result.choice is not None:
        grid.add_row("window, as measured", f"{result.choice.window}")
    grid.add_row("rounds", *(f"{one.rounds}" for one in runs))
    grid.add_row("evaluations per sample", *(f"{one.evaluations:.4g}" for one in runs))
    if result.acceptance is not None:
        grid.add_row("tests accepted per sample", f"{result.acceptance.accepted.double().mean():.4g}")
        grid.add_row("rejected", f"{result.acceptance.rejected.double().mean():.4g}")
    grid.add_row("certificate", *(str(one.certificate) for one in runs))
    grid.add_row("wall time", *(f"{one.seconds:.3g} s" for one in runs))
    if cost is not None:
        grid.add_row(f"of it network, slowest of {dist.get_world_size()} ranks", f"{cost.slowest:.3g} s")
        grid.add_row("communication", f"{cost.communication:.3g} s")
        grid.add_row("own arithmetic", f"{result.seconds - result.network_seconds:.3g} s")
    if sequential is not None:
        grid.add_row("time ratio", f"{sequential.seconds / result.seconds:.3g}× as fast", "1")
        grid.add_row("rms difference (largest)", f"{distance(result, sequential).max():.2g}", "0")
    return grid


def _arguments(context: typer.Context, sampler: SamplerName, scheduler: SchedulerName) -> dict[str, Any]:
    """The arguments that determine this run; refuses options that would change nothing."""
    arguments = {name: value for name, value in context.params.items() if name not in _LOCAL}
    idle = {
        name: f"no use to --sampler {sampler.value}, only to {' or '.join(one.value for one in samplers)}"
        for name, samplers in _SERVES.items()
        if sampler not in samplers
    }
    if scheduler is not SchedulerName.ddim:
        idle.setdefault("eta", "no use without --scheduler ddim")
    if arguments["target_kl"] is not None:
        idle.setdefault("tolerance", "no use with --target-kl, which takes its place")
    for name, remedy in idle.items():
        source = context.get_parameter_source(name)
        require(source is None or source.name == "DEFAULT", name, arguments.pop(name), remedy)
    return arguments


def _load(model: str, guidance_scale: float) -> DenoiserLike:
    if model not in models.NAMES:
        alone = guidance_scale == 1
        require(alone, "guidance_scale", guidance_scale, "is for embedded models: return piadm.Guided(…) from your function")
        return _own(model)
    embedded = models.load(model)
    if guidance_scale == 1:
        return embedded
    return Guided(embedded, guidance_scale, {"label": torch.tensor([NO_CLASS])})


def _own(model: str) -> DenoiserLike:
    """What the function of `path.py:function` returns."""
    file, _, function = model.rpartition(":")
    known = ", ".join(models.NAMES)
    require(file.endswith(".py"), "model", model, f"the embedded models are {known}; give your own as path.py:function")
    path = Path(file).resolve()
    require(path.is_file(), "model", model, f"there is no file {path}")
    spec = importlib.util.spec_from_file_location("piadm_user_model", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"`model` is {model!r}: Python cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    sys.path.insert(0, str(path.parent))  # as for a script: its neighbours can be imported
    with _blamed(model):
        spec.loader.exec_module(module)
    make: Any = getattr(module, function, None)
    require(callable(make), "model", model, f"{path.name} has no function {function!r}")
    with _blamed(model):
        denoiser: DenoiserLike = make()
    event = getattr(denoiser, "event_shape", None)
    fits = isinstance(event, tuple) and hasattr(denoiser, "schedule") and callable(denoiser)
    remedy = "return piadm.Denoiser(network, schedule, prediction, event_shape=(1, 28, 28))"
    require(fits, "model", model, f"{function}() returned {denoiser!r}, no denoiser with an event_shape: {remedy}")
    return denoiser


@contextmanager
def _blamed(model: str) -> Iterator[None]:
    """Whatever the user's code raises while loading, as one line of bad input."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"`model` is {model!r}: {type(error).__name__}: {error}{_place(error, model)}") from error


@contextmanager
def _processes() -> Iterator[None]:
    """The process group of the processes that torchrun or accelerate launch started, if they did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _keep(error: BaseException, path: Path) -> str:
    """Writes down how far an interrupted run had come, and says so."""
    run: Checkpoint | None = getattr(error, "checkpoint", None)
    if run is None or run.state.rounds == 0:
        return ""
    save(run, path)
    return f"; {run.state.rounds} rounds are kept: go on by the same command with --resume {path}"


def _prepare(output: Path) -> None:
    """Makes the folder before the run rather than find out after it that one cannot."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`output` is '{output}': it cannot be a folder ({error.strerror}): give another path") from error
    require(os.access(output, os.W_OK), "output", str(output), "the folder cannot be written to: give another path")


def _place(error: Exception, model: str) -> str:
    """Where in the user's file an error arose, if it did."""
    path = str(Path(model.rpartition(":")[0]).resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" ({Path(path).name}, line {lines[-1]})" if lines else ""


def _in_options(message: str, context: typer.Context) -> str:
    """The library's messages name arguments; here they are options."""

    def option(found: re.Match[str]) -> str:
        name = "num_inference_steps" if found[1] == "steps" else found[1]
        return f"--{name.replace('_', '-')}" if name in context.params else found[0]

    return re.sub(r"(?:`|(?<=keyword argument )')(\w+)[`']", option, message)


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    typer.echo(f"piadm sample{f' (rank {rank})' if rank != '0' else ''}: {message}", err=True)
    raise typer.Exit(code)
