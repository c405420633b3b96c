"""Statistics of the last recorded forward of each site, and the printed configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.routing import Routing
from sla2_compile.libraries.adapted import adapter_sites, adapters_of
from sla2_compile.modules.frames import plain
from sla2_compile.modules.redirect import CHILD
from sla2_compile.passes.sites.site import Site
from sla2_compile.plan import plans

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe

OR_BY_NAME = "or send it through register_transformers or set_diffusers_backend"


def sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Yield (name, site) for each site, named as in the state dict; an adapter's is named by the calling module."""
    for name, module in model.named_modules():
        if isinstance(module, Site):
            yield plain(name), module
    yield from adapter_sites(model)


def get_sla2_statistics(model: nn.Module, style: Literal["sites", "flat"] = "sites") -> dict[str, float]:
    """Return statistics of the last forward under `record_statistics`, as a flat dict of floats for a logger.

    It is empty for a model without SLA2. Compiled code runs as Python under `record_statistics`, so that one step of
    a compiled training can be recorded.

    Keys of style "sites", per site `<site>/...` and averaged over sites `mean/...`:
        sparsity: share of key blocks that the sparse branch skipped.
        alpha_mean, alpha_std, alpha_min, alpha_max: share of the sparse branch, over heads and query blocks
            (one row of each block). A site of method sla has none: its sum has no shares.
        router_entropy: entropy of the router's distribution over key blocks, in nats, mean over heads and query
            blocks.

    Style "flat" has `sla2_<owner>/...` for each site, with "_" for the dots in its owner's name: alpha_mean,
    alpha_std and sparsity as above, and router_params, the number of values in the router's projections. An owner
    with several sites has their number behind its name from the second on.

    Raises:
        ValueError: no forward was recorded yet, or the model waits for its first one; every site's last call kept
            full attention; there is no such style.
    """
    if style not in ("sites", "flat"):
        raise fail("style", "be 'sites' or 'flat'", repr(style), "flat has keys without dots")
    all_sites = list(sites(model))
    if not all_sites and not adapters_of(model):
        if any(plan.discovery == "pending" for _, _, plan in plans(model)):
            fix = "run one, or pass example_inputs to transform"
            raise fail("model", "have run its first forward", "one that waits for it", fix)
        return {}
    ran = [(name, site, site.last_routing) for name, site in all_sites if site.last_routing is not None]
    if not ran:
        raise _nothing_recorded(model, [site for _, site in all_sites])
    stats: dict[str, float] = {}
    if style == "flat":
        for name, site, routing in ran:
            found = _site_statistics(site, routing)
            found["router_params"] = float(sum(0 if p is None else p.numel() for p in (site.proj_q, site.proj_k)))
            keys = ("alpha_mean", "alpha_std", "sparsity", "router_params")
            stats |= {f"{_flat(name)}/{key}": found[key] for key in keys if key in found}
        return stats
    for name, site, routing in ran:
        stats |= {f"{name}/{key}": value for key, value in _site_statistics(site, routing).items()}
    for key in dict.fromkeys(key.rsplit("/", 1)[1] for key in stats):
        values = [value for name, value in stats.items() if name.endswith("/" + key)]
        stats[f"mean/{key}"] = sum(values) / len(values)
    return stats


def _flat(site: str) -> str:
    """A site's name without dots: blocks.0.attn.sla2.0 is sla2_blocks_0_attn."""
    levels = site.split(".")
    if CHILD not in levels:
        return "_".join([CHILD, *filter(None, levels)])
    at = levels.index(CHILD)
    return "_".join([CHILD, *levels[:at], *(level for level in levels[-1:] if level != "0")])


def _nothing_recorded(model: nn.Module, all_sites: list[Site]) -> ValueError:
    kept = sum((site.fallbacks for site in all_sites), Counter())
    reasons = ", ".join(f"{times} x {reason}" for reason, times in kept.items())
    if kept and not any(site.runs for site in all_sites):
        where = f"{sum(bool(site.fallbacks) for site in all_sites)} of {len(all_sites)} sites"
        return ValueError(
            "model must have a site whose calls SLA2 answers, got full attention at "
            f"{where}: {reasons}; give it inputs that SLA2 takes, or change the recipe"
        )
    got = f"{len(all_sites)} sites with none recorded" + (f" (full attention: {reasons})" if kept else "")
    if not all_sites:
        got = "no call yet through " + ", ".join(sorted({use.adapter.name for use in adapters_of(model)}))
    return ValueError(
        f"model must have run an eager forward that was recorded, got {got}; run one under `with "
        "sla2_compile.record_statistics(model):`"
    )


@torch.no_grad()
def _site_statistics(site: Site, routing: Routing) -> dict[str, float]:
    kept = (routing.lut >= 0).sum(dim=-1).float().mean().item()
    found = {"sparsity": 1.0 - kept / routing.Tn}
    alpha = _alpha(site, routing) if site.settings.options.method == "sla2" else routing.alpha
    if alpha is not None:
        alpha = alpha.float()
        found["alpha_mean"] = alpha.mean().item()
        found["alpha_std"] = alpha.std(correction=0).item()
        found["alpha_min"], found["alpha_max"] = alpha.min().item(), alpha.max().item()
    return {**found, "router_entropy": routing.entropy.float().mean().item()}


def _alpha(site: Site, routing: Routing) -> Tensor:
    """SLA2's alpha of the recorded rows, (B, Hq, Tm)."""
    logit = routing.lse - routing.log_rest
    if site.alpha_bias is not None:
        bias = site.alpha_bias.to(logit.dtype)
        if site.alpha_gain is None:
            logit = bias.expand_as(logit).masked_fill(routing.log_rest.isneginf(), float("inf"))
        else:
            gain = site.alpha_gain.to(logit.dtype)[:, None]
            logit = torch.where(routing.log_rest.isneginf(), logit, logit * gain + bias)
    return torch.sigmoid(logit).nan_to_num(0.0)


def log_sla2_config(model: nn.Module, log: Callable[[str], object] = print) -> None:
    """Write the model's SLA2 configuration line by line with log (print, logger.info, ...).

    It has one block for each part that `transform` planned. Then comes one for each adapter that the model uses now
    (`register_transformers`, `set_diffusers_backend`), with its eager calls so far. If two adapters share a part, the
    blocks are for its sub-parts.

    Raises:
        ValueError: model is not transformed, and uses no adapter.
    """
    found, uses = list(plans(model)), adapters_of(model)
    if not found and not uses:
        raise ValueError(
            f"model must be transformed, got one that is not; call sla2_compile.transform first, {OR_BY_NAME}"
        )
    for name, root, plan in found:
        where = name or type(root).__name__
        log(f"SLA2 in {where}: recipe {plan.recipe.name}, {len(plan.rewrites)} sites, {len(plan.misses)} left alone")
        _log_recipe(plan.recipe, log)
    for use in uses:
        # torch.compile's wrapper is not what a user built
        where = use.part or type(getattr(model, "_orig_mod", model)).__name__
        log(f"SLA2 in {where}: recipe {use.adapter.recipe.name}, behind {use.adapter.name}")
        log(f"  eager calls so far: {use.replaced} replaced, {use.left_alone} left alone")
        _log_recipe(use.adapter.recipe, log)
    learned = sum(p.numel() for _, site in sites(model) for p in site.parameters())
    log(f"  parameters added: {learned}")


def _log_recipe(recipe: Recipe, log: Callable[[str], object]) -> None:
    for field, value in recipe.model_dump(exclude={"name", "overrides"}).items():
        log(f"  {field}: {value}")
    for pattern, values in recipe.overrides.items():
        log(f"  override {pattern}: {values}")
