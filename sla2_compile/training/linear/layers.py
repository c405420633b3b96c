"""Which Linear layers a recipe's `quantize_linear` means, and why the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import fx, nn

from sla2_compile.kernels.checks import fail
from sla2_compile.modules.frames import plain
from sla2_compile.modules.parallel import sharding_of
from sla2_compile.plan import plans, roots
from sla2_compile.recipes import Recipe
from sla2_compile.training.linear.state import CONVERTED, ORIGINAL

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MULTIPLE = 8
"""Of in_features and out_features. torchao multiplies other sizes on the CPU, even those of a GPU's layers."""

EXCLUDED = "excluded by the recipe"


class Layer(NamedTuple):
    """A Linear layer of a model.

    Attributes:
        name: in the model, without a compiler's wrapper.
        module: the layer; a prepared one is torchao's.
        why: why it stays as it is, or empty.
    """

    name: str
    module: nn.Linear
    why: str


def layers(model: nn.Module) -> list[Layer]:
    """Return the Linear layers of those parts of a model whose recipe has quantize_linear, each once."""
    found: dict[int, Layer] = {}
    for part, root, plan in roots(model):
        if plan.recipe.quantize_linear == "none":
            continue
        for name, module, why in _inside(root, plan.recipe):
            found.setdefault(id(module), Layer(".".join(filter(None, (part, name))), module, why))
    return list(found.values())


def layers_to_prepare(model: nn.Module) -> list[nn.Linear]:
    """Return the layers that `prepare` is to change; none if no recipe asks for it, or if all are prepared.

    Raises:
        ValueError: a recipe asks for it, and model is a graph, is sharded or converted, or is only a part of the
            model that was transformed; or it has no layer that can be changed.
    """
    known = {id(root) for _, root, _ in roots(model)}
    wanted = [root for _, root, plan in plans(model) if plan.recipe.quantize_linear != "none"]
    if not wanted:
        return []
    if any(isinstance(root, fx.GraphModule) for root in wanted):
        fix = "a graph has no Linear layers to exchange: transform and prepare the nn.Module"
        raise fail("quantize_linear", "be 'none' for a graph", "'int8'", fix)
    if any(id(root) not in known for root in wanted):
        fix = "the recipe's patterns name layers in the whole: prepare that"
        raise fail("model", "be the one that was transformed, to prepare its Linear layers", "a part of it", fix)
    found = layers(model)
    if any(CONVERTED in layer.module.__dict__ for layer in found):
        fix = "make the model anew, transform it and load weights from before convert"
        raise fail("model", "not be converted", "Linear layers in 8 bits", fix)
    if all(layer.why for layer in found):
        reasons = ", ".join(dict.fromkeys(layer.why for layer in found)) or "there is none"
        fix = "quantize_linear='none' prepares the sites alone"
        raise fail("model", "have a Linear layer that can be prepared", f"none of {len(found)}: {reasons}", fix)
    todo = [layer.module for layer in found if not layer.why and ORIGINAL not in layer.module.__dict__]
    if todo and (how := sharding_of(model)) is not None:
        fix = "sharding takes hold of the Linear layers that it finds: prepare first"
        raise fail("model", "be prepared before it is sharded", how, fix)
    return todo


def asks_for_linear(model: nn.Module) -> bool:
    """Whether the recipe of a part of model has quantize_linear."""
    return any(plan.recipe.quantize_linear != "none" for _, _, plan in plans(model))


def names_for_patterns(model: nn.Module, recipe: Recipe) -> list[str]:
    """Return what include and exclude may name besides owners: Linear layers and the modules around them."""
    if recipe.quantize_linear == "none":
        return []
    linears = [plain(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(around for name in linears for around in _around(name)))


def _inside(root: nn.Module, recipe: Recipe) -> Iterator[tuple[str, nn.Linear, str]]:
    modules = {plain(name): module for name, module in root.named_modules()}
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            parents = [modules[around] for around in _around(name)[:-1] if around in modules]
            yield name, module, _why_not(name, module, parents, recipe)


def _why_not(name: str, linear: nn.Linear, parents: list[nn.Module], recipe: Recipe) -> str:
    if ORIGINAL in linear.__dict__ or CONVERTED in linear.__dict__:
        return ""
    if not _named(name, recipe.include) or _named(name, recipe.exclude):
        return EXCLUDED
    if any(isinstance(parent, fx.GraphModule) for parent in parents):
        return "inside a graph"
    if any("base_layer" in parent._modules for parent in parents):
        return "part of an adapter; merge it first"
    if type(linear) is not nn.Linear:
        # such as the out_proj of nn.MultiheadAttention, whose weight is read without a call of the layer
        return f"of class {type(linear).__name__}"
    return _why_not_this(linear)


def _why_not_this(linear: nn.Linear) -> str:
    held = vars(linear)
    if any(value for name, value in held.items() if "_hooks" in name):
        return "it has hooks"
    if "forward" in held or held.get("_compiled_call_impl") is not None:
        return "its forward was replaced, or compiled on its own"
    if set(linear._parameters) != {"weight", "bias"} or linear._buffers or linear._modules:
        return "it holds something else than a weight and a bias"
    if linear.weight.dtype not in DTYPES:
        return f"its weight is {linear.weight.dtype}"
    if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
        return f"features that are no multiples of {MULTIPLE}"
    return ""


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits the name, or that of a module around it."""
    return any(fnmatchcase(around, pattern) for pattern in patterns for around in _around(name))


def _around(name: str) -> list[str]:
    """The names of the modules around a module, from the root's on, and its own."""
    levels = name.split(".")
    return ["", *(".".join(levels[: n + 1]) for n in range(len(levels)))] if name else [""]
