"""NVIDIA's driver, as far as repeated launches need it, through ctypes (cuda.h, CUDA 12 and 13)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch


class Config(ctypes.Structure):
    """CUlaunchConfig, without attributes."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


@functools.cache
def driver() -> Any:
    """The library, which PyTorch has loaded by the time of a launch."""
    return ctypes.CDLL("libcuda.so.1")


def check(code: int, doing: str = "") -> None:
    """Raise an error with the driver's text for a code that it returned, after `doing`.

    Raises:
        RuntimeError: code is not 0.
    """
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{doing}CUDA driver error {code}: {(text.value or b'unknown').decode()}")


def use_context(device: int) -> bool:
    """Give this thread the context that PyTorch and Triton use, if it has none yet; returns whether it had none."""
    context = ctypes.c_void_p()
    check(driver().cuCtxGetCurrent(ctypes.byref(context)))
    if context.value is not None:
        return False
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    check(driver().cuCtxSetCurrent(context))
    return True


def after_failure(code: int, call: Callable[[], int], doing: str) -> None:
    """Make a call once more that returned a code other than 0, if the reason may be that this thread has no context.

    A thread has none before it first uses the GPU. To ask before every call would take as long as the call.

    Raises:
        RuntimeError: the call fails in a thread with a context.
    """
    if use_context(torch.cuda.current_device()):
        code = call()
    check(code, doing)
