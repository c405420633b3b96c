"""Programs that write into memory and never read the writing call's result: attention sees the memory instead.

Each works on keys `k` (B, H, N, D) of its own and may use `x` of the same shape; `total` is a buffer of the model.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

LIBRARY = torch.library.Library("sla2_tests", "FRAGMENT")
LIBRARY.define("shift_(Tensor(a!) x, float by) -> ()")
LIBRARY.define("note(Tensor x) -> ()")
NOTED: list[float] = []


@torch.library.impl(LIBRARY, "shift_", "CompositeExplicitAutograd")
def _shift(x, by):
    x.add_(by)


@torch.library.register_fake("sla2_tests::shift_", lib=LIBRARY)
def _shift_fake(x, by):
    return None


@torch.library.impl(LIBRARY, "note", "CompositeExplicitAutograd")
def _note(x):
    NOTED.append(float(x.sum()))


@torch.library.register_fake("sla2_tests::note", lib=LIBRARY)
def _note_fake(x):
    return None


def copied_halves(k, x, total):
    k[..., :4].copy_(x[..., 4:])
    k[..., 4:].copy_(-x[..., :4])


def added_to_a_view(k, x, total):
    k.transpose(1, 2)[:, 0].add_(x[:, :, 0])


def added_by_python(k, x, total):
    part = k[:, :1]
    part += 1.0


def scaled_by_python(k, x, total):
    part = k.narrow(2, 0, 8)
    part *= x.narrow(2, 0, 8)


def filled_where(k, x, total):
    k.masked_fill_(x > 0.5, 0.25)


def copied_by_index(k, x, total):
    k.index_copy_(2, torch.tensor([1, 3]), x[:, :, :2])


def scattered(k, x, total):
    k.scatter_(2, torch.zeros(1, 1, 1, 8, dtype=torch.long).expand(k.shape[0], k.shape[1], -1, -1), x[:, :, :1])


def function_named_in_place(k, x, total):
    torch.relu_(k.view(-1))


def functional_told_to(k, x, total):
    F.leaky_relu(k, 0.3, inplace=True)


def functional_told_by_position(k, x, total):
    F.hardtanh(k, -0.5, 0.5, True)


def given_out(k, x, total):
    torch.add(x, 1.0, out=k)


def two_given_out(k, x, total):
    torch.sort(x, -1, out=(k, torch.zeros(k.shape, dtype=torch.long)))


def a_list_of_views(k, x, total):
    torch._foreach_add_([k[:, 0], k[:, 1]], 0.5)


def filled_through_data(k, x, total):
    k.detach()[:, :, 0].fill_(2.0)


def packet(k, x, total):
    torch.ops.aten.mul_(k[:, :, ::2], 2.0)


def overload(k, x, total):
    torch.ops.aten.sub_.Tensor(k, x)


def by_the_operators_schema(k, x, total):
    torch.ops.sla2_tests.shift_(k, 0.75)


def buffer(k, x, total):
    total.add_(x.sum())


def buffer_by_item(k, x, total):
    total[0] += 1.0


def statistics_of_an_unread_layer(k, x, total):
    F.batch_norm(x.flatten(2).transpose(1, 2).reshape(-1, 2), total[:2], total[2:], training=True)


WRITERS = {f.__name__: f for f in (
    copied_halves, added_to_a_view, added_by_python, scaled_by_python, filled_where, copied_by_index, scattered,
    function_named_in_place, functional_told_to, functional_told_by_position, given_out, two_given_out,
    a_list_of_views, filled_through_data, packet, overload, by_the_operators_schema, buffer, buffer_by_item,
    statistics_of_an_unread_layer,
)}  # fmt: skip


class Attend(nn.Module):
    """Attention over keys that a writer has written into, and over values that are the caller's."""

    def __init__(self, write) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("total", torch.zeros(4))

    def forward(self, q, v):
        k = v * 0.5
        self.write(k, q, self.total)
        # timm adds position embeddings into its argument like this
        v.add_(1.0)
        return F.scaled_dot_product_attention(q, k, v) + self.total.sum()


def inputs():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 2, 64, 8, generator=generator) for _ in range(2))
