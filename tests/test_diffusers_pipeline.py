"""A pipeline of diffusers whose transformer is transformed: `pipe.transformer = transform(pipe.transformer)`."""

from __future__ import annotations

import pytest
import torch

import sla2_compile

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")


def pipeline():
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe):
    generator = torch.Generator().manual_seed(0)
    images = pipe([1], num_inference_steps=2, generator=generator, output_type="np", return_dict=False)[0]
    return torch.from_numpy(images)


def test_a_transformed_pipeline_runs():
    expected = image(pipeline())
    pipe = pipeline()
    pipe.transformer = sla2_compile.transform(pipe.transformer, topk_ratio=1.0, min_seq_len=0)
    torch.testing.assert_close(image(pipe), expected, rtol=1e-4, atol=1e-4)
    report = sla2_compile.report(pipe.transformer)
    assert len(report.rewrites) == 2
    assert report.fallbacks == {}
    sla2_compile.restore(pipe.transformer)
    assert torch.equal(image(pipe), expected)
    pipe.transformer = sla2_compile.transform(pipe.transformer, topk_ratio=0.25, min_seq_len=0)
    assert not torch.equal(image(pipe), expected)
