"""Image models of diffusers: transformers and a UNet. Attention to a short text prompt stays as it is."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from sla2_compile.passes.sites.rules import Reason
from tests.zoo.entry import Entry, image

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}


def timestep() -> torch.Tensor:
    return torch.tensor([1])


def prompt(width: int, length: int = 8) -> torch.Tensor:
    """(1, length, width), what a text encoder would give."""
    return torch.randn(1, length, width)


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, num_layers=2, sample_size=32, num_embeds_ada_norm=10, norm_num_groups=4
    )


def dit_inputs() -> dict[str, Any]:
    return {"hidden_states": image(32, 4), "timestep": timestep(), "class_labels": torch.tensor([1])}


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
    )  # fmt: skip


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": image(32, 4),
        "encoder_hidden_states": prompt(32),
        "pooled_projections": torch.randn(1, 16),
        "timestep": timestep(),
        "return_dict": False,
    }


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        **HEADS, patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def flux_inputs() -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    return {
        "hidden_states": torch.randn(1, 256, 4),
        "encoder_hidden_states": prompt(32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.stack((torch.zeros(16, 16), rows, columns), dim=-1).view(256, 3),
        "txt_ids": torch.zeros(8, 3),
        "guidance": None,
        "return_dict": False,
    }


def pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        **HEADS, in_channels=4, num_layers=2, sample_size=32, norm_num_groups=4, cross_attention_dim=32,
        caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip


def pixart_inputs() -> dict[str, Any]:
    return {
        "hidden_states": image(32, 4),
        "encoder_hidden_states": prompt(16),
        "timestep": timestep(),
        "return_dict": False,
    }


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip


def unet_inputs() -> dict[str, Any]:
    return {
        "sample": image(32, 4),
        "encoder_hidden_states": prompt(16),
        "timestep": timestep(),
        "return_dict": False,
    }


def vae() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, sample_size=16)


ENTRIES = [
    Entry("DiT (diffusers)", dit, dit_inputs, 2),
    Entry("SD3 (diffusers)", sd3, sd3_inputs, 2),
    Entry("Flux (diffusers)", flux, flux_inputs, 2),
    Entry("PixArt (diffusers)", pixart, pixart_inputs, 2, {Reason.SHORT_KEYS: 2}, file="model"),
    Entry("UNet with attention (diffusers)", unet, unet_inputs, 4, {Reason.SHORT_KEYS: 4}),
    Entry("AutoencoderKL (diffusers)", vae, lambda: {"sample": image(16), "return_dict": False}, 2, compiled="model"),
]
