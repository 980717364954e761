"""The suite. Kernels compiled for it are kept in asv's environment, apart for each commit."""

import os
from pathlib import Path

if "ASV_ENV_DIR" in os.environ:
    # The oldest commits keep kernels by file and time, and would run those of another commit.
    os.environ.setdefault(
        "NUMBA_CACHE_DIR", str(Path(os.environ["ASV_ENV_DIR"], "kernels", os.environ.get("ASV_COMMIT", "none")))
    )
