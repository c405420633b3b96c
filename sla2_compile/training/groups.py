"""`parameter_groups`: the parameters of a transformed model as groups for an optimizer of torch."""

from __future__ import annotations

from typing import Any

from torch import nn

from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.options import METHODS
from sla2_compile.training.sites import sites_in

ALPHA = ("alpha_gain", "alpha_bias")
ROUTER = ("proj_q", "proj_k")
UNDECAYED = ("alpha", "router")
LINEAR = METHODS["sla"].learns


def parameter_groups(
    model: nn.Module,
    lr: float,
    alpha_lr: float | None = None,
    weight_decay: float = 0.01,
    router_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Return parameters that require a gradient as groups, each with `name`, `params`, `lr` and `weight_decay`.

    | name | parameters | weight decay |
    |---|---|---|
    | model | the model's own | `weight_decay` |
    | alpha | the mix of each site (`alpha_gain`, `alpha_bias`) | 0: decay would pull a gain of 1 to 0 |
    | router | projections of the router, where they require a gradient | 0: decay would shrink an identity |
    | linear | projection of the linear branch, of method sla | `weight_decay` |

    Hard top-k gives the projections no gradient, and `transform` freezes them. Without a gradient an optimizer leaves
    them as they are. Set `requires_grad` on them if a loss of your own trains them.

    A group without parameters is left out. The model's own parameters come first, in the order of
    `model.parameters()`, which `load_optimizer_by_name` relies on.

    Args:
        model: a transformed module, or a module around one.
        lr: learning rate of the model's own parameters, and of SLA's projection.
        alpha_lr, router_lr: of the other groups; lr if None.
        weight_decay: of the same.

    Raises:
        TypeError, ValueError: model has no sites, a number is negative, or nothing requires a gradient.

    Example:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-5, alpha_lr=1e-3))
    """
    rates = {
        "model": lr,
        "alpha": lr if alpha_lr is None else alpha_lr,
        "router": lr if router_lr is None else router_lr,
        "linear": lr,
    }
    for name, value in (("weight_decay", weight_decay), *((f"the lr of group {k}", v) for k, v in rates.items())):
        if value < 0:
            raise fail(name, "be at least 0", value, "1e-5 is a usual learning rate of stage 2")
    of_sites = {id(getattr(site, key)): kind for site in sites_in(model).values() for kind, key in _KINDS}
    held: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for parameter in model.parameters():
        if parameter.requires_grad:
            held[of_sites.get(id(parameter), "model")].append(parameter)
    groups = [
        {"name": name, "params": params, "lr": rates[name], "weight_decay": weight_decay * (name not in UNDECAYED)}
        for name, params in held.items()
        if params
    ]
    if not groups:
        raise fail("model", "have a parameter that requires a gradient", "none", "call requires_grad_() on some")
    return groups


_PARTS = (("alpha", ALPHA), ("router", ROUTER), ("linear", LINEAR))
_KINDS = tuple((kind, key) for kind, keys in _PARTS for key in keys)
