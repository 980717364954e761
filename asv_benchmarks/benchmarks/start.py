"""What a new process waits for: the import, and the first call with and without compiled kernels on disk."""

EMPTY_CACHE = """
import os, tempfile
folder = tempfile.TemporaryDirectory()  # goes when the process ends
os.environ["NUMBA_CACHE_DIR"] = folder.name  # is read when Numba is imported
"""
CALL = "y = rmsnorm_np.rms_norm(x, weight)"
ARRAYS = """
import numpy as np
x, weight = np.ones((512, 768), np.float32), np.ones(768, np.float32)
"""


class Start:
    rounds = 1
    repeat = (3, 10, 5.0)  # at least 3 and at most 10 samples, as many as 5 s allow
    warmup_time = 0

    def timeraw_nothing_but_numpy(self):
        return "import numpy"

    def timeraw_import(self):
        return "import rmsnorm_np"


class FirstCall:
    rounds = 1
    repeat = (3, 5, 10.0)
    warmup_time = 0
    timeout = 600

    def setup(self):
        exec(f"import rmsnorm_np\n{ARRAYS}\n{CALL}", {})  # keeps the compiled kernel on disk

    def timeraw_cached(self):
        return f"import rmsnorm_np\n{CALL}", ARRAYS

    def timeraw_cold(self):
        return f"import rmsnorm_np\n{CALL}", f"{EMPTY_CACHE}\n{ARRAYS}"
