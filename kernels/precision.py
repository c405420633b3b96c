"""The format in which a call computes its sparse branch: the answer of `support.py`, as a constant in traces.

| asked | runs | where |
|---|---|---|
| int8_fp8 | INT8 QK, FP8 PV | where `support.FP8` admits it; else as int8 |
| int8 | INT8 QK, PV in the input's dtype | where the Triton kernels run |
| auto | as int8 | where that was measured to be faster and close enough (`support.AUTO`) |
| any | the input's dtype | everywhere else |
"""

from __future__ import annotations

import torch

from sla2_compile.kernels.blocks import num_kept
from sla2_compile.kernels.checks import Described, fail
from sla2_compile.kernels.support import LEAST_KEPT, LOW_BIT_CHOICES, MOST_KEPT, Chip, Facts, support
from sla2_compile.kernels.torch_internals import constant_in_traces
from sla2_compile.kernels.tracing import shorter


def size_class(size: int) -> int:
    """Round a head dim or block size to 8, 16, 32, 64, 96, 128 or 256; the format rules treat both values alike.

    It branches, so the result is a constant in a trace with symbolic sizes.
    """
    for power in (8, 16, 32, 64):
        if size <= power:
            return power
    if size < 128:
        return 96
    return 128 if size == 128 else 256


@constant_in_traces
def low_bit_on(
    device: torch.device, dtype: torch.dtype, D: int, Dv: int, block_q: int, block_k: int,
    low_bit: str, positive: bool, plain: bool, few: bool, many: bool,
) -> str:  # fmt: skip
    """`low_bit_of` for a call that is described by constants; a compiler's trace runs this and keeps the answer."""
    chip = Chip.of(device)
    return support(Facts(chip, dtype, D, Dv, block_q, block_k, low_bit, positive, plain, few, many)).low_bit


def low_bit_of(
    low_bit: str, q: Described, v_dim: int, block_q: int, block_k: int, scale: float,
    tn: int, topk_ratio: float, plain: bool,
) -> str:  # fmt: skip
    """Return the format that a call's low_bit resolves to: none, int8 or int8_fp8.

    Args:
        low_bit: one of `LOW_BIT_CHOICES`.
        q: (B, Hq, Nq, D), real or fake; v_dim: head dim of v.
        tn: number of key blocks; topk_ratio: share of them that a query block keeps.
        plain: as in `Facts`.

    Raises:
        ValueError: low_bit is none of them.
    """
    if low_bit not in LOW_BIT_CHOICES:
        raise fail("low_bit", f"be one of {', '.join(LOW_BIT_CHOICES)}", repr(low_bit), "auto runs what pays")
    if low_bit == "none" or q.device.type != "cuda":
        return "none"
    sizes = size_class(q.shape[3]), size_class(v_dim), size_class(block_q), size_class(block_k)
    # branches, so that these are constants too
    positive = True if scale > 0.0 else False  # noqa: SIM210
    few = True if topk_ratio <= MOST_KEPT else False  # noqa: SIM210
    runs = low_bit_on(q.device, q.dtype, *sizes, low_bit, positive, plain, few, True)
    if low_bit != "auto" or runs == "none":
        return runs
    # checked last and for auto only, because it may add a guard on the length
    kept = num_kept(tn, topk_ratio, block_q, block_k, False)
    return "none" if shorter(kept, LEAST_KEPT) else runs
