"""Training with SLA2: fake quantisation, schedules, and what a training loop needs.

| place | one idea |
|---|---|
| `qat.py` | `prepare`: sites imitate INT8 or FP8 while they train; the switch |
| `convert.py` | `convert`: low bit for good, for inference |
| `linear/` | the Linear layers around the sites, by torchao, if the recipe has quantize_linear |
| `torchao.py` | the same step through torchao's `quantize_`, beside its own for Linear layers |
| `calibration/` | stage 1: `calibrate` trains router and alpha against full attention |
| `off.py`, `distillation.py` | full attention from the same weights, as a teacher |
| `schedule.py` | the share of key blocks over the steps, which the state dict keeps |
| `aux_loss.py` | the router's loss in a training loop |
| `groups.py`, `optimizer_state.py` | an optimizer's groups, and its moments over the switch to SLA2 |
| `gradients.py` | gradients that are not finite name their site |
"""
