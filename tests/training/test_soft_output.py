"""The soft output and the losses of stage 1, against the reference and against autograd over dense maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sla2_compile.kernels.reference import sla2 as reference
from sla2_compile.passes.sites.masks import read_mask
from sla2_compile.training.calibration.losses import part_loss, soft_loss
from sla2_compile.training.calibration.problem import Part, Problem, Sample
from sla2_compile.training.calibration.rows import rows_of
from sla2_compile.training.calibration.scores import scores_of
from sla2_compile.training.calibration.soft import Learned, soft_output
from sla2_compile.training.calibration.soft_topk import soft_topk
from tests.training.cases import CASES, PLAIN

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def problem_of(case):
    call = case.call()
    return Problem.of(call, read_mask(call), case.options)


def whole(problem):
    """All query blocks of all heads, one part per sequence."""
    heads = problem.q.shape[1]
    return [Part(i, 0, torch.arange(problem.tm).expand(heads, -1)) for i in range(problem.q.shape[0])]


def as_rows(x, n):
    """(G, s, block_q, E) of all query blocks to (G, N, E)."""
    return x.flatten(1, 2)[:, :n]


def soft(problem, part, learned, tau):
    rows, scores = rows_of(problem, part), scores_of(problem, part, learned.proj_q, learned.proj_k)
    mask = soft_topk(scores.peak, problem.kept, tau, allowed=scores.allowed, forced=scores.forced, iterations=200)
    return soft_output(problem, part, rows, scores, mask, learned), mask


@every_case
def test_a_low_temperature_gives_the_references_output(case):
    problem, learned = problem_of(case), Learned.of(case.site())
    got = [as_rows(soft(problem, part, learned, 1e-9)[0], case.Nq) for part in whole(problem)]
    torch.testing.assert_close(torch.stack(got), case.hard(), rtol=1e-9, atol=1e-9)


@every_case
def test_scores_are_the_references(case):
    problem, site, call = problem_of(case), case.site(), case.call()
    k = call.k - reference.masked_mean(call.k, case.keys())[:, :, None]
    peak, typical = reference.block_scores(
        call.q, k, site.proj_q, site.proj_k, case.keys(),
        case.compression_ratio, case.block_q, case.block_k, case.D**-0.5,
    )  # fmt: skip
    for part in whole(problem):
        found = scores_of(problem, part, site.proj_q, site.proj_k)
        allowed = found.allowed.expand_as(found.peak)
        torch.testing.assert_close(found.peak[allowed], peak[part.item][allowed])
        torch.testing.assert_close(found.typical[allowed], typical[part.item][allowed])
        if not case.is_causal:
            assert torch.equal(allowed, peak[part.item] > -math.inf)


@every_case
def test_rows_are_full_attention_and_its_block_mass(case):
    problem, call = problem_of(case), case.call()
    full = call.full_attention()
    for part in whole(problem):
        rows = rows_of(problem, part)
        p, _ = rows.over_blocks()
        torch.testing.assert_close(as_rows(rows.average(p), case.Nq), full[part.item])
        torch.testing.assert_close(rows.block_mass(p).sum(dim=-1).min().item(), 1.0)


def dense(case, learned, mask, item):
    """The soft output of one sequence by N x N maps, from the formulas of `soft.py` alone."""
    call, groups = case.call(), case.Hq // case.Hkv
    keys = case.keys()
    k = (call.k - reference.masked_mean(call.k, keys)[:, :, None])[item].repeat_interleave(groups, dim=0)
    q, v = call.q[item], call.v[item].repeat_interleave(groups, dim=0)
    visible = reference.visible_keys(case.Nq, case.Nk, keys, case.is_causal, q.device)
    visible = visible[min(item, visible.shape[0] - 1)]
    inside = mask.repeat_interleave(case.block_q, 1)[:, : case.Nq].repeat_interleave(case.block_k, 2)[..., : case.Nk]
    e = (q @ k.mT * case.D**-0.5).exp() * visible * inside
    o_sparse = e @ v / e.sum(dim=-1, keepdim=True)
    w = reference.phi(q, case.feature_map) @ reference.phi(k, case.feature_map).mT * visible
    w = w if case.linear_scope == "all" else w * (1 - inside)
    o_linear = w @ v / w.sum(dim=-1, keepdim=True)
    args = (learned.proj_q, learned.proj_k, keys, case.compression_ratio, case.block_q, case.block_k, case.D**-0.5)
    smooth = call.k - reference.masked_mean(call.k, keys)[:, :, None]
    typical = reference.block_scores(call.q, smooth, *args)[1][item]
    log_rest = ((1 - mask) * typical.exp()).sum(dim=-1).log().repeat_interleave(case.block_q, dim=1)[:, : case.Nq]
    logit = (e.sum(dim=-1).log() - log_rest) * learned.alpha_gain[:, None] + learned.alpha_bias
    alpha = torch.sigmoid(logit)[..., None]
    return alpha * o_sparse + (1 - alpha) * o_linear


@pytest.mark.parametrize("name", ["plain", "grouped heads", "elu", "all keys in the linear branch"])
def test_the_soft_output_and_its_gradient_are_those_of_dense_maps(name):
    case = CASES[name]
    problem, site = problem_of(case), case.site()
    learned = Learned.of(site)
    for part in whole(problem):
        o, mask = soft(problem, part, learned, 0.5)
        o = as_rows(o, case.Nq)
        want = dense(case, learned, mask.mask, part.item)
        torch.testing.assert_close(o, want)
        weight = torch.randn(o.shape, dtype=o.dtype)
        grads = [torch.autograd.grad((x * weight).sum(), list(learned), retain_graph=True) for x in (o, want)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["kl", "mse"])
@every_case
def test_losses_pass_gradcheck_and_have_finite_gradients(case, kind):
    problem, site = problem_of(case), case.site()
    sample = problem.sample(2, torch.Generator().manual_seed(0))
    part = next(problem.parts(sample))
    size = torch.ones((), dtype=torch.float64)

    def loss(*values):
        return part_loss(problem, part, sample, Learned(*values), kind, size, 0.5, 60)

    values = [None if x is None else x.detach().clone().requires_grad_() for x in Learned.of(site)]
    grads = torch.autograd.grad(loss(*values), [x for x in values if x is not None], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    # along one direction; all entries of D x D matrices would take minutes
    way = [None if x is None else torch.randn_like(x) for x in values]

    def along(t):
        return loss(*(None if x is None else x.detach() + t * w for x, w in zip(values, way, strict=True)))

    assert torch.autograd.gradcheck(along, (torch.zeros((), dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("kind", ["kl", "mse", "split"])
@pytest.mark.parametrize("name", ["plain", "grouped heads", "causal and padded", "alpha per block"])
def test_the_loss_does_not_depend_on_how_it_is_cut(name, kind):
    call, site = CASES[name].call(), CASES[name].site()
    found = []
    for limit in (1, 3000, 2**24):
        site.zero_grad()
        generator = torch.Generator().manual_seed(0)
        loss = soft_loss(call, read_mask(call), site, kind=kind, blocks=3, generator=generator, limit=limit)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in site.parameters() if p.grad is not None)])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


def test_the_loss_over_all_blocks_is_the_relative_error_of_the_soft_output():
    case = PLAIN
    call, site, problem = case.call(), case.site(), problem_of(case)
    learned, full = Learned.of(site), call.full_attention()
    got = torch.stack([as_rows(soft(problem, part, learned, 0.1)[0], case.Nq) for part in whole(problem)])
    loss = soft_loss(call, read_mask(call), site, kind="mse", blocks=problem.tm * case.B, iterations=200)
    torch.testing.assert_close(loss, (got - full).square().mean() / full.square().mean())


@every_case
def test_the_split_loss_is_the_error_of_the_hard_mask_and_trains_alpha_through_it(case):
    call, site = case.call(), case.site()
    keys, full = case.keys(), call.full_attention()
    loss = soft_loss(call, read_mask(call), site, kind="split", blocks=10**6)
    torch.testing.assert_close(loss, (case.hard() - full).square().mean() / full.square().mean())
    loss.backward()
    lut, log_rest, _, k_mean = case.routed()
    gain, bias = (None if x is None else x.detach().clone().requires_grad_() for x in Learned.of(site)[2:])
    o, *_ = reference.attention(
        call.q, call.k, call.v, k_mean, lut.detach(), log_rest.detach(), gain, bias, keys, case.block_q, case.block_k,
        case.D**-0.5, case.feature_map, case.linear_scope, case.is_causal,
    )  # fmt: skip
    ((o - full).square().mean() / full.square().mean()).backward()
    torch.testing.assert_close(site.alpha_bias.grad, bias.grad)
    if gain is not None:
        torch.testing.assert_close(site.alpha_gain.grad, gain.grad)


def test_the_split_loss_selects_by_the_gradient_of_the_soft_mask():
    """One alpha per head does not see the scores, so that all of the router's gradient is the soft mask's."""
    case = PLAIN.with_(alpha="head")
    call, site, grads = case.call(), case.site(), []
    for kind in ("split", "mse"):
        site.zero_grad()
        soft_loss(call, read_mask(call), site, kind=kind, blocks=10**6).backward()
        grads.append(site.proj_q.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_kl_is_zero_only_where_the_router_knows_the_true_mass():
    # one router token per row, and scores that are the true ones: the router's block mass of a row is exact
    case = PLAIN.with_(compression_ratio=1, block_q=16, Nq=64, Nk=64, B=1)
    call, site = case.call(), case.site()
    # all rows of a query block are alike, so that the mean of log is the log of the mean
    call.q = call.q[:, :, ::16].repeat_interleave(16, dim=2)
    trained = soft_loss(call, read_mask(call), site, kind="kl", blocks=4)
    site.reset_parameters()
    exact = soft_loss(call, read_mask(call), site, kind="kl", blocks=4)
    assert trained > 0.01
    assert abs(exact) < 1e-12


def test_sampled_blocks_are_distinct_and_their_number_is_spread_over_the_batch():
    problem = problem_of(PLAIN.with_(B=4))
    sample = problem.sample(8)
    assert sample.blocks.shape == (4, 2, 2)
    assert all(len(set(row)) == 2 for row in sample.blocks.flatten(0, 1).tolist())
    few = problem.sample(3)
    assert few.blocks.shape == (3, 2, 1)
    assert len(set(few.items.tolist())) == 3
    assert problem.sample(10**6).blocks.shape == (4, 2, problem.tm)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if torch.is_tensor(x)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("kind", ["kl", "mse", "split"])
def test_no_tensor_is_larger_than_one_block_of_rows(kind):
    case = PLAIN.with_(B=1, Hq=4, Hkv=4, Nq=2048, Nk=2048, D=8, Dv=8, dtype=torch.float32)
    call, site = case.call(), case.site()
    answer = call.full_attention()
    with Largest() as largest:
        soft_loss(call, read_mask(call), site, kind=kind, blocks=8, answer=answer, limit=1).backward()
    assert largest.elements <= max(case.block_q * case.Nk, call.q.numel())


@pytest.mark.parametrize("kind", ["kl", "mse", "split"])
def test_parameters_of_any_dtype_are_trained_on_calls_of_16_bits(kind):
    case = PLAIN.with_(dtype=torch.bfloat16)
    call, site = case.call(), case.site()
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_loss(call, read_mask(call), site, kind=kind)
        loss.backward()
    assert loss.dtype == torch.float32
    assert site.proj_q.grad.dtype == torch.bfloat16
    assert site.proj_q.grad.abs().max() > 0


def test_tensors_of_inference_mode_are_taken():
    site = PLAIN.site()
    with torch.inference_mode():
        call = PLAIN.call()
    loss = soft_loss(call, read_mask(call), site)
    loss.backward()
    assert site.proj_q.grad.abs().max() > 0


@pytest.mark.parametrize(("options", "words"), [({"kind": "l1"}, "kind must be"), ({"blocks": 0}, "blocks must be")])
def test_losses_that_do_not_exist_are_refused(options, words):
    call = PLAIN.call()
    with pytest.raises(ValueError, match=words):
        soft_loss(call, read_mask(call), PLAIN.site(), **options)


def test_extreme_scores_keep_losses_and_gradients_finite():
    case = PLAIN.with_(dtype=torch.float32)
    call, site = case.call(), case.site()
    call.q = call.q * 1e3
    for kind in ("kl", "mse", "split"):
        site.zero_grad()
        loss = soft_loss(call, read_mask(call), site, kind=kind)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in site.parameters())


def test_a_sample_names_sequences_and_blocks():
    problem = problem_of(PLAIN)
    sample = Sample(torch.tensor([1]), torch.tensor([[[0, 4], [1, 2]]]))
    parts = list(problem.parts(sample, limit=1))
    assert [(p.item, p.first, p.blocks.tolist()) for p in parts] == [
        (1, 0, [[0]]), (1, 0, [[4]]), (1, 1, [[1]]), (1, 1, [[2]]),
    ]  # fmt: skip
