"""Tasks on threads: each is done once, whatever Numba's threading layer makes of them."""

from __future__ import annotations

import os

import numba
import numpy as np
import pytest
from programs import LAYERS, run

from rmsnorm_np.cpu import threads

PROGRAM = """
import hashlib
import numba
import numpy as np
import rmsnorm_np as rn

rng = np.random.default_rng(0)
digest = hashlib.sha256()
for shape in ((600, 1024), (2, 400_001)):  # a task for each thread; more tasks than threads
    x, dy, weight = (rng.standard_normal(s, dtype=np.float32) for s in (shape, shape, shape[1:]))
    for result in (rn.rms_norm(x, weight), *rn.rms_norm_backward(dy, x, weight)[:2]):
        digest.update(result)
print(numba.threading_layer(), digest.hexdigest())
"""


@pytest.fixture(scope="module")
def digest_on_one_thread():
    return run(PROGRAM, NUMBA_NUM_THREADS=1).split()[1]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.engine)])
def test_each_layer_and_number_of_threads_gives_the_same_bits(layer, count, digest_on_one_thread):
    """The layers cut the tasks differently: one at a time, or a run of them for each thread."""
    used, digest = run(PROGRAM, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=count).split()
    assert used == layer
    assert digest == digest_on_one_thread


AT_ONCE = """
import sys
import threading
import time
import numpy as np
import rmsnorm_np as rn
from rmsnorm_np.cpu import pace

pace.FIRST_HOLD = 0.0  # on threads even where that is slower
x = np.random.default_rng(0).standard_normal((600, 1024), dtype=np.float32)
want = [rn.rms_norm(x).tobytes(), rn.rms_norm_backward(x, x).dx.tobytes()]
end, wrong = time.monotonic() + 3, []

def work():
    while time.monotonic() < end:
        if [rn.rms_norm(x).tobytes(), rn.rms_norm_backward(x, x).dx.tobytes()] != want:
            wrong.append(1)

others = [threading.Thread(target=work) for _ in range(7)]
for other in others:
    other.start()
work()
for other in others:
    other.join()
sys.exit(len(wrong))
"""


@pytest.mark.engine
@pytest.mark.parametrize("layer", LAYERS)
def test_eight_python_threads_at_once(layer):
    """The workqueue layer ends the process when two Python threads use it at once."""
    run(AT_ONCE, NUMBA_THREADING_LAYER=layer)


FORKED = """
import os
import sys
import numpy as np
import rmsnorm_np as rn

x = np.random.default_rng(0).standard_normal((600, 1024), dtype=np.float32)
if sys.argv[1] == "after a small call":
    rn.rms_norm(x[:1])
if sys.argv[1] == "after a call on threads":
    rn.rms_norm(x)
child = os.fork()
if child == 0:
    same = rn.rms_norm(x).tobytes() == np.concatenate([rn.rms_norm(row) for row in np.split(x, 600)]).tobytes()
    os._exit(0 if same else 3)
assert os.waitpid(child, 0)[1] == 0, "the child died, or computed something else"
rn.rms_norm(x)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "when",
    [
        pytest.param("before any call", marks=pytest.mark.engine),
        pytest.param("after a small call", marks=pytest.mark.engine),
        "after a call on threads",
    ],
)
def test_a_forked_child_computes_the_same(layer, when):
    run(FORKED, when, NUMBA_THREADING_LAYER=layer)


def test_what_a_task_raises_is_raised():
    """In this thread and on others: an exception that nobody hears of leaves an output half written."""

    @numba.njit
    def task(t, values, numbers):
        if t == 3:
            raise MemoryError("no room")
        numbers[t] = values[t]

    @numba.njit
    def run(values, numbers, threads_):
        threads.in_parallel(task, len(values), threads_, (values, numbers))

    threads.layer()
    for n in (3, 9):
        for on_threads in (1, 2):
            numbers = np.zeros(n)
            if n > 3:
                with pytest.raises(MemoryError, match="no room"):
                    run(np.arange(1.0, n + 1), numbers, on_threads)
            else:
                run(np.arange(1.0, n + 1), numbers, on_threads)
                assert np.array_equal(numbers, np.arange(1.0, n + 1))


def test_one_task_after_the_other_in_plain_python():
    seen = []
    threads.in_parallel(lambda t, a, b: seen.append((t, a, b)), 3, 2, ("a", None))
    assert seen == [(0, "a", None), (1, "a", None), (2, "a", None)]
