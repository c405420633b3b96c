"""`register_transformers`: `attn_implementation="sla2"` in transformers, through its own public registries.

    sla2_compile.register_transformers(recipe="balanced")
    model = AutoModel.from_pretrained(..., attn_implementation="sla2")

The registered function is transformers' own for "sdpa", with SLA2 (no learned parameters) in place of its one call of
`F.scaled_dot_product_attention`. The library prepares masks, grouped heads, scale, causality and caches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.libraries.adapter import Adapter
from sla2_compile.recipes import DEFAULT, Recipe

# arguments that change the result of attention and that "sdpa" drops; models that pass them do not support "sdpa"
BEYOND_SDPA = ("s_aux", "sinks", "indices", "block_indices")

_ADAPTERS: dict[str, Adapter] = {}


def register_transformers(
    name: str = "sla2", recipe: str | Path | Recipe | dict[str, Any] = DEFAULT, **overrides: Any
) -> None:
    """Make `attn_implementation=name` mean SLA2 with this recipe in transformers.

    Calls that SLA2 does not take (`passes/sites/rules.py`) run as "sdpa". `report(model)` lists both kinds of eager
    call, as long as the model's config has this name. Compiled and exported code records nothing. There, a causal
    mask that the library builds as a tensor (padded batches, or no cache) keeps full attention, because only
    `transform` knows its values beforehand. A second recipe needs a second name.

    Args:
        name: the value of `attn_implementation`.
        recipe, **overrides: as for `transform`, without the fields that select sites by name.

    Raises:
        ImportError: transformers is not installed.
        RecipeError: unknown recipe or field.
        ValueError: name is taken; the recipe selects sites by name.

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
    # a name that was removed from the library's registry is free again
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
    """The adapter that a module's config selects now; None if it selects none."""
    if not _ADAPTERS:
        return None
    from transformers import PreTrainedConfig

    # read only transformers' configs, which its modules hold as plain attributes: attributes of other libraries'
    # objects may be computed, and that may fail
    config = vars(module).get("config")
    name = config._attn_implementation if isinstance(config, PreTrainedConfig) else None
    return _ADAPTERS.get(name) if isinstance(name, str) else None


def attention_mask(**kwargs: Any) -> Tensor | None:
    """Return the mask of "sdpa" (B, 1, Nq, Nk); in a trace None or one over keys (B, 1, 1, Nk), if equivalent.

    transformers reads a mask's values to leave it out, which a trace cannot. Without padding no value is needed.
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
