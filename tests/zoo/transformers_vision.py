"""Vision encoders of transformers. Most call SDPA without a mask; SAM and Swin add a learned bias."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PerceiverConfig,
    PerceiverModel,
    SamVisionConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.sam.modeling_sam import SamVisionEncoder

from sla2_compile.passes.sites.rules import Reason
from tests.zoo.entry import Entry, image

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 128,
    "patch_size": 8,
}


def pixels() -> dict[str, Any]:
    return {"pixel_values": image(128)}


def vit(**options: Any) -> nn.Module:
    return ViTModel(ViTConfig(**SMALL, **options))


def dinov2() -> nn.Module:
    return Dinov2Model(Dinov2Config(**SMALL))


def siglip() -> nn.Module:
    return SiglipVisionModel(SiglipVisionConfig(**SMALL))


def clip_vision() -> nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(**SMALL))


def sam() -> nn.Module:
    # the second layer attends within windows, the first over the whole image
    small = {**SMALL, "mlp_dim": 64, "output_channels": 16, "window_size": 8, "global_attn_indexes": [0]}
    del small["intermediate_size"]
    return SamVisionEncoder(SamVisionConfig(**small))


def swin() -> nn.Module:
    return SwinModel(SwinConfig(image_size=64, patch_size=2, embed_dim=32, depths=[2], num_heads=[2], window_size=8))


def perceiver() -> nn.Module:
    return PerceiverModel(
        PerceiverConfig(
            num_latents=64, d_latents=64, d_model=32, num_blocks=1, num_self_attends_per_block=2,
            num_self_attention_heads=2, num_cross_attention_heads=2,
        )
    )  # fmt: skip


def perceiver_inputs() -> dict[str, Any]:
    return {"inputs": image(16, channels=32).flatten(2).transpose(1, 2)}


ENTRIES = [
    Entry("ViT (transformers)", vit, pixels, 2),
    Entry("ViT, eager attention (transformers)", lambda: vit(attn_implementation="eager"), pixels, 2),
    Entry("DINOv2 (transformers)", dinov2, pixels, 2),
    Entry(
        "SigLIP (transformers)", siglip, pixels, 2, {Reason.WEIGHTS: 1},
        note="the pooling head is an nn.MultiheadAttention that is asked for its weights",
    ),
    Entry("CLIP vision (transformers)", clip_vision, pixels, 2),
    Entry("SAM encoder (transformers)", sam, pixels, 0, {Reason.BIAS: 2}, note="relative position bias"),
    Entry("Swin (transformers)", swin, lambda: {"pixel_values": image(64)}, 0, {Reason.BIAS: 2}, note="window bias"),
    Entry("Perceiver (transformers)", perceiver, perceiver_inputs, 3),
]  # fmt: skip
