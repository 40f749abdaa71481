r"""Two embedded class-conditional denoisers, trained by `piadm.models.train` on real data.

| name | data | shape | classes | prediction |
|---|---|---|---|---|
| `"digits"` | 1,797 handwritten digits, UCI by way of scikit-learn (CC BY 4.0, see `NOTICE`) | `(1, 8, 8)` | 0-9 | epsilon |
| `"fashion"` | Fashion-MNIST, 60,000 images of clothing (MIT) | `(1, 28, 28)` | 0-9, `LABELS` | v_prediction |

Both answer to `label`, int64 of shape `(B,)`; 10 means no class. Images lie in [-1, 1].
"""

from __future__ import annotations

import json
from importlib.resources import as_file, files

import torch
from safetensors import safe_open
from torch.nn.utils import convert_conv2d_weight_memory_format

from piadm.denoiser import Denoiser
from piadm.models.unet import UNet
from piadm.schedules import DiscreteBetas

NAMES = ("digits", "fashion")
LABELS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def load(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Denoiser:
    """An embedded denoiser, in evaluation mode; `denoiser.event_shape` is the shape of one sample.

    Raises:
        ValueError: for a name not in `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"`name` is {name!r}: the embedded models are {', '.join(NAMES)}")
    with as_file(files(__package__) / f"{name}.safetensors") as path, safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["piadm"])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a handle, not a dict)
    network = UNet(**config["network"])
    network.load_state_dict(weights)
    network.eval().requires_grad_(False).to(device=device, dtype=dtype)
    # a fifth faster on a CPU
    convert_conv2d_weight_memory_format(network, torch.channels_last)
    return Denoiser(
        network,
        DiscreteBetas.linear(1000),
        config["prediction"],
        mean=config["mean"],
        variance=config["variance"],
        event_shape=tuple(config["event_shape"]),
    )
