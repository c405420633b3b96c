"""The body of the ONNX function `sla2::attention`: SLA2 in standard operators, for one site's constants.

| place | one idea |
|---|---|
| `function.py` | the whole body, in the order of `kernels/reference/sla2.py` |
| `tools.py` | a builder of operators on sizes and shapes; loops |
| `call.py` | sizes of a call, its padded inputs, and which keys are real |
| `router.py` | block scores, the choice of blocks, and what is left over |
| `states.py` | block states and their sums over what was not chosen |
| `rows.py` | both branches and their mix, a few query blocks at a time |
| `sparse.py`, `sparse_int8.py`, `sparse_fp8.py` | scores and products of the chosen blocks, in each format |

Batch and lengths are not known to a body; heads, head dims and options are. All arithmetic is in float32.
"""
