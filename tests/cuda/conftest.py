from __future__ import annotations

import os

# These need the simulator, and run in a process of their own: see test_simulator.py.
if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    collect_ignore = ["in_simulator.py", "simulated.py"]


def pytest_collection_modifyitems(items):
    """Each process of test_simulator.py takes its share: every so many-th test, so that long ones are spread."""
    part, parts = map(int, os.environ.get("SIMULATOR_PART", "0/1").split("/"))
    items[:] = items[part::parts]
