"""The variants of `benchmarks/quality.py`: what is done to the teacher before it is measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import sla2_compile
from benchmarks.quality_data import Pictures, as_bytes, pictures
from benchmarks.quality_measures import Judge, of_sites
from benchmarks.quality_state import Row, State
from benchmarks.quality_training import Batch, JiT, LossOf, Size, Stream, autocast, distilled, task, train, tune
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.calibration.measure import ALL_SPARSE

SPARSITIES = (95, 85, 90, 97)
SEEDS = {95: (0, 1, 2)}
"""One seed elsewhere."""
MAIN = 95
TUNE_LR = 1e-4
# names of variants
FULL16 = "full, in float16"
UNTRAINED = "untrained"
STAGE1 = "stage 1"
QAT = "stage 2, INT8 QAT"
QAT_FP8 = "stage 2, INT8 + FP8 QAT"
TASK = "stage 2, INT8 QAT, diffusion loss"
CONTROL = "full, fine-tuned"
STAGE2 = "stage 2"
THEN = {"int8": "stage 2, then INT8", "int8_fp8": "stage 2, then INT8 + FP8"}
SPARSE = "stage 2, sparse branch alone"
HEURISTIC = "stage 2, heuristic router"


@dataclass(frozen=True)
class Run:
    """A piece of work that is done as a whole: it gives rows of these variants."""

    part: str
    variants: tuple[str, ...]
    make: Callable[[Bench, Run], Iterator[Row]]
    sparsity: int | None = None
    seed: int = 0

    def row(self, variant: str, **values: Any) -> Row:
        return {"variant": variant, "sparsity": self.sparsity, "seed": self.seed, **values}


class Bench:
    """Pictures, teacher and judge of a run, made when they are first needed."""

    def __init__(self, size: Size, device: torch.device, state: State, packaged: bool, seconds: float) -> None:
        self.size, self.device, self.state, self.packaged, self.seconds = size, device, state, packaged, seconds

    @cached_property
    def bank(self) -> Pictures:
        return pictures(self.size.bank, self.size.side, False, self.packaged, self.device)

    @cached_property
    def held(self) -> Pictures:
        return pictures(self.size.held, self.size.side, True, self.packaged, self.device)

    @cached_property
    def full(self) -> JiT:
        """The teacher with the weights of its file, frozen."""
        model = JiT(self.size.config)
        model.load_state_dict(self.state.weights())
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.full, self.held, self.size)

    @cached_property
    def measured_on(self) -> list[Batch]:
        """Held-out batches for the sites; the last one is not used."""
        stream = Stream(self.held, self.size.calibrate, 12)
        return [stream.noisy(step) for step in range(5)]

    def copy(self) -> JiT:
        return copy.deepcopy(self.full).requires_grad_(True)

    def transformed(self, sparsity: int, **fields: Any) -> nn.Module:
        """A copy of the teacher with SLA2 in all its calls."""
        size, (z, t, y) = self.size, self.measured_on[0]
        recipe: dict[str, Any] = {
            "topk_ratio": size.topk_ratio(sparsity), "compression_ratio": 8, "block_q": size.block_q,
            "block_k": size.block_k, "min_seq_len": 0,
        }  # fmt: skip
        model = sla2_compile.transform(
            self.copy(), "balanced", example_inputs=(z[:1], t[:1], y[:1]), **{**recipe, **fields}
        )
        return model.eval()

    def after_stage1(self, run: Run) -> nn.Module:
        """A transformed copy with the router and alpha that stage 1 trained."""
        assert run.sparsity is not None
        model, learned = self.transformed(run.sparsity), self.state.kept("sites", f"{run.sparsity}/{run.seed}/")
        if not learned:
            raise FileNotFoundError(
                f"{run.part} must come after stage1, got no sites at {run.sparsity} %; run part stage1"
            )
        for name, value in model.state_dict().items():
            if name in learned:
                value.copy_(learned[name])
        return model

    def measure(self, run: Run, variant: str, model: nn.Module, **values: Any) -> Row:
        """Return the row of a variant, and keep some of its pictures."""
        start = time.perf_counter()
        found, samples = self.judge.of(model)
        sites = sites_of(model)
        if sites:
            found |= of_sites(model, self.measured_on, sites[0].settings.options.topk_ratio)
            left = sum(site.fallbacks.total() for site in sites)
            if left:
                raise RuntimeError(
                    f"every call must run SLA2, got {left} that kept full attention; see report(model)"
                )
        if run.seed == 0 and run.sparsity in (None, MAIN):
            self.state.keep("samples", {variant: as_bytes(samples[:4])})
        return run.row(variant, **found, **values, measuring_s=time.perf_counter() - start)

    def tuned(self, run: Run, model: nn.Module, loss: LossOf | None = None) -> dict[str, Any]:
        """Stage 2 on a model, by distillation from the teacher if no loss is given; returns what to note of it."""
        stream = Stream(self.bank, self.size.tune, 100 + run.seed)
        done = tune(model, stream, loss or distilled(self.full), self.size.stage2, TUNE_LR)
        return about(done)


def about(done: dict[str, Any]) -> dict[str, Any]:
    """Of a training: steps, seconds, and the mean loss of its first and last tenth."""
    losses = done["losses"]
    tenth = max(1, len(losses) // 10)
    ends = {"loss_first": sum(losses[:tenth]) / tenth, "loss_last": sum(losses[-tenth:]) / tenth}
    return {"training_steps": done["steps"], "training_s": done["seconds"], **ends}


def sites_of(model: nn.Module) -> list[Site]:
    return [module for module in model.modules() if isinstance(module, Site)]


def teacher(bench: Bench, run: Run) -> Iterator[Row]:
    """Full attention from scratch."""
    torch.manual_seed(0)
    model = JiT(bench.size.config).to(bench.device)
    done = train(model, Stream(bench.bank, bench.size.batch, 0), bench.size.teacher, bench.seconds)
    bench.state.save_weights(model.state_dict())
    every = max(1, len(done["losses"]) // 200)
    curve = [sum(done["losses"][i : i + every]) / every for i in range(0, len(done["losses"]) - every + 1, every)]
    found, samples = bench.judge.of(bench.full)
    bench.state.keep("samples", {"full": as_bytes(samples[:4]), "held out": bench.held.x[:4]})
    count = sum(p.numel() for p in model.parameters())
    yield run.row("full", **found, **about(done), losses=curve, every=every, parameters=count)


def rounding(bench: Bench, run: Run) -> Iterator[Row]:
    """The floor of all paired errors: the teacher in float16, which is as fast as bf16 and rounds more finely."""
    model = Float16(bench.full)
    found, _ = bench.judge.of(model)
    yield run.row(FULL16, **found)


class Float16(nn.Module):
    """A model that computes in float16 whatever autocast is around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.float16):
            out: Tensor = self.model(x, t, y)
            return out


def stage1(bench: Bench, run: Run) -> Iterator[Row]:
    """SLA2 untrained, then calibrated."""
    assert run.sparsity is not None
    model = bench.transformed(run.sparsity)
    if UNTRAINED in run.variants:
        yield bench.measure(run, UNTRAINED, model)
    stream = Stream(bench.bank, bench.size.calibrate, 200 + run.seed)
    batches = [stream.noisy(step) for step in range(min(64, bench.size.stage1 + 2))]
    start = time.perf_counter()
    with autocast(bench.device):
        found = sla2_compile.calibrate(
            model, batches, steps=bench.size.stage1, patience=0, ratios=(bench.size.topk_ratio(run.sparsity),),
            seed=run.seed, progress=False,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    names = {name for name in model.state_dict() if ".sla2." in name}
    learned = {f"{run.sparsity}/{run.seed}/{k}": x for k, x in model.state_dict().items() if k in names}
    bench.state.keep("sites", {k: x for k, x in learned.items() if torch.is_tensor(x)})
    kept_old = sum(site.kept_old for site in found.sites)
    yield bench.measure(
        run, STAGE1, model, training_steps=found.steps, training_s=seconds, sites_that_kept_old=kept_old
    )


def stage2(bench: Bench, run: Run) -> Iterator[Row]:
    """Stage 2 with QAT, from stage 1."""
    (variant,) = run.variants
    model = bench.after_stage1(run)
    sla2_compile.prepare(model, low_bit="int8_fp8" if variant == QAT_FP8 else "int8")
    done = bench.tuned(run, model, task if variant == TASK else None)
    yield bench.measure(run, variant, model, **done)


def control(bench: Bench, run: Run) -> Iterator[Row]:
    """Full attention with as many more steps: how far the weights alone move."""
    model = bench.copy()
    done = bench.tuned(run, model, task)
    yield bench.measure(run, CONTROL, model, **done)


def without_qat(bench: Bench, run: Run) -> Iterator[Row]:
    """Stage 2 in bf16, then low bit without training for it."""
    model = bench.after_stage1(run)
    done = bench.tuned(run, model)
    yield bench.measure(run, STAGE2, model, **done)
    for low_bit, variant in THEN.items():
        if variant in run.variants:
            low = sla2_compile.convert(sla2_compile.prepare(copy.deepcopy(model), low_bit=low_bit)).eval()
            yield bench.measure(run, variant, low, **done)


def sparse_alone(bench: Bench, run: Run) -> Iterator[Row]:
    """Stage 2 with alpha fixed at 1: the linear branch adds nothing, in training and after."""
    model = bench.after_stage1(run)
    for site in sites_of(model):
        assert site.alpha_gain is not None
        assert site.alpha_bias is not None
        site.alpha_gain.data.zero_()
        site.alpha_bias.data.fill_(ALL_SPARSE)
        site.alpha_gain.requires_grad_(False)
        site.alpha_bias.requires_grad_(False)
    done = bench.tuned(run, model)
    yield bench.measure(run, SPARSE, model, **done)


def heuristic(bench: Bench, run: Run) -> Iterator[Row]:
    """Stage 2 without stage 1: blocks ranked by their mean query times their mean key, alpha learned from scratch."""
    assert run.sparsity is not None
    # projections that are still the identity learn nothing in stage 2
    model = bench.transformed(run.sparsity, compression_ratio="block")
    done = bench.tuned(run, model)
    yield bench.measure(run, HEURISTIC, model, **done)


def runs() -> list[Run]:
    """All runs on the teacher, in the order of their worth."""
    # one seed everywhere before others: a run that is cut short has all sparsities
    at = sorted(((x, seed) for x in SPARSITIES for seed in SEEDS.get(x, (0,))), key=lambda pair: pair[1])
    found = [Run("teacher", ("full",), teacher), Run("teacher", (FULL16,), rounding)]
    for sparsity, seed in at:
        found.append(Run("stage1", (*((UNTRAINED,) if seed == 0 else ()), STAGE1), stage1, sparsity, seed))
    found += [Run("stage2", (QAT,), stage2, sparsity, seed) for sparsity, seed in at]
    found += [Run("control", (CONTROL,), control), Run("control", (TASK,), stage2, MAIN)]
    for sparsity in SPARSITIES:
        low = tuple(THEN.values()) if sparsity == MAIN else (THEN["int8"],)
        found.append(Run("convert", (STAGE2, *low), without_qat, sparsity))
    found.append(Run("convert", (QAT_FP8,), stage2, MAIN))
    return [*found, Run("sparse", (SPARSE,), sparse_alone, MAIN), Run("heuristic", (HEURISTIC,), heuristic, MAIN)]
