"""The live page: a parallel sampler beside the sequential one, on this machine and for it alone; it needs the extra `demo`.

The page is served on the loopback address, and neither it nor its server asks anything of any other: no fonts, no analytics.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import gradio as gr
from markupsafe import Markup, escape
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from piadm import models
from piadm.choices import PAPERS, SamplerName, SchedulerName, make_published, make_scheme, read_condition, read_window
from piadm.denoiser import Denoiser, DenoiserLike
from piadm.errors import require, require_count
from piadm.exact import Exact
from piadm.film import SAMPLES
from piadm.pictures import address, heat_image, pixels, png
from piadm.racing import Draw, Lane, Turns, race
from piadm.record import distance
from piadm.samplers import Parallel, Sequential

USERS = 2
"""Races at once."""
WAITING = 2
"""Races that may wait for one of them to end; more are turned away."""
COLUMNS = 500
"""Pixels across the convergence map, at most."""
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
_CSS = """
.gradio-container { max-width: 66rem !important; margin: 0 auto !important; }
.gradio-container { --block-info-text-color: color-mix(in srgb, var(--body-text-color) 75%, transparent); }
#note { min-height: 2.2rem; }
.lane h3 { margin: 0 0 .5rem; font-size: 1.05rem; }
.lane figcaption, .map figcaption { opacity: .75; font-size: .85rem; font-weight: normal; }
.lane .images { display: grid; grid-template-columns: repeat(auto-fit, minmax(4rem, 1fr)); gap: .6rem; min-height: 8rem; }
.lane figure { margin: 0; max-width: 10rem; }
.lane .many figure { max-width: none; }
.lane .many { grid-template-columns: 1fr; min-height: 0; }
.lane img { display: block; width: 100%; image-rendering: pixelated; border-radius: .25rem; }
.lane table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-variant-numeric: tabular-nums; }
.lane table, .lane tr, .lane th, .lane td { border: 0; background: none; font-weight: normal; }
.lane tr { border-bottom: 1px solid var(--border-color-primary); }
.lane th, .lane td { padding: .3rem 0; text-align: left; vertical-align: top; } .lane td { text-align: right; }
.lane progress { display: block; width: 100%; height: .5rem; border: 0; border-radius: .25rem; }
.lane progress { overflow: hidden; appearance: none; }
.lane progress, .lane ::-webkit-progress-bar { background: rgb(128 128 128 / .25); }
.lane ::-webkit-progress-value { background: var(--color-accent); }
.lane ::-moz-progress-bar { background: var(--color-accent); }
.map figure { margin: 0; }
.map .plot { position: relative; height: 13rem; background: rgb(128 128 128 / .15); border-radius: .25rem; overflow: hidden; }
.map .plot > * { position: absolute; inset: 0; width: 100%; height: 100%; image-rendering: pixelated; }
.map polyline { fill: none; stroke: crimson; stroke-width: 2.5; vector-effect: non-scaling-stroke; }
.map .ends { display: flex; justify-content: space-between; gap: 1rem; }
.map .scale { display: inline-block; width: 7rem; height: .7rem; vertical-align: middle; border-radius: .2rem;
  background: linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725); }
.map .prefix { display: inline-block; width: 1.4rem; border-top: 3px solid crimson; vertical-align: middle; }
"""


def serve(port: int, browser: bool) -> None:
    """Serves the page on the loopback address until it is interrupted.

    Raises:
        OSError: if the port is taken.
    """
    page().launch(
        server_name="127.0.0.1",
        server_port=port,
        inbrowser=browser,
        share=False,
        quiet=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        app_kwargs={"middleware": [Middleware(_Alone)]},
    )


class _Alone:
    """Forbids the browser to fetch anything from elsewhere, whatever the page framework would have it do."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", _POLICY)]}
            await send(message)

        await self._app(scope, receive, told)


def page() -> gr.Blocks:
    """The page: `USERS` races run at once and `WAITING` more may wait."""
    hall = _Hall()
    blocks = gr.Blocks(title="piadm: parallel beside sequential", analytics_enabled=False)
    with blocks:
        gr.HTML(
            "<h1>The same sample, in parallel and one step after the other</h1><p>Both start from the same noise. They take "
            "turns, the one behind goes on, and each clock runs in its own turns only: as if each had this machine alone.</p>"
        )
        with gr.Row():
            model = gr.Dropdown(list(models.NAMES), value="digits", label="Model")
            label = gr.Dropdown(
                _labels("digits"),
                value="7",
                label="Label",
                info="One class or several: 7, or 0,1,2",
                allow_custom_value=True,
                elem_id="label",
            )
            names = [name.value for name in SamplerName if name is not SamplerName.sequential]
            sampler = gr.Dropdown(names, value="parallel", label="Sampler")
            scheduler = gr.Dropdown([name.value for name in SchedulerName], value="ddpm", label="Scheduler")
        with gr.Row():
            steps = gr.Number(1000, elem_id="steps", label="Steps", info="Network calls of the sequential run")
            window = gr.Textbox("32", elem_id="window", label="Window", info="Steps at once, all, or auto", max_lines=1)
            samples = gr.Slider(1, SAMPLES, value=1, step=1, label="Samples", elem_id="samples")
            seed = gr.Number(0, label="Seed", elem_id="seed")
        with gr.Row():
            run = gr.Button("Run", variant="primary")
            stop = gr.Button("Stop", variant="stop", interactive=False)
        note = gr.HTML(elem_id="note")
        with gr.Row():
            parallel = gr.HTML(_empty("Parallel"), elem_id="parallel", elem_classes="lane", min_width=280)
            sequential = gr.HTML(_empty("Sequential"), elem_id="sequential", elem_classes="lane", min_width=280)
        heat = gr.HTML(elem_id="map", elem_classes="map")

        direct: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        model.change(lambda name: gr.Dropdown(_labels(name)), model, label, **direct)
        sampler.change(_meaningful, sampler, [scheduler, window], **direct)
        inputs = [model, label, sampler, scheduler, steps, window, samples, seed]
        views = [parallel, sequential, heat, note]
        stop.click(hall.stop, **direct)
        entering = {**direct, "queue": True, "concurrency_limit": None}  # only what queues can say what was refused
        entered = run.click(hall.enter, inputs, [*views, run, stop], **entering)
        ran = entered.success(hall.run, inputs, views, show_progress="hidden", api_visibility="private")
        ran.then(hall.leave, None, [run, stop], **direct)
        blocks.unload(hall.close)
    blocks.queue(max_size=WAITING, default_concurrency_limit=USERS, api_open=False)
    return blocks


def _labels(model: str) -> list[tuple[str, str]]:
    return [(f"{n} · {name}" if model == "fashion" else str(n), str(n)) for n, name in enumerate(models.LABELS)]


def _meaningful(sampler: str) -> tuple[gr.Dropdown, gr.Textbox]:
    """The paper's samplers have steps and blocks of their own."""
    own = SamplerName(sampler) in PAPERS
    return gr.Dropdown(interactive=not own), gr.Textbox(interactive=not own)


@cache
def _model(name: str) -> Denoiser:
    return models.load(name)


class _Hall:
    """Who is running, or waits to: a flag for each that ends it."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._stops: dict[str, threading.Event] = {}

    def enter(self, request: gr.Request, *given: Any) -> tuple[Any, ...]:
        """Refuses bad values at once, without a place in the queue."""
        whose = str(request.session_hash)
        if whose in self._stops:
            raise gr.Error("A run of this page is still under way: stop it first.", print_exception=False)
        with _told():
            _lanes(*given, turns=self._turns, stop=threading.Event())
        full = len(self._stops) >= USERS
        self._stops[whose] = threading.Event()
        note = "Waiting: others are running." if full else ""
        return (
            _empty("Parallel"),
            _empty("Sequential"),
            "",
            _said(note),
            gr.Button(interactive=False),
            gr.Button(interactive=True),
        )

    def run(self, request: gr.Request, *given: Any) -> Iterator[tuple[str, ...]]:
        stop = self._stops.setdefault(str(request.session_hash), threading.Event())
        with _told():
            lanes = _lanes(*given, turns=self._turns, stop=stop)
            for _ in race(lanes, stop):
                yield (*map(_lane, lanes), _map(lanes[0]), _said(_outcome(*lanes)))

    def stop(self, request: gr.Request) -> None:
        if (flag := self._stops.get(str(request.session_hash))) is not None:
            flag.set()

    def close(self, request: gr.Request) -> None:
        """Whatever runs for a page that is gone ends."""
        if (flag := self._stops.pop(str(request.session_hash), None)) is not None:
            flag.set()

    def leave(self, request: gr.Request) -> tuple[gr.Button, gr.Button]:
        """After a run, however it ended."""
        self.close(request)
        return gr.Button(interactive=True), gr.Button(interactive=False)


class _told:
    """What the library refuses, said on the page."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | TypeError | ArithmeticError):
            message = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(str(error))))
            raise gr.Error(message, print_exception=False) from error


def _lanes(
    model: str,
    label: str | None,
    sampler: str,
    scheduler: str,
    steps: float | None,
    window: str,
    samples: float | None,
    seed: float | None,
    *,
    turns: Turns,
    stop: threading.Event,
) -> tuple[Lane, Lane]:
    """The parallel run and the sequential one beside it, before their first network call.

    Raises:
        ValueError, TypeError: for values that are not right.
    """
    denoiser, name, count, whole = _model(model), SamplerName(sampler), _integer(samples), _integer(steps)
    require(isinstance(count, int) and 1 <= count <= SAMPLES, "samples", count, f"give an integer from 1 to {SAMPLES}")
    require_count("steps", whole, "1000")
    start = _integer(seed)
    require(isinstance(start, int) and 0 <= start < 2**53, "seed", start, "give an integer from 0 to 2**53 - 1")
    condition = read_condition(label or "", count, True, denoiser)
    width = None if name in PAPERS else read_window(window.strip())

    def make(wrapped: DenoiserLike) -> Parallel:
        if name in PAPERS:
            return make_published(name, wrapped, whole)
        kind = Exact if name is SamplerName.exact else Parallel
        return kind(wrapped, make_scheme(SchedulerName(scheduler), wrapped, whole, 0.0), window=width)

    draw = Draw(count, start, condition)
    parallel = Lane(make, denoiser, draw, turns, stop)
    return parallel, Lane(lambda wrapped: Sequential(wrapped, parallel.sampler.scheme), denoiser, draw, turns, stop)


def _integer(value: float | None) -> Any:
    """A number field's value, where it is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _outcome(parallel: Lane, sequential: Lane) -> str:
    """What can be said so far."""
    if parallel.stopped or sequential.stopped:
        return "Stopped. What is shown is the last complete round of each."
    if parallel.result is None or sequential.result is None:
        return ""
    ratio = sequential.seconds / parallel.seconds
    fewer = f"{parallel.rounds} rounds in place of {sequential.rounds}, {ratio:.3g} times as fast."
    if parallel.result.acceptance is not None:
        return f"{fewer} Exact: other samples than the sequential ones, of exactly the same law."
    return f"{fewer} The samples differ by {float(distance(parallel.result, sequential.result).max()):.1g} (rms) at most."


def _said(text: str) -> str:
    return str(Markup('<p role="status">{}</p>').format(text)) if text else ""


def _empty(title: str) -> str:
    return str(Markup('<h3>{}</h3><div class="images"></div>').format(title))


def _lane(lane: Lane) -> str:
    title = "Sequential" if isinstance(lane.sampler, Sequential) else "Parallel"
    if lane.ahead is None or lane.state is None:
        return _empty(title)
    told = "prediction" if lane.result is None else "sample"
    figures = [("rounds", f"{lane.rounds}"), ("steps finished", f"{lane.finished} of {lane.steps}")]
    figures.append(("time", f"{lane.seconds:.2f} s"))
    images = [_figure(lane.ahead, told), _figure(lane.state, "finished state, noise and all")]
    rows = Markup("").join(Markup("<tr><th>{}</th><td>{}</td></tr>").format(*one) for one in figures)
    bar = Markup('<progress max="{}" value="{}"></progress>').format(lane.steps, lane.finished)
    whole = Markup('<h3>{}</h3><div class="images{}">{}</div><table>{}</table>{}')
    return str(whole.format(title, " many" if len(lane.ahead) > 1 else "", Markup("").join(images), rows, bar))


def _figure(images: Tensor, told: str) -> Markup:
    picture = pixels(images)
    row = picture.swapaxes(0, 1).reshape(picture.shape[1], -1, 3)
    return Markup('<figure><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>').format(address(png(row)), told, told)


def _map(lane: Lane) -> str:
    """The convergence map: step from left to right, round from below upwards."""
    if not lane.rounds:
        return ""
    image, low, high = heat_image(lane.steps, lane.windows, lane.residuals, COLUMNS)
    corners = [(start, lane.rounds - n - up) for n, (start, _) in enumerate(lane.windows) for up in (0, 1)]
    corners += [(lane.steps, 0)] if lane.result is not None else []
    whole = Markup(
        '<figure><h3>Convergence of the parallel run</h3><div class="plot"><img src="{}" alt="residual by step and round">'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" aria-hidden="true"><polyline points="{}"/></svg></div>'
        '<figcaption><div class="ends"><span>step 0: noise</span><span>step {}: sample</span></div>'
        'Rounds 1 to {} from below. Residual (rms) {} <span class="scale"></span> {}, <span class="prefix"></span> '
        "finished steps</figcaption></figure>"
    )
    points = " ".join(f"{x},{y}" for x, y in corners)
    return str(
        whole.format(address(png(image)), lane.steps, lane.rounds, points, lane.steps, lane.rounds, f"{low:.1g}", f"{high:.1g}")
    )
