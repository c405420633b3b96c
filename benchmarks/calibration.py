"""What stage 1 is worth: trains a small pixel transformer on a photograph, then calibrates it, on a CPU.

    python benchmarks/calibration.py                # the default options, with the table and the error curves
    python benchmarks/calibration.py --variants     # other losses, rates, temperatures and kinds of alpha beside them

Each variant starts from the same model and the same batches. Errors are means over the sites, relative to full
attention on the same q, k and v, on held-out batches, with hard top-k. `output` is the relative error of the model's
own output on these batches.
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
from sla2_compile.training.calibration import losses  # noqa: E402

HELD_OUT = 4
# 64 key blocks, of which 3 are kept
RECIPE = {"topk_ratio": 0.05, "compression_ratio": 8, "block_q": 32, "block_k": 16, "min_seq_len": 0}

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


def trained(photo: Tensor, steps: int) -> JiT:
    """Train the demo's model on the photograph."""
    torch.manual_seed(0)
    model = JiT(JiTConfig())
    start = time.perf_counter()
    done, loss = train(model, photo, steps, 600.0, lambda loss: None)
    print(f"trained for {done} steps in {time.perf_counter() - start:.0f} s, loss {loss:.3f}")
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
    parser.add_argument("--plot", help="image file for the default's picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(described(environment("cpu", "calibration.py", sys.argv[1:])))
    photo = load_photo()
    full = trained(photo, options.train_steps)
    data = batches(photo, options.tokens, options.batches)
    heads = full.config.width // full.config.head_dim
    print(
        f"q, k, v (2, {heads}, {options.tokens}, {full.config.head_dim}) float32, {full.config.depth} sites, {RECIPE}"
    )
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
