"""The demo's model as it was trained with SLA2 on a GPU: its file, and the two models that are made of it.

`benchmarks/quality.py demo` trains it on the photograph and on batik, in both stages, and writes the file: weights
and what the sites learned. Full attention and SLA2 share the weights.

Large matrices are int8 in the file, with a float16 scale for each row: w = scale * int8. All else is float16, also
what the sites learned. Their projections are the identity and small numbers around it, which int8 would lose.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from jit import JiT, JiTConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import sla2_compile

WEIGHTS = Path(__file__).parent / "data" / "trained.safetensors"
CONFIG = JiTConfig(rope_grid=64)
"""The weights have seen 64 x 64 tokens. Positions in other pictures must stay within that."""
SITES = ".sla2."
FORMAT = "int8 rows"
SCALE = ".scale"
LARGE = 2**14
"""Elements from which a matrix is stored as int8."""
# labels
PHOTO, BATIK = 0, 1


def with_sla2(model: JiT, recipe: str) -> nn.Module:
    """Return a copy of the demo's model with untrained SLA2 in all its attention calls, whatever their length."""
    device = next(model.parameters()).device
    # what the sites hold does not depend on the size of the picture
    x, t, y = torch.zeros(1, 3, 64, 64, device=device), torch.zeros(1, device=device), torch.zeros(1, device=device)
    inputs = (x, t, y.long())
    return sla2_compile.transform(copy.deepcopy(model), recipe, example_inputs=inputs, min_seq_len=0).eval()


def pack(name: str, x: Tensor) -> dict[str, Tensor]:
    """Return what the file holds for one tensor: int8 and scales of the rows of a large matrix, else float16."""
    x = x.detach().float().cpu()
    if SITES in name or x.dim() != 2 or x.numel() < LARGE:
        return {name: x.half().contiguous()}
    # rounded before it divides, so that both ways use one scale; a row of zeros has a scale of zero
    scale = (x.abs().amax(dim=1, keepdim=True) / 127).half()
    rows = (x / scale.float().masked_fill(scale == 0, 1.0)).round().clamp(-127, 127)
    return {name: rows.to(torch.int8), name + SCALE: scale}


def unpack(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in float32 from what a file holds."""
    scales = {name.removesuffix(SCALE): x.float() for name, x in stored.items() if name.endswith(SCALE)}
    weights = {name: x.float() for name, x in stored.items() if not name.endswith(SCALE)}
    return {name: x * scales[name] if name in scales else x for name, x in weights.items()}


def save(model: nn.Module, recipe: str, path: Path) -> None:
    """Write a transformed model to a file."""
    tensors: dict[str, Tensor] = {}
    for name, x in model.state_dict().items():
        if torch.is_tensor(x):
            tensors |= pack(name, x)
    save_file(tensors, path, metadata={"recipe": recipe, "format": FORMAT})


def load(path: Path | None = None, config: JiTConfig = CONFIG) -> tuple[JiT, nn.Module, str]:
    """Read a file; returns the model with full attention, the same with SLA2, and the name of the recipe.

    Args:
        path: the demo's file if None.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it was cut short, is no file of this kind, or is of another model.
    """
    path = path or WEIGHTS
    fix = "check the repository out again, or train it with benchmarks/quality.py demo"
    if not path.exists():
        raise FileNotFoundError(f"{path.name} must be in {path.parent.name}, got no such file; {fix}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path.name} must be a whole safetensors file, got {error}; {fix}") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"format of {path.name} must be {FORMAT!r}, got {about.get('format')!r}; {fix}")
    state, full = unpack(stored), JiT(config).eval()
    try:
        full.load_state_dict({name: x for name, x in state.items() if SITES not in name})
        model = with_sla2(full, about["recipe"])
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path.name} must hold the weights of {config}, got others; {fix}") from error
    return full, model, about["recipe"]
