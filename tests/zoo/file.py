"""What is measured of one model of the zoo as an ONNX file: nodes of SLA2, parity in onnxruntime, dynamic sizes."""

from __future__ import annotations

import functools
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_map, tree_map_only

import sla2_compile
from tests.zoo import check
from tests.zoo.entry import Entry

PARITY = 1e-4
"""Largest error of an entry of the batch, relative to its norm, in float32."""


@dataclass(frozen=True)
class File:
    """One model in onnxruntime.

    Attributes:
        sites: its nodes `sla2::attention`.
        error: the largest, at the example's sizes and at others.
        dynamic: which sizes the file leaves open: batch, others. compared: whether other sizes were compared.
        failure: the error of the export, if there is one. model_fails: the untransformed model gives no file that
            runs either.
    """

    sites: int = 0
    error: float = 0.0
    dynamic: tuple[str, ...] = ()
    compared: bool = False
    failure: str = ""
    model_fails: bool = False

    @property
    def outcome(self) -> int | str:
        """What an `Entry` says of it."""
        return "model" if self.model_fails else self.sites if not self.failure else self.failure


@functools.cache
def in_onnxruntime(entry: Entry) -> File:
    """Export a sparse model with all sizes open that its program leaves open, and compare the file with it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        model, kwargs = entry.make()
        kwargs = twice(model, kwargs)
        check.transform(model, kwargs, check.SPARSE)
        path = Path(folder) / "model.onnx"
        try:
            made = sla2_compile.export_onnx(model, (), path, kwargs=kwargs, dynamic_shapes=open_sizes(kwargs))
        except Exception as error:  # whatever an exporter raises is the result here
            failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            return File(failure=failure, model_fails=fails(entry))
        assert made.verification is not None
        runs = made.verification.runs
        largest = max(run.error for run in runs)
        return File(made.sites, largest, dynamic_sizes(path), any(not run.refused for run in runs[1:]))


def twice(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give a batch of one a second entry, as no export leaves a size of 1 open; as it was, where the model fails."""
    doubled = tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x, kwargs)
    try:
        model(**doubled)
    except Exception:  # not every first axis is a batch
        return kwargs
    return doubled


def open_sizes(kwargs: dict[str, Any]) -> dict[str, Any]:
    return tree_map(lambda x: dict.fromkeys(range(x.ndim), Dim.AUTO) if isinstance(x, Tensor) else None, kwargs)


def dynamic_sizes(path: Path) -> tuple[str, ...]:
    """Which sizes of its inputs a file leaves open."""
    inputs = onnx.load(str(path), load_external_data=False).graph.input
    dims = [[bool(dim.dim_param) for dim in x.type.tensor_type.shape.dim] for x in inputs]
    batch, others = any(x[0] for x in dims if x), any(any(x[1:]) for x in dims)
    return tuple(name for name, found in (("batch", batch), ("length", others)) if found)


def fails(entry: Entry) -> bool:
    """Whether the untransformed model gives no file that onnxruntime opens either."""
    torch._dynamo.reset()
    model, kwargs = entry.make()
    kwargs = twice(model, kwargs)
    try:
        made = torch.onnx.export(
            model, (), kwargs=kwargs, dynamic_shapes=open_sizes(kwargs), dynamo=True, verbose=False
        )
        assert made is not None
        onnxruntime.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # as above
        return True
    return False
