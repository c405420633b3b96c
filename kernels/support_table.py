"""The rules of `support.py` as the tables that `sla2 support` prints and docs/support.md shows."""

from __future__ import annotations

from sla2_compile.kernels.support import AUTO, FP8, FUSED, TRITON, Rule


def table() -> str:
    """The rules as Markdown."""

    def row(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    def needs(rules: tuple[Rule, ...]) -> str:
        return "; ".join(rule.needs for rule in rules)

    lines = [
        row("what runs a call", "needs"),
        row("---", "---"),
        row(
            "fused kernels (Gluon), of a forward and of its backward, of any method",
            f"as the Triton kernels, and {needs(FUSED)}",
        ),
        row("Triton kernels, of a forward and of its backward, of any method", needs(TRITON)),
        row("blocked PyTorch", "any device; what the others do not take"),
        "",
        row("`low_bit`", "computes the sparse branch of an inference in", "needs", "else"),
        row("---", "---", "---", "---"),
        row("int8_fp8", "INT8 QK and FP8 PV", f"as the Triton kernels, and {needs(FP8)}", "int8"),
        row("int8", "INT8 QK, PV in the input's dtype", "as the Triton kernels", "the input's dtype"),
        row("auto", "as int8", f"as the Triton kernels, and {needs(AUTO)}", "the input's dtype"),
        row("none", "the input's dtype", "nothing", ""),
    ]
    return "\n".join(lines)
