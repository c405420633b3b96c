"""What stage 1 is worth: trains a small pixel transformer on a photograph, then calibrates it, on a CPU.

    python benchmarks/calibration.py                # the default options, with the table and the error curves
    python benchmarks/calibration.py --variants     # other losses, rates, temperatures and kinds of alpha beside them
    python benchmarks/calibration.py --limits       # before any training: what bounds the error

Each variant starts from the same model and the same batches. Errors are means over the sites, relative to full
attention on the same q, k and v, on held-out batches, with hard top-k. `output` is the relative error of the model's
own output on these batches.

`--limits` prints, per site, the errors of: SLA2 untrained; the same with the true mass of the selected blocks as
alpha; with the best blocks (largest true mass) and that alpha; with the best alpha in [0, 1] per row; and the errors
of the linear branch alone, the sparse branch alone, and the mean of v alone.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from demo_train import load_photo, random_crops, train  # noqa: E402
from jit import JiT, JiTConfig, noisy  # noqa: E402

import sla2_compile  # noqa: E402
from benchmarks.environment import described, environment  # noqa: E402
from sla2_compile.kernels.reference import sla2 as reference  # noqa: E402
from sla2_compile.passes.sites.call import AttentionCall  # noqa: E402
from sla2_compile.passes.sites.masks import MaskView  # noqa: E402
from sla2_compile.passes.sites.site import Site  # noqa: E402
from sla2_compile.training.calibration import losses  # noqa: E402

HELD_OUT = 4
# 64 key blocks, of which 3 are kept
RECIPE: dict[str, Any] = {"topk_ratio": 0.05, "compression_ratio": 8, "block_q": 32, "block_k": 16, "min_seq_len": 0}

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "no KL": ({}, {"kl_share": 0.0}),
    "KL alone": ({}, {"kl_share": 1.0}),
    "loss mse (the paper's)": ({}, {"loss": "mse"}),
    "tau 0.5": ({}, {"tau": 0.5}),
    "tau 0.5, loss mse": ({}, {"tau": 0.5, "loss": "mse"}),
    "lr 3e-3": ({}, {"lr": 3e-3}),
    "lr 1e-2": ({}, {"lr": 1e-2}),
    "softmax of scores in SoftTop-k": ({}, {}),
    "alpha head": ({"alpha": "head"}, {}),
    "alpha block": ({"alpha": "block"}, {}),
    "feature map elu": ({"feature_map": "elu"}, {}),
    "feature map relu": ({"feature_map": "relu"}, {}),
}


def trained(photo: Tensor, steps: int, weights: Path | None) -> JiT:
    """Train a model of the demo's shape on the photograph, or load it from a file of an earlier run."""
    torch.manual_seed(0)
    model = JiT(JiTConfig())
    if weights is not None and weights.exists():
        model.load_state_dict(torch.load(weights))
        return model.eval()
    start = time.perf_counter()
    done, loss = train(model, photo, steps, 600.0, lambda loss: None)
    print(f"trained for {done} steps in {time.perf_counter() - start:.0f} s, loss {loss:.3f}")
    if weights is not None:
        torch.save(model.state_dict(), weights)
    return model


def batches(photo: Tensor, tokens: int, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Noisy crops at all noise levels: (z_t, t, y), two images each."""
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        x, y = random_crops(photo, 4 * round(tokens**0.5), 2, g)
        t = torch.rand(2, generator=g)
        made.append((noisy(x, t, torch.randn(x.shape, generator=g)), t, y))
    return made


@torch.no_grad()
def output_error(model: nn.Module, full: nn.Module, held: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return the relative error of the model's output to that of full attention."""
    pairs = [(model(*x), full(*x)) for x in held]
    error, size = (
        sum(float(x.square().sum()) for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return (error / size) ** 0.5


@torch.no_grad()
def limits(model: nn.Module, held: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Print what bounds each site's error; see the module's docstring."""
    table = Table("site", "untrained", "true alpha", "best blocks", "best alpha", "linear", "sparse", "mean of v")
    seen: dict[str, Tensor] = {}

    def observe(site: Site, call: AttentionCall, mask: MaskView) -> Tensor:
        q, k, v, scale = call.q, call.k, call.v, call.q.shape[3] ** -0.5
        sizes = RECIPE["block_q"], RECIPE["block_k"]
        lut, log_rest, _, k_mean = reference.route(
            q, k, None, None, None, RECIPE["topk_ratio"], RECIPE["compression_ratio"], *sizes, scale, False
        )
        p = torch.softmax(q @ k.mT * scale, dim=-1)
        full = p @ v

        def branches(lut: Tensor) -> tuple[Tensor, ...]:
            rest = (*sizes, scale, "softmax", "complement", False)
            o, _, sparse, linear = reference.attention(q, k, v, k_mean, lut, log_rest, None, None, None, *rest)
            true = (p * reference.selected_keys(lut, p.shape[2], p.shape[3], *sizes)).sum(dim=-1, keepdim=True)
            return o, sparse, linear, true * sparse + (1 - true) * linear

        o, sparse, linear, by_true = branches(lut)
        mass = p.unflatten(3, (-1, sizes[1])).sum(dim=-1).unflatten(2, (-1, sizes[0])).sum(dim=3)
        _, _, _, by_best = branches(mass.topk(lut.shape[-1]).indices.sort(dim=-1).values.int())
        gap = sparse - linear
        alpha = (((full - linear) * gap).sum(-1, True) / gap.square().sum(-1, True)).clamp(0, 1)
        found = (o, by_true, by_best, alpha * sparse + (1 - alpha) * linear, linear, sparse, v.mean(2, True))
        sums = torch.stack([(x - full).square().sum() for x in found] + [full.square().sum()])
        name = site.planned.name
        seen[name] = seen.get(name, torch.zeros(8)) + sums
        return full

    sites = [site for site in model.modules() if isinstance(site, Site)]
    for site in sites:
        site.observer = observe
    for batch in held:
        model(*batch)
    for site in sites:
        site.observer = None
    for name, sums in seen.items():
        table.add_row(name, *(f"{x:.3f}" for x in (sums[:-1] / sums[-1]).sqrt().tolist()))
    Console(width=140).print(table)


@contextmanager
def softmax_first(on: bool) -> Iterator[None]:
    """Give SoftTop-k the softmax of the scores, as Alg. 2 may be read, instead of the scores."""
    soft_topk = losses.soft_topk

    def changed(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return soft_topk(x.softmax(dim=-1), *args, **kwargs)

    with mock.patch.object(losses, "soft_topk", changed if on else soft_topk):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--only", nargs="*", help="of the variants, only these")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--limits", action="store_true", help="print what bounds the error, and train nothing")
    parser.add_argument("--weights", type=Path, help="file of the trained model: loaded if it exists, else written")
    parser.add_argument("--plot", help="image file for the default's picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(described(environment("cpu", "calibration.py", sys.argv[1:])))
    photo = load_photo()
    full = trained(photo, options.train_steps, options.weights)
    data = batches(photo, options.tokens, options.batches)
    heads = full.config.width // full.config.head_dim
    print(
        f"q, k, v (2, {heads}, {options.tokens}, {full.config.head_dim}) float32, {full.config.depth} sites, {RECIPE}"
    )
    if options.limits:
        limits(sla2_compile.transform(full, "max_speedup", example_inputs=data[0], **RECIPE), data[:HELD_OUT])
        return
    table = Table(
        "variant", "error before", "after", "factor", "recall", "at best", "output before", "after", "seconds"
    )
    console = Console(width=140)
    for name, (recipe, fields) in VARIANTS.items():
        if (name != "default" and not options.variants) or (options.only and name not in options.only):
            continue
        model = copy.deepcopy(full)
        model = sla2_compile.transform(model, "max_speedup", example_inputs=data[0], **{**RECIPE, **recipe})
        before, start = output_error(model, full, data[:HELD_OUT]), time.perf_counter()
        with softmax_first(name.startswith("softmax")):
            fixed = {"steps": options.steps, "held_out": HELD_OUT, "patience": 0, "progress": False}
            ratios = {"ratios": (0.03, 0.05, 0.1, 0.15, 0.25) if name == "default" else (0.05,)}
            found = sla2_compile.calibrate(model, data, **{**fixed, **ratios, **fields})
        seconds, sites = time.perf_counter() - start, found.sites
        old, new = (sum(getattr(s, when).error for s in sites) / len(sites) for when in ("before", "after"))
        recall = [sum(x) / len(sites) for x in zip(*((s.before.recall, s.after.recall) for s in sites), strict=True)]
        best = sum(s.before.oracle for s in sites) / len(sites)
        after = output_error(model, full, data[:HELD_OUT])
        cells = (f"{old:.4f}", f"{new:.4f}", f"{old / new:.2f}", f"{recall[0]:.3f} to {recall[1]:.3f}", f"{best:.3f}")
        table.add_row(name, *cells, f"{before:.4f}", f"{after:.4f}", f"{seconds:.0f}")
        print(name, *cells, f"{before:.4f} {after:.4f} {seconds:.0f} s", flush=True)
        if name == "default":
            console.print(found)
            for site in sites:
                curve = ", ".join(f"{p.topk_ratio:g}: {p.error:.3f}" for p in site.curve)
                print(f"error of {site.name} over topk_ratio: {curve}")
            if options.plot:
                found.plot(options.plot)
    console.print(table)


if __name__ == "__main__":
    main()
