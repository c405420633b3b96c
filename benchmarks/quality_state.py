"""What `benchmarks/quality.py` keeps between its parts, in one folder of few and small files.

quality.json             rows by part
teacher-1-of-3...        weights of the teacher in bfloat16, in shards; all parts use these rounded weights
sites.safetensors        what stage 1 trained, by sparsity and seed
samples.safetensors      pictures for the report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Row = dict[str, Any]
KEYS = ("variant", "sparsity", "seed")
SHARD = 15 * 2**20
"""Bytes of a shard of weights at most, unless one tensor has more."""


class State:
    """The folder of a benchmark, read when it is opened.

    Attributes:
        found: by part, {"environment": {...}, "rows": [...]}.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.json = folder / "quality.json"
        self.found: dict[str, dict[str, Any]] = json.loads(self.json.read_text()) if self.json.exists() else {}

    def rows(self, part: str) -> list[Row]:
        return list(self.found[part]["rows"]) if part in self.found else []

    def has(self, part: str, row: Row) -> bool:
        """Whether there is a row of this variant, sparsity and seed."""
        return any(all(old.get(key) == row.get(key) for key in KEYS) for old in self.rows(part))

    def add(self, part: str, row: Row, about: dict[str, str]) -> None:
        """Write a row, in place of an earlier one of the same variant, sparsity and seed."""
        rows = [old for old in self.rows(part) if any(old.get(key) != row.get(key) for key in KEYS)]
        self.found[part] = {"environment": about, "rows": [*rows, row]}
        self.json.write_text(json.dumps(self.found, indent=1) + "\n")

    def save_weights(self, weights: dict[str, Tensor], name: str = "teacher") -> None:
        """Write weights in bfloat16, in shards."""
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for key, value in weights.items():
            x = value.detach().to("cpu", torch.bfloat16).contiguous()
            if shards[-1] and size + x.nbytes > SHARD:
                shards.append({})
                size = 0
            shards[-1][key] = x
            size += x.nbytes
        for old in self.folder.glob(f"{name}-*.safetensors"):
            old.unlink()
        for number, shard in enumerate(shards, 1):
            save_file(shard, self.folder / f"{name}-{number}-of-{len(shards)}.safetensors")

    def weights(self, name: str = "teacher") -> dict[str, Tensor]:
        """Read weights, in float32.

        Raises:
            FileNotFoundError: they are not there, or a shard is missing.
        """
        files = sorted(self.folder.glob(f"{name}-*.safetensors"))
        wanted = int(files[0].stem.rpartition("-")[2]) if files else 1
        if len(files) != wanted:
            raise FileNotFoundError(
                f"{self.folder} must hold {name}'s shards, got {len(files)} of them; run part {name}"
            )
        return {key: x.float() for file in files for key, x in load_file(file).items()}

    def keep(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Add tensors to the file of a kind, `sites` or `samples`."""
        path = self.folder / f"{kind}.safetensors"
        before = load_file(path) if path.exists() else {}
        save_file({**before, **{k: x.detach().cpu().contiguous() for k, x in tensors.items()}}, path)

    def kept(self, kind: str, prefix: str = "") -> dict[str, Tensor]:
        """Read the tensors of a kind whose names begin with a prefix, by the rest of their names."""
        path = self.folder / f"{kind}.safetensors"
        held = load_file(path) if path.exists() else {}
        return {key.removeprefix(prefix): x for key, x in held.items() if key.startswith(prefix)}
