"""`FakeQuantizer`: imitates 8 bits on one input of a site, and is shaped as torchao's fake quantisers are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.quantise import fake_quant


@dataclass(frozen=True)
class FakeQuantConfig:
    """How one input of the sparse branch is rounded (`kernels/quantise.py`).

    Attributes:
        format: int8 or e4m3.
        per_block: whether a key block has one scale; else each row has its own.
        smooth: whether the mean over the tokens is left out of the rounding, as SLA2 does with keys.
    """

    format: str
    per_block: bool
    smooth: bool = False


INPUTS = {
    "q": FakeQuantConfig("int8", per_block=False),
    "k": FakeQuantConfig("int8", per_block=True, smooth=True),
    "v": FakeQuantConfig("e4m3", per_block=True),
}
"""How SLA2 rounds each (arXiv 2602.12675, Sec. 5, with the changes that `kernels/reference/low_bit.py` names)."""

FORMATS = {"int8": ("q", "k"), "int8_fp8": ("q", "k", "v")}
"""Inputs that each format of a call rounds."""


class FakeQuantizer(nn.Module):
    """Rounds an input to 8 bits and back if `enabled`; it has no state besides.

    A site's op rounds its inputs itself, inside its kernel, so a site only asks its quantisers whether they are
    enabled. In graphs they are nodes before the site (`insert_fake_quant.py`). To see what is rounded away, call one.

    Attributes:
        enabled: the switch, which may be set at any time; compiled code then compiles once more.
        config: how it rounds. options: of its site; they say how many rows a block has.
    """

    def __init__(self, config: FakeQuantConfig, options: AttentionOptions) -> None:
        super().__init__()
        self.config, self.options = config, options
        self.enabled = True

    def forward(self, x: Tensor, q: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Round x (B, H, N, D).

        Args:
            q: (B, Hq, Nq, D), the call's queries, whose length decides about block sizes; x itself if None.
            key_mask: (B, N) bool, True where the token takes part.
        """
        if not self.enabled:
            return x
        rows = 1
        if self.config.per_block:
            _, rows = self.options.block_sizes((x if q is None else q).shape[2], x.shape[2])
        return fake_quant(x, rows, self.config.format, smooth=self.config.smooth, key_mask=key_mask)

    def extra_repr(self) -> str:
        per = "block" if self.config.per_block else "row"
        return f"{self.config.format} per {per}, enabled={self.enabled}"


def format_of(quantisers: nn.ModuleDict) -> str | None:
    """Return the format that the enabled quantisers of a site make together; None if all are disabled.

    Raises:
        ValueError: only one of q and k would be rounded, or v alone.
    """
    enabled = tuple(name for name, x in quantisers.items() if x.enabled)
    if not enabled:
        return None
    for low_bit, names in FORMATS.items():
        if enabled == names:
            return low_bit
    raise fail(
        "fake quantisers", "be enabled for q and k together, and for v beside them", ", ".join(enabled),
        "use enable_sla2_qat and disable_sla2_qat",
    )  # fmt: skip
