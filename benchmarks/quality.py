"""Does a model keep its quality when it is trained with SLA2? A small pixel transformer, trained and measured here.

    python benchmarks/quality.py teacher stage1 stage2 control curves --output benchmarks/results/quality
    python benchmarks/quality.py convert sparse heuristic --output benchmarks/results/quality
    python benchmarks/quality.py --report --state build/quality --output benchmarks/results/quality   # needs no GPU
    python benchmarks/quality.py --tiny [--device cuda]                         # the script itself

A JiT (`examples/jit.py`; depth 8, width 384, heads of 64, 4096 tokens) learns pixel diffusion on photographs that
come with scikit-image and scikit-learn, and on batik drawn by code. It is the teacher. Then, at 85, 90, 95 and 97 %
sparsity in blocks of 64 x 32:

teacher    full attention from scratch, for --seconds; and the same model in float16, the floor of paired errors
stage1     SLA2 untrained, and after `calibrate`
stage2     after stage 2 with QAT (`prepare`), distilled from the teacher
control    full attention fine-tuned for as many steps; stage 2 with the loss of diffusion instead
curves     a small JiT from scratch: full attention in three orders of the data, SLA2 with topk_ratio 1.0 and balanced
convert    stage 2 without QAT, then low bit (`convert`)
sparse     stage 2 with the sparse branch alone
heuristic  stage 2 with a router that nothing trained
methods    other methods than SLA2, untrained and after stage 2
tails      SLA2 and pooled tails once more, by three seeds
demo       the model of `examples/demo.py`, on one photograph and batik, as trained.safetensors

Every row is saved when it is there, in the folder --state, and runs whose rows are there are skipped: a part that was
cut short goes on where it stopped. `benchmarks/quality_measures.py` says what is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import quality_curves, quality_demo, quality_methods, quality_variants
from benchmarks.environment import described, environment
from benchmarks.quality_report import row_line, write
from benchmarks.quality_state import State
from benchmarks.quality_training import FULL, TINY, Size
from benchmarks.quality_variants import Bench, Run

RUNS = [*quality_variants.runs(), *quality_curves.runs(), *quality_methods.runs(), *quality_demo.runs()]
PARTS = (
    "teacher",
    "stage1",
    "stage2",
    "control",
    "curves",
    "convert",
    "sparse",
    "heuristic",
    "methods",
    "tails",
    "demo",
)


def measure(run: Run, bench: Bench, about: dict[str, str]) -> float:
    """Do a run, save its rows, and return its seconds."""
    start = time.perf_counter()
    for row in run.make(bench, run):
        bench.state.add(run.part, row, about)
        print(f"{run.part}: {row_line(row)}", flush=True)
    seconds = time.perf_counter() - start
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if bench.device.type == "cuda" else ""
    print(f"    {seconds:.1f} s{peak}", flush=True)
    return seconds


def shown(arguments: list[str]) -> list[str]:
    """The arguments that decide figures: all but the folder, which is anyone's own."""
    at = arguments.index("--state") if "--state" in arguments else len(arguments)
    return [*arguments[:at], *arguments[at + 2 :]]


def chosen_size(given: argparse.Namespace) -> Size:
    """The size with the counts that the command line gives."""
    counts = {name: getattr(given, name) for name in ("stage1", "stage2", "curves") if getattr(given, name)}
    return replace(TINY if given.tiny else FULL, **counts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all if none")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training in parts teacher and demo")
    parser.add_argument("--stage1", type=int, help="steps of stage 1")
    parser.add_argument("--stage2", type=int, help="steps of stage 2 and of the control")
    parser.add_argument("--curves", type=int, help="steps of each curve")
    parser.add_argument("--sparsity", type=int, help="of the runs that have one: only this")
    parser.add_argument("--seeds", type=int, default=1, help="with --sparsity: how many seeds of a run")
    parser.add_argument("--limit", type=float, default=450.0, help="seconds after which no run is started")
    parser.add_argument("--state", type=Path, help="folder of what the parts leave to each other")
    parser.add_argument("--output", type=Path, help="prefix of the JSON, Markdown and PNG files")
    parser.add_argument("--report", action="store_true", help="measure nothing: write the files from the folder")
    parser.add_argument("--tiny", action="store_true", help="small sizes, in float32 on a CPU: to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda, or with --tiny cpu, if not given")
    given = parser.parse_args(arguments)
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"part must be one of {', '.join(PARTS)}, got {unknown[0]!r}")
    given.device = given.device or ("cpu" if given.tiny else "cuda")
    if given.device == "cpu" and not given.tiny:
        parser.error("--device cpu must come with --tiny: the sizes are a GPU's")
    if given.device == "cuda" and not (given.report or torch.cuda.is_available()):
        raise SystemExit("benchmarks/quality.py must run on a CUDA GPU, got none; see benchmarks/results, or --tiny")
    if given.report:
        if given.output is None:
            parser.error("--report must come with --output; give the prefix of the files")
        print(write(State(given.state) if given.state else None, given.output))
        return
    state = State(given.state or Path("build") / ("quality_tiny" if given.tiny else "quality"))
    device = torch.device(given.device)
    about = environment(device.type, "quality.py", shown(sys.argv[1:] if arguments is None else arguments))
    print(described(about))
    if given.device == "cpu":
        torch.set_num_threads(1)
    failed = work(Bench(chosen_size(given), device, state, not given.tiny, given.seconds), given, about)
    if given.output:
        print(write(state, given.output))
    if failed:
        raise SystemExit(f"runs that failed, and are made again next time: {', '.join(failed)}")


def work(bench: Bench, given: argparse.Namespace, about: dict[str, str]) -> list[str]:
    """Do the runs of the parts that are wanted, in the order of PARTS, as far as the limit allows.

    Returns:
        the runs that failed.
    """
    start, longest, failed = time.perf_counter(), 0.0, []
    for run in sorted(RUNS, key=lambda run: PARTS.index(run.part)):
        wanted = not given.parts or run.part in given.parts
        if given.sparsity is not None and run.sparsity is not None:
            wanted = wanted and run.sparsity == given.sparsity and run.seed < given.seeds
        if not wanted or all(bench.state.has(run.part, run.row(variant)) for variant in run.variants):
            continue
        passed = time.perf_counter() - start
        if passed + longest > given.limit:
            print(f"stopped before {run.part} after {passed:.0f} s: --limit {given.limit:g}; run it again to go on")
            break
        try:
            seconds = measure(run, bench, about)
        except FileNotFoundError as error:
            # what an earlier part leaves is missing; others may not need it
            print(error, file=sys.stderr)
            failed.append(f"{run.part}: {run.variants[-1]}")
            continue
        except Exception:
            # one that fails must not take the others' time on a GPU
            traceback.print_exc()
            failed.append(f"{run.part}: {run.variants[-1]}")
            continue
        # the teacher takes as long as it is given, once
        longest = longest if run.part == "teacher" else max(longest, seconds)
    return failed


if __name__ == "__main__":
    main()
