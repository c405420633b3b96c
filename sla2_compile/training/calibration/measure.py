"""How far the sites' answers are from full attention, as inference computes them: hard top-k, low bit if it is on.

For each site, over all rows of the held-out calls, at several topk_ratios: error = |o - o_full| / |o_full|, with
Frobenius norms over all calls, and the same for the sparse branch alone. On sampled query blocks: how much of the
true attention mass the selected blocks hold (recall), and the most that as many blocks could hold (oracle).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.functional import Routing, attend
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView
from sla2_compile.passes.sites.rules import why_not
from sla2_compile.passes.sites.settings import SiteSettings
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.calibration import ranks
from sla2_compile.training.calibration.batches import mixed
from sla2_compile.training.calibration.problem import Problem
from sla2_compile.training.calibration.rows import rows_of
from sla2_compile.training.calibration.soft import Learned

# sigmoid of it is 1 in float32: the sparse branch alone
ALL_SPARSE = 40.0
SAMPLED = 16


@dataclass(frozen=True)
class Point:
    """One site at one topk_ratio.

    Attributes:
        topk_ratio: as set. share: of the key blocks that are really kept, which differs by rounding.
        error: relative error of the output. sparse_error: that of the sparse branch alone.
        recall, oracle: share of the true mass in the selected blocks, and in the best ones.
    """

    topk_ratio: float
    share: float
    error: float
    sparse_error: float
    recall: float
    oracle: float


@dataclass(frozen=True)
class Measured:
    """One site on the held-out batches.

    Attributes:
        points: by rising topk_ratio. A ratio at which SLA2 would not take the calls is left out.
        work: multiply-adds of the calls' full attention.
        calls: how many calls were measured.
    """

    points: tuple[Point, ...]
    work: float
    calls: int

    def at(self, topk_ratio: float) -> Point:
        """The point of a ratio that was measured."""
        return next(point for point in self.points if point.topk_ratio == topk_ratio)

    @property
    def ratios(self) -> list[float]:
        """The ratios that were measured, rising."""
        return [point.topk_ratio for point in self.points]

    def to_list(self) -> list[Any]:
        """Return plain data, for `from_list`."""
        return [[list(vars(point).values()) for point in self.points], self.work, self.calls]

    @classmethod
    def from_list(cls, values: list[Any]) -> Measured:
        points, work, calls = values
        return cls(tuple(Point(*point) for point in points), work, calls)


class Meter:
    """Measures sites in one forward after another.

    Args:
        learned: the parameters to measure with, by name of the site.
        ratios: topk_ratios to measure at, by name of the site.
        seed: fixes which query blocks are sampled for recall.
    """

    def __init__(self, learned: Mapping[str, Learned], ratios: Mapping[str, Sequence[float]], seed: int) -> None:
        self.learned, self.seed = learned, mixed(seed, ranks.rank())
        self.ratios = {name: sorted(set(values)) for name, values in ratios.items()}
        # per ratio: squared errors, recall, oracle, share; then squared size, work, calls
        self.sums = {name: torch.zeros(5 * len(x) + 3, dtype=torch.float64) for name, x in self.ratios.items()}

    @torch.no_grad()
    def observe(self, name: str, site: Site, call: AttentionCall, mask: MaskView) -> Tensor:
        """Measure one call, and answer it by full attention."""
        answer = call.full_attention()
        with torch.inference_mode(False), torch.autocast(call.q.device.type, enabled=False):
            full = answer.clone() if answer.is_inference() else answer
            (B, H, Nq, D), (Nk, Dv) = call.q.shape, call.v.shape[2:]
            mass = self._mass(name, site, call, mask)
            learned = self.learned[name]
            rows = [self._at(ratio, learned, site, call, mask, full, mass) for ratio in self.ratios[name]]
            work = float(B * H * Nq * Nk * (D + Dv))
            flat = torch.tensor([*(x for row in rows for x in row), squared(full), work, 1.0], dtype=torch.float64)
        self.sums[name] += flat
        return answer

    def _mass(self, name: str, site: Site, call: AttentionCall, mask: MaskView) -> Any:
        problem = Problem.of(call, mask, site.settings.options)
        seen = int(self.sums[name][-1])
        sample = problem.sample(SAMPLED, torch.Generator().manual_seed(mixed(self.seed, *name.encode(), seen)))
        found = []
        for part in problem.parts(sample):
            rows = rows_of(problem, part)
            found.append((part, rows.block_mass(rows.over_blocks()[0])))
        return found

    def _at(
        self, ratio: float, learned: Learned, site: Site, call: AttentionCall, mask: MaskView, full: Tensor,
        mass: Any,
    ) -> list[float]:  # fmt: skip
        """Return squared errors, recall, oracle and share at one ratio; NaN where SLA2 would not take the call."""
        settings = with_ratio(site.settings, ratio)
        if why_not(call, mask, settings) is not None:
            return [float("nan")] * 5
        o, routing = answered(site, settings, call, mask, learned)
        bias = torch.full((1, 1), ALL_SPARSE, dtype=torch.float32, device=call.q.device)
        sparse, _ = answered(site, settings, call, mask, Learned(learned.proj_q, learned.proj_k, None, bias))
        assert routing is not None
        recall, oracle = _recall(routing, mass)
        block_q, block_k = settings.options.block_sizes(call.q.shape[2], call.k.shape[2])
        tn = num_blocks(call.k.shape[2], block_k)
        share = num_kept(tn, ratio, block_q, block_k, mask.is_causal) / tn
        return [squared(o - full), squared(sparse - full), recall, oracle, float(share)]

    def results(self) -> dict[str, Measured]:
        """What was measured, over all processes. Sites without a call are left out."""
        if not self.sums:
            return {}
        device = next(x.device for learned in self.learned.values() for x in learned if x is not None)
        flat = torch.cat(list(self.sums.values()))
        # not every device has float64
        flat = flat.to(device, torch.float64 if device.type in ("cpu", "cuda") else torch.float32)
        parts = ranks.total(flat).double().cpu().split([len(x) for x in self.sums.values()])
        found = {}
        for (name, ratios), sums in zip(self.ratios.items(), parts, strict=True):
            *_, size, work, calls = sums.tolist()
            if calls:
                rows = zip(ratios, sums[:-3].view(-1, 5).tolist(), strict=True)
                points = (_point(ratio, row, size, calls) for ratio, row in rows if row[0] == row[0])
                found[name] = Measured(tuple(points), work, int(calls))
        return found


def _point(ratio: float, row: list[float], size: float, calls: float) -> Point:
    error, sparse, recall, oracle, share = row
    size = max(size, torch.finfo(torch.float64).tiny)
    return Point(ratio, share / calls, (error / size) ** 0.5, (sparse / size) ** 0.5, recall / calls, oracle / calls)


def with_ratio(settings: SiteSettings, topk_ratio: float) -> SiteSettings:
    """Return the settings with another topk_ratio, for calls whose tokens are in the site's order already."""
    return replace(settings, options=replace(settings.options, topk_ratio=topk_ratio, order="raster"))


def answered(
    site: Site, settings: SiteSettings, call: AttentionCall, mask: MaskView, learned: Learned
) -> tuple[Tensor, Routing | None]:
    """Answer a call as the site does in inference, with other settings and parameters, which get the site's dtype."""
    dtype = None if site.alpha_bias is None else site.alpha_bias.dtype
    proj_q, proj_k, gain, bias = learned.map(lambda x: x.detach().to(dtype))
    q, k, v = (x.clone() if x.is_inference() else x for x in (call.q, call.k, call.v))
    return attend(
        q, k, v, settings.options, key_mask=mask.keys, is_causal=mask.is_causal, scale=call.scale,
        proj_q=proj_q, proj_k=proj_k, alpha_gain=gain, alpha_bias=bias, training=False,
        imitate=site.imitates(), keep_routing=True,
    )  # fmt: skip


def _recall(routing: Routing, mass: Any) -> tuple[float, float]:
    """Return the mean share of the true mass in the selected blocks, and in as many best ones."""
    held = best = count = 0.0
    for part, true in mass:
        heads = torch.arange(routing.lut.shape[1], device=true.device)[part.heads]
        lut = routing.lut[part.item, heads[:, None], part.blocks.to(true.device)]
        taken = true.gather(-1, lut.clamp(min=0).long()) * (lut >= 0)
        # as many as were selected; the others count nothing
        top = true.topk(lut.shape[-1], dim=-1).values * (lut.sort(dim=-1, descending=True).values >= 0)
        held, best, count = held + float(taken.sum()), best + float(top.sum()), count + part.blocks.numel()
    return held / count, best / count


def squared(x: Tensor) -> float:
    """Sum of squares, accumulated in float32 or wider."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(x, dtype=dtype)) ** 2
