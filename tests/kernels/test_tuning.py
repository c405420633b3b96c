"""Tiles by trial: every candidate computes the same, the fastest is kept, and nothing is tried unasked."""

from __future__ import annotations

import errno
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.cuda import tuning  # noqa: E402
from sla2_compile.kernels.cuda.forward import launches as attention_schedule  # noqa: E402
from sla2_compile.kernels.cuda.forward import states_launches as states_schedule  # noqa: E402
from sla2_compile.kernels.cuda.forward.states import states_kernel  # noqa: E402
from sla2_compile.kernels.cuda.launch.schedule import Schedule  # noqa: E402
from sla2_compile.kernels.cuda.launch.steps import Launch  # noqa: E402
from sla2_compile.kernels.cuda.route import launches as route_schedule  # noqa: E402
from tests.kernels.schedules import as_long_calls, forget_schedules  # noqa: E402
from tests.kernels.triton_case import INTERPRETED, Case, body, poison_outputs, scheduled_attention, scheduled_route  # noqa: E402

SMALL = Case(D=64, Dv=64, block_q=64, block_k=32, Nq=70, Nk=100, heads=1, groups=1)


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
    # whose router has a kernel to be cut as well
    as_long_calls(monkeypatch)
    x["lut"], x["log_rest"], _, x["k_mean"] = SMALL.route(x, scheduled_route)
    o, lse, *_ = SMALL.attention(x, scheduled_attention)
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
        SMALL.attention(x, scheduled_attention)
        assert {name: tuner.do_bench.trials for name, tuner in made.items()} == before

else:

    class Driver:
        """Stands in for a GPU's: which chip it is, and the clock."""

        def __init__(self) -> None:
            self.bench = Bench(2)

        def get_current_target(self) -> Any:
            return triton.backends.compiler.GPUTarget("cuda", 90, 32)

        def get_benchmarker(self) -> Bench:
            return self.bench

    class Chip:
        """A GPU that runs `states_kernel` in no time, and what it was asked to."""

        def __init__(self, folder: Path) -> None:
            self.folder, self.driver = folder, Driver()
            self.launches: list[dict[str, Any]] = []

        def process(self) -> int:
            """One call of a process that has tried nothing yet; returns how many tiles it tried."""
            tuning.tuned.cache_clear()
            before, made = self.driver.bench.trials, Schedule()
            arguments = {"D": 64, "DV": 64, "BLOCK_K": 64, "HAS_MASK": False, "LOW_BIT": 0, "FEATURE_MAP": "softmax"}
            tile, limits = {"BLOCK_DV": 64, "num_warps": 4, "maxnreg": None}, {"BLOCK_DV": (16, 64)}
            tuning.launch(made, states_kernel, lambda _: (1,), tile=tile, limits=limits, trials=True, **arguments)
            (step,) = made.steps
            assert isinstance(step, Launch)
            step.kernel[step.grid](*step.args, **step.constants)
            return self.driver.bench.trials - before

        @property
        def launched(self) -> dict[str, Any]:
            """The tile of the last launch, which is the call's own."""
            return {name: self.launches[-1].get(name) for name in ("BLOCK_DV", "num_warps")}

        @property
        def file(self) -> Path:
            (found,) = self.folder.glob("*/states_kernel.autotune.json")
            return found

    @pytest.fixture
    def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chip]:
        made = Chip(tmp_path / "cache")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(made.folder))
        monkeypatch.setattr(states_kernel, "run", lambda *_, **options: made.launches.append(options))
        monkeypatch.setattr(triton.runtime.driver, "_active", made.driver)
        yield made
        tuning.tuned.cache_clear()

    SECOND = {"BLOCK_DV": 32, "num_warps": 4}
    """What the clock says is fastest: the table's tile is the first, that of the candidates the second."""

    def test_the_next_process_tries_nothing(chip: Chip) -> None:
        assert chip.process() == 4
        assert chip.launched == SECOND
        chip.driver.bench.fastest = 0
        chip.launches.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chip.process() == 0
        assert chip.launched == SECOND
        assert len(chip.launches) == 1

    def spoiled(text: str) -> dict[str, str]:
        """Ways in which a file of timings goes bad."""
        timings = json.loads(text)["configs_timings"]
        config = timings[0][0]

        def entries(*configs: dict[str, Any]) -> str:
            return json.dumps({"configs_timings": [[x, [1.0, 1.0, 1.0]] for x in configs]})

        return {
            "empty": "",
            "truncated": text[: len(text) // 2],
            "without timings": "{}",
            "empty timings": entries(),
            "a list": "[]",
            "null": '{"configs_timings": null}',
            "not text": "\udcff",
            "an unknown field": entries({**config, "threads": 3}),
            "an unknown size": entries({**config, "kwargs": {"BLOCK_X": 3}}),
            "no sizes": entries({**config, "kwargs": None}),
            "another tile": entries({**config, "kwargs": {"BLOCK_DV": 8}}),
            "times that have no order": json.dumps({"configs_timings": [[timings[0][0], 1], [timings[1][0], None]]}),
        }

    @pytest.mark.parametrize("how", spoiled('{"configs_timings": [[{}, 0], [{}, 0]]}'))
    def test_a_file_that_cannot_be_used_costs_trials_and_a_warning(how: str, chip: Chip) -> None:
        chip.process()
        chip.file.write_text(spoiled(chip.file.read_text())[how], errors="surrogateescape")
        # of a tile that no kernel has only the name of the file is known
        named = "*" if how in ("an unknown size", "another tile") else chip.file.parent.name
        chip.driver.bench.trials = 0
        with pytest.warns(RuntimeWarning, match=r"delete it\.") as seen:
            assert chip.process() == 4
        assert [str(chip.folder / named / chip.file.name) in str(x.message) for x in seen] == [True]
        assert chip.launched == SECOND
        # as it says
        chip.file.unlink()
        chip.driver.bench.trials = 0
        assert chip.process() == 4
        assert chip.process() == 0

    def test_a_folder_that_cannot_be_used_costs_trials_and_a_warning(chip: Chip) -> None:
        chip.folder.write_text("in the way")
        with pytest.warns(
            RuntimeWarning, match=r"TRITON_CACHE_DIR must be a folder .*, got .*Not a directory"
        ) as seen:
            assert chip.process() == 4
        assert len(seen) == 1
        assert chip.launched == SECOND

    def test_timings_that_cannot_be_kept_cost_a_warning(chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(triton.runtime.cache.FileCacheManager, "put", full)
        with pytest.warns(RuntimeWarning, match="No space left"):
            assert chip.process() == 4
        assert chip.launched == SECOND

    @pytest.mark.parametrize("error", [OSError, ValueError, TypeError])
    def test_what_a_kernel_raises_is_not_the_cache_s(
        error: type[Exception], chip: Chip, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any, **__: Any) -> None:
            raise error("of the kernel")

        monkeypatch.setattr(states_kernel, "run", fails)
        with pytest.raises(error, match="of the kernel"):
            chip.process()


def test_candidates_keep_to_the_limits() -> None:
    tile = {"BLOCK_M": 64, "STAGES": 3}
    assert tuning.fits(tile, {"BLOCK_M": (16, 64), "STAGES": (1, 3)})
    assert not tuning.fits(tile, {"BLOCK_M": (16, 32), "STAGES": (1, 3)})
    assert not tuning.fits(tile, {"BLOCK_M": (128, 256)})


def test_every_candidate_names_what_the_kernel_has() -> None:
    for name, tiles in tuning.CANDIDATES.items():
        kernel = next(vars(m)[name] for m in (attention_schedule, states_schedule, route_schedule) if name in vars(m))
        for tile in tiles:
            assert set(tile) - set(tuning.OF_TRITON) <= set(kernel.arg_names), name


@pytest.mark.parametrize("table", ["ATTEND", "LINEAR", "STATES", "HOPPER"])
def test_every_call_has_a_row_and_every_row_a_call(table: str) -> None:
    from sla2_compile.kernels.cuda import tiles

    rows, used = getattr(tiles, table), set()
    arches = (90,) if table == "HOPPER" else (80, 89, 90, 100, 120)
    dims = (64, 128) if table == "HOPPER" else (16, 64, 128, 256)
    blocks = ((16, 128), (16, 64, 128))
    sizes = itertools.product(arches, dims, *blocks, (0, 1, 2))
    words = itertools.product(*[(False, True)] * 4)
    for (arch, d, block_q, block_k, low), (more, causal, tma, odd) in itertools.product(sizes, words):
        shape = tiles.ShapeClass(arch, d, d, block_q, block_k, low, more, causal, tma, odd)
        used.add(next(n for n, (fits, _) in enumerate(rows) if fits(shape)))
    assert used == set(range(len(rows)))
