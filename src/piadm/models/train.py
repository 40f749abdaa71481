r"""How the embedded models were trained: `python -m piadm.models.train fashion` (or `digits`).

Each minimises $\mathbb{E} \| f_θ(x_t, t, y) - \text{target} \|^2$ over the 1000 steps of the linear beta schedule, with the
label dropped one time in ten so that the network also answers without one, and keeps an exponential average of its weights.

Data:
    | `fashion`: Fashion-MNIST, 60,000 images 28×28 (MIT; Debian's package `dataset-fashion-mnist` or any folder with its
      two `train-*.gz` files, named by `--data`).
    | `digits`: scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits", 1,797 images 8×8 (CC BY 4.0).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from piadm.models.unet import UNet

RECIPES: dict[str, dict[str, Any]] = {
    "fashion": {
        "network": {"channels": 1, "widths": (40, 80), "depth": 1, "patch": 2, "classes": 10},
        "prediction": "v_prediction",
        "steps": 9_000,
        "batch": 64,
        "rate": 1e-3,
    },
    "digits": {
        "network": {"channels": 1, "widths": (32, 64), "depth": 1, "patch": 1, "classes": 10},
        "prediction": "epsilon",
        "steps": 9_000,
        "batch": 128,
        "rate": 1e-3,
    },
}


def load_data(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], shape `(N, 1, H, W)`, and labels, shape `(N,)`."""
    if name == "digits":
        from sklearn.datasets import load_digits

        data = load_digits()
        return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.tensor(pixels, dtype=torch.float32) / 127.5 - 1, torch.tensor(labels).long()


def train(name: str, folder: Path, output: Path, steps: int, log_every: int = 250) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(0)
    x, y = load_data(name, folder)
    network = UNet(**recipe["network"])
    average = {key: value.detach().clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe["rate"], weight_decay=1e-3)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).to(torch.float32)
    losses, started = [], time.perf_counter()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 200)
        optimizer.param_groups[0]["lr"] = recipe["rate"] * warm * (0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2)
        rows = torch.randint(len(x), (recipe["batch"],))
        t = torch.randint(1000, (recipe["batch"],))
        label = torch.where(torch.rand(recipe["batch"]) < 0.1, recipe["network"]["classes"], y[rows])
        alpha, sigma = alpha_bar[t].sqrt()[:, None, None, None], (1 - alpha_bar[t]).sqrt()[:, None, None, None]
        noise = torch.randn_like(x[rows])
        target = noise if recipe["prediction"] == "epsilon" else alpha * noise - sigma * x[rows]
        loss = (network(alpha * x[rows] + sigma * noise, t, label) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        for key, value in network.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % log_every == 0:
            loss_now, seconds = float(np.mean(losses[-log_every:])), time.perf_counter() - started
            print(f"{name} {step + 1}/{steps} loss {loss_now:.4f} {seconds:.0f} s", flush=True)
            config = {
                "network": recipe["network"],
                "prediction": recipe["prediction"],
                "event_shape": list(x.shape[1:]),
                "mean": x.mean().item(),
                "variance": x.var().item(),
                "trained": {"steps": step + 1, "batch": recipe["batch"], "loss": loss_now},
            }
            save_file(average, output, metadata={"piadm": json.dumps(config)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    output = arguments.output or Path(__file__).with_name(f"{arguments.name}.safetensors")
    train(arguments.name, arguments.data, output, arguments.steps or RECIPES[arguments.name]["steps"])


if __name__ == "__main__":
    main()
