"""Which forwards a compiled function stands in, when planning runs it as Python.

An owner may call a function, or a module, that torch.compile made. Dynamo traces what runs in there, so that nothing
can be deferred: hand-written attention with a step in there keeps full attention. Products in there also have numbers
at planning that they do not have afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

from torch import fx

from sla2_compile.kernels.torch_internals import compiles
from sla2_compile.modules.frames import Frame
from sla2_compile.modules.recording.recorded import FRAMES, Recording


def forwards_around(frames: Sequence[Frame]) -> int:
    """How many of the running forwards are outside of the innermost compiled function; 0 without one.

    frames: the forwards, outermost first.
    """
    at: FrameType | None = sys._getframe()
    left = len(frames)
    while at is not None and left:
        found = compiles(at.f_code)
        if found is not None:
            # what keeps Dynamo away, as around reentrant checkpoints, runs eager code also inside of compiled code
            return left if found else 0
        if at.f_code.co_name == "_call_impl" and at.f_locals.get("self") is frames[left - 1].module:
            left -= 1
        at = at.f_back
    return 0


def is_compiled(recording: Recording, steps: Sequence[fx.Node], frames: Sequence[Frame]) -> bool:
    """Whether a step of hand-written attention, or another product of its owner, is in a function that it compiled.

    frames: the forwards around the attention; the last is its owner's.
    """
    products = [node for node in recording.batched if frames[-1] in node.meta[FRAMES]]
    return any(recording.compiled.get(node, 0) >= len(frames) for node in (*steps, *products))
