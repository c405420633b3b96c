"""What kernels spill where they are compiled ahead of time (`test_aot.py`). What is not here spills nothing."""

from __future__ import annotations

from sla2_compile.kernels.cuda import device

TRITONS = ((3, 6), (3, 7))
SPILLS: dict[str, dict[str, tuple[int, int]]] = {
    # two programs share a multiprocessor at head dim 64, although a few registers are spilled
    "attend_hopper_kernel": {
        "sm_90 fused, D48, none": (16, 16),
        "sm_90 fused, D48, int8": (80, 80),
        "sm_90 fused, D48, int8_fp8": (32, 32),
        "sm_90 fused, D64, none": (32, 32),
        "sm_90 fused, D64, int8": (80, 80),
        "sm_90 fused, D64, int8_fp8": (40, 32),
        "sm_90 fused, D80, int8_fp8": (72, 72),
        "sm_90 fused, D128, int8_fp8": (80, 80),
    },
    # on sm_90 two programs a multiprocessor, by caps that were timed and pay; on sm_120 the assembler's own choice
    "attend_kernel": {
        "sm_80 D256, fp16": (16, 0),
        "sm_90 D64, r = 1": (8, 0),
        "sm_90 D64, all": (0, 16),
        "sm_90 D128": (24, 24),
        "sm_120 D64, 128 keys": (8, 0),
        "sm_120 D128": (8, 0),
        "sm_120 D128, 128 keys, masked": (8, 0),
    },
    # the assembler's own choice: fewer than all 255 registers are in use
    "choose_kernel": {"sm_100 short, D128, causal masked": (0, 8)},
    "front_kernel": {
        "sm_100 short forward, D128, causal masked": (0, 8),
        "sm_100 short forward, D128, int8": (8, 0),
    },
    "pool_kernel": {"sm_80 D128": (16, 8), "sm_90 D128": (0, 16)},
    # 128 rows of 256 dims in float32 are half of all registers, and are copied for 8 bits: no tile tried does
    # without. At 128 dims Triton 3.6 needs a little for three programs a multiprocessor
    "states_kernel": {
        "sm_80 D256, 128 keys": (96, 0),
        "sm_90 D128, int8": (24, 0),
        "sm_90 D128, int8 + fp8": (8, 0),
        "sm_90 D256, 128 keys, int8 + fp8": (80, 72),
        "sm_100 D256, 128 keys, int8 + fp8": (104, 152),
    },
    # 8 warps spill nothing on sm_90 and take half as long again
    "keys_kernel": {
        "sm_80 backward, D96, causal masked, elu": (40, 0),
        "sm_90 backward, D128": (32, 24),
        "sm_100 backward, D64": (0, 8),
        "sm_120 backward, D96, causal masked, elu": (56, 0),
    },
    # two programs share a multiprocessor
    "keys_hopper_kernel": {
        "sm_90 fused backward, D128": (152, 120),
        "sm_90 fused backward, D128, int8": (80, 88),
        "sm_90 fused backward, D128, relu": (8, 8),
    },
    "rows_hopper_kernel": {"sm_90 fused backward, D64": (8, 0)},
    # 128 masked keys of a wide head: no cut tried does without
    "queries_kernel": {
        "sm_90 backward, D256, 128 keys, causal masked": (8, 16),
        "sm_100 backward, D256, 128 keys, causal masked": (0, 16),
    },
    # 128 masked keys of a wide head: 16 rows spill less, and compute half as much for each key that they read. The
    # others by Triton 3.6 alone
    "attend_pooled_kernel": {
        "sm_80 proxy 2, D256, 128 keys, causal masked": (64, 16),
        "sm_80 proxy 2, D200, 32 keys, masked": (8, 0),
        "sm_90 proxy 2, D256, 128 keys, causal masked": (16, 16),
        "sm_100 proxy 2, D256, 128 keys, causal masked": (8, 24),
        "sm_100 proxy, D128": (8, 0),
    },
    # the assembler's own choice: half of all registers are in use
    "pooled_terms_kernel": {
        "sm_80 proxy, D256, fp16": (8, 8),
        "sm_90 proxy, D256, fp16": (8, 8),
        "sm_100 proxy, D256, fp16": (8, 0),
    },
    # wide heads, by Triton 3.6 alone
    "rows_kernel": {
        "sm_90 backward, D200, masked, elu": (16, 0),
        "sm_100 backward, D200, masked, elu": (24, 0),
    },
    "gather_kernel": {
        "sm_100 backward, D256, bf16": (16, 0),
        "sm_100 backward, D256, causal masked, int8": (8, 0),
        "sm_100 backward, D256, 128 keys, causal masked": (16, 0),
    },
}
"""Bytes per thread, of each kernel in the cases named, by each of TRITONS."""


def allowed(kernel: str, case: str) -> int:
    """Return the bytes that a kernel may spill in a case: what it did when the table was written.

    A Triton that is not in the table may spill as much as any that is.
    """
    spilled = SPILLS.get(kernel, {}).get(case, (0,) * len(TRITONS))
    version = device.triton_version()
    return spilled[TRITONS.index(version)] if version in TRITONS else max(spilled)
