"""accelerate around transformed models: mixed precision put around a forward, models built without memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sla2_compile
from sla2_compile.passes.sites.site import Site
from tests import models

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

ANY: dict[str, Any] = {"min_seq_len": 0}


@pytest.fixture
def accelerator():
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    # it keeps what it was told for the whole process
    accelerate.state.AcceleratorState._reset_state(True)


def transformed(model, x, **fields):
    return sla2_compile.transform(model, example_inputs=(x,), **{**ANY, **fields})


@pytest.mark.parametrize("kind", [models.Attention, models.Net])
def test_prepared_models_train_and_come_back(x, accelerator, kind):
    """The root that accelerate wraps is an owner itself, or has owners in it."""
    model = kind()
    twin = transformed(copy.deepcopy(model), x)
    transformed(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = twin(x).float()
    out = prepared(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    accelerator.backward(out.square().mean())
    optimizer.step()
    sites = [module for module in prepared.modules() if isinstance(module, Site)]
    assert all(site.runs > 0 and site.alpha_bias.grad.abs().max() > 0 for site in sites)
    assert not torch.equal(prepared(x), expected)

    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    twin.load_state_dict(bare.state_dict())
    assert torch.equal(bare(x), twin(x))


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", {"blocks.0": "cpu", "blocks.1": "disk"}])
def test_checkpoints_with_sites_are_dispatched(x, tmp_path, device_map):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    trained = transformed(models.Net(depth=2), x)
    with torch.no_grad():
        for block in trained.blocks:
            block.sla2[0].alpha_bias.normal_()
    safetensors.save_file(trained.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with accelerate.init_empty_weights():
        model = models.Net(depth=2)
    transformed(model, x)
    accelerate.load_checkpoint_and_dispatch(
        model, str(tmp_path / "model.safetensors"), device_map=device_map, offload_folder=str(tmp_path / "disk")
    )
    assert torch.equal(model(x), trained(x))


def test_checkpoints_without_sites_are_dispatched(x, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    original = models.Net(depth=2)
    safetensors.save_file(original.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with accelerate.init_empty_weights():
        model = models.Net(depth=2)
    transformed(model, x)
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert torch.equal(model(x), transformed(original, x)(x))


@pytest.mark.parametrize("kind", [models.Attention, models.Net])
def test_a_first_forward_inside_what_accelerate_put_around_it(x, accelerator, kind):
    model = kind()
    twin = transformed(copy.deepcopy(model), x).eval()
    prepared = accelerator.prepare(sla2_compile.transform(model.eval(), **ANY))
    prepared(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(prepared(x), twin(x).float())
    assert sla2_compile.report(prepared).fallbacks == {}
