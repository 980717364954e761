"""Many Python threads at once: the right bits from each, under every threading layer of Numba, and no crash."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from programs import LAYERS, PATIENCE, run

pytestmark = [pytest.mark.engine]

# Every op on arrays that take each way through the engine: alone, on threads, past the cache, a row on several threads.
AT_ONCE = f"""
import faulthandler
import itertools
import random
import sys
import threading
import time
import ml_dtypes  # gives NumPy the name bfloat16
import numpy as np
import rmsnorm_np as rn
from rmsnorm_np.cpu import threads

seconds = float(sys.argv[1])
faulthandler.dump_traceback_later(seconds + {PATIENCE} / 2, exit=True)  # blocked: say where

rng = np.random.default_rng(0)
calls = []
for dtype in map(np.dtype, sys.argv[2:]):
    for shape in ((3, 65), (600, 128), (1026, 2048), (2, 140_001)):
        x, dy = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(2))
        w, b = (rng.standard_normal(shape[1:], dtype=np.float32).astype(dtype) for _ in range(2))
        calls += [
            lambda o, x=x, w=w, b=b: [rn.rms_norm(x, w, b, backend=o)],
            lambda o, x=x, w=w, b=b: [rn.layer_norm(x, w, b, backend=o)],
            lambda o, x=x, w=w, b=b, dy=dy: rn.rms_norm_backward(dy, x, w, b, p=0.25, backend=o),
            lambda o, x=x, w=w, b=b, dy=dy: rn.layer_norm_backward(dy, x, w, b, backend=o),
        ]


def bits(arrays):
    return [array.view(np.uint8) for array in arrays]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other))


wants = {{}}  # the first result of each call
wrong, failed, done = [], [], [0] * 16
start = threading.Barrier(16)


def work(me):
    order = list(range(len(calls)))
    random.Random(me).shuffle(order)
    try:
        start.wait()
        end = time.monotonic() + seconds
        for i in itertools.cycle(order):
            got = bits(calls[i]("cpu"))
            if not same(got, wants.setdefault(i, got)):
                wrong.append(i)
            done[me] += 1
            if done[me] >= len(calls) and time.monotonic() > end:
                break
    except BaseException as error:
        failed.append(error)
        raise


others = [threading.Thread(target=work, args=(me,)) for me in range(1, 16)]
for other in others:
    other.start()
work(0)
for other in others:
    other.join()

for i, call in enumerate(calls):
    got = call("cpu")
    if not same(bits(got), wants[i]):
        wrong.append(i)
    for a, b in zip(got, call("reference")):  # far from exact here: other tests see to the last bit
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=0.02, atol=0.02 * abs(b.astype(float)).max())
print(threads.layer(), sum(done), "calls")
sys.exit(f"{{len(wrong)}} wrong, {{len(failed)}} failed" if wrong or failed else 0)
"""


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("seconds", "dtypes"),
    [(2, "float32"), pytest.param(20, "float16 bfloat16 float32 float64", marks=pytest.mark.slow)],
)
def test_sixteen_python_threads_with_every_op(layer, seconds, dtypes):
    """TBB and OpenMP take them all at once; the workqueue layer ends a process that two threads enter."""
    out = run(AT_ONCE, seconds, *dtypes.split(), NUMBA_THREADING_LAYER=layer)
    sys.stdout.write(out)  # how many calls there were: shown with -rP
    assert out.startswith(f"{layer} ")


FIRST_CALL = f"""
import faulthandler
import sys
import threading
import numpy as np
import rmsnorm_np as rn

faulthandler.dump_traceback_later({PATIENCE} / 2, exit=True)
x = np.random.default_rng(0).standard_normal((300, 256), dtype=np.float32)
start, results = threading.Barrier(16), []


def work():
    start.wait()
    results.append(rn.rms_norm(x))


others = [threading.Thread(target=work) for _ in range(16)]
for other in others:
    other.start()
for other in others:
    other.join()
assert len(results) == 16, results
for y in results:
    np.testing.assert_allclose(y, rn.rms_norm(x, backend="reference"), rtol=1e-6)
"""


def test_sixteen_threads_make_the_first_call_at_once(tmp_path):
    """The engine is imported, its kernel compiled and Numba's threads are started by all of them at the same time."""
    run(FIRST_CALL, NUMBA_CACHE_DIR=tmp_path)


CHURN = """
import os
import sys
import threading
import numpy as np
import rmsnorm_np as rn

x = np.random.default_rng(0).standard_normal((300, 256), dtype=np.float32)
want, wrong = rn.rms_norm(x).tobytes(), []


def work():
    if rn.rms_norm(x).tobytes() != want:
        wrong.append(1)


alive = []
for _ in range(int(sys.argv[1])):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    alive.append(len(os.listdir("/proc/self/task")))
half = len(alive) // 2
assert not wrong
assert max(alive[half:]) <= max(alive[:half]) + 4, alive  # a thread of the system's ends a moment after its Python one
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_thread_for_each_call_leaves_none_behind(layer, count):
    """Servers start a thread for a request. OpenMP gives each one helpers of its own, which have to go with it."""
    run(CHURN, count, NUMBA_THREADING_LAYER=layer)
