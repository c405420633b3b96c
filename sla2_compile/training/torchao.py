"""QAT through torchao's `quantize_`, beside torchao's own fake quantisation of Linear layers.

    from torchao.quantization import quantize_
    from sla2_compile.training.torchao import SLA2QATConfig

    quantize_(model, SLA2QATConfig(step="prepare"), filter_fn=None)

It does what `sla2_compile.prepare` does. The fake quantisers are torchao's `FakeQuantizerBase`, so code that looks
for these and sets `enabled` finds them. Importing this file needs torchao.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.passes.sites.fake_quantizer import FORMATS, FakeQuantConfig, FakeQuantizer
from sla2_compile.training.qat import prepare

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import FqnToConfig
    from torchao.quantization.qat.fake_quantize_config import FakeQuantizeConfigBase
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise ImportError(
        "sla2_compile.training.torchao needs torchao 0.18 or later; pip install 'sla2_compile[qat]'"
    ) from error

WHOLE_MODEL = "re:"
"""The pattern that only a model's root matches, whose name is empty."""


@dataclass(frozen=True)
class SLA2FakeQuantizeConfig(FakeQuantConfig, FakeQuantizeConfigBase):
    """How one input of a site is rounded, as torchao's code expects to find it."""


class SLA2FakeQuantizer(FakeQuantizer, FakeQuantizerBase):
    """A `FakeQuantizer` that torchao's code recognises."""

    @classmethod
    def of(cls, config: FakeQuantConfig, options: AttentionOptions) -> SLA2FakeQuantizer:
        return cls(SLA2FakeQuantizeConfig(config.format, config.per_block, config.smooth), options)


@dataclass
class _Step(AOBaseConfig):
    """What the handler does with the whole model."""

    low_bit: str | None


@dataclass
class SLA2QATConfig(FqnToConfig):
    """Config for `torchao.quantization.quantize_` that prepares the SLA2 sites of a transformed model.

    `quantize_` must be given filter_fn=None, and raises if it is not: its own filter looks at Linear layers alone.
    The recipe says which sites imitate low bit.

    Args:
        step: "prepare".
        low_bit: as `sla2_compile.prepare` has it.

    Raises:
        ValueError: another step or format; in `quantize_` as `sla2_compile.prepare` does.
    """

    step: str = "prepare"
    low_bit: str | None = None

    def __post_init__(self) -> None:
        if self.step != "prepare":
            raise fail("step", "be 'prepare'", repr(self.step), "trained sites run low bit as their recipe says")
        if self.low_bit is not None and self.low_bit not in FORMATS:
            raise fail("low_bit", f"be one of {', '.join(FORMATS)}", repr(self.low_bit), "or None, the recipe's")
        self.fqn_to_config = OrderedDict({WHOLE_MODEL: _Step(self.low_bit)})
        super().__post_init__()


@register_quantize_module_handler(_Step)
def _prepare(model: nn.Module, config: _Step) -> nn.Module:
    return prepare(model, low_bit=config.low_bit, make=SLA2FakeQuantizer.of)
