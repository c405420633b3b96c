"""How near is each method to full attention in a trained model, before anything of the method is trained?

    python benchmarks/methods_trained.py --state build/quality --output benchmarks/results/methods_trained
    python benchmarks/methods_trained.py --report --output benchmarks/results/methods_trained

The model is the teacher of `benchmarks/quality.py`, whose part `teacher` leaves it in the folder --state: a JiT that
learned pixel diffusion on 4096 tokens, ordered in compact tiles. For each share of the key blocks and each size of
blocks, the relative error of the model's output, |x_hat - x_full| / |x_full|, on a held-out photograph and a batik at
t = 0.2, 0.5 and 0.8, by each method over the key blocks that the same untrained router selects. On a GPU in bf16
autocast, on a CPU in float32. SLA is left out: before training it is its sparse branch.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent))

import sla2_compile
from benchmarks.environment import described, environment
from benchmarks.quality_data import as_float, pictures
from benchmarks.quality_measures import relative
from benchmarks.quality_state import State
from benchmarks.quality_training import FULL, JiT, autocast, noisy

WAYS = {"topk": ("topk", 1), "sla2": ("sla2", 1), "proxy": ("proxy", 1), "proxy, order 2": ("proxy", 2)}
TIMES = (0.2, 0.5, 0.8)
CASES = [*((kept, 64, 32) for kept in (15, 10, 5, 3)), (15, 128, 64), (5, 128, 64)]
"""Percent of the key blocks, block_q, block_k."""


class Held:
    """A photograph and a batik that no training saw, in noise; outputs of a model for them."""

    def __init__(self, device: torch.device) -> None:
        held = pictures(2, FULL.side, True, True, device)
        x, self.y, self.device = as_float(held.x), held.y, device
        noise = torch.randn(x.shape, generator=torch.Generator(device).manual_seed(11), device=device)
        self.t = [torch.full((len(x),), t, device=device) for t in TIMES]
        self.z = [noisy(x, t, noise) for t in self.t]

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[Tensor]:
        with autocast(self.device):
            return [model(z, t, self.y).float() for z, t in zip(self.z, self.t, strict=True)]

    def example(self) -> tuple[Tensor, ...]:
        return self.z[0][:1], self.t[0][:1], self.y[:1]


def measure(full: nn.Module, held: Held, kept: int, block_q: int, block_k: int) -> dict[str, Any]:
    """One row: the mean error over the times for each of WAYS."""
    blocks = FULL.tokens // block_k
    topk = max(1, round(kept / 100 * blocks))
    truth, row = held.outputs(full), {"kept": f"{topk} of {blocks}", "blocks": f"{block_q} x {block_k}"}
    errors = {}
    for name, (method, order) in WAYS.items():
        model = sla2_compile.transform(
            copy.deepcopy(full), "balanced", example_inputs=held.example(), min_seq_len=0, topk_ratio=topk / blocks,
            block_q=block_q, block_k=block_k, method=method, proxy_order=order, low_bit="none", qat=False,
        ).eval()  # fmt: skip
        found = [relative(a, b) for a, b in zip(held.outputs(model), truth, strict=True)]
        errors[name] = sum(found) / len(found)
    return {**row, "share": topk / blocks, **errors}


def document(result: dict[str, Any]) -> str:
    """The table of a result, as Markdown."""
    lines = [
        "# Methods on a trained model, before they are trained",
        "",
        described(result["environment"]),
        "",
        "Relative error of the model's output to full attention's, mean over t = 0.2, 0.5 and 0.8 and two held-out",
        "pictures; in brackets over SLA2's. The model has 21.8 M parameters and 4096 tokens in compact tiles.",
        "",
        f"| key blocks | blocks | {' | '.join(WAYS)} |",
        "|---" * (len(WAYS) + 2) + "|",
    ]
    for row in result["rows"]:
        cells = [f"{row[way]:.4f} ({row[way] / row['sla2']:.2f}x)" for way in WAYS]
        lines.append(f"| {row['kept']} ({row['share']:.1%}) | {row['blocks']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], output: Path) -> None:
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(document(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("build") / "quality", help="folder with the teacher")
    parser.add_argument("--output", type=Path, help="prefix of the JSON and Markdown files")
    parser.add_argument("--report", action="store_true", help="measure nothing: write the Markdown from the JSON")
    given = parser.parse_args()
    if given.report:
        write(json.loads(given.output.with_suffix(".json").read_text()), given.output)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = JiT(FULL.config)
    full.load_state_dict(State(given.state).weights())
    full.to(device).eval().requires_grad_(False)
    held = Held(device)
    result: dict[str, Any] = {"environment": environment(device.type, "methods_trained.py", sys.argv[1:]), "rows": []}
    for case in CASES:
        result["rows"].append(measure(full, held, *case))
        print(document({**result, "rows": result["rows"][-1:]}).splitlines()[-1], flush=True)
        if given.output:
            write(result, given.output)


if __name__ == "__main__":
    main()
