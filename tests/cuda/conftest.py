from __future__ import annotations

import os

# These need the simulator, and run in a process of their own: see test_simulator.py.
if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    collect_ignore = ["in_simulator.py", "simulated.py"]
