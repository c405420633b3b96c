"""Tiles by trial: every candidate computes the same, the fastest is kept, and nothing is tried unasked."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels import attention_schedule, route_schedule, tuning  # noqa: E402
from tests.kernels.schedules import forget_schedules  # noqa: E402
from tests.kernels.triton_case import INTERPRETED, Case, body, poison_outputs, scheduled_attention, scheduled_route  # noqa: E402

SMALL = Case(D=64, Dv=64, block_q=64, block_k=32, Nq=70, Nk=100, heads=1, groups=1, keep=False)


class Bench:
    """Stands in for the clock: runs each trial and says that number `fastest` was."""

    def __init__(self, fastest: int) -> None:
        self.fastest, self.trials = fastest, 0

    def __call__(self, run: Any, quantiles: Any = None) -> list[float]:
        run()
        self.trials += 1
        return [0.5 if self.trials == self.fastest else 1.0] * 3


def attend(monkeypatch: pytest.MonkeyPatch, fastest: dict[str, int] | None) -> tuple[list[Any], dict[str, Any]]:
    """Route and attend, by the tables or by trial; returns lut, o and lse, and by kernel what tried its tiles."""
    x = SMALL.tensors()
    made: dict[str, Any] = {}
    if fastest is not None:
        monkeypatch.setenv("SLA2_AUTOTUNE", "1")
        autotune = triton.autotune

        def fake(configs: Any, key: Any, **options: Any) -> Any:
            def wrap(kernel: Any) -> Any:
                name = kernel.fn.__name__
                made[name] = autotune(configs, key, do_bench=Bench(fastest.get(name, 1)), **options)(kernel)
                return made[name]

            return wrap

        monkeypatch.setattr(triton, "autotune", fake)
    tuning.tuned.cache_clear()
    forget_schedules()
    x["lut"], x["log_rest"], _, x["k_mean"] = SMALL.route(x, scheduled_route)
    o, lse, *_ = SMALL.attention(x, scheduled_attention, False)
    tuning.tuned.cache_clear()
    forget_schedules()
    return [x["lut"], o, lse], made


if INTERPRETED:

    @body
    def test_nothing_is_tried_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton, "autotune", None)
        attend(monkeypatch, None)

    @body
    @pytest.mark.parametrize("fastest", [1, 2, 3])
    def test_the_fastest_is_kept(fastest: int, monkeypatch: pytest.MonkeyPatch) -> None:
        poison_outputs(monkeypatch)
        plain, _ = attend(monkeypatch, None)
        tried, made = attend(monkeypatch, dict.fromkeys(tuning.CANDIDATES, fastest))
        assert set(made) == set(tuning.CANDIDATES)
        assert torch.equal(plain[0], tried[0])
        # another tile adds in another order
        torch.testing.assert_close(tried[1], plain[1], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(tried[2], plain[2], atol=1e-4, rtol=1e-4)
        for name, tuner in made.items():
            # with one tile that fits, there is nothing to try
            assert tuner.do_bench.trials == (len(tuner.configs) if len(tuner.configs) > 1 else 0)
            assert tuner.best_config is tuner.configs[min(fastest, len(tuner.configs)) - 1], name
        assert all(len(made[name].configs) > 3 for name in ("attend_kernel", "linear_kernel", "states_kernel"))

    @body
    def test_second_call_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
        _, made = attend(monkeypatch, {})
        before = {name: tuner.do_bench.trials for name, tuner in made.items()}
        x = SMALL.tensors()
        forget_schedules()
        monkeypatch.setattr(tuning, "tuned", lambda kernel, *_: made[kernel.fn.__name__])
        x["lut"], x["log_rest"], _, x["k_mean"] = SMALL.route(x, scheduled_route)
        SMALL.attention(x, scheduled_attention, False)
        assert {name: tuner.do_bench.trials for name, tuner in made.items()} == before

else:

    def test_in_the_interpreter() -> None:
        """In a process of its own: Triton decides at import whether it interprets."""
        env = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_candidates_keep_to_the_limits() -> None:
    tile = {"BLOCK_M": 64, "STAGES": 3}
    assert tuning.fits(tile, {"BLOCK_M": (16, 64), "STAGES": (1, 3)})
    assert not tuning.fits(tile, {"BLOCK_M": (16, 32), "STAGES": (1, 3)})
    assert not tuning.fits(tile, {"BLOCK_M": (128, 256)})


def test_every_candidate_names_what_the_kernel_has() -> None:
    for name, tiles in tuning.CANDIDATES.items():
        kernel = getattr(attention_schedule, name, None) or getattr(route_schedule, name)
        for tile in tiles:
            assert set(tile) - set(tuning.OF_TRITON) <= set(kernel.arg_names), name


@pytest.mark.parametrize("table", ["ATTEND", "LINEAR", "STATES", "HOPPER"])
def test_every_call_has_a_row_and_every_row_a_call(table: str) -> None:
    from sla2_compile.kernels import tiles

    rows, used = getattr(tiles, table), set()
    arches = (90,) if table == "HOPPER" else (80, 89, 90, 100)
    dims = (64, 128) if table == "HOPPER" else (16, 64, 128, 256)
    for arch, d, block_q, block_k, low in itertools.product(arches, dims, (16, 128), (16, 64, 128), (0, 1, 2)):
        shape = tiles.ShapeClass(arch, d, d, block_q, block_k, low)
        used.add(next(n for n, (fits, _) in enumerate(rows) if fits(shape)))
    assert used == set(range(len(rows)))
