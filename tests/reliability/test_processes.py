"""Child processes of every kind, after the parent has computed on threads; and Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest
from programs import LAYERS, PATIENCE, run

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

CHILDREN = f"""
import concurrent.futures
import faulthandler
import hashlib
import multiprocessing
import os
import sys
import numpy as np
import rmsnorm_np as rn

SHAPES = ((600, 1024), (2, 140_001), (1026, 2048))  # on threads, a row on several threads, past the cache


def arrays():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in SHAPES]


def work(given):
    digest = hashlib.sha256()
    for x in given or arrays():
        for norm in ("rms", "layer"):
            digest.update(getattr(rn, f"{{norm}}_norm")(x))
            for gradient in getattr(rn, f"{{norm}}_norm_backward")(x, x, x[0])[:2]:
                digest.update(gradient)
    return digest.hexdigest()


def fork(jobs):
    want = work(None)
    for _ in jobs:
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if work(None) == want else 3)
            os._exit(0 if work(None) == want and os.waitpid(grandchild, 0)[1] == 0 else 4)
        status = os.waitpid(child, 0)[1]
        assert status == 0, f"the child died, or computed something else: {{status}}"
    return [want] * len(jobs)


def pool(method):
    def run(jobs):
        with multiprocessing.get_context(method).Pool(2) as workers:
            return workers.map(work, jobs)
    return run


def futures(method):
    def run(jobs):
        context = None if method is None else multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as workers:
            return list(workers.map(work, jobs))
    return run


def by_joblib(backend):
    def run(jobs):
        import joblib

        # large arguments reach loky's workers as read-only maps of a file
        return joblib.Parallel(n_jobs=2, backend=backend)(joblib.delayed(work)(job or arrays()) for job in jobs)
    return run


WAYS = {{
    "fork": fork,
    **{{f"multiprocessing {{m}}": pool(m) for m in ("fork", "forkserver", "spawn")}},
    **{{f"futures {{m}}": futures(m) for m in (None, "fork", "forkserver", "spawn")}},
    **{{f"joblib {{b}}": by_joblib(b) for b in ("loky", "multiprocessing", "threading")}},
}}

if __name__ == "__main__":
    faulthandler.dump_traceback_later({PATIENCE} / 2, exit=True)  # blocked: say where
    want = work(None)
    for way in sys.argv[1:]:
        assert WAYS[way]([None, arrays(), None]) == [want] * 3, f"{{way}}: another result in a child"
        assert work(None) == want, f"{{way}}: another result in the parent, afterwards"
        print(way)
"""

FORKS = ("fork", "multiprocessing fork", "futures fork")
STARTS = ("multiprocessing forkserver", "multiprocessing spawn", "futures None", "futures forkserver", "futures spawn")
JOBLIB = ("joblib loky", "joblib multiprocessing", "joblib threading")


@pytest.fixture
def program(tmp_path):
    """The program as a file, which children that do not begin as a copy of it import."""
    file = tmp_path / "children.py"
    file.write_text(CHILDREN)
    return file


@pytest.mark.parametrize("layer", LAYERS)
def test_forked_children_compute_the_same(program, layer):
    """Their children, too. GNU OpenMP has no threads in a forked process, and Numba ends it at its first kernel."""
    assert run(program, *FORKS, NUMBA_THREADING_LAYER=layer).splitlines() == list(FORKS)


@pytest.mark.parametrize("layer", ["default", *(pytest.param(layer, marks=pytest.mark.slow) for layer in LAYERS)])
def test_children_that_start_afresh_compute_the_same(program, layer):
    assert run(program, *STARTS, NUMBA_THREADING_LAYER=layer).splitlines() == list(STARTS)


@pytest.mark.parametrize("layer", ["default", *(pytest.param(layer, marks=pytest.mark.slow) for layer in LAYERS)])
def test_joblib_computes_the_same(program, layer):
    pytest.importorskip("joblib")
    assert run(program, *JOBLIB, NUMBA_THREADING_LAYER=layer).splitlines() == list(JOBLIB)


BUSY = f"""
import faulthandler
import os
import signal
import sys
import threading
import numpy as np
import rmsnorm_np as rn

faulthandler.dump_traceback_later({PATIENCE} / 2, exit=True)
x = np.random.default_rng(0).standard_normal((1026, 2048), dtype=np.float32)
want = rn.rms_norm(x).tobytes()
stop, failed = threading.Event(), []


def work():
    while not stop.is_set():
        rn.rms_norm(x)


def fork():
    for _ in range(int(sys.argv[1])):
        child = os.fork()
        if child == 0:
            signal.alarm({PATIENCE} // 4)  # not faulthandler, which waits for the parent's thread of it
            os._exit(0 if rn.rms_norm(x).tobytes() == want else 3)
        if status := os.waitpid(child, 0)[1]:
            failed.append(status)


threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
if sys.argv[2] == "main":
    fork()
else:
    forking = threading.Thread(target=fork)
    forking.start()
    forking.join()
stop.set()
for thread in threads:
    thread.join()
assert not failed, failed
"""


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("thread", ["main", "another"])
@pytest.mark.parametrize("count", [10, 500])
def test_a_fork_while_other_threads_compute(layer, thread, count):
    """Whatever lock or memory those threads hold at that moment, nobody in the child gives it back."""
    run(BUSY, count, thread, NUMBA_THREADING_LAYER=layer)


CHOICE = """
import os
import threading
from rmsnorm_np.cpu import threads

threads.layer()
stop = threading.Event()
other = threading.Thread(target=stop.wait)
for beside in (False, True):
    if beside:
        other.start()
    child = os.fork()
    if child == 0:
        os._exit(threads.choose(10**9))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
stop.set()
other.join()
"""


@pytest.mark.parametrize(("layer", "want"), [("omp", "1 1 "), ("tbb", "2 1 ")])
def test_threads_of_a_child(layer, want):
    """One, where the layer has lost its threads, or may have lost a lock to a thread that the child has not got."""
    assert run(CHOICE, NUMBA_THREADING_LAYER=layer) == want


INTERRUPTED = """
import os
import signal
import threading
import time
import numpy as np
import rmsnorm_np as rn

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
x = np.random.default_rng(0).standard_normal((4096, 4096))
weight, before = np.ones(4096), x[::512].copy()
small = x[:40, :1024].copy()
want = [array.tobytes() for array in (rn.rms_norm(small), *rn.rms_norm_backward(small, small)[:1])]
rn.layer_norm(small[:1], weight[:1024])
rn.layer_norm_backward(small[:1], small[:1], weight[:1024])
ways = (
    lambda: rn.rms_norm(x),
    lambda: rn.layer_norm(x, weight),
    lambda: rn.layer_norm_backward(x, x, weight),
    lambda: rn.layer_norm(x, backend="reference"),
)
for way in ways:
    for _ in range(30):  # until the signal comes while the call runs: the machine may do much else
        called, went_on = threading.Event(), False

        def interrupt():
            called.wait()
            time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Thread(target=interrupt)
        timer.start()
        try:
            called.set()
            way()
            went_on = True
            timer.join()
            time.sleep(10)  # the signal came too late: it ends this
            raise SystemExit("the interrupt was lost")
        except KeyboardInterrupt:
            pass
        timer.join()
        if not went_on:
            break
    else:
        raise SystemExit("the signal never came in time")
    assert (x[::512] == before).all(), "an input was changed"
    got = [array.tobytes() for array in (rn.rms_norm(small), *rn.rms_norm_backward(small, small)[:1])]
    assert got == want
"""


def test_ctrl_c_ends_a_long_call_with_keyboard_interrupt():
    """As soon as the kernel returns; another thread sends the signal while it runs."""
    run(INTERRUPTED)


AT_ANY_MOMENT = f"""
import faulthandler
import random
import signal
import sys
import threading
import numpy as np
import rmsnorm_np as rn
from rmsnorm_np.cpu import memory

count, longest, cold = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "compiling"
faulthandler.dump_traceback_later({PATIENCE} / 2, exit=True)
rng, chance = np.random.default_rng(0), random.Random(0)
shapes = ((3, 64),) if cold else ((3, 64), (600, 1024), (1026, 2048))
x = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
copies = [a.copy() for a in x]


def all_ops(a, backend="cpu"):
    y = rn.rms_norm(a, backend=backend)
    if cold:
        return (y,)
    grads = rn.rms_norm_backward(a, a, a[0], backend=backend), rn.layer_norm_backward(a, a, backend=backend)
    return y, rn.layer_norm(a, backend=backend), *grads[0][:2], grads[1].dx


wants = [all_ops(a, "reference") for a in x]
if not cold:
    for a in x:
        all_ops(a)  # compiled: what follows interrupts computing


def interrupt(*_):
    raise KeyboardInterrupt


lost = []  # what is raised in a destructor goes nowhere: fire again
signal.signal(signal.SIGALRM, interrupt)
sys.unraisablehook = lambda _: lost.append(signal.setitimer(signal.ITIMER_REAL, 0.01))
interrupted = 0
while interrupted < count:
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, longest))
        for _ in range(1000 if not cold else 1):
            for a in x:
                all_ops(a)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if cold:
            break
    except KeyboardInterrupt:
        interrupted += 1
print(interrupted, "interrupted", len(lost), "of them lost")


def see():
    for a, copy, want in zip(x, copies, wants):
        assert (a == copy).all(), "an input was changed"
        for got, right in zip(all_ops(a), want):
            np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4 * abs(right).max())
    done.append(True)


done = []
see()
other = threading.Thread(target=see, daemon=True)  # a lock that was never given back stops another thread
other.start()
other.join()
assert len(done) == 2
assert sum(map(len, memory._pool.free)) <= memory.limit()
"""

has_timers = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")


@has_timers
@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_interrupts_at_any_moment_leave_a_usable_state(count):
    run(AT_ANY_MOMENT, count, 0.02, "computing")


@pytest.mark.slow
@has_timers
@pytest.mark.parametrize("count", [3, 30])
def test_interrupts_while_compiling_leave_a_usable_state(tmp_path, count):
    run(AT_ANY_MOMENT, count, 1.5, "compiling", NUMBA_CACHE_DIR=tmp_path)
    assert not list((tmp_path / "rmsnorm_np").glob("tmp*")), "half a file was left behind"
