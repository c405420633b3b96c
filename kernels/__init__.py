"""SLA2's operators `sla2::*`: their specification and their implementations.

| place | one idea |
|---|---|
| `arguments.py` | what the ops take and return; `records.py` reads that as schemas and values |
| `ops.py` | fakes, autograd and dispatch of the ops |
| `checks.py` | what an op accepts, from metadata alone; the error that says rule, value and fix |
| `blocks.py` | block geometry: how many blocks, how many are kept, which sizes suit a length |
| `support.py` | which kernels run a call, in which format, and why not better ones |
| `tracing.py` | what code may ask while a compiler traces it |
| `torch_internals.py` | the private interfaces of PyTorch in use, each with a test |
| `precision.py` | the format of a call, as a constant of whatever traces it |
| `feature_maps.py` | phi of the linear branch, and its derivative |
| `options.py` | how a call is computed, with words for what its lengths decide |
| `flops.py` | what the ops count in PyTorch's FLOP counter |
| `functional.py` | SLA2 in one call, by whichever ops it takes |
| `reference/` | the method written plainly over dense maps: the specification |
| `portable/` | blocked PyTorch for any device |
| `cuda/` | Triton and Gluon kernels, reached through `dispatch.py` |
| `cuda/route/`, `cuda/forward/` | the router's kernels, the forward's kernels, and their launches |
| `cuda/launch/` | a call's launches, worked out once for its layout; later ones without Triton's launcher |

Importing this package loads torch and registers the ops; Triton comes when a CUDA tensor first arrives.
"""

from sla2_compile.kernels import flops
from sla2_compile.kernels.blocks import auto_block_sizes
from sla2_compile.kernels.functional import sla2_attention
from sla2_compile.kernels.ops import attention, forward, route
from sla2_compile.kernels.options import AttentionOptions

flops.register()

__all__ = ["AttentionOptions", "attention", "auto_block_sizes", "forward", "route", "sla2_attention"]
