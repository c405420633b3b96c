"""`transform` and `restore`: the one call that turns a model into an SLA2 model, and the one that undoes it."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sla2_compile import debug
from sla2_compile.kernels.checks import DTYPES
from sla2_compile.libraries.peft import check_adapters
from sla2_compile.libraries.transformers import door_of
from sla2_compile.modules.captured import CHILD
from sla2_compile.modules.discovery import CONTAINERS, discover
from sla2_compile.modules.hand_written import find_hand_written
from sla2_compile.modules.parallel import wrapper_around
from sla2_compile.modules.pretrained import begin_as_saved
from sla2_compile.modules.redirect import RedirectAttention, check_removable, has_attribute, install, is_owner, remove
from sla2_compile.modules.too_early import RemembersCopies, tell
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.passes.sites.select import SeenCall, check_patterns, select
from sla2_compile.passes.sites.site import Site, Sites
from sla2_compile.plan import Plan, plans, set_plan
from sla2_compile.recipes import DEFAULT, Recipe
from sla2_compile.reports.report import report

M = TypeVar("M", bound=nn.Module | ExportedProgram)


def transform(
    model: M,
    recipe: str | Path | Recipe | dict[str, Any] = DEFAULT,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    discover: Literal["auto", "fake", "real"] = "auto",
    allow_none: bool = False,
    **overrides: Any,
) -> M:
    """Replace a model's attention by SLA2 (arXiv 2602.12675), in place, and return the model.

    Every `F.scaled_dot_product_attention` call that the recipe selects and the rules admit is sent to a site, a
    child module `sla2` of the module that makes the call. Class, attributes, hooks and state-dict keys stay;
    `restore` undoes it. A GraphModule is rewritten in its graph; an ExportedProgram gives a new one.

    Args:
        model: nn.Module, fx.GraphModule or ExportedProgram.
        recipe: name, path of a YAML file, Recipe or dict; see `Recipe`.
        example_inputs, example_kwargs: one set of inputs for forward. With them the calls are found at once,
            without computing (fake tensors; a model on the meta device can be planned). Without them the first
            forward finds them; learned parameters then appear too late for an optimizer built before it.
        discover: "fake", "real" (one true forward), or "auto": fake, and real where that fails or shows masks that
            a library may build only while it is traced.
        allow_none: return the model unchanged, instead of raising, if nothing was replaced.
        **overrides: any field of Recipe, for example topk_ratio=0.1.

    Returns:
        The same object (ExportedProgram: a new program that shares the weights).

    Raises:
        RecipeError: unknown recipe or field, value out of range.
        ValueError: nothing was replaced; the inputs do not run; the model is transformed with another recipe.
            The model is left as it was.
        TypeError: model is none of the three kinds, or scripted.

    Example:
        >>> model = transform(model, "balanced", example_inputs=(x, t, y), topk_ratio=0.1)
    """
    chosen = Recipe.of(recipe, **overrides)
    debug.level()  # a bad SLA2_DEBUG is refused before anything changes
    if isinstance(example_inputs, Tensor) or (
        example_inputs is not None and not isinstance(example_inputs, Sequence)
    ):
        kind = type(example_inputs).__name__
        raise ValueError(f"example_inputs must be a tuple of forward's arguments, got {kind}; write (x,)")
    if isinstance(model, (ExportedProgram, fx.GraphModule)):
        return cast(M, _transform_graph(model, chosen, example_inputs, example_kwargs, allow_none))
    if isinstance(model, type) or not isinstance(model, nn.Module):
        kind = model if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"model must be an nn.Module, GraphModule or ExportedProgram, got {kind}; "
            "pass the module itself, for a pipeline its transformer: pipe.transformer = transform(pipe.transformer)"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must not be scripted as a whole, got {type(model).__name__}; its code cannot be rewritten: "
            "transform the nn.Module that it was made of"
        )
    if _already(model, chosen):
        return model
    if example_inputs is None and example_kwargs is None:
        model.__dict__["forward"] = FirstForward(model, chosen, discover, allow_none)
        set_plan(model, Plan(chosen, (), "pending"))
        return model
    _transform_now(model, chosen, tuple(example_inputs or ()), dict(example_kwargs or {}), discover, allow_none)
    return model


def _transform_graph(
    model: ExportedProgram | fx.GraphModule, recipe: Recipe, inputs: Any, kwargs: Any, allow_none: bool
) -> Any:
    from sla2_compile.graphs import transform_exported, transform_graph_module

    if kwargs is not None:
        raise ValueError(
            "example_kwargs must be None for a graph, got some; its inputs are positional: example_inputs"
        )
    if inputs is not None and isinstance(model, ExportedProgram):
        raise ValueError("example_inputs must be None for an ExportedProgram, got some; it holds those of its export")
    if isinstance(model, ExportedProgram):
        return transform_exported(model, recipe, allow_none)
    return model if _already(model, recipe) else transform_graph_module(model, recipe, inputs, allow_none)


def restore(model: nn.Module) -> nn.Module:
    """Give a transformed model its own attention back: original forward, original state-dict keys, same weights.

    A model that was never transformed is returned as it is. Parts transformed on their own are restored too.

    Raises:
        TypeError: model is no nn.Module; an ExportedProgram's original is still there, `transform` made a new one.
        ValueError: a forward was wrapped after transform; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"model must be an nn.Module, got {kind}; transform left an ExportedProgram as it was")
    owners = [module for module in model.modules() if is_owner(module)]
    for owner in owners:
        check_removable(owner)
    for _, root, _ in list(plans(model)):
        first = root.__dict__.get("forward")
        if isinstance(first, FirstForward):
            first.withdraw()
        set_plan(root, None)
    for owner in owners:
        remove(owner)
    for module in list(model.modules()):
        if isinstance(module, fx.GraphModule):
            from sla2_compile.graphs import restore_graph_module

            restore_graph_module(module)
    return model


class FirstForward(RemembersCopies):
    """A root's forward until its first call, which finds the attention and then runs.

    Somebody may wrap it before that; then it stays inside the wrapper and hands every later call on.
    """

    def __init__(self, root: nn.Module, recipe: Recipe, how: str, allow_none: bool) -> None:
        super().__init__()
        self.root, self.recipe, self.how, self.allow_none = root, recipe, how, allow_none
        self.own = root.__dict__.get("forward")
        self.done = False

    def withdraw(self) -> None:
        """Take this object away from the root again."""
        if self.own is None:
            del self.root.__dict__["forward"]
        else:
            self.root.__dict__["forward"] = self.own

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        return (
            self.own(*args, **kwargs) if self.own is not None else type(self.root).forward(self.root, *args, **kwargs)
        )

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's, for libraries that look at what forward takes."""
        return inspect.signature(self.own or type(self.root).forward.__get__(self.root))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.done:
            return self._original(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a model transformed without example_inputs must run once before it is compiled or exported, "
                "got a compiler's trace; call it once, or pass example_inputs to transform"
            )
        if (wrapper := wrapper_around(self.root)) is not None:
            raise RuntimeError(
                f"a model transformed without example_inputs must run once before it is wrapped, got {wrapper} around "
                "its first forward; its new parameters would not be synchronised: pass example_inputs to transform"
            )
        root = self.root
        check_adapters(root)
        wrapped = root.__dict__.get("forward") is not self
        if not wrapped:
            self.withdraw()
        set_plan(root, None)
        # a trial run of a wrapped root must come through here to the original
        self.done = True
        try:
            _transform_now(root, self.recipe, args, kwargs, self.how, self.allow_none)
        except Exception:
            # leave the model as transform made it: the next forward tries again
            self.done = False
            if not wrapped:
                root.__dict__["forward"] = self
            set_plan(root, Plan(self.recipe, (), "pending"))
            raise
        twins = [twin() for twin in self.copies]
        tell(root, sum(isinstance(twin, FirstForward) and not twin.done for twin in twins))
        if wrapped and is_owner(root):
            with RedirectAttention(root.sla2):  # type: ignore[arg-type]
                return self._original(*args, **kwargs)
        return self._original(*args, **kwargs) if wrapped else root.forward(*args, **kwargs)


def _transform_now(
    model: nn.Module, recipe: Recipe, args: Sequence[Any], kwargs: Mapping[str, Any], how: str, allow_none: bool
) -> None:
    found = discover(model, args, kwargs, how)
    seen, captured = find_hand_written(model, found)
    check_patterns(seen, recipe)
    outcomes = select(seen, recipe)
    rewrites = [x for x in outcomes if isinstance(x, Rewrite)]
    if not rewrites and not allow_none:
        raise nothing_replaced(outcomes)
    calls = {(s.where.owner, s.where.index): s for s in seen if s.call is not None}
    owners: dict[str, dict[int, Site]] = defaultdict(dict)
    modules = dict(model.named_modules(remove_duplicate=False))
    for rewrite in rewrites:
        where = rewrite.where
        site = _site(modules[where.owner], calls[where.owner, where.index], rewrite)
        owners[where.owner][where.index] = site
    begin_as_saved(model, {f"{o}.{CHILD}.{i}".lstrip("."): s for o, made in owners.items() for i, s in made.items()})
    # an owner whose calls all stay must answer them itself if a module around it is an owner, or a door would
    for s in seen:
        module = modules[s.where.owner]
        taken = _inside(s.where.owner, owners) or door_of(module) is not None
        if s.call is not None and s.where.owner not in owners and taken and not isinstance(module, CONTAINERS):
            owners[s.where.owner] = {}
    # nn.TransformerEncoder turns padded batches into nested tensors, unless a function mode is active: be one
    for name in [n for n, m in modules.items() if isinstance(m, nn.TransformerEncoder) and n not in owners]:
        if any(name == "" or owner.startswith(f"{name}.") for owner in list(owners)):
            owners[name] = {}
    for name in owners:
        if has_attribute(modules[name], CHILD):
            kind = type(modules[name]).__name__
            raise ValueError(
                f"{name or 'model'} ({kind}) must have no attribute {CHILD!r}, got one; rename it, since sites "
                "live there. The model was left as it was"
            )
    # nothing above changed the model; nothing below can fail
    for name, sites in owners.items():
        install(modules[name], Sites(sites), captured.get(name))
    set_plan(model, Plan(recipe, tuple(outcomes), found.how))
    debug.show_report(lambda: report(model))


def _inside(name: str, owners: Mapping[str, Any]) -> bool:
    return any(outer != name and (outer == "" or name.startswith(outer + ".")) for outer in owners)


def _site(owner: nn.Module, seen: SeenCall, rewrite: Rewrite) -> Site:
    """Build a site whose parameters have the owner's own dtype, training mode and wish for gradients."""
    assert seen.call is not None
    floating = [p for p in owner.parameters() if p.dtype in DTYPES]
    # the first forward of a lazily transformed model may run in inference mode, whose tensors never train
    with torch.inference_mode(False):
        site = Site(rewrite.settings, seen.call, floating[0].dtype if floating else None)
    if floating and not any(p.requires_grad for p in owner.parameters()):
        site.requires_grad_(False)
    return site.train(owner.training)


def _already(model: nn.Module, recipe: Recipe) -> bool:
    """Whether model is transformed with this recipe; raise if it cannot be transformed (again)."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model must be transformed before it is compiled, got torch.compile's wrapper; "
            "write torch.compile(transform(model, ...))"
        )
    if (wrapper := wrapper_around(model)) is not None:
        raise ValueError(
            "model must be transformed before it is wrapped or sharded for several devices, got "
            f"{wrapper}; its new parameters would not be synchronised: transform first"
        )
    for name, root, plan in plans(model):
        if root is model and plan.recipe == recipe:
            return True
        part = "model" if root is model else f"part {name!r}"
        was, now = plan.recipe.model_dump(), recipe.model_dump()
        differ = ", ".join(f"{k} {was[k]!r} then {now[k]!r}" for k in was if was[k] != now[k]) or "the same recipe"
        raise ValueError(
            f"{part} must not be transformed twice, got {differ}; call sla2_compile.restore(model) first"
        )
    for name, module in model.named_modules():
        if is_owner(module):
            where = name or type(module).__name__
            raise ValueError(
                f"model must not be part of a transformed model, got sites in {where}; restore the whole model first"
            )
    check_adapters(model)
    return False


def nothing_replaced(outcomes: Sequence[Rewrite | Miss]) -> ValueError:
    """The error for a model in which no call was replaced: says what was seen, and why each call stayed."""
    if not outcomes:
        return ValueError(
            "model must call scaled_dot_product_attention at least once, got no attention call; "
            "pass allow_none=True if that is fine. The model was left as it was"
        )
    counts: dict[str, list[str]] = defaultdict(list)
    for miss in outcomes:
        assert isinstance(miss, Miss)
        counts[f"{miss.reason.value}{f' ({miss.detail})' if miss.detail else ''}"].append(miss.where.owner or "model")
    why = "; ".join(f"{len(names)} x {reason}: {', '.join(names[:3])}" for reason, names in counts.items())
    return ValueError(
        f"model must have an attention call that SLA2 takes, got none of {len(outcomes)}: {why}; "
        "change the recipe (min_seq_len=0 takes every length) or pass allow_none=True. The model was left as it was"
    )
