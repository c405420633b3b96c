"""`Plan`: what `transform` decided for one model; kept on the model, outside its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from sla2_compile.passes.sites.outcome import Miss, Rewrite

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe

ATTRIBUTE = "_sla2_plan"


@dataclass(frozen=True)
class Plan:
    """The decisions of one `transform`.

    Attributes:
        recipe: as given, overrides applied.
        outcomes: every attention call, in the order of a forward.
        discovery: how the calls were found: "fake", "real" or "graph"; "pending" before a lazy first forward.
    """

    recipe: Recipe
    outcomes: tuple[Rewrite | Miss, ...]
    discovery: str

    @property
    def rewrites(self) -> list[Rewrite]:
        return [x for x in self.outcomes if isinstance(x, Rewrite)]

    @property
    def misses(self) -> list[Miss]:
        return [x for x in self.outcomes if isinstance(x, Miss)]


def plan_of(module: nn.Module) -> Plan | None:
    """The plan of a module that was transformed as a root, or None."""
    return module.meta.get(ATTRIBUTE) if isinstance(module, fx.GraphModule) else module.__dict__.get(ATTRIBUTE)


def set_plan(module: nn.Module, plan: Plan | None) -> None:
    """Keep a plan on its root; None removes it. A GraphModule has it in meta, which its deepcopy keeps."""
    held: dict[str, Any] = module.meta if isinstance(module, fx.GraphModule) else module.__dict__
    if plan is None:
        held.pop(ATTRIBUTE, None)
    else:
        held[ATTRIBUTE] = plan


def plans(model: nn.Module) -> Iterator[tuple[str, nn.Module, Plan]]:
    """Yield (name, root, plan) for model and every part of it that was transformed as a root."""
    for name, module in model.named_modules():
        plan = plan_of(module)
        if plan is not None:
            # torch.compile's wrapper adds a level that users do not know
            yield name.removeprefix("_orig_mod").lstrip("."), module, plan
