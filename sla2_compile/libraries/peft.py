"""peft's `modules_to_save=["sla2"]`: peft adapters that train, save and load what sites learned."""

from __future__ import annotations

from torch import nn

from sla2_compile.modules.redirect import CHILD


def check_adapters(model: nn.Module) -> None:
    """Refuse to add sites to a model whose peft adapters name sites to save or load, but found none.

    peft silently drops a name that it finds no module for.

    Raises:
        ValueError: an adapter of model, which has no sites, names `sla2` in modules_to_save.
    """
    for module in model.modules():
        # written by peft on its own wrappers and on the model that it adapts
        for name, config in (vars(module).get("peft_config") or {}).items():
            saved = getattr(config, "modules_to_save", None) or ()
            if any(part.split(".")[-1] == CHILD for part in saved):
                raise ValueError(
                    f"adapter {name!r} with modules_to_save={list(saved)} must find sites in its model, got a model "
                    "that has none yet; transform the model with example_inputs first, then get_peft_model or "
                    "PeftModel.from_pretrained"
                )
