"""Settings of the export's tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_library() -> Iterator[None]:
    """Read onnxscript's operators once: `torch.onnx.export` does so each time, which is a third of a small export."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        apis = _registration.onnxscript_apis
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield
