"""The op `sla2::select`: `sla2::route` with other choices of key blocks; `reference/select.py` specifies it.

It takes `SelectArgs` and returns `RouteResult`. Its table may have rows with fewer entries than others, so whoever
attends by it must pass a key mask; see `methods.py`. Blocked PyTorch computes it on every device. The gradient of
k_mean goes to k, and no other.
"""

from __future__ import annotations

from torch import Tensor

from sla2_compile.kernels.arguments import RouteResult, SelectArgs
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import check_select
from sla2_compile.kernels.ops import define, pass_mean, route_fake


def _select(args: SelectArgs[Tensor]) -> RouteResult[Tensor]:
    from sla2_compile.kernels.portable.select import select_forward

    check_select(args)
    return select_forward(args)


def _select_fake(args: SelectArgs[Tensor]) -> RouteResult[Tensor]:
    from sla2_compile.kernels.portable.select import table_width

    check_select(args)
    made = route_fake(args.route())
    width = table_width(args, num_blocks(args.k.shape[2], args.block_k))
    return made._replace(lut=made.lut.new_empty(*made.lut.shape[:3], width))


select = define("select", SelectArgs, RouteResult, run=_select, cuda="", fake=_select_fake)
"""Choose the key blocks of each query block by a rule. Formula: `reference.select`."""


pass_mean(select, SelectArgs)
