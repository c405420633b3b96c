"""Parts `methods` and `tails` of `benchmarks/quality.py`: rivals at equal key blocks, untrained and after stage 2.

All begin with the teacher's weights, keep the same share of key blocks, and see the same data. SLA2 begins with what
stage 1 trained; the others have no stage 1. The model keeps its tokens in tiles of 8 x 8, so that VSA's cubes and
VMoBA's chunks of 64 tokens in a row are squares. Sites are not measured: `calibrate` takes SLA2 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

from torch import nn

from benchmarks.quality_data import as_bytes
from benchmarks.quality_state import Row
from benchmarks.quality_variants import MAIN, SEEDS, Bench, Run, sites_of

SLA2 = "SLA2"
METHODS: dict[str, dict[str, Any]] = {
    SLA2: {},
    "proxy": {"method": "proxy"},
    "proxy, order 2": {"method": "proxy", "proxy_order": 2},
    "topk": {"method": "topk"},
    "SLA": {"method": "sla"},
    "VSA": {"method": "vsa"},
    "VMoBA": {"method": "vmoba", "brick": (1, 1, 64)},
}


def names(method: str) -> tuple[str, str]:
    """The variants of a method: untrained, and after stage 2."""
    return f"{method}, untrained", f"{method}, stage 2"


def rival(bench: Bench, run: Run) -> Iterator[Row]:
    """Measure a method as it begins, train it in stage 2, and measure it again."""
    assert run.sparsity is not None
    trained = run.variants[-1]
    method = trained.removesuffix(", stage 2")
    model = bench.transformed(run.sparsity, **METHODS[method])
    if run.seed == 0:
        # what is not trained draws nothing
        yield measured(bench, run, names(method)[0], model)
    if method == SLA2:
        model = bench.after_stage1(run)
    done = bench.tuned(run, model)
    yield measured(bench, run, trained, model, **done)


def measured(bench: Bench, run: Run, variant: str, model: nn.Module, **values: Any) -> Row:
    """Return the row of a variant, without figures of its sites."""
    found, samples = bench.judge.of(model)
    if left := sum(site.fallbacks.total() for site in sites_of(model)):
        raise RuntimeError(f"no call must keep full attention, got {left} that did; see report(model)")
    if run.seed == 0:
        bench.state.keep("samples", {variant: as_bytes(samples[:4])})
    return run.row(variant, **found, **values)


TAILS = (SLA2, "proxy", "proxy, order 2")
"""The methods of part `tails`: what the keys count as that are not selected, by three seeds."""


def runs() -> list[Run]:
    found = [Run("methods", names(method), rival, MAIN) for method in METHODS]
    for seed in SEEDS[MAIN]:
        found += [Run("tails", names(method)[seed > 0 :], rival, MAIN, seed) for method in TAILS]
    return found


def tails(rows: list[Row]) -> list[str]:
    """The tails side by side, mean and standard deviation over seeds, on a teacher of their own."""
    measures = {"step": "step error", "sample": "sample error", "loss_gap": "held-out loss less full's"}
    lines = ["| tail | seeds | when | " + " | ".join(measures.values()) + " |", "|---" * (3 + len(measures)) + "|"]
    for method in TAILS:
        for variant in names(method):
            mine = [row for row in rows if row["variant"] == variant]
            if mine:
                values = [[row[key] for row in mine] for key in measures]
                cells = [f"{mean(x):.4f}" + (f" ± {stdev(x):.4f}" if len(x) > 1 else "") for x in values]
                when = variant.removeprefix(f"{method}, ")
                lines.append("| " + " | ".join([method, str(len(mine)), when, *cells]) + " |")
    how = f"At {MAIN} % sparsity. A seed decides what training draws; an untrained model has none."
    return [*lines, "", how, *teacher(rows)]


def teacher(rows: list[Row]) -> list[str]:
    """What the teacher of these rows is, where the part has one of its own."""
    full = next((row for row in rows if row["variant"] == "full"), None)
    if full is None:
        return []
    return [
        f"The teacher of these rows is another one: {full['training_steps']} steps in {full['training_s']:.0f} s, "
        f"with a held-out loss of {full['loss']:.4f}."
    ]


def table(rows: list[Row]) -> list[str]:
    """The methods side by side; where the part has a teacher of its own, what that is."""
    by_name = {row["variant"]: row for row in rows}
    measures = {"step": "step error", "sample": "sample error", "loss_gap": "held-out loss less full's"}
    heads = ["method", *(f"{title}, {when}" for title in measures.values() for when in ("untrained", "stage 2"))]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in METHODS:
        mine = [by_name.get(name, {}) for name in names(method)]
        cells = [f"{row[key]:.4f}" if key in row else "" for key in measures for row in mine]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return [*lines, "", f"At {MAIN} % sparsity, one seed.", *teacher(rows)]
