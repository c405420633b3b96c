"""What `sla2 calibrate` does between its arguments and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.api import transform
from sla2_compile.modules.frames import plain
from sla2_compile.modules.redirect import CHILD
from sla2_compile.plan import roots
from sla2_compile.training.calibration.calibrate import calibrate
from sla2_compile.training.calibration.result import Calibration


def run(
    model: Any, batches: Any, recipe: str, fields: dict[str, Any], options: dict[str, Any], out: Path | None,
    plot: Path | None,
) -> Calibration:  # fmt: skip
    """Transform a model if it is not, calibrate it, and write the files that were asked for.

    Raises:
        ValueError: as `transform` and `calibrate` do.
    """
    if isinstance(model, nn.Module) and not list(roots(model)):
        model = transform(model, recipe, **fields)
    found = calibrate(model, batches, **options)
    if out is not None:
        save(site_state(model), out)
        if len(found.recipes) == 1:
            found.recipe.save(out.with_suffix(".yaml"))
    if plot is not None:
        found.plot(plot)
    return found


def site_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of a model's state dict that its sites hold, for `load_state_dict(..., strict=False)`."""
    return {plain(name): x for name, x in model.state_dict().items() if CHILD in name.split(".")}


def save(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors with safetensors if the file is called so, else with torch.save.

    Raises:
        ImportError: safetensors is not installed.
    """
    if path.suffix != ".safetensors":
        torch.save(state, path)
        return
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("a .safetensors file needs safetensors; pip install safetensors") from error
    save_file({name: x.contiguous() for name, x in state.items()}, path)
