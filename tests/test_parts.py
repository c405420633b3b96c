"""Parts of a transformed model, and models whose root is another object now: told of as they are."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import sla2_compile
from tests.written_by_hand import Owner


def sdpa(s, q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Owner(sdpa)
        self.lone = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x) + self.lone(x, x, x, need_weights=True)[0]


class Plain(nn.Module):
    def forward(self, x):  # without types, which are strings here and keep a graph from being pickled
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


@pytest.fixture
def model(x) -> nn.Module:
    net = sla2_compile.transform(
        Holder(nn.Sequential(Block(), Block(), Block())), example_inputs=(x,), min_seq_len=0, topk_ratio=0.5
    )
    net(x)
    return net


def told(part: nn.Module) -> tuple[list[str], list[str], dict[str, int]]:
    found = sla2_compile.report(part)
    assert found.recipe is not None
    assert found.recipe.topk_ratio == 0.5
    assert all(r.settings.options.topk_ratio == 0.5 for r in found.rewrites)
    assert not found.gone
    return [r.where.owner for r in found.rewrites], [m.where.owner for m in found.misses], found.ran


def test_parts(model, x):
    blocks = model.part
    assert told(blocks[1]) == (["attn"], ["lone"], {"attn.sla2.0": 1})
    assert told(blocks[1].attn) == ([""], [], {"sla2.0": 1})
    assert told(blocks[1].attn.sla2) == ([""], [], {"0": 1})
    assert told(blocks[1].attn.sla2[0]) == ([""], [], {"": 1})
    owners, misses, ran = told(blocks[1:])
    assert len(owners) == len(misses) == len(ran) == 2
    lines: list[str] = []
    sla2_compile.log_sla2_config(blocks[1], lines.append)
    assert lines[0] == "SLA2 in Block: recipe balanced, 1 sites, 1 left alone"
    with sla2_compile.record_statistics(blocks[1]):
        blocks[1](x)
    assert "mean/sparsity" in sla2_compile.get_sla2_statistics(blocks[1])


def test_a_new_root(model, x):
    held = Holder(nn.ModuleList([copy.deepcopy(model.part[1]), model.part[0]]))
    held.part[0](x)
    owners, misses, ran = told(held)
    assert sorted(owners) == ["part.0.attn", "part.1.attn"]
    assert sorted(misses) == ["part.0.lone", "part.1.lone"]
    assert ran == {"part.0.attn.sla2.0": 1, "part.1.attn.sla2.0": 1}


def test_a_lost_forward_of_a_part_is_told_of(model):
    attn = model.part[1].attn
    attn.forward = lambda x: x
    with pytest.warns(UserWarning, match="was replaced"):
        assert list(sla2_compile.report(model.part[1]).gone) == ["attn"]


def test_torch_compiles_wrapper_hides_no_owner(model, x):
    model.part[1] = torch.compile(model.part[1], backend="eager")
    for part in (model, model.part, torch.compile(model, backend="eager")):
        assert len(told(part)[0]) == 3


def test_a_wrapper_that_comes_after_transform_hides_no_owner(model, x):
    model.part[0] = Holder(model.part[0])
    model.part[2].attn = checkpoint_wrapper(model.part[2].attn)
    owners, misses, ran = told(model)
    assert owners == ["part.0.part.attn", "part.1.attn", "part.2.attn._checkpoint_wrapped_module"]
    assert misses == ["part.0.part.lone", "part.1.lone", "part.2.lone"]
    assert ran == {f"{owner}.sla2.0": 1 for owner in owners}
    model.part[0].part.attn.sla2[0].set_topk_ratio(0.25)
    assert [r.settings.options.topk_ratio for r in sla2_compile.report(model).rewrites] == [0.25, 0.5, 0.5]
    model.part[1] = Holder(nn.Identity())
    with pytest.warns(UserWarning, match="part.1.attn: the module was replaced"):
        assert list(sla2_compile.report(model).gone) == ["part.1.attn"]
    for module in sla2_compile.restore(model).modules():
        assert not hasattr(module, "sla2")


def test_parts_that_were_compiled_before_transform(x):
    net = Holder(nn.Sequential(*(torch.compile(Block(), backend="eager") for _ in range(2))))
    full = copy.deepcopy(net)
    sla2_compile.transform(net, example_inputs=(x,), min_seq_len=0, topk_ratio=0.5, exclude=["part.0.attn"])
    assert not torch.equal(net(x), full(x))
    assert told(net) == (["part.1.attn"], ["part.0.attn", "part.0.lone", "part.1.lone"], {})
    with sla2_compile.record_statistics(net):
        net(x)
    assert sla2_compile.report(net).ran == {"part.1.attn.sla2.0": 1}
    torch.testing.assert_close(sla2_compile.restore(net)(x), full(x), rtol=0, atol=0)


def test_a_graph_in_a_new_root(x):
    gm = fx.symbolic_trace(Plain())
    sla2_compile.transform(gm, example_inputs=(x,), min_seq_len=0, topk_ratio=0.5)
    gm(x)
    loaded = pickle.loads(pickle.dumps(gm))
    loaded(x)
    assert told(loaded) == ([""], [], {"sla2.0": 1})
    assert told(gm.sla2) == ([""], [], {"0": 1})
    assert told(fx.GraphModule(dict(gm.named_modules()), gm.graph)) == ([""], [], {"sla2.0": 1})
    assert told(copy.deepcopy(gm))[0] == [""]
    sla2_compile.restore(gm)
    assert sla2_compile.report(gm).recipe is None


def test_a_graph_whose_site_was_erased(x):
    gm = fx.symbolic_trace(nn.Sequential(Plain(), Plain()))
    sla2_compile.transform(gm, example_inputs=(x,), min_seq_len=0, topk_ratio=0.5)
    node = next(node for node in gm.graph.nodes if node.target == "1.sla2.0")
    with gm.graph.inserting_before(node):
        full = gm.graph.call_function(F.scaled_dot_product_attention, node.args[:3])
    node.replace_all_uses_with(full)
    gm.graph.erase_node(node)
    for unused in (False, True):
        if unused:
            gm.delete_all_unused_submodules()
        gm.recompile()
        gm(x)
        with pytest.warns(UserWarning, match="1: the graph no longer calls its site"):
            found = sla2_compile.report(gm)
        assert list(found.gone) == ["1"]
        assert str(found).count("planned, not reached") == 1
    assert "sla2" not in sla2_compile.restore(gm).code


def test_programs_without_a_plan(x):
    """What was exported of a transformed model, and a loaded program: SLA2's calls are counted, and stay."""
    model = sla2_compile.transform(Holder(Owner(sdpa)).eval(), example_inputs=(x,), min_seq_len=0)
    program = torch.export.export(model, (x,))
    file = io.BytesIO()
    torch.export.save(sla2_compile.transform(torch.export.export(Owner(sdpa), (x,)), min_seq_len=0), file)
    file.seek(0)
    for held in (program, torch.export.load(file)):
        found = sla2_compile.report(held)
        assert (found.discovery, found.to_dict()["unplanned"]) == ("not transformed", 1)
        assert "1 call of SLA2 in the graph" in str(found)
        module = held.module()
        expected = module(x)
        for outer in (module, nn.Sequential(module)):
            with pytest.raises(ValueError, match="got 1 ops of SLA2 in a graph"):
                sla2_compile.restore(outer)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    assert sla2_compile.report(model).unplanned == 0
