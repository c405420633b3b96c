"""The zoo's results as rows, for the terminal and for docs/zoo.md."""

from __future__ import annotations

import platform
from importlib.metadata import version

from tests.zoo import check
from tests.zoo.entry import Entry
from tests.zoo.file import PARITY, File, in_onnxruntime

COLUMNS = (
    "model",
    "calls",
    "SLA2",
    "left alone",
    "parity error",
    "gradients",
    "autocast",
    "compile",
    "export",
    "strict export",
    "program",
    "backend",
    "ONNX file",
)

HEAD = """# Compatibility: the model zoo

Written by `make zoo` with {versions}, on a CPU. Do not edit it.

The zoo has {models} tiny models with random weights (`tests/zoo/`). SLA2 takes attention calls of {changed} of them.
{fallbacks}.

| column | meaning |
|---|---|
| calls | attention calls that one forward makes, as `sla2_compile.report` lists them |
| SLA2 | calls that became SLA2, with `min_seq_len={shortest}` |
| left alone | the other calls, by their reasons |
| parity error | largest difference to the original output, as a share of the largest output. Here `topk_ratio=1.0`, so SLA2 is full attention. Checked against the original in float64 |
| gradients | learned parameters of sites that get a gradient in one backward, at `topk_ratio={sparse}` |
| autocast | sites that are SLA2 under bfloat16 autocast |
| compile | sites that are SLA2 under `torch.compile` (aot_eager), with the same output as in eager mode |
| export, strict export | the same in `torch.export`, with `strict=False` and `strict=True` |
| program | calls that become SLA2 when the original is exported first and then the program is transformed, with the same check of parity. The passes also read attention written by hand. They see a mask, but not what it means |
| backend | the same of the original under `torch.compile(backend="sla2")` |
| ONNX file | nodes of SLA2 in the file of `export_onnx`, the largest error in onnxruntime (at most {parity:.0e}), and which sizes the file leaves open: batch, length (any other). Compared at the example's sizes and, where some are open, at others |

`restore` gives every model its original output back, bit for bit, and its original state dict. A dash means that SLA2
takes no call of the model. The model is left alone, and its output is the original's.

"""  # noqa: E501  (a Markdown table row is one line)


def row(entry: Entry) -> tuple[str, ...]:
    """One model's results, as text."""
    calls = check.calls(entry)
    left = ", ".join(f"{count} x {reason}" for reason, count in sorted(calls.left.items()))
    name = f"{entry.name}: {entry.note}" if entry.note else entry.name
    found = (name, str(calls.rewritten + calls.left.total()), str(calls.rewritten), left)
    compiled, exported, strict = check.compiled(entry), check.exported(entry, False), check.exported(entry, True)
    traced = tuple(_traced(x, calls.rewritten) for x in (compiled, exported, strict))
    graphs = _program(check.program(entry)), _program(check.backend(entry))
    if not calls.rewritten:
        return (*found, "-", "-", "-", *traced, *graphs, "-")
    alphas = check.alphas(entry)
    reached = alphas - len(check.without_gradient(entry))
    autocast = f"{check.under_autocast(entry)} of {calls.rewritten}"
    return (*found, _parity(check.parity(entry)), f"{reached} of {alphas}", autocast, *traced, *graphs, _file(entry))


def _parity(parity: check.Parity) -> str:
    wrong = "" if parity.error <= parity.allowed else " **too large**"
    return f"{parity.difference:.0e}{wrong}"


def _program(program: check.Program) -> str:
    wrong = program.parity.error > program.parity.allowed
    return f"{program.rewritten}, **wrong** by {program.parity.difference:.0e}" if wrong else f"{program.rewritten}"


def _file(entry: Entry) -> str:
    file: File = in_onnxruntime(entry)
    if file.model_fails:
        return "the original fails too"
    if file.failure:
        return f"**fails**: {file.failure[:120]}"
    sites = f"{file.sites} of {check.calls(entry).rewritten}"
    if file.error > PARITY:
        return f"{sites}, **differs** by {file.error:.0e}"
    sizes = " and ".join(file.dynamic) or "no size"
    alone = "" if file.compared or not file.dynamic else ", compared at one"
    return f"{sites}, {file.error:.0e}; {sizes}{alone}"


def _traced(traced: check.Traced, rewritten: int) -> str:
    if traced.model_fails:
        return "the original fails too"
    if traced.failure:
        return f"**fails**: {traced.failure[:80]}"
    if traced.difference is not None and traced.difference > check.SAME:
        return f"**differs** by {traced.difference:.0e}"
    if traced.inside < rewritten:
        return f"{traced.inside} of {rewritten}, the others full attention"
    return f"{traced.inside} of {rewritten}" if rewritten else "-"


def document(entries: list[Entry]) -> str:
    """docs/zoo.md."""
    names = ("torch", "transformers", "diffusers")
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])
    head = HEAD.format(
        versions=versions,
        models=len(entries),
        changed=sum(check.calls(entry).rewritten > 0 for entry in entries),
        fallbacks=_fallbacks(entries),
        shortest=check.MIN_SEQ_LEN,
        sparse=check.SPARSE,
        parity=PARITY,
    )
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row(entry) for entry in entries)]
    return (
        head + "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
    )


def _fallbacks(entries: list[Entry]) -> str:
    lost = [e for e in entries if any(0 <= t.inside < check.calls(e).rewritten for t in _traces(e) if not t.failure)]
    return f"Models that fall back to full attention in a compiler's trace: {len(lost)}"


def _traces(entry: Entry) -> tuple[check.Traced, ...]:
    return check.compiled(entry), check.exported(entry, False), check.exported(entry, True)
