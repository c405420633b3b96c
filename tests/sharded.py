"""What test_sharding.py runs in two processes: each check trains a transformed model under one wrapper.

All ranks run all checks in one go, since starting processes takes longer than the checks.
"""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import sla2_compile
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.aux_loss import AuxLoss, end_observing, observe_calls
from sla2_compile.training.distillation import distillation_loss
from sla2_compile.training.gradients import check_gradients
from sla2_compile.training.groups import parameter_groups
from sla2_compile.training.schedule import TopKSchedule
from sla2_compile.training.sites import sites_in
from tests import models

WORLD = 2
CPU = torch.device("cpu")


def net(**options: Any) -> models.Net:
    torch.manual_seed(0)
    return models.Net(depth=2, **options)


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(2, 200, 32, generator=torch.Generator().manual_seed(rank + 10 * step))


def planned(model: nn.Module, **fields: Any) -> nn.Module:
    return sla2_compile.transform(model, example_inputs=(batch(0, 0),), min_seq_len=0, **fields)


def train(model: nn.Module, ranks: list[int]) -> None:
    """Three steps; without a wrapper, on the batches of all ranks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for rank in ranks:
            (model(batch(rank, step)).square().mean() / len(ranks)).backward()
        optimizer.step()


@functools.cache
def alone(alpha: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A model trained by one process on all batches, and its state dict before and after."""
    model = planned(net(), alpha=alpha)
    before = copy.deepcopy(model.state_dict())
    train(model, list(range(WORLD)))
    return model, before, copy.deepcopy(model.state_dict())


def assert_trained_alike(state: dict[str, Any], alpha: str = "routed") -> None:
    """A full state dict is what one process gets on all batches, under the same names, and loads there strictly."""
    model, before, after = alone(alpha)
    assert state.keys() == before.keys()
    for name, value in after.items():
        torch.testing.assert_close(state[name], value, msg=f"{name} differs")
        # the router's projections are frozen, and all else has moved
        assert torch.equal(value, before[name]) == ("proj" in name), name
    model.load_state_dict(state)


def full(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp1(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=CPU, **options)


def fsdp2(model: Any, mesh: DeviceMesh) -> Any:
    return fully_shard(model, mesh=mesh)


def fsdp2_blocks(model: Any, mesh: DeviceMesh) -> Any:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_sites(model: Any, mesh: DeviceMesh) -> Any:
    for block in model.blocks:
        fully_shard(block.sla2, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp_trains(rank: int, mesh: DeviceMesh) -> None:
    model = planned(net())
    train(ddp(model, mesh), [rank])
    assert_trained_alike(model.state_dict())


def fsdp2_trains(rank: int, mesh: DeviceMesh) -> None:
    for wrap, alpha in ((fsdp2, "head"), (fsdp2_blocks, "routed"), (fsdp2_blocks, "block"), (fsdp2_sites, "routed")):
        model = wrap(planned(net(), alpha=alpha), mesh)
        train(model, [rank])
        assert_trained_alike(full(model), alpha=alpha)


def ddp_distils(rank: int, mesh: DeviceMesh) -> None:
    """Distillation under a schedule and DDP gives what one process gets on both batches."""

    def run(model: Any, wrapped: Any, ranks: list[int]) -> dict[str, Any]:
        schedule = TopKSchedule(model, 0.5, 0.25, steps=2, levels=2)
        optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.0))
        for step in range(3):
            optimizer.zero_grad()
            for other in ranks:
                loss, output = distillation_loss(wrapped, batch(other, step))
                ((loss + output.square().mean()) / len(ranks)).backward()
            assert check_gradients(model) == []
            optimizer.step()
            schedule.step()
        return model.state_dict()

    model = planned(net())
    together = run(model, ddp(model, mesh), [rank])
    other = planned(net())
    torch.testing.assert_close(together, run(other, other, [0, 1]))
    assert together["blocks.0.sla2.0.progress"][1:4].tolist() == [0.25, 0.0, 3.0]


def ddp_trains_routers(rank: int, mesh: DeviceMesh) -> None:
    """A router's loss, added to the task's or by a backward of its own, gives what one process gets."""

    def soft(call: Any, mask: Any, site: Any, *, tau: float, iterations: int) -> torch.Tensor:
        return (call.q.float().mean(2) @ site.proj_q @ site.proj_k.T - 1).square().mean()

    def run(wrap: Callable[[Any], Any], ranks: list[int], added: bool) -> dict[str, Any]:
        model: Any = planned(net())
        sites: list[Any] = list(sites_in(model).values())
        for site in sites:
            site.proj_q.requires_grad_()
            site.proj_k.requires_grad_()
        wrapped, aux = wrap(model), AuxLoss(soft)
        observe_calls(model, sites, aux)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            # the router rests in the last step
            aux.weight = 1.0 if step < 2 else 0.0
            optimizer.zero_grad()
            for other in ranks:
                loss, extra = wrapped(batch(other, step)).square().mean() / len(ranks), model.pop_sla2_aux_loss()
                extra = extra / len(ranks)
                if not added and extra.requires_grad:
                    extra.backward()
                (loss + extra if added else loss).backward()
            optimizer.step()
        end_observing(model, sites)
        return model.state_dict()

    expected = run(lambda model: model, [0, 1], True)
    assert not torch.equal(expected["blocks.0.sla2.0.proj_q"], torch.eye(16))
    for added in (True, False):
        torch.testing.assert_close(run(lambda model: ddp(model, mesh), [rank], added), expected)


def fsdp2_from_meta(rank: int, mesh: DeviceMesh) -> None:
    with torch.device("meta"):
        model = models.Net(depth=2)
    fsdp2_blocks(planned(model), mesh).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, net().state_dict(), options=options)
    train(model, [rank])
    assert_trained_alike(full(model))
    for module in model.modules():
        if isinstance(module, Site):
            module.reset_parameters()
    for name, value in alone("routed")[1].items():
        assert ".sla2." not in name or torch.equal(full(model)[name], value), name


def fsdp1_trains(rank: int, mesh: DeviceMesh) -> None:
    for whole in (True, False):
        for policy in (ModuleWrapPolicy({models.Attention}), ModuleWrapPolicy({Site})):
            model = fsdp1(planned(net()), mesh, use_orig_params=whole, auto_wrap_policy=policy)
            train(model, [rank])
            assert_trained_alike(full(model))


def fsdp1_from_meta(rank: int, mesh: DeviceMesh) -> None:
    for whole in (True, False):
        with torch.device("meta"):
            model = models.Net(depth=2)
        for module in model.modules():
            # FullyShardedDataParallel asks it of every module that has parameters of its own
            module.__dict__.setdefault("reset_parameters", lambda: None)
        wrapped = fsdp1(planned(model), mesh, use_orig_params=whole)
        _, untrained, _ = alone("routed")
        with FullyShardedDataParallel.summon_full_params(wrapped):
            for name, value in model.state_dict().items():
                assert ".sla2." not in name or torch.equal(value, untrained[name]), name


def pending_models_are_refused(rank: int, mesh: DeviceMesh) -> None:
    def around(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return fsdp2(nn.Sequential(model), mesh)

    def inside(model: Any, mesh: DeviceMesh) -> nn.Module:
        fsdp2(model.blocks[0], mesh)
        return model

    for wrap in (ddp, fsdp1, fsdp2, around, inside):
        error = error_of(wrap(sla2_compile.transform(net(), min_seq_len=0), mesh), batch(0, 0))
        assert "pass example_inputs" in error, (wrap, error)


def wrapped_models_are_refused(rank: int, mesh: DeviceMesh) -> None:
    for wrap in (ddp, fsdp1, fsdp2):
        for inputs in (None, (batch(0, 0),)):
            error = error_of(sla2_compile.transform, wrap(net(), mesh), example_inputs=inputs)
            assert "transform first" in error, (wrap, error)


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        call(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


CHECKS = (
    ddp_trains,
    ddp_distils,
    ddp_trains_routers,
    fsdp2_trains,
    fsdp2_from_meta,
    fsdp1_trains,
    fsdp1_from_meta,
    pending_models_are_refused,
    wrapped_models_are_refused,
)


def run(rank: int, folder: str) -> None:
    """Run all checks as one of the processes, and leave a file of what went wrong."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=120), rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    failed = []
    for check in CHECKS:
        try:
            check(rank, mesh)
        except Exception:  # the others are run all the same
            failed.append(f"{check.__name__} on rank {rank}: {traceback.format_exc()}")
        dist.barrier()
    Path(folder, f"{rank}.txt").write_text("\n".join(failed))
    dist.destroy_process_group()
