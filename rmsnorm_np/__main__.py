"""``python -m rmsnorm_np``."""

from __future__ import annotations

import sys

from rmsnorm_np.cli import main

if __name__ == "__main__":
    sys.exit(main())
