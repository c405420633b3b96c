"""Which numeric format the sparse branch really runs in: `effective_low_bit` alone decides, and `why_less` says why.

| asked | runs | where |
|---|---|---|
| int8_fp8 | INT8 QK, FP8 PV | NVIDIA sm_89 and later, block_k of 32 or more |
| int8_fp8 | as int8 | sm_80 to sm_88, or block_k 16 (an FP8 product sums over 32 keys at a time) |
| int8 | INT8 QK, PV in q's dtype | NVIDIA sm_80 and later |
| auto | as int8 | where that was measured to be faster and close enough (`why_not_int8`), so far on sm_90 alone |
| any | the input's dtype | other devices, what the Triton kernels do not take (`cuda/dispatch.py`), training |
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels.blocks import num_kept, shorter
from sla2_compile.kernels.checks import fail

LOW_BIT_CHOICES = ("none", "auto", "int8", "int8_fp8")
"""What a recipe may ask for."""

MOST_KEPT = 1 / 16
"""Largest share of key blocks at which INT8's whole op is within three times bf16's own error."""
LEAST_KEPT = 32
"""Fewest key blocks a query block with which INT8 is faster."""
NOT_FASTER = "does not pay on cuda (sm_90), as far as measured"
TOO_FAR = "over 3 times bf16's own error above a sixteenth of the key blocks"


def effective_low_bit(
    low_bit: str,
    q: Tensor,
    v_dim: int,
    block_q: int,
    block_k: int,
    scale: float,
    tn: int,
    topk_ratio: float,
    plain: bool,
    wants_grad: bool,
) -> str:
    """Return what `low_bit` comes to for one call: none, int8 or int8_fp8; see the table above.

    Args:
        low_bit: what the recipe asks for.
        q: (B, Hq, Nq, D), real or fake; v_dim: head dim of v.
        tn: key blocks there are; topk_ratio: share of them that a query block keeps.
        plain: whether the call has no key mask and is not causal.
        wants_grad: whether a backward will follow: there is none in low bit.

    Raises:
        ValueError: low_bit is none of `LOW_BIT_CHOICES`.
    """
    if low_bit not in LOW_BIT_CHOICES:
        raise fail("low_bit", f"be one of {', '.join(LOW_BIT_CHOICES)}", repr(low_bit), "auto runs what pays")
    if low_bit == "none" or wants_grad or q.device.type != "cuda":
        return "none"
    # branches, so that these are constants in a trace where dims, and under dynamic=True all integers, are symbols
    positive = True if scale > 0.0 else False  # noqa: SIM210
    # asked for auto alone: the answer may be a guard on the length
    fits = low_bit == "auto" and not why_not_int8(q.shape[3], v_dim, block_q, block_k, tn, topk_ratio, plain)
    D, Dv, block_q, block_k = rounded_up(q.shape[3]), rounded_up(v_dim), rounded_up(block_q), rounded_up(block_k)
    return low_bit_on(low_bit, q.device, q.dtype, D, Dv, block_q, block_k, positive, fits)


def why_not_int8(D: int, Dv: int, block_q: int, block_k: int, tn: int, topk_ratio: float, plain: bool) -> str:
    """Return why `auto` leaves such a call in 16 bits on sm_90; nothing where INT8 QK is faster and close enough.

    Faster (benchmarks/NOTES.md): at head dim 128 with 35 key blocks a query block or more; with 15 it gains nothing,
    and at head dim 64 it is slower throughout. FP8 PV on top gains 3 to 6 %, at three times the error.
    Close enough (benchmarks/results/low_bit.md): at most three times bf16's own error in the whole op on normal data.

    Args:
        tn, topk_ratio, plain: as `effective_low_bit` has them.
    """
    if not plain or D != 128 or Dv != 128 or block_q != 128 or block_k != 64:
        return NOT_FASTER
    # the share asked for, a constant: that of the blocks kept would be another guard on the length
    if topk_ratio > MOST_KEPT:
        return TOO_FAR
    return NOT_FASTER if shorter(num_kept(tn, topk_ratio, block_q, block_k, False), LEAST_KEPT) else ""


def rounded_up(size: int) -> int:
    """Round a head dim or a block size up to a power of two from 8 to 256, all that the kernels' rule asks of it."""
    for power in (8, 16, 32, 64, 128):
        if size <= power:
            return power
    return 256


def low_bit_on(
    low_bit: str,
    device: torch.device,
    dtype: torch.dtype,
    D: int,
    Dv: int,
    block_q: int,
    block_k: int,
    positive: bool,
    fits: bool,
) -> str:
    """`effective_low_bit` of a call without gradient, from plain data.

    Args:
        positive: whether scale is; fits: whether `why_not_int8` has nothing to say, for auto.
    """
    if low_bit == "none" or device.type != "cuda" or not torch.cuda.is_available():
        return "none"
    from sla2_compile.kernels.cuda import device as chip
    from sla2_compile.kernels.cuda import dispatch as cuda

    if not cuda.kernels_take(device, dtype, D, Dv, block_q, block_k, 1.0 if positive else -1.0):
        return "none"
    if low_bit == "auto":
        return "int8" if fits and chip.capability(device) == 90 else "none"
    return low_bit if cuda.multiplies_fp8(device, block_k) else "int8"


def why_less(
    low_bit: str,
    runs: str,
    device: torch.device,
    dtype: torch.dtype,
    D: int,
    Dv: int,
    block_q: int,
    block_k: int,
    positive: bool,
    refusal: str,
) -> str:
    """Return why `low_bit_on` made runs of low_bit, where that is less than was asked for; else nothing.

    Args:
        refusal: what `why_not_int8` says of the call.
    """
    if runs == low_bit or (low_bit, runs) == ("auto", "int8"):
        return ""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"not run on {device.type}" + (", which is not here" if device.type == "cuda" else "")
    refused = why_portable(device, dtype, D, Dv, block_q, block_k, positive)
    if refused:
        return refused
    from sla2_compile.kernels.cuda import device as chip

    arch = chip.capability(device)
    if low_bit == "auto":
        return refusal if arch == 90 else f"not measured on sm_{arch}"
    return f"no FP8 on sm_{arch}" if arch < 89 else "FP8 needs block_k of 32"


def why_portable(
    device: torch.device, dtype: torch.dtype, D: int, Dv: int, block_q: int, block_k: int, positive: bool
) -> str:
    """Return why blocked PyTorch runs a CUDA call and not the Triton kernels; nothing where they do, or off CUDA.

    The rule is `cuda.kernels_take`; this says which line of it spoke.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    from sla2_compile.kernels.cuda import device as chip
    from sla2_compile.kernels.cuda import dispatch as cuda

    if cuda.kernels_take(device, dtype, D, Dv, block_q, block_k, 1.0 if positive else -1.0):
        return ""
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA, not ROCm"
    arch = chip.capability(device)
    if arch < 80:
        return f"the Triton kernels need sm_80, not sm_{arch}"
    if dtype not in (torch.bfloat16, torch.float16):
        outside = " outside autocast" if dtype == torch.float32 else ""
        return f"the Triton kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}{outside}"
    if not positive:
        return "the Triton kernels take a scale above 0 only"
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if not 16 <= size <= 128:
            return f"the Triton kernels take {name} of 16 to 128, not {size}"
    return f"block_k {block_k} at head dim {max(D, Dv)} does not fit the shared memory of sm_{arch}"


# what torch.compiler.assume_constant_result does: calling it would load all of torch's compiler on import
low_bit_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
