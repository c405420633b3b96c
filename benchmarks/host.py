"""How fast the host is just now.

Shared machines run at half speed for seconds at a time, and a GPU waits for the host wherever launching takes longer
than running: such a row says nothing unless the host's own speed stands beside it.
"""

from __future__ import annotations

import time
from statistics import median

STEADY = 1.2
"""A host that takes this much longer than at its best is waited for."""


def work() -> int:
    """A few milliseconds of the interpreter's time, as launching kernels takes it: calls, tuples, dicts."""
    table: dict[tuple[int, int], int] = {}
    for n in range(10_000):
        key = (n & 63, n & 7)
        table[key] = max(table.get(key, 0), n)
    return len(table)


class Host:
    """Probes the host between measurements.

    Attributes:
        best: the shortest probe so far, in milliseconds.
    """

    def __init__(self) -> None:
        self.best = min(self.probe() for _ in range(5))

    def probe(self) -> float:
        """Milliseconds that a fixed piece of Python takes now."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        return median(times)

    def settle(self, patience: float = 4.0) -> float:
        """Wait until the host is about as fast as it was at its best, at most `patience` seconds; return a probe."""
        until = time.perf_counter() + patience
        while True:
            now = self.probe()
            self.best = min(self.best, now)
            if now <= STEADY * self.best or time.perf_counter() > until:
                return now
            time.sleep(0.1)


def slowdowns(probes: list[float | None]) -> list[float | None]:
    """Probes as multiples of the fastest one; None stays None."""
    known = [x for x in probes if x is not None]
    return [None if x is None else x / min(known) for x in probes]
