"""What the passes know about PyTorch's operators: one line each, `name [other spellings]: traits`.

A new operator, or a new spelling of one, is a line in `OPERATORS`; no other file holds a table of operators. Effects
on memory come from PyTorch's own schemas (`effects.py`) where possible; traits add what the schemas lack.
"""

from __future__ import annotations

from enum import Flag, auto


class Trait(Flag):
    """One property of an operator."""

    VIEW = auto()
    """Its result may share memory with its inputs."""
    REGROUP = auto()
    """It only changes the shape, and keeps the row-major order of all elements."""
    CAST = auto()
    """It gives the same values in another dtype or memory layout."""
    PERMUTE = auto()
    """It gives the same axes in another order."""
    EXPAND = auto()
    """It repeats axes of size one."""
    PART = auto()
    """It cuts or extends its input along an axis that keeps its meaning."""
    COLUMNS = auto()
    """It adds columns to its input, or cuts some off, or takes one of several tensors."""
    LAYOUT = auto()
    """Its result may be laid out in memory like its input."""
    STRIDED = auto()
    """Its behaviour depends on its input's layout in memory."""

    PRODUCT = auto()
    """It contracts two tensors."""
    SOFTMAX = auto()
    """It is a softmax."""
    WEIGHTS = auto()
    """It may be a softmax's part, or a softmax that no pass takes."""
    MULTIPLIES = auto()
    """It contracts two tensors in a form that no pass takes; with learned weights it is a layer."""
    BIASED = auto()
    """It adds its first argument to the product of the next two."""
    SCORES = auto()
    """It may stand between a score product and its softmax, because an attention call can express it."""
    KERNEL = auto()
    """It is a kernel to which scaled_dot_product_attention dispatches."""
    ATTENTION = auto()
    """It is attention in a layout of its own, or with code instead of a mask."""
    MULTIHEAD = auto()
    """It is multi-head attention with its projections, or a layer around it, in one operator."""

    FEATURES = auto()
    """It writes features into the last axis of its result."""
    CONVOLUTION = auto()
    """It writes features into the channel axis of its result."""
    MIXER = auto()
    """It mixes channels, or heads if they are the last axis."""
    LAYER = auto()
    """It is a layer of a network, and so no step between a product and a softmax."""
    BAND = auto()
    """It makes or reads a band of a matrix."""

    POINTWISE = auto()
    """It works element by element, although PyTorch's tags do not say so."""
    LIKE = auto()
    """It makes a tensor from the metadata of another."""
    FRESH = auto()
    """Its result always has its own memory."""

    PURE = auto()
    """It has no side effects, although no schema says so."""
    SETTER = auto()
    """It writes into its first argument, although its name does not say so."""
    TAKES = auto()
    """It makes one tensor use the memory of another."""
    STATISTICS = auto()
    """In training it writes into running_mean and running_var, although its schema does not say so."""
    TOKEN = auto()
    """It is an assertion. Its result is a token that only orders it."""
    METADATA = auto()
    """It asserts a tensor's metadata. It does not use the values, and means nothing without the tensor."""


_T = Trait
_CONV = _T.CONVOLUTION | _T.LAYER
_MAKE = _T.LIKE | _T.FRESH

OPERATORS: dict[str, Trait] = {
    # shapes
    "view _unsafe_view": _T.REGROUP | _T.STRIDED,
    "view_as": _T.REGROUP | _T.STRIDED,
    "_reshape_alias": _T.REGROUP | _T.STRIDED,
    "reshape": _T.REGROUP | _T.LAYOUT,
    "reshape_as": _T.REGROUP,
    "flatten": _T.REGROUP | _T.LAYOUT,
    "unflatten": _T.REGROUP | _T.LAYOUT,
    "squeeze": _T.REGROUP | _T.LAYOUT,
    "unsqueeze": _T.REGROUP | _T.LAYOUT,
    "transpose": _T.PERMUTE | _T.LAYOUT,
    "permute": _T.PERMUTE | _T.LAYOUT,
    "swapaxes": _T.PERMUTE | _T.LAYOUT,
    "swapdims": _T.PERMUTE,
    "movedim": _T.PERMUTE | _T.LAYOUT,
    "moveaxis": _T.PERMUTE,
    "t": _T.PERMUTE,
    "mT": _T.PERMUTE,
    "numpy_T": _T.PERMUTE,
    "T": _T.VIEW,
    "H": _T.VIEW,
    "mH": _T.VIEW,
    "expand": _T.VIEW | _T.EXPAND | _T.LAYOUT,
    "expand_as": _T.VIEW | _T.EXPAND,
    "broadcast_to": _T.VIEW | _T.EXPAND,
    "broadcast_tensors": _T.VIEW,
    "meshgrid": _T.VIEW,
    "atleast_1d": _T.VIEW,
    "atleast_2d": _T.VIEW,
    "atleast_3d": _T.VIEW,
    # dtypes and layouts
    "to": _T.CAST | _T.LAYOUT,
    "_to_copy": _T.CAST,
    "type": _T.CAST | _T.LAYOUT | _T.PURE,
    "type_as": _T.CAST | _T.LAYOUT,
    "float": _T.CAST | _T.LAYOUT | _T.PURE,
    "half": _T.CAST | _T.LAYOUT | _T.PURE,
    "bfloat16": _T.CAST | _T.LAYOUT | _T.PURE,
    "double": _T.CAST | _T.LAYOUT | _T.PURE,
    "bool": _T.VIEW | _T.PURE,
    "int": _T.VIEW | _T.PURE,
    "long": _T.VIEW | _T.PURE,
    "short": _T.VIEW | _T.PURE,
    "cpu": _T.VIEW | _T.PURE,
    "contiguous": _T.CAST,
    "clone": _T.CAST | _T.FRESH,
    "alias lift_fresh lift_fresh_copy": _T.CAST | _T.LAYOUT,
    "detach": _T.VIEW,
    "data": _T.VIEW,
    "identity": _T.VIEW | _T.LAYOUT | _T.PURE,
    "real": _T.VIEW,
    "imag": _T.VIEW,
    "view_as_real": _T.VIEW,
    "view_as_complex": _T.VIEW,
    # parts
    "getitem": _T.VIEW | _T.LAYOUT | _T.PURE | _T.COLUMNS,
    "select": _T.VIEW | _T.LAYOUT,
    "slice": _T.VIEW | _T.LAYOUT | _T.PART | _T.COLUMNS,
    "narrow": _T.VIEW | _T.PART | _T.COLUMNS,
    "cat concat concatenate": _T.COLUMNS,
    "unbind": _T.VIEW | _T.LAYOUT,
    "chunk": _T.VIEW | _T.LAYOUT,
    "unsafe_chunk": _T.VIEW,
    "split": _T.VIEW | _T.LAYOUT,
    "unsafe_split": _T.VIEW,
    "split_with_sizes": _T.VIEW,
    "tensor_split": _T.VIEW,
    "hsplit": _T.VIEW,
    "vsplit": _T.VIEW,
    "dsplit": _T.VIEW,
    "diagonal": _T.VIEW | _T.BAND,
    "as_strided": _T.VIEW | _T.STRIDED | _T.BAND,
    "unfold": _T.VIEW | _T.BAND,
    "pad": _T.PART | _T.BAND,
    "constant_pad_nd": _T.PART | _T.BAND,
    "roll": _T.PART,
    "repeat": _T.PART,
    "repeat_interleave": _T.PART,
    # element by element
    "add": _T.SCORES | _T.LAYOUT,
    "sub subtract": _T.SCORES | _T.LAYOUT,
    "mul multiply": _T.SCORES | _T.LAYOUT,
    "div divide truediv true_divide": _T.SCORES | _T.LAYOUT,
    "masked_fill": _T.SCORES | _T.POINTWISE,
    "where": _T.POINTWISE,
    "bitwise_and and and_": _T.POINTWISE,
    "bitwise_or or or_": _T.POINTWISE,
    "bitwise_xor xor": _T.POINTWISE,
    "logical_not not_ invert inv bitwise_not": _T.POINTWISE,
    "is is_": _T.PURE,
    "neg": _T.LAYOUT,
    "relu": _T.LAYOUT,
    "gelu": _T.LAYOUT,
    "silu": _T.LAYOUT,
    "sigmoid": _T.LAYOUT,
    "tanh": _T.LAYOUT,
    "dropout": _T.VIEW | _T.SCORES | _T.LAYOUT,
    "feature_dropout": _T.VIEW,
    "alpha_dropout": _T.VIEW,
    "softmax _softmax _safe_softmax special_softmax": _T.SOFTMAX,
    "exp": _T.WEIGHTS,
    "exp2 special_exp2": _T.WEIGHTS,
    "softmin": _T.WEIGHTS,
    "gumbel_softmax": _T.WEIGHTS,
    # products and layers
    "matmul": _T.PRODUCT,
    "bmm": _T.PRODUCT,
    "mm": _T.PRODUCT,
    "baddbmm": _T.PRODUCT | _T.BIASED,
    "einsum": _T.PRODUCT | _T.MIXER | _T.LAYER,
    "mv": _T.MULTIPLIES,
    "addmv": _T.MULTIPLIES | _T.BIASED,
    "addbmm": _T.MULTIPLIES | _T.BIASED,
    "inner": _T.MULTIPLIES,
    "tensordot": _T.MULTIPLIES,
    "linear": _T.FEATURES | _T.MIXER | _T.LAYER | _T.MULTIPLIES,
    "nondynamicallyquantizablelinear": _T.FEATURES,
    "addmm": _T.FEATURES | _T.MULTIPLIES | _T.BIASED,
    "embedding": _T.FEATURES | _T.LAYER,
    "conv1d": _CONV | _T.MIXER,
    "conv2d": _CONV | _T.MIXER,
    "conv3d": _CONV | _T.MIXER,
    "convolution": _CONV | _T.MIXER,
    "_convolution": _T.CONVOLUTION,
    "conv_transpose1d convtranspose1d": _T.CONVOLUTION,
    "conv_transpose2d convtranspose2d": _T.CONVOLUTION,
    "conv_transpose3d convtranspose3d": _T.CONVOLUTION,
    "layer_norm": _T.LAYER,
    "group_norm": _T.LAYER,
    "batch_norm": _T.LAYER | _T.STATISTICS,
    "native_batch_norm": _T.STATISTICS,
    "cudnn_batch_norm": _T.STATISTICS,
    "miopen_batch_norm": _T.STATISTICS,
    "_batch_norm_impl_index": _T.STATISTICS,
    "batch_norm_update_stats": _T.STATISTICS,
    "batch_norm_gather_stats": _T.STATISTICS,
    "batch_norm_gather_stats_with_counts": _T.STATISTICS,
    "instance_norm": _T.STATISTICS,
    "multi_head_attention_forward": _T.MULTIHEAD | _T.PURE,
    "_native_multi_head_attention": _T.MULTIHEAD,
    "_transformer_encoder_layer_fwd": _T.MULTIHEAD,
    "_scaled_dot_product_flash_attention": _T.KERNEL,
    "_scaled_dot_product_flash_attention_for_cpu": _T.KERNEL,
    "_scaled_dot_product_efficient_attention": _T.KERNEL,
    "_scaled_dot_product_cudnn_attention": _T.KERNEL,
    "_scaled_dot_product_fused_attention_overrideable": _T.KERNEL,
    "_scaled_dot_product_attention_math": _T.KERNEL,
    "_scaled_dot_product_attention_math_for_mps": _T.KERNEL,
    "_flash_attention_forward": _T.ATTENTION,
    "_efficient_attention_forward": _T.ATTENTION,
    "_cudnn_attention_forward": _T.ATTENTION,
    "_triton_scaled_dot_attention": _T.ATTENTION,
    "flex_attention": _T.ATTENTION,
    # new tensors
    "zeros_like": _MAKE,
    "ones_like": _MAKE,
    "full_like": _MAKE,
    "new_zeros": _MAKE,
    "new_ones": _MAKE,
    "new_full": _MAKE,
    "zeros": _T.FRESH,
    "ones": _T.FRESH,
    "full": _T.FRESH,
    "causal_keys": _T.PURE | _T.FRESH,
    # numbers
    "len": _T.PURE,
    "max": _T.PURE,
    "min": _T.PURE,
    "abs": _T.PURE,
    "round": _T.PURE,
    "sum": _T.PURE,
    "ndimension": _T.PURE,
    "sym_int": _T.PURE,
    "sym_float": _T.PURE,
    "sym_max": _T.PURE,
    "sym_min": _T.PURE,
    "sym_not": _T.PURE,
    "sym_sqrt": _T.PURE,
    # effects
    "setitem": _T.SETTER,
    "delitem": _T.SETTER,
    "set": _T.TAKES,
    "setattr": _T.SETTER | _T.TAKES,
    "delattr": _T.SETTER,
    "_assert_tensor_metadata": _T.METADATA,
    "_functional_assert_async": _T.TOKEN,
    "_functional_assert_scalar": _T.TOKEN,
    "_functional_sym_constrain_range": _T.TOKEN,
    "_functional_sym_constrain_range_for_size": _T.TOKEN,
}
"""Traits by the operator's name, then its other spellings. In-place operators stand without their underscore."""

_NONE = Trait(0)
_SHARES = Trait.REGROUP | Trait.CAST | Trait.PERMUTE

SPELLINGS: dict[str, str] = {}
"""The canonical name of each other spelling."""

_TRAITS: dict[str, Trait] = {}
for _names, _traits in OPERATORS.items():
    _name, *_others = _names.split()
    _TRAITS[_name] = _traits | (Trait.VIEW if _traits & _SHARES else _NONE)
    SPELLINGS.update(dict.fromkeys(_others, _name))


def traits_of(name: str) -> Trait:
    """Return the traits of an operator by its name; none if it is not listed."""
    return _TRAITS.get(name, _NONE)
