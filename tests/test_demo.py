"""The examples: the small JiT model, and the demo from its command line to its pictures."""

from __future__ import annotations

import copy
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import sla2_compile

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from jit import JiT, JiTConfig, diffusion_loss, sample, to_grid, to_sequence, token_positions

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = JiTConfig(width=128, depth=2)


def inputs(height: int = 64, width: int = 96, count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(count, 3, height, width), torch.rand(count), torch.randint(0, 4, (count,))


def awake(config: JiTConfig = SMALL) -> JiT:
    """A model whose gates and output do not start at zero."""
    model = JiT(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (20, 12)])
def test_jit_keeps_the_shape_of_its_input(height: int, width: int) -> None:
    x, t, y = inputs(height, width)
    assert awake()(x, t, y).shape == x.shape


def test_jit_gives_every_parameter_a_gradient() -> None:
    x, t, y = inputs()
    model = awake()
    diffusion_loss(model, x, y, t, torch.randn_like(x)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_jit_starts_silent() -> None:
    assert not JiT(SMALL)(*inputs()).any()


def test_jit_compiles_exports_and_copies() -> None:
    model, args = awake(), inputs()
    expected = model(*args)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.export.export(model, args).module()(*args), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(copy.deepcopy(model)(*args), expected)


@pytest.mark.parametrize(("gh", "gw"), [(16, 24), (5, 7), (8, 8)])
def test_order_of_tokens_is_undone(gh: int, gw: int) -> None:
    grid = torch.randn(2, gh, gw, 3)
    assert torch.equal(to_grid(to_sequence(grid, 8), gh, gw, 8), grid)


def test_blocks_of_tokens_are_squares() -> None:
    positions = token_positions(16, 24, 8)
    for block in positions.split(64):
        assert (block.amax(0) - block.amin(0)).tolist() == [7, 7]


def test_order_of_tokens_does_not_change_the_output() -> None:
    args, model = inputs(), awake()
    by_rows = JiT(JiTConfig(width=128, depth=2, tile=1)).eval()
    by_rows.load_state_dict(model.state_dict())
    torch.testing.assert_close(by_rows(*args), model(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"width": 100}, "take 128"), ({"head_dim": 30, "width": 60}, "multiple of 4"), ({"tile": 6}, "power of 2")],
)
def test_wrong_sizes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JiTConfig(**values)


def test_positions_stay_within_what_was_trained() -> None:
    free, bound = awake(), JiT(JiTConfig(width=128, depth=2, rope_grid=16)).eval()
    bound.load_state_dict(free.state_dict())
    same, larger = inputs(64, 64), inputs(128, 128)
    assert torch.equal(bound(*same), free(*same))
    assert not torch.equal(bound(*larger), free(*larger))
    # every second token of the larger picture stands where one of the smaller does
    halved = token_positions(32, 32, 8) * (16 / 32)
    assert halved.max() == 15.5
    assert {tuple(place) for place in token_positions(16, 16, 8).tolist()} <= {tuple(p) for p in halved.tolist()}


def test_sampling_starts_where_it_is_told() -> None:
    seen: list[float] = []

    class Known(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append(float(t[0]))
            return torch.full_like(x, 0.5)

    drawn = sample(Known(), torch.randn(1, 3, 4, 4), torch.zeros(1, dtype=torch.long), 3, 0.1)
    torch.testing.assert_close(drawn, torch.full((1, 3, 4, 4), 0.5))
    assert seen == pytest.approx([0.1, 0.4, 0.7])


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4, got"):
        JiT(SMALL)(torch.randn(1, 3, 30, 30), torch.rand(1), torch.zeros(1, dtype=torch.long))


def test_error_of_jit_falls_as_more_blocks_are_kept() -> None:
    args, model = inputs(128, 128, 1), awake()
    full = model(*args)
    errors = []
    for ratio in (0.05, 0.15, 0.4, 1.0):
        ours = sla2_compile.transform(
            copy.deepcopy(model), "balanced", example_inputs=args, topk_ratio=ratio, min_seq_len=0
        )
        errors.append(((ours(*args) - full).norm() / full.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and printed text of one `demo.py --quick`, run from elsewhere."""
    for module in ("matplotlib", "PIL", "psutil", "safetensors"):
        pytest.importorskip(module, reason=f"the demo needs {module}: pip install 'sla2_compile[demo]'")
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--out", "out"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def test_demo_writes_pictures(quick_demo: tuple[Path, str]) -> None:
    from PIL import Image

    pictures = sorted(quick_demo[0].glob("selected_blocks_*.png"))
    assert [p.stem.removeprefix("selected_blocks_") for p in pictures] == [
        "balanced", "high_quality", "max_speedup", "paper",
    ]  # fmt: skip
    for picture in (*pictures, quick_demo[0] / "samples.png"):
        image = Image.open(picture).convert("RGB")
        assert min(image.size) > 300
        colours = image.getcolors(maxcolors=image.width * image.height)
        assert colours is not None
        assert len(colours) > 100


def test_demo_draws_with_each_attention(quick_demo: tuple[Path, str]) -> None:
    full, trained, untrained = json.loads((quick_demo[0] / "results.json").read_text())["samples"]
    for row in (full, trained, untrained):
        assert row["name"] in quick_demo[1]
        assert row["seconds"] > 0
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
        # noise alone lies further from the photograph than a picture of nothing
        assert 0 < row["photo_error"] < 1
    assert full["error"] == full["sparsity"] == 0
    assert trained["sparsity"] == untrained["sparsity"] > 0.8
    assert 0 < trained["error"] < untrained["error"]


def test_demo_measures_every_recipe(quick_demo: tuple[Path, str]) -> None:
    results = json.loads((quick_demo[0] / "results.json").read_text())
    rows = {row["name"]: row for row in results["jit_1024"]}
    assert list(rows) == ["full attention", "max_speedup", "balanced", "high_quality", "paper"]
    for name, row in rows.items():
        assert name in quick_demo[1]
        assert row["seconds"] > 0
        assert row["attention_seconds"] > 0
        for value in (row["seconds"], row["attention_seconds"], row["peak_mib"], *row["site_errors"].values()):
            assert math.isfinite(value)
    assert rows["full attention"]["output_error"] == 0
    by_ratio = [rows[name] for name in ("max_speedup", "balanced", "high_quality")]
    for key in ("output_error", "sparsity"):
        values = [row[key] for row in by_ratio]
        assert values == sorted(values, reverse=True)
        assert 0 < values[-1] < 1
    for site in by_ratio[0]["site_errors"]:
        values = [row["site_errors"][site] for row in by_ratio]
        assert values == sorted(values, reverse=True)


def test_demo_says_what_it_did(quick_demo: tuple[Path, str]) -> None:
    text = quick_demo[1]
    assert "1024 tokens in 3 steps" in text
    assert "500 steps of stage 2" in " ".join(text.split())
    assert "4 of 4 attention calls replaced" in text
    assert "transformers" in text


@pytest.fixture(scope="module")
def demo_trained() -> ModuleType:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    return importlib.import_module("demo_trained")


def test_demo_weights_come_with_the_repository(demo_trained: ModuleType) -> None:
    full, model, recipe = demo_trained.load()
    assert recipe == "balanced"
    assert demo_trained.WEIGHTS.stat().st_size < 6e6
    state = model.state_dict()
    for name, x in full.state_dict().items():
        assert torch.equal(x, state[name])
    untrained = demo_trained.with_sla2(full, recipe).state_dict()
    learned = [name for name in state if name.endswith(("proj_q", "proj_k", "alpha_bias"))]
    assert len(learned) == 3 * full.config.depth
    assert not any(torch.equal(state[name], untrained[name]) for name in learned)


@pytest.mark.parametrize("width", [64, 300])
def test_int8_rows_round_to_half_a_step(demo_trained: ModuleType, width: int) -> None:
    x = torch.randn(256, width) * torch.logspace(-6, 1, 256)[:, None]
    x[7] = 0
    packed = demo_trained.pack("weight", x)
    assert {name: y.dtype for name, y in packed.items()} == {"weight": torch.int8, "weight.scale": torch.float16}
    (back,) = demo_trained.unpack(packed).values()
    step = packed["weight.scale"].float()
    assert ((back - x).abs() <= step * 0.5 + torch.finfo(torch.float16).tiny).all()
    assert not back[7].any()


def test_small_tensors_and_sites_stay_in_float16(demo_trained: ModuleType) -> None:
    for name, x in (("bias", torch.randn(99)), ("out", torch.randn(48, 64)), ("a.sla2.0.p", torch.randn(200, 200))):
        packed = demo_trained.pack(name, x)
        assert packed[name].dtype == torch.float16
        assert torch.equal(demo_trained.unpack(packed)[name], x.half().float())


def spoilt(kind: str, path: Path, whole: Path) -> None:
    """Write a file that is no good."""
    from safetensors.torch import save_file

    if kind == "cut short":
        path.write_bytes(whole.read_bytes()[:4_000_000])
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    elif kind == "of another kind":
        save_file({"x": torch.zeros(1)}, path)
    elif kind == "of another model":
        save_file({"x": torch.zeros(1)}, path, metadata={"format": "int8 rows", "recipe": "balanced"})


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, r"weights.safetensors must be in .*, got no such file; check the repository"),
        (
            "cut short",
            ValueError,
            "weights.safetensors must be a whole safetensors file, got .*; check the repository",
        ),
        ("text", ValueError, "weights.safetensors must be a whole safetensors file, got .*; check the repository"),
        ("of another kind", ValueError, "format of weights.safetensors must be 'int8 rows', got None; check"),
        (
            "of another model",
            ValueError,
            r"weights.safetensors must hold the weights of JiTConfig\(.*got others; check",
        ),
    ],
)
def test_spoilt_weights_are_refused(
    demo_trained: ModuleType, kind: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    spoilt(kind, tmp_path / "weights.safetensors", demo_trained.WEIGHTS)
    with pytest.raises(error, match=message):
        demo_trained.load(tmp_path / "weights.safetensors")


def test_demo_without_weights_stops_with_the_reason(
    demo_trained: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("matplotlib", "PIL", "psutil"):
        pytest.importorskip(module, reason=f"the demo needs {module}: pip install 'sla2_compile[demo]'")
    monkeypatch.setattr(demo_trained, "WEIGHTS", tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit, match=r"weights.safetensors must be in .*; check the repository out again"):
        importlib.import_module("demo").main(["--quick", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
