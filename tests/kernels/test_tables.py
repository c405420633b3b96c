"""Methods with tables of their own, VSA and VMoBA: what they compute is what their specifications say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sla2_compile.kernels.functional import attend, sla2_attention
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.order import ordered, whole
from sla2_compile.kernels.reference import methods as reference

N = 150
CUBES: dict[str, dict[str, Any]] = {
    "runs": {"brick": (1, 1, 16)},
    "squares": {"brick": (1, 4, 4), "grid": (1, 10, 15)},
    "video": {"brick": (2, 2, 4), "grid": (3, 5, 10)},
}
CHUNKS: dict[str, dict[str, Any]] = {
    "runs": {"brick": (1, 1, 32)},
    "bands": {"brick": (1, 4, -1), "grid": (1, 10, 15)},
    "columns": {"brick": (-1, 2, 4), "grid": (3, 5, 10)},
}


def inputs(masked: bool, dtype: torch.dtype = torch.float64) -> Any:
    """q, k and v of grouped heads, a gate, and a key mask under which a whole block is hidden."""
    torch.manual_seed(0)
    shapes = ((2, 4, N, 16), (2, 2, N, 16), (2, 2, N, 24), (24, 16), (24,))
    mask = torch.rand(2, N) < 0.8
    mask[1, 40:80] = False
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes], mask if masked else None


def placed(fields: dict[str, Any], unit: int) -> Any:
    """The order of the tokens, with every cube or chunk filled up to a multiple of unit."""
    grid = fields.get("grid", (1, 1, N))
    return ordered(grid, "brick", whole(fields["brick"], grid), unit, 0, 0, torch.device("cpu"), fill=True)


@pytest.mark.parametrize("cubes", CUBES)
@pytest.mark.parametrize("masked", [False, True])
def test_vsa(cubes: str, masked: bool) -> None:
    x, mask = inputs(masked)
    options = AttentionOptions(0.3, method="vsa", **CUBES[cubes])
    o, routing = attend(x[0], x[1], x[2], options, key_mask=mask, gate_weight=x[3], gate_bias=x[4])
    order = placed(CUBES[cubes], 16)
    q, k, v = (order.rows(t) for t in x[:3])
    real = None if order.real is None else order.real.expand(2, -1)
    want = reference.vsa(q, k, v, order.mask(mask, 2), real, x[3], x[4], 16, 0.3, 0.25)
    want = order.restored(want)
    torch.testing.assert_close(o, want)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (o, want)), strict=True):
        torch.testing.assert_close(a, b)
    assert routing is not None
    assert routing.alpha is None


def test_without_a_gate_vsa_is_its_sparse_branch() -> None:
    x, _ = inputs(False)
    options = AttentionOptions(0.3, method="vsa", **CUBES["runs"])
    o, _ = attend(x[0], x[1], x[2], options)
    zero, _ = attend(
        x[0], x[1], x[2], options, gate_weight=torch.zeros(24, 16).double(), gate_bias=torch.zeros(24).double()
    )
    torch.testing.assert_close(o, zero)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("share", [None, 0.4])
def test_vmoba(chunks: str, masked: bool, share: float | None) -> None:
    x, mask = inputs(masked)
    rule: dict[str, Any] = {} if share is None else {"selection": "threshold", "threshold": share}
    fields = CHUNKS[chunks]
    options = AttentionOptions(0.6, block_q=32, block_k=16, method="vmoba", **fields, **rule)
    o, _ = attend(x[0], x[1], x[2], options, key_mask=mask)
    order = placed(fields, 32)
    q, k, v = (order.rows(t) for t in x[:3])
    real = None if order.real is None else order.real.expand(2, -1)
    grid = fields.get("grid", (1, 1, N))
    size = -(-torch.tensor(whole(fields["brick"], grid)).prod().item() // 32) * 32
    keys = reference.vmoba_keys(q, k, order.mask(mask, 2), real, int(size), 32, 0.6, share)
    want = order.restored(sdpa(q, k, v, keys, enable_gqa=True))
    # a padded place may see no key, and is not compared
    torch.testing.assert_close(o, want)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), x[:3]) for y in (o, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_vmoba_by_blocks_is_vmoba_by_tokens_where_a_blocks_queries_are_one() -> None:
    x, _ = inputs(False)
    q, k, v = (t.detach() for t in x[:3])
    q = q[:, :, ::32].repeat_interleave(32, dim=2)[:, :, :N]
    o, _ = attend(q, k, v, AttentionOptions(0.6, block_q=32, block_k=16, method="vmoba", brick=(1, 1, 32)))
    keys = reference.vmoba_keys(q, k, None, None, 32, 1, 0.6, None)
    torch.testing.assert_close(o, sdpa(q, k, v, keys, enable_gqa=True))


@pytest.mark.parametrize(("method", "fields"), [("vsa", CUBES["squares"]), ("vmoba", CHUNKS["columns"])])
def test_compiled_code_and_all_blocks(method: str, fields: dict[str, Any]) -> None:
    x, _ = inputs(False, torch.float32)
    options = AttentionOptions(0.5, block_q=32, block_k=16, method=method, **fields)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got, want = (run(x[0], x[1], x[2], options, keep_routing=False)[0] for run in (compiled, attend))
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), x[:3]) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    q, k, v = x[:3]
    whole_map = AttentionOptions(1.0, block_q=32, block_k=16, method=method, **fields)
    torch.testing.assert_close(sla2_attention(q, k, v, whole_map), sdpa(q, k, v, enable_gqa=True))


@pytest.mark.parametrize(("method", "rule"), [("vsa", "topk"), ("vmoba", "topk"), ("vmoba", "threshold")])
@pytest.mark.parametrize("grid", [None, (1, 10, 13)])
def test_protected_tokens(method: str, grid: Any, rule: str) -> None:
    """12 in front and 8 behind: seen by every query, and rows of full attention."""
    x, _ = inputs(False)
    q, k, v = x[:3]
    brick = (1, 4, 4) if grid else (1, 1, 16 if method == "vsa" else 32)
    options = AttentionOptions(
        0.3, block_q=32, block_k=16, method=method, grid=grid, brick=brick, protect=((0, 12), (-8, None)),
        selection=rule,
    )  # fmt: skip
    o, routing = attend(q, k, v, options)
    full = sdpa(q, k, v, enable_gqa=True)
    for rows in (slice(12), slice(142, 150)):
        torch.testing.assert_close(o[:, :, rows], full[:, :, rows])
    assert not torch.allclose(o[:, :, 12:142], full[:, :, 12:142], atol=1e-3)
    assert routing is not None
    if grid is None and method == "vsa":
        # tokens stay where they are: the first block, and the last ones
        assert all({0, 8, 9} <= set(row.tolist()) for row in routing.lut.flatten(0, 2))
    else:
        # 20 tokens behind all others begin a block of their own: it and the next are there for all
        last = int(routing.lut.max())
        assert all({last - 1, last} <= set(row.tolist()) for row in routing.lut.flatten(0, 2))


@pytest.mark.parametrize("rule", ["topk", "threshold"])
def test_a_last_chunk_of_fewer_blocks(rule: str) -> None:
    """20 protected tokens behind two chunks of 64 are a chunk of two blocks: no block counts twice for the others."""
    x, _ = inputs(False)
    q, k, v = (t[:, :, :148] for t in x[:3])
    fields: dict[str, Any] = {
        "method": "vmoba",
        "brick": (1, 1, 64),
        "protect": ((0, 20),),
        "block_q": 32,
        "block_k": 16,
    }
    whole_map = AttentionOptions(1.0, **fields)
    torch.testing.assert_close(sla2_attention(q, k, v, whole_map), sdpa(q, k, v, enable_gqa=True))
    o, routing = attend(q, k, v, AttentionOptions(0.4, **fields, selection=rule))
    assert routing is not None
    assert (routing.lut < 0).any()
    order = ordered((1, 1, 128), "brick", (1, 1, 64), 32, 20, 0, torch.device("cpu"), fill=True)
    keys = torch.zeros(2, 4, 5, 11, dtype=torch.bool)
    keys = keys.scatter(-1, torch.where(routing.lut < 0, 10, routing.lut).long(), True)[..., :10]
    seen = keys.repeat_interleave(32, 2)[:, :, :148].repeat_interleave(16, 3)[..., :148]
    want = order.restored(sdpa(order.rows(q), order.rows(k), order.rows(v), seen, enable_gqa=True))
    torch.testing.assert_close(o[:, :, 20:], want[:, :, 20:])


def test_what_is_refused() -> None:
    x, _ = inputs(False, torch.float32)
    q, k, v = x[:3]
    for method, fields, words in (
        ("vsa", {"is_causal": True}, "is_causal must be False with method 'vsa'"),
        ("vmoba", {"is_causal": True}, "is_causal must be False with method 'vmoba'"),
        ("vmoba", {"gate_weight": x[3]}, r"parameters must be those of method 'vmoba' \(none\), got gate_weight"),
        ("vsa", {"linear_bias": x[4]}, "those of method 'vsa' .gate_weight, gate_bias., got linear_bias"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(q, k, v, AttentionOptions(method=method), **fields)
    with pytest.raises(ValueError, match="q must have k's 150 tokens with an order or method vmoba, got 20"):
        attend(q[:, :, :20], k, v, AttentionOptions(method="vmoba"))
    with pytest.raises(
        ValueError, match=r"grid must have the sequence's 150 tokens, got \(1, 10, 10\), which are 100"
    ):
        attend(q, k, v, AttentionOptions(method="vsa", grid=(1, 10, 10)))
