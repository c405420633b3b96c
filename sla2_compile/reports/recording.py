"""`record_statistics`: eager forwards keep what SLA2 chose only while somebody asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from sla2_compile.libraries.adapter import keeping_choices
from sla2_compile.modules.uncompiled import uncompiled
from sla2_compile.passes.sites.site import Site
from sla2_compile.reports.statistics import sites


@contextlib.contextmanager
def record_statistics(model: nn.Module) -> Iterator[None]:
    """Have the model's forwards keep what SLA2 chose, for `get_sla2_statistics`.

    Without it a forward keeps nothing, because that costs launches and memory. A recorded forward computes the same.
    Afterwards the last recorded forward of each site stays known.

    Compiled graphs cannot record. Inside, code that torch.compile made therefore runs as the Python that it was made
    of, in the whole process (`torch.compiler.set_stance("force_eager")`), and compiled code goes on afterwards. Such
    a step is slower, and needs the memory of an uncompiled one.

    Example:
        >>> with record_statistics(model):
        ...     out = model(x)
        >>> stats = get_sla2_statistics(model)
    """
    before: list[tuple[Site, bool]] = [(site, site.recording) for _, site in sites(model)]
    with keeping_choices(model.modules()), uncompiled():
        for site, _ in before:
            site.recording = True
        try:
            yield
        finally:
            for site, was in before:
                site.recording = was
