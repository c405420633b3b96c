"""A call's launches: `schedule.py` works them out once for its layout, and Triton makes them.

Behind `rerun.ENABLED`, later runs go past Triton's launcher (`rerun.py`, `repeat.py`, `driver.py`), which spares the
host 40 to 80 us of a call. Imports point one way: schedule -> rerun -> repeat -> driver; layout and steps below them.
"""
