"""The models, sizes and inputs of `benchmarks/end_to_end.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.jit_context import B16, JiTInContext
from benchmarks.wan import Wan, WanConfig

PARTS = ("wan", "jit_1024", "jit_256", "train", "train_wan", "layer", "wan_14b")
"""The longest one last: a run of all of them that is cut short has the others."""
TRAINED = ("train", "train_wan")
MODES = ("eager", "compiled", "graph")
WAN_14B = WanConfig(depth=40, width=5120, heads=40, hidden=13824, latent=(21, 90, 160))
"""Wan2.1-T2V-14B at 1280 x 720 pixels, 81 frames."""
WAN_LAYERS = WanConfig(depth=4)
"""Four of the 30 layers of Wan2.1-T2V-1.3B: the backward of all would keep more than a GPU holds."""
LAYERS = ((8, 12, 256), (4, 12, 1024), (4, 12, 4096), (1, 12, 16384))
"""(B, H, N) of one layer of JiT-B, head dim 64."""

Made = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Workload:
    """A model with its inputs.

    Attributes:
        make: builds both, on the default device.
        training: forward and backward, not forward alone.
        modes: how it may run.
        min_seq_len: of the recipes; 0 replaces every call, also where the crossover says that it does not pay.
        autocast: whether bf16 autocast is on, over float32 parameters.
    """

    name: str
    make: Callable[[], Made]
    training: bool = False
    modes: tuple[str, ...] = MODES
    min_seq_len: int | str = 0
    autocast: bool = False


class OneCall(nn.Module):
    """A layer's attention and nothing else."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def workloads(part: str, tiny: bool) -> list[Workload]:
    """The workloads of one part; tiny ones have the same structure and take milliseconds."""
    if part in ("wan", "wan_14b", "train_wan"):
        training = part in TRAINED
        size = "14B" if part == "wan_14b" else "1.3B"
        config = {"wan": WanConfig(), "wan_14b": WAN_14B, "train_wan": WAN_LAYERS}[part]
        if tiny:
            config = WanConfig(2, 64, 2, 128, latent=(2, 16, 16), text_tokens=16, text_width=32, frequencies=16)
        # self-attention is replaced, cross-attention to the text is not
        shortest = 64 if tiny else "auto"
        name = f"Wan2.1-{size}, {config.tokens} tokens, batch 1"
        name += f", {config.depth} layers, forward and backward" if training else ""
        modes = ("eager", "compiled", *(("graph",) if training else ()))
        return [Workload(name, lambda: wan(config, tiny), training, modes, shortest)]
    if part == "layer":
        sizes = ((1, 2, 128), (1, 2, 256)) if tiny else LAYERS
        return [
            Workload(
                f"({B}, {H}, {N}, 64), {'forward and backward' if training else 'forward'}",
                partial(layer, B, H, N, training, tiny),
                training,
                ("eager",) if training else ("eager", "graph"),
            )
            for training in (False, True)
            for B, H, N in sizes
        ]
    pixels, batch = {"jit_1024": (1024, 4), "jit_256": (256, 8), "train": (1024, 4)}[part]
    if tiny:
        pixels, batch = pixels // 4, 1
    training = part in TRAINED
    what = ", forward and backward" if training else ""
    name = f"JiT-B/16, {(pixels // 16) ** 2} tokens, batch {batch}{what}"
    return [Workload(name, lambda: jit(pixels, batch, tiny), training, autocast=True)]


def dtype(tiny: bool) -> torch.dtype:
    return torch.float32 if tiny else torch.bfloat16


def wan(config: WanConfig, tiny: bool) -> Made:
    kind, (frames, height, width) = dtype(tiny), config.latent
    x = torch.randn(1, config.channels, frames, height, width, dtype=kind)
    text = torch.randn(1, config.text_tokens, config.text_width, dtype=kind)
    return Wan(config).to(kind), (x, 1000 * torch.rand(1), text)


def jit(pixels: int, batch: int, tiny: bool) -> Made:
    model = JiTInContext(replace(B16, width=64, depth=2), context=8, start=1) if tiny else JiTInContext()
    return model, (torch.randn(batch, 3, pixels, pixels), torch.rand(batch), torch.randint(0, 20, (batch,)))


def layer(B: int, H: int, N: int, training: bool, tiny: bool) -> Made:
    q, k, v = (torch.randn(B, H, N, 64, dtype=dtype(tiny), requires_grad=training) for _ in range(3))
    return OneCall(), (q, k, v)
