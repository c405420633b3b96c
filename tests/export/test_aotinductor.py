"""A transformed model compiled ahead of time by AOTInductor, in a process that has only our ops.

About 20 s: the C++ compiler takes half of it, and the fresh process most of the rest.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim

import sla2_compile
from tests import models

FRESH = """
import sys, torch
try:
    torch._inductor.aoti_load_package(sys.argv[1] + ".pt2")(torch.randn(2, 100, 32))
except RuntimeError as error:
    print(str(error).splitlines()[0])
import sla2_compile
package = torch._inductor.aoti_load_package(sys.argv[1] + ".pt2")
for x, want in zip(*torch.load(sys.argv[1] + ".pt")):
    assert torch.equal(package(x), want), (package(x) - want).abs().max()
print("equal")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler g++")
def test_a_package_gives_what_the_model_gives_at_any_length(tmp_path: Path) -> None:
    inputs = [torch.randn(2, n, 32) for n in (100, 150)]
    model = sla2_compile.transform(
        models.Attention(), example_inputs=inputs[:1], min_seq_len=0, topk_ratio=0.3, block_q=32, block_k=16
    ).eval()
    # the least work for the C++ compiler
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    with torch.no_grad():
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=({1: Dim.DYNAMIC},))
        package = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=quick)
        torch.save((inputs, [model(x) for x in inputs]), tmp_path / "model.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    # the ops come with the import
    assert "schema for sla2::forward" in done.stdout, done.stderr
    assert done.stdout.endswith("equal\n"), done.stderr
