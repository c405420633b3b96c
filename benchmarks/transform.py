"""How long does `transform` take? A JiT of 12 layers, planned under fake tensors, and undone.

python benchmarks/transform.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from jit import JiT, JiTConfig

import sla2_compile


def main() -> None:
    config = JiTConfig(width=768, depth=12, patch=16, bottleneck=128)
    model = JiT(config)
    inputs = torch.randn(1, 3, 1024, 1024), torch.rand(1), torch.tensor([0])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        sla2_compile.transform(model, "balanced", example_inputs=inputs)
        seconds.append(time.perf_counter() - start)
        count = len(sla2_compile.report(model).rewrites)
        sla2_compile.restore(model)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console = Console(highlight=False)
    console.print(f"{count} attention calls of {config.depth} layers, {parameters:.0f} M parameters, 4096 tokens")
    console.print("transform: " + ", ".join(f"{s:.2f} s" for s in seconds) + " (first call imports what it needs)")
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; python benchmarks/transform.py")


if __name__ == "__main__":
    main()
