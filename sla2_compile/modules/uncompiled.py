"""`uncompiled`: code that torch.compile made runs as the Python that it was made of, for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_LOCK = threading.Lock()
_STANCE = contextlib.ExitStack()
_open = 0


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled code uncompiled inside, in the whole process; it is not compiled anew afterwards.

    Contexts may end in any order, as those of several callbacks do after an exception. The last one that ends brings
    back the stance (`torch.compiler.set_stance`) from before the first.
    """
    global _open
    with _LOCK:
        if _open == 0:
            _STANCE.enter_context(torch.compiler.set_stance("force_eager"))
        _open += 1
    try:
        yield
    finally:
        with _LOCK:
            _open -= 1
            if _open == 0:
                _STANCE.close()
