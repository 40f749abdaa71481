r"""A small class-conditional UNet in plain torch, so that the embedded models need nothing but torch.

The network maps $(x_t, t, y)$ to its prediction. Time enters through a sinusoidal embedding, the class through a learned
one whose last row is "no class" (what classifier-free guidance calls unconditional); both modulate every residual block
by a scale and a shift. Images are folded by `patch` before the first convolution, which is where a CPU saves most.

References:
    | Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (arXiv 2006.11239).
    | Perez et al., "FiLM", AAAI 2018 (arXiv 1709.07871).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal(t: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """$[\\cos ω_i t, \\sin ω_i t]$ with $ω_i$ geometric from 1 to 1 / `period`, shape `(B, width)`."""
    half = width // 2
    frequencies = torch.exp(-math.log(period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResidualBlock(nn.Module):
    """Two convolutions with group norm, modulated by the embedding between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return torch.add(self.skip(x), h)


class Attention(nn.Module):
    """Self-attention over the pixels of the coarsest level."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.GroupNorm(8, width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, rows, columns = x.shape
        q, k, v = (
            part.reshape(batch, self.heads, width // self.heads, rows * columns).transpose(2, 3)
            for part in self.qkv(self.norm(x)).chunk(3, dim=1)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, width, rows, columns)
        return torch.add(x, self.out(h))


class UNet(nn.Module):
    """`network(x, t, label)` on images of shape `(B, channels, H, W)`; `t` counts discrete steps, shape `(B,)`.

    Arguments:
        channels: Image channels.
        widths: Channels of each resolution, finest first; each next level halves H and W.
        depth: Residual blocks a level.
        patch: Side of the pixel squares folded into channels before the first level.
        classes: Number of labels; `label=classes` (or `None`) means unconditional.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], depth: int, patch: int, classes: int) -> None:
        super().__init__()
        self.widths, self.patch, self.classes = tuple(widths), patch, classes
        width = widths[0]
        embedding = 4 * width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding)
        self.enter = nn.Conv2d(channels * patch**2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [width]
        for level, w in enumerate(widths):
            for _ in range(depth):
                self.down.append(ResidualBlock(width, w, embedding))
                width = w
                skips.append(width)
            if level + 1 < len(widths):
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList(
            [ResidualBlock(width, width, embedding), Attention(width), ResidualBlock(width, width, embedding)]
        )
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                self.up.append(ResidualBlock(width + skips.pop(), w, embedding))
                width = w
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels * patch**2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        t = t.expand(x.shape[0])
        if label is None:
            label = torch.full_like(t, self.classes, dtype=torch.long)
        e = F.silu(self.time(sinusoidal(t, self.widths[0]).to(x.dtype)) + self.label(label.expand(x.shape[0])))
        h = self.enter(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for layer in self.down:
            h = layer(h, e) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, e) if isinstance(layer, ResidualBlock) else layer(h)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), e) if isinstance(layer, ResidualBlock) else layer(h)
        return F.pixel_shuffle(self.leave(h), self.patch)
