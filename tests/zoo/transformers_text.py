"""Text and speech models of transformers: encoders with padding, causal decoders, learned position bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sla2_compile.passes.sites.rules import Reason
from tests.zoo.entry import Entry, padded, tokens

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}


def text() -> dict[str, Any]:
    return {"input_ids": tokens(256)}


def text_with_padding() -> dict[str, Any]:
    return {"input_ids": tokens(256), "attention_mask": padded(256, 200)}


def decoded() -> dict[str, Any]:
    return {"input_ids": tokens(256), "use_cache": False}


def decoded_with_padding() -> dict[str, Any]:
    return {**decoded(), "attention_mask": padded(256, 200)}


def bert() -> nn.Module:
    return BertModel(BertConfig(**SMALL))


def modernbert() -> nn.Module:
    # the first layer is global, the second sees a window of 32 tokens to each side
    return ModernBertModel(
        ModernBertConfig(**{**SMALL, "local_attention": 64, "layer_types": ["full_attention", "sliding_attention"]})
    )


def clip_text() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(**SMALL, max_position_embeddings=256))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**GROUPED))


def qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**GROUPED))


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2, n_positions=256)
    )


def t5() -> nn.Module:
    return T5EncoderModel(T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, vocab_size=99))


def whisper() -> nn.Module:
    return WhisperEncoder(
        WhisperConfig(
            d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=16,
            max_source_positions=256, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
    )  # fmt: skip


ENTRIES = [
    Entry("BERT (transformers)", bert, text, 2),
    Entry("BERT, padded batch (transformers)", bert, text_with_padding, 2),
    Entry(
        "ModernBERT (transformers)",
        modernbert,
        text,
        1,
        {Reason.QUERY_MASK: 1},
        note="every second layer is a window",
    ),
    Entry("CLIP text (transformers)", clip_text, text, 2),
    Entry("Llama (transformers)", llama, decoded, 2),
    Entry("Llama, padded batch (transformers)", llama, decoded_with_padding, 2),
    Entry("Qwen2 (transformers)", qwen2, decoded, 2),
    Entry("Qwen3 (transformers)", qwen3, decoded, 2),
    Entry("GPT-2 (transformers)", gpt2, decoded, 2),
    Entry("T5 encoder (transformers)", t5, text, 0, {Reason.BIAS: 2}, note="learned position bias"),
    Entry("Whisper encoder (transformers)", whisper, lambda: {"input_features": torch.randn(1, 16, 512)}, 2),
]
