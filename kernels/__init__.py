"""SLA2's operators `sla2::*`: their specification and their implementations.

| place | one idea |
|---|---|
| `arguments.py` | arguments and results of the ops; `records.py` reads schemas and values from them |
| `ops.py` | fakes, autograd and dispatch of the ops |
| `sparse_ops.py` | the op that the other methods share |
| `methods.py` | the other methods than SLA2, and what each is made of |
| `routing.py` | what was chosen in a call |
| `checks.py` | what an op accepts, judged by metadata alone; the form of every error |
| `blocks.py` | block geometry: how many blocks, how many are kept, which sizes suit a length |
| `support.py` | which kernels run a call, in which format, and why not better ones |
| `tracing.py` | questions about a trace that add no guard |
| `torch_internals.py` | the private interfaces of PyTorch in use, each with a test |
| `precision.py` | the format of a call, as a constant in traces |
| `feature_maps.py` | phi of the linear branch, and its derivative |
| `options.py` | the options of a call; words such as "auto" are resolved by its lengths |
| `flops.py` | what the ops count in PyTorch's FLOP counter |
| `layout.py` | what of a tensor decides launches: the key of a kind of call |
| `kinds.py` | what is decided once per kind of eager call, up to its launches |
| `switches.py` | switches in the environment, read at each call |
| `functional.py` | SLA2 in one call, through one op or two |
| `quantise.py` | rounding to 8 bits: the ops `fake_quant`, `quantize` and `dequantize` |
| `reference/` | the method written plainly over dense maps: the specification |
| `portable/` | blocked PyTorch for any device |
| `cuda/` | Triton and Gluon kernels, reached through `dispatch.py` |
| `cuda/route/`, `cuda/forward/`, `cuda/backward/` | the kernels of router, forward and backward, and their launches |
| `cuda/sparse/` | the kernels of the op that the other methods share, and their launches |
| `cuda/launch/` | a call's launches, planned once per layout and replayed without Triton's launcher |

Importing this package loads torch and registers the ops; Triton is imported for the first call on CUDA tensors.
"""

from sla2_compile.kernels import flops
from sla2_compile.kernels.blocks import auto_block_sizes
from sla2_compile.kernels.functional import sla2_attention
from sla2_compile.kernels.ops import attention, forward, route
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.sparse_ops import sparse_attention

flops.register()

__all__ = [
    "AttentionOptions",
    "attention",
    "auto_block_sizes",
    "forward",
    "route",
    "sla2_attention",
    "sparse_attention",
]
