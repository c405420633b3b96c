"""Exported attention in onnxruntime on this CPU: SLA2's files against the best export of full attention.

    python benchmarks/export.py                       # everything; about ten minutes on a quiet machine
    python benchmarks/export.py --lengths 1024 4096
    python benchmarks/export.py --threads 1 2         # each number of threads takes as long again

Files are what `export_onnx` writes for a model that is one attention call, with dynamic batch and length. Full
attention is exported twice, decomposed (opset 20) and as one Attention node (opset 23), and the faster one counts.
Least process time of several runs, taken in turns; wall time for more than one thread, which needs a quiet machine.
Peak memory is what one run adds with one thread, in a process of its own. Full attention is in float32 also beside
float16, in which onnxruntime has no products on a CPU. Writes benchmarks/results/export.json and export.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch
from torch import Tensor, nn
from torch.export import Dim

import sla2_compile
from sla2_compile.export.precision import Precision

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.cpu import cpu_model
from benchmarks.environment import commit

RESULTS = Path(__file__).parent / "results"
B, H, D = 1, 4, 64
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
SETTINGS = {"5 %": (0.05, 16), "15 %": (0.15, 8), "25 %": (0.25, 4)}
TARGETS = {
    (4096, "5 %", "fp32"): 9.0, (4096, "15 %", "fp32"): 4.5, (4096, "25 %", "fp32"): 2.5, (4096, "15 %", "int8"): 6.0,
    (16384, "5 %", "fp32"): 14.0, (16384, "15 %", "fp32"): 5.0, (16384, "15 %", "int8"): 8.0,
}  # fmt: skip


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True)
class Row:
    """One file against the fastest of full attention. Times in milliseconds, memory in MB."""

    N: int
    setting: str
    precision: str
    ms: float
    full_ms: float
    mb: float
    full_mb: float
    error: float
    threads: int = 1

    @property
    def ratio(self) -> float:
        return self.full_ms / self.ms


def inputs(N: int) -> dict[str, np.ndarray[Any, Any]]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(B, H, N, D, generator=g).numpy() for name in "qkv"}


def write(folder: Path, N: int) -> dict[str, Path]:
    """Write all files for a length; the lengths within are dynamic."""
    block_q, block_k = (64, 32) if N < 2048 else (128, 64)
    g = torch.Generator().manual_seed(1)
    example = tuple(torch.randn(2, H, 2048, D, generator=g) for _ in range(3))
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    files = {}
    for opset in (20, 23):
        path = files[f"full, opset {opset}"] = folder / f"full{opset}.onnx"
        made = torch.onnx.export(
            Attention(), example, dynamo=True, opset_version=opset, dynamic_shapes=(sizes,) * 3, verbose=False
        )
        assert made is not None
        made.save(path)
    for name, (topk_ratio, ratio) in SETTINGS.items():
        model = sla2_compile.transform(
            Attention(), example_inputs=example, topk_ratio=topk_ratio, compression_ratio=ratio, block_q=block_q,
            block_k=block_k, min_seq_len=0,
        )  # fmt: skip
        for precision in PRECISIONS:
            path = files[f"{name} {precision}"] = folder / f"{topk_ratio}-{precision}.onnx"
            sla2_compile.export_onnx(
                model, example, path, dynamic_shapes=(sizes,) * 3, precision=precision, verify=False
            )
    return files


def session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # the threads of one session must not spin into the turn of the next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def peak_memory(path: Path, N: int) -> float:
    """MB that one run adds at its peak, in a process of its own; Linux only."""
    # the system's record of the peak is set back first: loading a file takes more than a short run
    code = f"""
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
run = onnxruntime.InferenceSession({str(path)!r}, options, providers=["CPUExecutionProvider"])
dtype = "float16" if run.get_inputs()[0].type == "tensor(float16)" else "float32"
rng = numpy.random.default_rng(0)
x = {{name: rng.standard_normal(({B}, {H}, {N}, {D}), "float32").astype(dtype) for name in "qkv"}}
def megabytes(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = megabytes("VmRSS")
run.run(None, x)
print(megabytes("VmHWM") - before)
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def measure(N: int, seconds: float, threads: Sequence[int]) -> list[Row]:
    """Measure all files for a length, with each number of threads."""
    x = inputs(N)
    half = {name: a.astype(np.float16) for name, a in x.items()}
    with torch.no_grad():
        want = Attention()(*(torch.from_numpy(a) for a in x.values())).numpy()
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), N)
        if N > 8192:
            # twice the memory of the other, and slower
            del files["full, opset 20"]
        memory = {name: peak_memory(path, N) for name, path in files.items()}
        feeds = {name: half if name.endswith("fp16") else x for name in files}
        rows: list[Row] = []
        for count in threads:
            runs = {name: session(path, count) for name, path in files.items()}
            errors = {}
            for name, run in runs.items():
                (got,) = run.run(None, feeds[name])
                errors[name] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            best = least_times(runs, feeds, seconds, time.process_time if count == 1 else time.perf_counter)
            full = min((name for name in files if name.startswith("full")), key=lambda name: best[name])
            both = ", ".join(f"{n} {t:.1f} ms" for n, t in best.items() if n.startswith("full"))
            print(f"N {N}, {count} threads: full attention {both}")
            rows += [
                Row(N, setting, precision, best[name], best[full], memory[name], memory[full], errors[name], count)
                for setting in SETTINGS
                for precision in PRECISIONS
                if (name := f"{setting} {precision}") in files
            ]
    return rows


def least_times(
    runs: dict[str, Any], feeds: dict[str, Any], seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Run sessions in turns, and return the least time of each in milliseconds."""
    best = dict.fromkeys(runs, float("inf"))
    rounds, until = 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < until:
        rounds += 1
        for name, run in runs.items():
            start = clock()
            run.run(None, feeds[name])
            best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def document(found: dict[str, Any]) -> str:
    about = found["about"]
    lines = [
        f"# Exported attention in onnxruntime: {about['cpu']}", "",
        ", ".join(f"{name} {version}" for name, version in about.items() if name not in ("cpu", "command"))
        + f"; `{about['command']}`.", "",
        f"One attention call, q, k, v ({B}, {H}, N, {D}), normal, dynamic batch and length. "
        "Full attention is the faster of its decomposed export and the Attention node. The error is "
        "untrained SLA2's, on noise, which no choice of blocks approximates well.",
        "",
        "| N | threads | blocks kept | precision | full ms | SLA2 ms | ratio | full MB | SLA2 MB | error | target |",
        "|" + "---|" * 11,
    ]  # fmt: skip
    for given in found["rows"]:
        row = Row(**given)
        target = TARGETS.get((row.N, row.setting, row.precision)) if row.threads == 1 else None
        goal = "" if target is None else f"{target:g}x: " + ("reached" if row.ratio >= target else "missed")
        cells = (
            row.N, row.threads, row.setting, row.precision, f"{row.full_ms:.1f}", f"{row.ms:.1f}",
            f"**{row.ratio:.2f}x**", f"{row.full_mb:.0f}", f"{row.mb:.0f}", f"{row.error:.3f}", goal,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each length and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    given = parser.parse_args()
    about = {
        "cpu": cpu_model(), "torch": torch.__version__, "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__, "onnxruntime": onnxruntime.__version__, "commit": commit(),
        "command": " ".join(["python benchmarks/export.py", *sys.argv[1:]]),
    }  # fmt: skip
    print(*about.values(), sep="\n", flush=True)
    rows: list[Row] = []
    for N in given.lengths:
        found_here = measure(N, given.seconds, given.threads)
        rows += found_here
        for row in found_here:
            what = f"{row.threads} threads, {row.setting} {row.precision}"
            print(f"  {what}: {row.ms:.1f} ms, {row.ratio:.2f}x, {row.mb:.0f} MB", flush=True)
    found = {"about": about, "rows": [asdict(row) for row in rows]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "export.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "export.md").write_text(document(found))


if __name__ == "__main__":
    main()
