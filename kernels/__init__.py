"""SLA2's operators `sla2::*`: their specification and their implementations.

| file | one idea |
|---|---|
| `checks.py` | what an op accepts, from metadata alone; the error that says rule, value and fix |
| `blocks.py` | block geometry: how many blocks, how many are kept, which sizes suit a length |
| `feature_maps.py` | phi of the linear branch, and its derivative |
| `reference.py` | the method written plainly over dense maps: the specification |
| `reference_low_bit.py` | its sparse branch in INT8 and FP8: the specification of the 8-bit format |
| `ops.py` | schemas, fakes, autograd, dispatch: route and attention where a gradient is wanted, else both as one op |
| `tiling.py`, `portable_route.py`, `portable_attention.py`, `portable_backward.py` | blocked PyTorch for any device |
| `cuda.py` | which calls the Triton kernels take, and the calls |
| `schedule.py` | a call's launches, worked out once for its layout |
| `rerun.py`, `repeat.py`, `driver.py` | its later runs; one launch made again; NVIDIA's driver |
| `route_schedule.py`, `attention_schedule.py` | those of route and of attention |
| `states_schedule.py` | those of attention's block states, and how these lie in memory |
| `tiles.py`, `tuning.py` | how attention's kernels are cut: by tables, or by trial |
| `device.py` | what launchers ask of a GPU and of a layout |
| `triton_pool.py`, `triton_scores.py`, `triton_select.py` | router: pooled tokens, block scores, top-k |
| `triton_states.py`, `triton_linear.py`, `triton_attend.py` | linear branch; sparse branch and mix |
| `hopper.py`, `gluon_attend.py` | which calls one kernel takes for both branches on sm_90, and that kernel |
| `precision.py` | which numeric format the sparse branch really runs in |
| `functional.py` | SLA2 in one call, by whichever ops it takes |

Importing this package loads torch and registers the ops; Triton comes when a CUDA tensor first arrives.
"""

from sla2_compile.kernels.blocks import AUTO, auto_block_sizes
from sla2_compile.kernels.functional import AttentionOptions, sla2_attention
from sla2_compile.kernels.ops import attention, forward, route

__all__ = ["AUTO", "AttentionOptions", "attention", "auto_block_sizes", "forward", "route", "sla2_attention"]
