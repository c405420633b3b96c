"""The demo's model as it was trained with SLA2 on a GPU: its file, and the two models that are made of it.

`benchmarks/quality.py demo` trains it on the photograph and on batik, in both stages, and writes the file: weights
and what the sites learned, in float16. Full attention and SLA2 share the weights.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from jit import JiT, JiTConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sla2_compile

WEIGHTS = Path(__file__).parent / "data" / "trained.safetensors"
SITES = ".sla2."
# labels
PHOTO, BATIK = 0, 1


def with_sla2(model: JiT, recipe: str) -> nn.Module:
    """Return a copy of the demo's model with SLA2 in all its attention calls, whatever their length."""
    device = next(model.parameters()).device
    # what the sites hold does not depend on the size of the picture
    x, t, y = torch.zeros(1, 3, 64, 64, device=device), torch.zeros(1, device=device), torch.zeros(1, device=device)
    inputs = (x, t, y.long())
    return sla2_compile.transform(copy.deepcopy(model), recipe, example_inputs=inputs, min_seq_len=0).eval()


def save(model: nn.Module, recipe: str, path: Path) -> None:
    """Write a transformed model to a file, in float16."""
    state = {name: x.half().cpu().contiguous() for name, x in model.state_dict().items() if torch.is_tensor(x)}
    save_file(state, path, metadata={"recipe": recipe})


def load(path: Path = WEIGHTS, config: JiTConfig | None = None) -> tuple[JiT, nn.Module, str]:
    """Read the file; returns the model with full attention, the same with SLA2, and the name of the recipe.

    Args:
        config: of the model; the demo's if None.

    Raises:
        FileNotFoundError: the file is not there.
        RuntimeError: it is of another model, or of other sites.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} must be in {path.parent.name}, got no such file; check the repository out again, or train "
            "it with benchmarks/quality.py demo"
        )
    with safe_open(path, "pt") as file:
        recipe = file.metadata()["recipe"]
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, it is no dict
    full = JiT(config).eval()
    full.load_state_dict({name: x for name, x in state.items() if SITES not in name})
    model = with_sla2(full, recipe)
    model.load_state_dict(state)
    return full, model, recipe
