"""The error for a model in which nothing was replaced: what was seen, why each call stayed, and what would help."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sla2_compile.kernels.checks import MAX_HEAD_DIM
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.select import layer_numbers

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe

_LENGTH = "min_seq_len=0 takes every length"
_SPELT = (
    "call scaled_dot_product_attention in its place (a model of transformers does with attn_implementation='sdpa')"
)

ADVICE = {
    Reason.SHORT_SEQUENCE: _LENGTH,
    Reason.SHORT_KEYS: _LENGTH,
    Reason.LITTLE_WORK: _LENGTH,
    Reason.FEW_QUERIES: _LENGTH,
    Reason.BIAS: "give masks that only hide keys, boolean or 0 and -inf; a bias on the scores has no place in SLA2",
    Reason.QUERY_MASK: "give a mask over keys, is_causal=True, or both; another mask has no place in SLA2",
    Reason.DROPOUT: "set the dropout of attention to 0, or call model.eval() first",
    Reason.HEAD_DIM: f"head dims go up to {MAX_HEAD_DIM}",
    Reason.RANK: "give q, k and v as (B, H, N, D)",
    Reason.BROADCAST: "expand k and v to q's batch and heads, or pass enable_gqa=True for fewer heads",
    Reason.DTYPE: "compute attention in float32, bfloat16 or float16",
    Reason.CAUSAL_ALL_KEYS: "linear_scope='complement' takes causal calls",
    Reason.CAUSAL_METHOD: "methods sla2, proxy and topk take causal calls",
    Reason.CAUSAL_ORDER: "causal calls take order='raster'",
    Reason.PLACES: "give the grid of these tokens, or none and order='raster'",
    Reason.EXCLUDED: "change include and exclude",
    Reason.LAYER_RANGE: "change start_layer and end_layer",
    Reason.WEIGHTS: "ask for no attention weights: need_weights=False",
    Reason.MULTIHEAD: "transform the nn.Module, before it becomes a graph",
    Reason.HAND_WRITTEN: _SPELT,
    Reason.WEIGHTS_USED: "ask for no attention weights: output_attentions=False",
    Reason.OPAQUE: _SPELT,
    Reason.CONTAINER: "put the call into a module of its own",
    Reason.CHECKPOINT: "checkpoint the module that makes the call, from outside",
    Reason.BODY: "transform the nn.Module, or compile it with torch.compile(backend='sla2')",
    Reason.SCRIPTED: "transform the Python code that the scripted code was made of",
    Reason.COMPILED: "compile the module that makes the call as a whole, or call scaled_dot_product_attention",
    Reason.THREAD: "make the call in the thread that runs the forward",
    Reason.NESTED: "give padded tensors and a mask over keys",
    Reason.EMPTY: "give a batch of at least one",
}
"""What a user can do about a reason. For a reason without an entry there is nothing to do."""


def check_nothing_wanted(outcomes: Sequence[Rewrite | Miss], recipe: Recipe) -> None:
    """Refuse a model in which no call was replaced, unless the recipe says that none should be.

    A start_layer equal to the number of layers says so: it is the last value of a sweep over start layers.

    Raises:
        ValueError: the recipe asks for some.

    Warns:
        UserWarning: it asks for none.
    """
    layers = len(set(layer_numbers([x.where.owner for x in outcomes]).values()))
    if not layers or recipe.start_layer != layers:
        raise nothing_replaced(outcomes)
    warnings.warn(
        f"start_layer {recipe.start_layer} leaves none of {layers} layers to SLA2; the model keeps full attention",
        stacklevel=4,
    )


def nothing_replaced(outcomes: Sequence[Rewrite | Miss]) -> ValueError:
    """The error for a model in which no call was replaced."""
    if not outcomes:
        return ValueError(
            "model must hold attention that can be seen (scaled_dot_product_attention, nn.MultiheadAttention, or a "
            "product, softmax and product written by hand), got no attention call; pass allow_none=True if that is "
            "fine. The model was left as it was"
        )
    owners: dict[str, list[str]] = defaultdict(list)
    advice: dict[str, None] = {}
    for miss in outcomes:
        assert isinstance(miss, Miss)
        owners[told(miss)].append(miss.where.owner or "model")
        if miss.reason in ADVICE:
            advice[ADVICE[miss.reason]] = None
    why = "; ".join(f"{len(names)} x {reason}: {', '.join(names[:3])}" for reason, names in owners.items())
    help_ = "; ".join([*advice, "allow_none=True returns the model unchanged"])
    return ValueError(
        f"model must have an attention call that SLA2 takes, got none of {len(outcomes)}: {why}; {help_}. "
        "The model was left as it was"
    )


def told(miss: Miss) -> str:
    """A miss in words: its reason, with the detail if there is one."""
    return miss.reason.value + (f" ({miss.detail})" if miss.detail else "")
