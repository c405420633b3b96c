"""What is decided once for each kind of eager call: its resolved arguments, and on a GPU its launches.

A kind is all that decides how a call is computed: the layouts of its tensors, and its options. It is one tuple, and
the only key between a call and its launches. What may differ between calls of one kind is asked at each: addresses,
the stream, the current GPU, who listens to launches, autograd, modes, and switches in the environment.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sla2_compile.kernels.arguments import ForwardArgs
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import Described, check_qkv
from sla2_compile.kernels.layout import Fields, Layout
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.precision import low_bit_of

DEVICES = {"cuda"}
"""Types of devices whose calls are launches."""
Tensors = Sequence[Tensor | None]
Straight = Callable[[Tensors, list[int]], Tensor]
"""Makes a call's launches, given its tensors and their addresses, and returns o."""


def resolve(
    q: Described, k: Described, v: Described, options: AttentionOptions, low_bit: str, imitated: bool,
    scale: float | None, is_causal: bool, unmasked: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Check q, k and v; return the arguments of `sla2::forward` behind its tensors.

    Args:
        low_bit: format asked for; imitated: whether it is computed in any case, and not only where it pays.
    """
    check_qkv(q, k, v)
    block_q, block_k = options.block_sizes(q.shape[2], k.shape[2])
    # plain floats: a number of numpy's is equal to one, and would be handed to calls that gave one
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    topk_ratio = float(options.topk_ratio)
    runs = low_bit if imitated else low_bit_of(
        low_bit, q, v.shape[3], block_q, block_k, scale, num_blocks(k.shape[2], block_k), topk_ratio,
        plain=unmasked and not is_causal,
    )  # fmt: skip
    ratio = options.router_ratio(block_q, block_k)
    rest = (scale, options.feature_map, options.linear_scope, is_causal, runs)
    return topk_ratio, ratio, block_q, block_k, *rest


class Kind:
    """What is known of a kind of call.

    Attributes:
        resolved: the arguments of `sla2::forward` behind its tensors.
        straight: what its calls without a gradient run past the op; None where the op must run, and until `ask`.
        step: what its training steps run past the ops (`cuda.step.Step`); None likewise, and until `ask_step`.
        asked, asked_step: whether `ask` and `ask_step` have answered.
    """

    __slots__ = ("asked", "asked_step", "resolved", "step", "straight")

    def __init__(self, resolved: tuple[Any, ...]) -> None:
        self.resolved = resolved
        self.straight: Straight | None = None
        self.step: Any = None
        self.asked = self.asked_step = False

    def ask(self, tensors: Tensors) -> Straight | None:
        """Find out what `straight` is, with the tensors of a first call, and return it.

        Raises:
            ValueError: as the op does.
        """
        if (args := self._on_a_gpu(tensors)) is not None:
            from sla2_compile.kernels.cuda import dispatch

            self.straight = dispatch.straight(args)
        self.asked = True
        return self.straight

    def ask_step(self, tensors: Tensors) -> Any:
        """Find out what `step` is, with the tensors of a first call, and return it.

        Raises:
            ValueError: as the ops do.
        """
        if (args := self._on_a_gpu(tensors)) is not None:
            from sla2_compile.kernels.cuda import step

            self.step = step.step_of(args)
        self.asked_step = True
        return self.step

    def _on_a_gpu(self, tensors: Tensors) -> ForwardArgs[Tensor] | None:
        """The arguments of a call whose kernels are launched; None on other devices."""
        first, values = tensors[0], (*tensors, *self.resolved)
        launched = first is not None and first.device.type in DEVICES
        return ForwardArgs(*values) if launched else None


@functools.lru_cache(maxsize=1024)
def kind_of(
    layouts: tuple[Fields | None, ...], options: AttentionOptions, low_bit: str, imitated: bool, scale: float | None,
    is_causal: bool,
) -> Kind:  # fmt: skip
    """Return what is known of a kind of call, checked when it is first seen.

    Args:
        layouts: of q, k, v, proj_q, proj_k, alpha_gain, alpha_bias, key_mask, as `layout.read` returns them.
        low_bit, imitated: as for `resolve`.

    Raises:
        ValueError: q, k and v do not form one attention call.
    """
    q, k, v = (Layout(*x) for x in layouts[:3] if x is not None)
    topk_ratio, *sizes, feature_map, linear_scope, causal, runs = resolve(
        q, k, v, options, low_bit, imitated, scale, is_causal, layouts[-1] is None
    )
    # plain ints for the same reason; a float is refused, as by an op's schema
    *sizes, scale = (*map(operator.index, sizes[:-1]), sizes[-1])
    return Kind((topk_ratio, *sizes, scale, feature_map, linear_scope, causal, runs))
