"""Prepared and converted Linear layers, made by torchao: INT8 weights, and INT8 activations scaled as they come.

A weight has one scale for each output, without an offset. An activation has a scale and an offset for each token.
torchao infers no fake quantisers from its config of INT8 inference, so both are written out here. A converted layer
gives what the prepared one gave, to the rounding of the layer's dtype (1e-7 in float32, 4e-3 in bfloat16).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.kernels.checks import fail
from sla2_compile.training.linear.state import CONVERTED, ORIGINAL, exchange

try:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer
    from torchao.quantization.quant_primitives import MappingType
except ImportError as error:
    raise ImportError(
        "quantize_linear needs torchao 0.18 or later; pip install 'sla2_compile[qat]', or set quantize_linear='none'"
    ) from error

# the smallest scale of torchao's INT8 inference; left to themselves, its fake quantisers would imitate smaller ones
EPS = torch.finfo(torch.float32).eps
ACTIVATIONS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, eps=EPS)
WEIGHTS = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True, eps=EPS)


class LinearFakeQuantizer(IntxFakeQuantizer):
    """torchao's fake quantiser, which rests inside `sites_off` and keeps no tensor of a forward.

    Gradients pass straight through. torchao's own are 0 where a number was rounded above 127. With a scale taken from
    the row that is its largest number alone, which is not clipped, and would never learn.

    Attributes:
        off: whether it rests; neither saved nor copied, as with sites.
    """

    def __init__(self, config: IntxFakeQuantizeConfig) -> None:
        super().__init__(config)
        self.off = False

    def forward(self, x: Tensor) -> Tensor:
        if self.off or not self.enabled:
            return x
        with torch.no_grad():
            rounded: Tensor = super().forward(x)
        # an export refuses a module that holds tensors of its forward
        self.scale = self.zero_point = None
        if not (torch.is_grad_enabled() and x.requires_grad):
            return rounded
        # exact, because no number is rounded to over twice or under half of itself, except to 0
        return x + (rounded - x).detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "off": False}


def prepare_layers(model: nn.Module, layers: Sequence[nn.Linear]) -> None:
    """Put FakeQuantizedLinears in the place of layers of a model, with the same parameters."""
    # these run fused code, which reads the weights, unless a module inside has a hook
    fused = {id(x) for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) for x in m.children()}
    made: dict[nn.Module, nn.Module] = {linear: _prepared(linear) for linear in layers}
    for linear, layer in made.items():
        if id(linear) in fused:
            layer.register_forward_pre_hook(_only_seen)
    exchange(model, made)


def _prepared(linear: nn.Linear) -> nn.Linear:
    # made without memory and random numbers: its own parameters are not used
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype))
    quantize_(model, QATConfig(activation_config=ACTIVATIONS, weight_config=WEIGHTS, step="prepare"))
    made: Any = model[0]
    made.activation_fake_quantizer = LinearFakeQuantizer(ACTIVATIONS)
    made.weight_fake_quantizer = LinearFakeQuantizer(WEIGHTS)
    made._parameters = linear._parameters
    made.__dict__[ORIGINAL] = linear
    layer: nn.Linear = made.train(linear.training)
    return layer


def _only_seen(module: nn.Module, args: Any) -> None:
    """Do nothing; only the presence of this hook matters."""


def converted(layers: Sequence[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Return, for each prepared layer, an nn.Linear that computes in INT8; both have one bias.

    Raises:
        ValueError: this CPU's INT8 products overflow.
    """
    devices = {parameter.device for layer in layers for parameter in layer.parameters()}
    if any(device.type == "cpu" for device in devices):
        _check_products()
    config = Int8DynamicActivationInt8WeightConfig(
        granularity=PerRow(), act_mapping_type=MappingType.ASYMMETRIC, set_inductor_config=False
    )
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        return {layer: _converted(layer, config) for layer in layers}


def _converted(layer: nn.Module, config: Int8DynamicActivationInt8WeightConfig) -> nn.Module:
    model = nn.Sequential(layer)
    quantize_(model, QATConfig(config, step="convert"))
    made = model[0]
    # torchao's own, a bound method that cannot be pickled
    made.__dict__.pop("extra_repr", None)
    made.__dict__[CONVERTED] = True
    return made.train(layer.training)


def _check_products() -> None:
    """Refuse a CPU whose INT8 products saturate at 16 bits, as some do that lack VNNI."""
    ones = torch.full((32, 64), 127, dtype=torch.int8)
    if int(torch._int_mm(ones, ones.T.contiguous()).max()) != 64 * 127 * 127:
        fix = "convert on a GPU, or export the prepared model"
        raise fail("INT8 products of this CPU", "be exact", "sums that saturate", fix)
