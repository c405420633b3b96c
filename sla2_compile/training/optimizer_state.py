"""`load_optimizer_by_name`: an optimizer's moments survive the switch from full attention to SLA2, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sla2_compile.kernels.checks import fail
from sla2_compile.modules.redirect import CHILD


def load_optimizer_by_name(optimizer: Optimizer, state: dict[str, Any], model: nn.Module) -> list[str]:
    """Load an optimizer's state from a checkpoint whose model had other sites, usually none.

    Parameters keep their moments by name. If the checkpoint has no names (torch saves them only for an optimizer that
    was made of named parameters), both optimizers must hold the model's own parameters in one order, with the sites'
    parameters at any place between them; shapes are compared. Parameters of sites that the checkpoint lacks begin
    without moments, as in a new optimizer. Learning rates and all other settings stay those of the optimizer.

    Args:
        optimizer: of the transformed model, new.
        state: its `state_dict()` as saved before.
        model: the module whose parameters, among others, the optimizer holds.

    Returns:
        Names of the parameters that begin without moments.

    Raises:
        ValueError: the parameters do not match. The optimizer is left as it was.

    Example:
        >>> saved = torch.load("before_sla2.pt")
        >>> model.load_state_dict(saved["model"], strict=False)
        >>> load_optimizer_by_name(optimizer, saved["optimizer"], model)
    """
    merged, fresh = merge_optimizer_state(optimizer, state, model)
    optimizer.load_state_dict(merged)
    return fresh


def merge_optimizer_state(
    optimizer: Optimizer, state: dict[str, Any], model: nn.Module
) -> tuple[dict[str, Any], list[str]]:
    """Return the state dict that `load_optimizer_by_name` loads, and the names of parameters without moments."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mine = [names.get(id(parameter), f"parameter {at}") for at, parameter in enumerate(held)]
    saved = [index for group in state["param_groups"] for index in group["params"]]
    given = [name for group in state["param_groups"] for name in group.get("param_names", ())]
    if len(given) == len(saved) > 0:
        by_name = dict(zip((_plain(name) for name in given), saved, strict=True))
        pairs = [(at, by_name[_plain(name)]) for at, name in enumerate(mine) if _plain(name) in by_name]
        lost = [at for at in range(len(mine)) if at not in dict(pairs) and not _of_site(mine[at])]
        if lost:
            fix = "load the checkpoint of this model"
            raise fail(f"the moments of {mine[lost[0]]}", "be in the checkpoint under its name", "none", fix)
    else:
        own = [at for at, name in enumerate(mine) if not _of_site(name)]
        own = list(range(len(mine))) if len(saved) == len(mine) else own
        if len(own) != len(saved):
            rule = f"hold the moments of {len(own)} parameters, or of {len(mine)} with those of sites"
            fix = "build the optimizer of the same parameters as before, in the same order"
            raise fail("the checkpoint", rule, len(saved), fix)
        pairs = list(zip(own, saved, strict=True))
    for at, index in pairs:
        for key, value in state["state"].get(index, {}).items():
            # 0-dim entries are counts
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != held[at].shape:
                rule = f"have its shape {tuple(held[at].shape)}"
                fix = "build the optimizer of the same parameters as before, in the same order"
                raise fail(f"{key} of {mine[at]} in the checkpoint", rule, tuple(value.shape), fix)
    merged = optimizer.state_dict()
    merged["state"] = {at: state["state"][index] for at, index in pairs if index in state["state"]}
    loaded = set(merged["state"])
    return merged, [name for at, name in enumerate(mine) if at not in loaded]


def _of_site(name: str) -> bool:
    return CHILD in name.split(".")


def _plain(name: str) -> str:
    """A parameter's name without the levels of wrappers: torch.compile's and DistributedDataParallel's."""
    levels = [level for level in name.split(".") if level != "_orig_mod"]
    return ".".join(levels[1:] if levels[:1] == ["module"] else levels)
