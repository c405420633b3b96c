"""Training with SLA2: fake quantisation, and what a training loop needs.

| place | one idea |
|---|---|
| `qat.py` | `prepare`: sites imitate INT8 or FP8 while they train; the switch |
| `convert.py` | `convert`: low bit for good, for inference |
| `torchao.py` | the same step through torchao's `quantize_`, beside its own for Linear layers |
"""
