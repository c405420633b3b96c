"""Tables and files of `benchmarks/quality.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.environment import described
from benchmarks.quality_curves import WINDOW, verdict
from benchmarks.quality_methods import table as methods
from benchmarks.quality_methods import tails
from benchmarks.quality_plots import curves_picture, error_picture, samples_picture
from benchmarks.quality_state import Row, State

Found = dict[str, dict[str, Any]]
"""By part: {"environment": {...}, "rows": [...]}."""
COLUMNS = {
    "sample": "sample error", "step": "step error", "psnr": "PSNR, dB", "loss": "held-out loss",
    "loss_gap": "less full's", "frechet": "Fréchet to held-out", "frechet_full": "to full's",
    "site_error": "site error", "sparse_error": "sparse alone", "recall": "recall", "oracle": "of at best",
}  # fmt: skip
NOTES = """
- **sample error**: relative L2 difference of whole pictures from those of the teacher with full attention, from the
  same noise by the same deterministic sampler; PSNR is of the same difference.
- **step error**: the same of single denoising steps on noisy held-out pictures, mean over t = 0.1, 0.3, 0.5, 0.7
  and 0.9.
- **held-out loss**: of the velocity, on photographs and batik that no training saw, with the same noise and times for
  all; beside it the mean difference from the teacher's, with its standard error over pictures.
- **Fréchet** distances are of *fixed random* convolution features, of drawn pictures: they are no FID, and compare
  within this table alone.
- **site error**: mean over sites, on the same q, k and v as full attention; **recall**: share of the true attention
  mass in the selected key blocks, and the most that as many blocks could hold.
- Rows with several seeds are means, ± the standard deviation over seeds. A seed decides what training draws.
- A held-out loss below the teacher's says that the teacher was not trained to its end, as the control shows. It is no
  merit of SLA2. Published gains over full attention come from better data in fine-tuning.
""".strip()


def row_line(row: Row) -> str:
    """A row in one line, for the terminal."""
    name = row["variant"] + (f", {row['sparsity']} %" if row["sparsity"] else "") + f", seed {row['seed']}"
    keys = ("step", "sample", "loss", "frechet", "site_error", "recall", "oracle", "training_s", "measuring_s")
    more = ("training_steps", "loss_first", "loss_last", "held_out_loss")
    return "  ".join([name, *(f"{key} {row[key]:.4g}" for key in (*keys, *more) if key in row)])


def write(state: State | None, prefix: Path) -> str:
    """Write the JSON, Markdown and PNG files; return the Markdown.

    Args:
        state: the folder of a run, or None to write the others anew from prefix.json, without the pictures drawn.
    """
    found = json.loads(Path(f"{prefix}.json").read_text()) if state is None else state.found
    text = markdown(found)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.json").write_text(json.dumps(found, indent=1) + "\n")
    Path(f"{prefix}.md").write_text(text)
    error_picture(found, Path(f"{prefix}_error.png"))
    curves_picture(found, Path(f"{prefix}_curves.png"))
    if state is not None:
        samples_picture(state.kept("samples"), Path(f"{prefix}_samples.png"))
    return text


def markdown(found: Found) -> str:
    """All parts as one page."""
    lines = ["# Quality of a model trained with SLA2", ""]
    taken: dict[str, list[str]] = {}
    for part in found:
        taken.setdefault(described(found[part]["environment"]), []).append(part)
    lines += [f"- {', '.join(parts)}: {how}" for how, parts in taken.items()]
    rows = [
        row for part in found if part not in ("curves", "demo", "methods", "tails") for row in found[part]["rows"]
    ]
    if rows:
        lines += ["", *teacher(rows), "", *table(rows), "", NOTES]
    if "methods" in found:
        lines += ["", "## Other methods", "", *methods(found["methods"]["rows"])]
    if "tails" in found:
        lines += ["", "## The nearest ones by several seeds", "", *tails(found["tails"]["rows"])]
    if "curves" in found:
        lines += ["", "## From scratch", "", *curves(found["curves"]["rows"])]
    return "\n".join(lines) + "\n"


def teacher(rows: list[Row]) -> list[str]:
    """What the teacher is."""
    row = next((row for row in rows if row["variant"] == "full"), None)
    if row is None:
        return []
    return [
        f"The teacher has {row['parameters'] / 1e6:.1f} M parameters, trained for {row['training_steps']} steps in "
        f"{row['training_s']:.0f} s; its loss was {row['loss_last']:.3f} over the last tenth of them."
    ]


def grouped(rows: list[Row]) -> dict[tuple[int | None, str], list[Row]]:
    """Rows of one sparsity and variant: one for each seed. Without SLA2 first, then by rising sparsity."""
    found: dict[tuple[int | None, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["sparsity"] or 0):
        found.setdefault((row["sparsity"], row["variant"]), []).append(row)
    return found


def table(rows: list[Row]) -> list[str]:
    """One line for each variant and sparsity."""
    heads = ["sparsity", "variant", "seeds", *COLUMNS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (sparsity, variant), mine in grouped(rows).items():
        cells = [f"{sparsity} %" if sparsity else "", variant, str(len(mine))]
        lines.append("| " + " | ".join([*cells, *(cell(mine, key) for key in COLUMNS)]) + " |")
    return lines


def cell(rows: list[Row], key: str) -> str:
    """A figure, with its deviation over seeds; a gap also with its standard error."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return ""
    shown = f"{mean(values):+.4f}" if key == "loss_gap" else f"{mean(values):.4g}"
    if len(values) > 1:
        return f"{shown} ± {stdev(values):.1g}"
    return f"{shown} ({rows[0]['loss_gap_error']:.1g})" if key == "loss_gap" else shown


def curves(rows: list[Row]) -> list[str]:
    """The curves from scratch, and how far they are apart."""
    said, noise = verdict(rows), ""
    lines = ["| training | order of data | last loss | held-out loss | distance of its curve | |", "|---" * 6 + "|"]
    for row in rows:
        name, apart, note = row["variant"], "", ""
        if name in said.get("distance", {}):
            apart = f"{said['distance'][name]:.4f}"
            if said["noise"]:
                inside = said["distance"][name] <= max(said["noise"])
                note = "within noise" if inside else "beyond noise"
        lines.append(
            f"| {name} | {row['seed']} | {row['loss_last']:.4f} | {row['held_out_loss']:.4f} | {apart} | {note} |"
        )
    if said.get("noise"):
        orders, losses = (", ".join(f"{x:.4f}" for x in said[key]) for key in ("noise", "held_out_noise"))
        noise = (
            "Distance: root mean square of the relative difference from full attention's curve of order 0, both "
            f"averaged over {WINDOW} steps. Noise: the other orders are {orders} from it, and their held-out losses "
            f"{losses}. All losses of all runs are finite."
        )
    return [*lines, "", noise] if noise else lines
