"""A call's launches: `schedule.py` works them out once for its layout, and Triton makes them.

If `rerun.ENABLED`, later runs bypass Triton's launcher (`rerun.py`, `repeat.py`, `driver.py`), which saves the host
40 to 80 us per call. Imports point one way: schedule -> rerun -> repeat -> driver; layout and steps below them.
"""
