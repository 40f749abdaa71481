"""Draws the pictures of "How it works", in about two minutes: python docs/pictures.py

They are made by the library itself, on a transparent ground and in a grey that reads on white as on black.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import piadm
from piadm import pictures, propagators
from piadm.fills import Copy, Fill, Jump
from piadm.film import Film
from piadm.noise import Noise
from piadm.windows import Sliding

INK = "#7b828c"
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
SETTINGS = {
    **dict.fromkeys(INKED, INK),
    **dict.fromkeys(("savefig.facecolor", "figure.facecolor", "axes.facecolor"), "none"),
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10.5,
}


def paths(
    denoiser: piadm.DenoiserLike,
    scheme: piadm.DDPM,
    event: tuple[int, ...],
    propagator: propagators.Propagator,
    fill: Fill,
    **condition: Tensor,
) -> Iterator[Tensor]:
    """All states of one sample, shape `(M + 1, D)`, before the first round and after each."""
    table = scheme(denoiser.schedule)
    noise = Noise(torch.Generator().manual_seed(2), 1, int(np.prod(event)), 1, torch.device("cpu"), torch.float32)
    solver = piadm.Solver(table, noise, propagator, Sliding(None), fill, 1e-7, denoiser.variance)
    state = solver.init(table.scale * noise.start())
    path = state.x[:, 0, 0]
    yield path
    while not state.done:
        request = solver.request(state)
        rows = {name: value.expand(len(request.x)) for name, value in condition.items()}
        f = denoiser(request.x.reshape(-1, *event), request.t, **rows)
        state = solver.update(state, f.reshape(request.x.shape))
        path = torch.cat([path[: int(state.start)], state.x[:, 0, 0]])
        yield path


def draw_round(file: Path) -> None:
    """One number, drawn from a mixture of two Gaussians in 40 steps: what the first rounds make of its path."""
    target = piadm.targets.GaussianMixture(torch.tensor([[-1.0], [1.5]]), 0.01, schedule=piadm.schedules.OrnsteinUhlenbeck(8.0))
    figure = Figure(figsize=(7.6, 3.4), dpi=110, layout="constrained")
    every = [
        list(paths(target, piadm.DDPM(steps=40), (1,), *policies))
        for policies in (
            (propagators.Identity(), Copy()),
            (propagators.Secant(target.variance), Jump(variance=target.variance)),
        )
    ]
    for axes, rounds, title in zip(
        figure.subplots(1, 2, sharey=True), every, ("Identity, Copy: ParaDiGMS", "Secant, Jump: ours"), strict=True
    ):
        for number, shade in ((0, 0.35), (1, 0.5), (2, 0.7), (4, 0.9)):
            axes.plot(
                rounds[min(number, len(rounds) - 1)][:, 0],
                color=matplotlib.colormaps["viridis"](shade),
                label=f"round {number}",
            )
        axes.plot(every[0][-1][:, 0], ".", color="crimson", markersize=4, label="sequential")
        axes.set(title=title, xlabel="step")
    figure.axes[0].set(ylabel="state", ylim=(-3.5, 3.5))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(file)


def draw_propagators(file: Path, steps: int) -> None:
    """How far the last state is from the sequential sample after each round."""
    denoiser = piadm.models.load("digits")
    scheme, label = piadm.DDPM(steps=steps), torch.tensor([7])
    variance = denoiser.variance
    compared: dict[str, propagators.Propagator] = {
        "Identity (ParaDiGMS)": propagators.Identity(),
        "Exponential (PIADM)": propagators.Exponential(),
        "Gaussian": propagators.Gaussian(variance),
        "Secant": propagators.Secant(variance),
    }
    figure = Figure(figsize=(7.2, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for (name, propagator), color in zip(compared.items(), ("#b07aa1", "#e15759", "#59a14f", "#4e79a7"), strict=True):
        ends = [path[-1] for path in paths(denoiser, scheme, (1, 8, 8), propagator, Jump(denoiser.mean, variance), label=label)]
        gaps = [float((end - ends[-1]).square().mean().sqrt()) for end in ends[:-1]]
        axes.semilogy([gap for gap in gaps if gap > 1e-6], color=color, label=name)
    axes.set(xlabel="round", ylabel="rms distance from the sequential sample", xlim=(0, 40), ylim=(1e-5, 2e2))
    figure.legend(loc="outside upper center", ncols=4, fontsize=9)
    figure.savefig(file)


def draw_convergence(file: Path, steps: int) -> None:
    """The convergence map of one digit."""
    sampler = piadm.Parallel(piadm.models.load("digits"), piadm.DDPM(steps=steps), window=max(1, steps // 8), merge=False)
    result = sampler((1, 1, 8, 8), generator=torch.Generator().manual_seed(0), label=torch.tensor([7]))
    residuals = [row.tolist() for row in result.residuals]
    figure = pictures.convergence(steps, result.windows, residuals, (6.4, 3.4))
    figure.axes[0].get_legend().remove()
    figure.savefig(file, dpi=110)


def draw_emerging(file: Path, steps: int) -> None:
    """What the window's last step predicts of four samples, round by round; the last column is what came of it."""
    film = Film(piadm.models.load("fashion"))
    sampler = piadm.Parallel(film, piadm.DDPM(steps=steps), window=max(1, steps // 8), merge=False)
    conditions = {"label": torch.tensor([7, 9, 8, 2]), **film.condition(4)}
    result = sampler((4, 1, 28, 28), generator=torch.Generator().manual_seed(1), callback=film.callback, **conditions)
    frames = film.tensors(result.rounds, result.samples)
    chosen = torch.linspace(0, len(frames["rounds"]) - 1, 9).round().long()
    figure = Figure(figsize=(7.6, 3.6), dpi=110, layout="constrained")
    for row, axes in enumerate(figure.subplots(4, len(chosen))):
        for ax, frame in zip(axes, chosen.tolist(), strict=True):
            ax.imshow(pictures.pixels(frames["ahead"][frame, row].float()))
            ax.set_axis_off()
            if row == 0:
                last = frame == len(frames["rounds"]) - 1
                ax.set_title("samples" if last else f"round {int(frames['rounds'][frame])}", fontsize=9)
    figure.savefig(file)


def main(folder: Path, steps: int = 1000) -> None:
    """Draws all four; with fewer steps, sooner."""
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(SETTINGS), torch.no_grad():
        draw_round(folder / "round.png")
        draw_propagators(folder / "propagators.png", min(steps, 100))
        draw_convergence(folder / "convergence.png", steps)
        draw_emerging(folder / "emerging.png", steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
