"""Video models of diffusers: long sequences over frames, rotary positions, padded prompts."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from sla2_compile.passes.sites.rules import Reason
from tests.zoo.diffusers_image import HEADS, prompt, timestep
from tests.zoo.entry import Entry


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, patch_size=(1, 2, 2), in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2,
    )  # fmt: skip


def wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 32, 32),
        "encoder_hidden_states": prompt(16),
        "timestep": timestep(),
        "return_dict": False,
    }


def cogvideox() -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=16,
        sample_height=16, sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=8,
    )  # fmt: skip


def cogvideox_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 2, 4, 16, 16),
        "encoder_hidden_states": prompt(16),
        "timestep": timestep(),
        "return_dict": False,
    }


def hunyuan() -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def hunyuan_inputs() -> dict[str, Any]:
    mask = torch.ones(1, 8)
    mask[:, 5:] = 0
    return {
        "hidden_states": torch.randn(1, 4, 2, 16, 16),
        "encoder_hidden_states": prompt(16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6.0]),
        "timestep": timestep(),
        "return_dict": False,
    }


def ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=2, caption_channels=16
    )


def ltx_inputs() -> dict[str, Any]:
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[:, 5:] = False
    return {
        "hidden_states": torch.randn(1, 256, 8),
        "encoder_hidden_states": prompt(16),
        "encoder_attention_mask": mask,
        "timestep": timestep(),
        "num_frames": 4,
        "height": 8,
        "width": 8,
        "return_dict": False,
    }


ENTRIES = [
    Entry("Wan (diffusers)", wan, wan_inputs, 2, {Reason.SHORT_KEYS: 2}),
    Entry("CogVideoX (diffusers)", cogvideox, cogvideox_inputs, 2),
    Entry(
        "HunyuanVideo (diffusers)", hunyuan, hunyuan_inputs, 2, {Reason.QUERY_MASK: 1}, file="model",
        note="the refiner of the prompt masks queries too",
    ),
    Entry(
        "LTX (diffusers)", ltx, ltx_inputs, 2, {Reason.BIAS: 2},
        note="padding of the prompt is a mask of -10000, a number like any other",
    ),
]  # fmt: skip
