"""`register_transformers`: `attn_implementation="sla2"` in transformers, through its own public registries.

    sla2_compile.register_transformers(recipe="balanced")
    model = AutoModel.from_pretrained(..., attn_implementation="sla2")

The registered function is transformers' own for "sdpa", with SLA2 (no learned parameters) in the place of its one
call of `F.scaled_dot_product_attention`; the library prepares masks, grouped heads, scale, causality and caches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.libraries.adapter import Adapter
from sla2_compile.recipes import DEFAULT, Recipe

# arguments that change what attention computes and that "sdpa" drops: models that pass them do not support it
BEYOND_SDPA = ("s_aux", "sinks", "indices", "block_indices")

_ADAPTERS: dict[str, Adapter] = {}


def register_transformers(
    name: str = "sla2", recipe: str | Path | Recipe | dict[str, Any] = DEFAULT, **overrides: Any
) -> None:
    """Make `attn_implementation=name` mean SLA2 with this recipe in transformers.

    Calls that SLA2 does not take (`passes/sites/rules.py`) run as "sdpa"; `report(model)` lists both, as eager calls
    were made, for as long as the model's config has this name. Compiled and exported code records nothing. There, a
    causal map that the library builds as a tensor (padded batches, or no cache) keeps full attention: only
    `transform` knows beforehand what a mask will say. A second recipe takes a second name.

    Args:
        name: what `attn_implementation` is to be.
        recipe, **overrides: as `transform`; fields that tell sites apart must be left out.

    Raises:
        ImportError: transformers is not installed.
        RecipeError: unknown recipe or field.
        ValueError: name is taken; the recipe tells sites apart.

    Example:
        >>> sla2_compile.register_transformers()
        >>> model = AutoModelForCausalLM.from_pretrained("...", attn_implementation="sla2")
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError as error:
        fix = "pip install 'transformers>=5'"
        raise ImportError(f"register_transformers needs transformers 5, got {error}; {fix}") from error
    adapter = Adapter(Recipe.of(recipe, **overrides), f"transformers' attn_implementation={name!r}")
    taken = name == "eager" or name in AttentionInterface().valid_keys()
    # a name that somebody removed from the library's registry is free again
    if taken and name in _ADAPTERS and _ADAPTERS[name].recipe == adapter.recipe:
        return
    if taken:
        raise ValueError(f"name must be free in transformers' AttentionInterface, got {name!r}; choose another")

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        for argument in BEYOND_SDPA:
            if kwargs.get(argument) is not None:
                kind = type(module).__name__
                raise ValueError(
                    f"{argument} must be None under attn_implementation={name!r}, got one from {kind}; "
                    "this model does not run on scaled_dot_product_attention: use 'eager'"
                )
        return adapter.call(module, sdpa_attention_forward, module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)
    _ADAPTERS[name] = adapter


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that transformers sends this module's calls to, by what its config says now; None if none."""
    if not _ADAPTERS:
        return None
    from transformers import PreTrainedConfig

    # modules and configs of other libraries may compute what they are asked for, and fail: only transformers' are,
    # whose modules hold theirs as plain attributes
    config = vars(module).get("config")
    name = config._attn_implementation if isinstance(config, PreTrainedConfig) else None
    return _ADAPTERS.get(name) if isinstance(name, str) else None


def attention_mask(**kwargs: Any) -> Tensor | None:
    """The mask of "sdpa" (B, 1, Nq, Nk); while traced, none or one over keys (B, 1, 1, Nk) if that says the same.

    transformers reads a mask's values to leave it out, which a tracer cannot. Without padding none need be read.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    if torch.compiler.is_compiling() and kwargs.get("local_size") is None and _starts_at_zero(kwargs):
        padding, function = kwargs.get("attention_mask"), kwargs["mask_function"]
        square = kwargs["q_length"] == kwargs["kv_length"]
        if (
            padding is None
            and square
            and kwargs.get("allow_is_causal_skip", True)
            and function is causal_mask_function
        ):
            return None
        if kwargs.get("allow_is_bidirectional_skip", False) and function is bidirectional_mask_function:
            if padding is None:
                return None
            if padding.dtype == torch.bool and padding.shape[-1] == kwargs["kv_length"]:
                return padding[:, None, None]
    return sdpa_mask(**kwargs)


def _starts_at_zero(kwargs: dict[str, Any]) -> bool:
    offsets = (kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0))
    return all(isinstance(offset, int) and offset == 0 for offset in offsets)
