"""`compare`: quality against time for every method, on one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sla2_compile.api import restore, transform
from sla2_compile.comparison.result import Compared, Comparison
from sla2_compile.kernels.checks import fail
from sla2_compile.modules.mode import in_eval_mode
from sla2_compile.plan import plans
from sla2_compile.recipes import DEFAULT, Recipe
from sla2_compile.reports.report import report

METHODS: dict[str, dict[str, Any]] = {
    "sla2": {"method": "sla2"},
    "proxy": {"method": "proxy", "proxy_order": 1},
    "proxy2": {"method": "proxy", "proxy_order": 2},
    "topk": {"method": "topk"},
    "sla": {"method": "sla"},
    "vsa": {"method": "vsa"},
    "vmoba": {"method": "vmoba"},
}
"""Names of methods, and the fields of a recipe that they stand for."""
UNTRAINED = ("sla2", "proxy", "proxy2", "topk")
"""Those that are whole without training, and take any call. VMoBA takes no causal call, and wants chunks."""
RATIOS = (0.05, 0.1, 0.15, 0.25)
OWN = ("method", "proxy_order", "topk_ratio")
"""Fields of a recipe that each row has its own value of."""
SAME = 1e-3
"""Largest relative difference of two forwards with full attention: above it, errors say nothing."""


def compare(
    model: nn.Module,
    example_inputs: Sequence[Any] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    recipe: str | Path | Recipe | dict[str, Any] = DEFAULT,
    methods: Sequence[str] = UNTRAINED,
    ratios: Sequence[float] = RATIOS,
    repeats: int = 3,
    **fields: Any,
) -> Comparison:
    """Run a model with each method at each topk_ratio, and measure the error of its output and its time.

    Nothing is trained: the methods are as they are on the first day. Errors are of one set of inputs, in eval mode
    and eager code. The model is transformed and restored for each row, so that there is never a second copy of it;
    it is left as it was, in its mode too.

    Args:
        model: not transformed. example_inputs, example_kwargs: what its forward is given.
        recipe, fields: of all rows, as for `transform`; method, proxy_order and topk_ratio are each row's own.
        methods: names of sla2, proxy, proxy2 (proxy_order 2), topk, vmoba, sla and vsa. ratios: values of topk_ratio.
        repeats: timed forwards of each row, after one that is not; the least time counts.

    Raises:
        ValueError: the model is transformed already, gives other results each time, or zeros; a method is unknown;
            fields has what is a row's own; repeats is no positive number; there is no method or ratio. Also what
            `transform` raises: where it can replace no call, for example.

    Example:
        >>> found = compare(model, (x, t, y), ratios=(0.05, 0.15))
        >>> print(found)
        >>> found.plot("methods.png")
    """
    base = _checked(model, recipe, methods, ratios, repeats, fields)
    kwargs = dict(example_kwargs or {})
    device = next((x.device for x in tree_leaves((list(example_inputs), kwargs)) if isinstance(x, Tensor)), None)
    rows, calls = [], 0
    with in_eval_mode(model), torch.no_grad():

        def forward() -> Tensor:
            return _numbers(model(*example_inputs, **kwargs))

        full, full_seconds = _timed(forward, device, repeats)
        if not full.any():
            raise fail(
                "model", "give an output that is not all 0", "zeros", "errors are relative to it; load weights"
            )
        off = _relative(forward(), full)
        if not off <= SAME:
            fix = "have it draw no random numbers, or set a seed inside"
            raise fail("model", "give the same output for the same inputs", f"a difference of {off:.1e}", fix)
        for method in methods:
            for ratio in ratios:
                chosen = Recipe.of(base, topk_ratio=ratio, **METHODS[method])
                transform(model, chosen, example_inputs=tuple(example_inputs), example_kwargs=kwargs)
                try:
                    found, seconds = _timed(forward, device, repeats)
                    made = report(model)
                    replaced = sum(x.where.times for x in made.rewrites)
                    calls = replaced + sum(x.where.times for x in made.misses)
                finally:
                    restore(model)
                rows.append(Compared(method, float(ratio), _relative(found, full), seconds, replaced))
    return Comparison(tuple(rows), full_seconds, calls, repeats, str(device or "cpu"))


def _checked(
    model: nn.Module,
    recipe: Any,
    methods: Sequence[str],
    ratios: Sequence[float],
    repeats: int,
    fields: dict[str, Any],
) -> Recipe:
    """Check the arguments before the first forward; returns the recipe of all rows."""
    if any(True for _ in plans(model)):
        raise fail("model", "not be transformed", "a transformed model", "restore(model) first")
    for name in OWN:
        if name in fields:
            raise fail("fields", f"leave out {', '.join(OWN)}", name, "give methods and ratios, which set them")
    for method in methods:
        if method not in METHODS:
            raise fail("methods", f"be of {', '.join(METHODS)}", repr(method), "proxy2 is proxy with proxy_order 2")
    if not methods or not ratios:
        raise fail("methods and ratios", "name at least one each", f"{methods} and {ratios}", "leave them out")
    if type(repeats) is not int or repeats < 1:
        raise fail("repeats", "be an int of at least 1", repr(repeats), "3 is enough where nothing else runs")
    base = Recipe.of(recipe, **fields)
    for ratio in ratios:
        Recipe.of(base, topk_ratio=ratio)
    return base


def _numbers(output: Any) -> Tensor:
    """All floating-point numbers of an output as one vector."""
    found = [x.flatten() for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise fail("model", "return a tensor of numbers", type(output).__name__, "wrap it in a module that does")
    return torch.cat([x.float() for x in found])


def _relative(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def _timed(forward: Callable[[], Tensor], device: torch.device | None, repeats: int) -> tuple[Tensor, float]:
    """Return the result of a forward, and the least time of the ones after it."""

    def synchronize() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    made, seconds = forward(), []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        forward()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return made, min(seconds)
