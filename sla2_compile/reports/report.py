"""`report(model)`: every attention call, what was done with it, or why it was left alone."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from sla2_compile.libraries.adapted import adapter_sites, adapters_of
from sla2_compile.modules.redirect import CHILD
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.passes.sites.settings import SiteSettings
from sla2_compile.plan import plans
from sla2_compile.reports import runtime
from sla2_compile.reports.computed import How, as_exported, attention_ops, calls, how_lines
from sla2_compile.reports.linear import linear_lines, linear_states
from sla2_compile.reports.training import training_lines

if TYPE_CHECKING:
    from rich.table import Table

    from sla2_compile.recipes import Recipe


@dataclass(frozen=True)
class Report:
    """The outcome of each attention call of a model; `print` it, or use `to_dict()`.

    Attributes:
        outcomes: a `Rewrite` or a `Miss` for each attention call, in the order of a forward.
        recipe: the recipe, or None for a model that was not transformed.
        discovery: how the calls were found: fake, real, graph, pending (before the first forward), adapter (only
            eager calls so far, through a library's attention registry), or not transformed.
        fallbacks: per site name, eager calls that kept full attention at run time, by reason.
        recipes: per name of a transformed part, its recipe; empty if there is only one recipe to name.
        device: type of the device that the model is on; empty if it has no parameters.
        ran: per site name, how many eager calls SLA2 answered; compiled calls are not counted.
        gone: per owner whose planned calls no longer reach its sites, the reason.
        by_adapter: whether modules select SLA2 in a library's registry; their eager calls so far are listed.
        imitated: per name of a prepared or converted site, its format; none where that is switched off.
        converted: whether sites compute in low bit for good.
        linear: per name of a Linear layer, its state (`reports.linear.STATES`) or why it stays as it is; empty
            unless a recipe has quantize_linear.
        unplanned: calls of SLA2 in graphs that keep no plan: exports of transformed models, and saved programs.
    """

    outcomes: tuple[Rewrite | Miss, ...]
    recipe: Recipe | None
    discovery: str
    fallbacks: dict[str, dict[str, int]]
    recipes: dict[str, Recipe] = field(default_factory=dict)
    device: str = ""
    by_adapter: bool = False
    ran: dict[str, int] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    imitated: dict[str, str] = field(default_factory=dict)
    converted: bool = False
    linear: dict[str, str] = field(default_factory=dict)
    unplanned: int = 0

    @property
    def rewrites(self) -> list[Rewrite]:
        return [x for x in self.outcomes if isinstance(x, Rewrite)]

    @property
    def misses(self) -> list[Miss]:
        return [x for x in self.outcomes if isinstance(x, Miss)]

    @property
    def flops_saved(self) -> float:
        """Share of the attention FLOPs of all rewritten calls that SLA2 does not compute, in [0, 1]."""
        full = sum(r.full_flops * r.where.times for r in self.rewrites)
        ours = sum(r.flops * r.where.times for r in self.rewrites)
        return 1.0 - ours / full if full else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data.

        Keys: recipe, recipes, discovery, by_adapter, flops_saved, calls, fallbacks, ran, gone, imitated,
        converted, linear, unplanned.

        A replaced call has its method, low_bit and portable. low_bit holds what was asked for, what runs (empty where
        that depends on the length), and why if that is less. portable says why blocked PyTorch and not the Triton
        kernels runs the call on a GPU, or is empty.
        """
        calls = []
        for x in self.outcomes:
            row: dict[str, Any] = {**asdict(x.where), "replaced": isinstance(x, Rewrite)}
            if isinstance(x, Rewrite):
                row |= {"method": x.settings.options.method, "sparsity": x.sparsity}
                row |= {"topk": x.topk, "tm": x.tm, "tn": x.tn}
                row |= {"block_q": x.block_q, "block_k": x.block_k, "flops": x.flops, "full_flops": x.full_flops}
                how = How.of(x, self.device)
                row |= {"low_bit": {"asked": how.asked, "runs": how.runs, "why": how.why}, "portable": how.portable}
            else:
                row |= {"reason": x.reason.value, "detail": x.detail}
            calls.append(row)
        return {
            "recipe": None if self.recipe is None else self.recipe.model_dump(mode="json"),
            "recipes": {name: recipe.model_dump(mode="json") for name, recipe in self.recipes.items()},
            "discovery": self.discovery,
            "by_adapter": self.by_adapter,
            "flops_saved": self.flops_saved,
            "calls": calls,
            "fallbacks": self.fallbacks,
            "ran": self.ran,
            "gone": self.gone,
            "imitated": self.imitated,
            "converted": self.converted,
            "linear": self.linear,
            "unplanned": self.unplanned,
        }

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"{len(self.rewrites)} of {len(self.outcomes)} attention calls replaced, {self._recipe_names()}"
        if self.unplanned:
            title = f"{calls(self.unplanned)} of SLA2 in the graph, which keeps no plan of what was replaced"
        table = Table(title=title, caption=self._caption(), title_justify="left", caption_justify="left")
        for column in ("owner", "call", "q (B, H, N, D)", "keys", "done"):
            table.add_column(column, overflow="fold")
        table.add_column("blocks kept", justify="right")
        table.add_column("FLOPs saved", justify="right")
        for x in self.outcomes:
            w = x.where
            call = f"{w.index}" + (f" x{w.times}" if w.times > 1 else "")
            shape = " x ".join(map(str, w.q_shape)) + f" {w.dtype}" if w.q_shape else ""
            keys = str(w.k_shape[-2]) if w.k_shape else ""
            if isinstance(x, Rewrite):
                kept = f"{x.topk} of {x.tn}" if x.tn else f"{x.settings.options.topk_ratio:.0%}"
                saved = f"{1 - x.flops / x.full_flops:.0%}" if x.full_flops else ""
                table.add_row(w.owner or "(model)", call, shape, keys, self._done(x), kept, saved)
            else:
                why = x.reason.value + (f" ({x.detail})" if x.detail else "")
                table.add_row(w.owner or "(model)", call, shape, keys, why, "", "", style="dim")
        return table

    def _done(self, x: Rewrite) -> str:
        if x.where.owner not in self.gone:
            return name_of(x.settings)
        lost = self.gone[x.where.owner] in (runtime.REPLACED, runtime.SWAPPED, runtime.ERASED)
        if lost or not self._is_met(x.where.owner, self.ran):
            return "planned, not reached (see below)"
        return f"{name_of(x.settings)}, not always (see below)"

    def _unreached(self) -> list[str]:
        """Owners without any eager call, of which nothing else is told: other code may compute their attention."""
        owners = dict.fromkeys(x.where.owner for x in self.rewrites)
        met = {**self.ran, **self.fallbacks}
        return [owner or "(model)" for owner in owners if owner not in self.gone and not self._is_met(owner, met)]

    def _is_met(self, owner: str, names: Iterable[str]) -> bool:
        """Whether one of the names is of the owner's sites, or of one of them."""
        sites = f"{owner}.{CHILD}".lstrip(".")
        return any(name == sites or name.startswith(f"{sites}.") for name in names)

    def _recipe_names(self) -> str:
        if not self.recipes:
            return f"recipe {self.recipe.name if self.recipe else 'none'}"
        return "recipes " + ", ".join(f"{recipe.name} ({name or 'model'})" for name, recipe in self.recipes.items())

    def _caption(self) -> str:
        lines = []
        if self.discovery == "pending":
            lines.append("the first forward will find the attention calls")
        if self.by_adapter:
            # if there is a plan too, its calls are listed in full
            whose = "" if self.discovery == "adapter" else "under a library's name for SLA2: "
            lines.append(f"{whose}eager calls so far; compiled code records none")
        if self.rewrites:
            lines.append(f"attention FLOPs saved in the replaced calls: {self.flops_saved:.1%}")
        lines += how_lines(self.rewrites, self.device, self.imitated, self.converted)
        lines += linear_lines(self.linear)
        lines += training_lines(self.rewrites)
        if self.ran:
            who = " and ".join(dict.fromkeys(name_of(x.settings) for x in self.rewrites)) or "SLA2"
            lines.append(f"{who} answered {sum(self.ran.values())} eager calls")
            if not self.by_adapter and (unreached := self._unreached()):
                lines.append(f"not called so far, as far as eager code tells: {', '.join(unreached)}")
        lines += [f"{name or '(model)'}: {why}" for name, why in self.gone.items()]
        for name, counts in self.fallbacks.items():
            reasons = ", ".join(f"{n} x {reason}" for reason, n in counts.items())
            lines.append(f"{name}: full attention at run time: {reasons}")
        return "\n".join(lines)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=118)
        console.print(self)
        return console.file.getvalue().rstrip() if isinstance(console.file, io.StringIO) else ""


def report(model: nn.Module | ExportedProgram) -> Report:
    """Return what `transform` did with each attention call of model, a module or an exported program.

    A model with several transformed parts gets one report, with the parts' names before the owners'. Calls through a
    library's registry (`register_transformers`, `set_diffusers_backend`) are listed as far as they were made (none
    before a first forward), and only while the model selects SLA2 there. A model that was never transformed gets an
    empty report; `inspect` says what `transform` would do.

    Raises:
        TypeError: model is neither.
    """
    if not isinstance(model, (nn.Module, ExportedProgram)):
        kind = type(model).__name__
        raise TypeError(f"model must be an nn.Module or ExportedProgram, got {kind}; for a pipeline its transformer")
    model = model.graph_module if isinstance(model, ExportedProgram) else model
    outcomes: list[Rewrite | Miss] = []
    recipes: dict[str, Recipe] = {}
    discovery, by_adapter = "", False
    for name, root, plan in plans(model):
        outcomes += [_prefixed(x, name) for x in runtime.now(root, as_exported(root, plan.outcomes))]
        recipes[name] = plan.recipe
        discovery = discovery or plan.discovery
    for name, site in adapter_sites(model):
        outcomes += [_prefixed(x, name) for x in site.outcomes.values()]
        recipes[name] = site.recipe
        by_adapter = True
    for use in adapters_of(model):
        by_adapter = True
        if not use.replaced and not use.left_alone:
            recipes[use.part] = use.adapter.recipe
    discovery = discovery or ("adapter" if by_adapter else "")
    if not recipes:
        return Report((), None, "not transformed", {}, unplanned=len(list(attention_ops(model))))
    first = next(iter(recipes.values()))
    several = len(recipes) > 1 and (discovery != "adapter" or any(recipe != first for recipe in recipes.values()))
    named, device = recipes if several else {}, _device(model)
    ran, lost = runtime.counts(model), runtime.gone(model)
    return Report(
        tuple(outcomes), first, discovery, runtime.fallbacks(model), named, device, by_adapter, ran, lost,
        runtime.imitated(model), runtime.is_converted(model), linear_states(model),
    )  # fmt: skip


def name_of(settings: SiteSettings) -> str:
    """What a report calls a site's method."""
    method = settings.options.method
    return {"sla2": "SLA2", "sla": "SLA", "vsa": "VSA", "vmoba": "VMoBA"}.get(method, method)


def _prefixed(x: Rewrite | Miss, name: str) -> Rewrite | Miss:
    if not name:
        return x
    owner = f"{name}.{x.where.owner}" if x.where.owner else name
    return replace(x, where=replace(x.where, owner=owner))


def _device(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "" if parameter is None else parameter.device.type
