"""The examples: the small JiT model, and the demo from its command line to its pictures."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sla2_compile

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from jit import JiT, JiTConfig, diffusion_loss, to_grid, to_sequence, token_positions

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
    for module in ("matplotlib", "PIL", "psutil"):
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
    for picture in pictures:
        image = Image.open(picture).convert("RGB")
        assert min(image.size) > 300
        colours = image.getcolors(maxcolors=image.width * image.height)
        assert colours is not None
        assert len(colours) > 100


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
    assert "Trained 6 steps" in text
    assert "2 of 2 attention calls replaced" in text
    assert "transformers" in text
