"""When calls that may use threads run on one: on a machine that is made up, with a clock of its own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import rmsnorm_np as rn
from rmsnorm_np.cpu import pace, threads

SIZE = 512 * 768
US, MS = 1e-6, 1e-3


class Kernel:
    """A kernel whose calls take what `cost(threads)` says, in seconds; and the machine it runs on."""

    def __init__(self, cost):
        self.now, self.cost, self.seen = 1000.0, cost, []
        self.code = self.call

    def call(self, threads_):
        self.now += self.cost(threads_)
        self.seen.append(threads_)
        return 0

    def run(self, seconds, size=SIZE, most=2):
        """On how many threads each call ran, in so many seconds of calls one after the other."""
        self.seen, end = [], self.now + seconds
        while self.now < end:
            assert pace.run(self, (), size, most) == (0, self.seen[-1])
            self.now += US
        return np.array(self.seen)


@pytest.fixture
def kernel(monkeypatch):
    def make(one, many, late=0.0, each=1):
        """Calls of these lengths on one thread and on many, of which each so-manieth on many is late."""
        count = itertools.count(1)
        return make_of(lambda n: one if n == 1 else late if late and next(count) % each == 0 else many)

    def make_of(cost):
        made = Kernel(cost)
        monkeypatch.setattr(pace, "_paces", {})
        monkeypatch.setattr(pace, "perf_counter", lambda: made.now)
        return made

    make.of = make_of
    return make


@pytest.mark.parametrize(
    ("one", "many", "most"),
    [(11 * US, 10 * US, 2), (100 * US, 55 * US, 2), (100 * US, 10 * US, 64), (2 * MS, 1 * MS, 2), (0.1, 0.055, 2)],
)
def test_on_an_idle_machine_calls_run_on_threads(kernel, one, many, most):
    """Calls on one thread, which are made to see what that takes, cost 1 % of the time at most."""
    idle = kernel(one, many)
    seen = idle.run(1000 * many + 2.0, most=most)
    assert 0 < np.sum(seen == 1) * (one - many) < 0.01 * len(seen) * many


@pytest.mark.parametrize(
    ("one", "many"), [(20 * US, 15 * US), (150 * US, 80 * US), (2 * MS, 1 * MS), (10 * MS, 6 * MS)]
)
@pytest.mark.parametrize("each", [1, 3, 10])
@pytest.mark.parametrize("most", [2, 64])
def test_where_threads_wait_for_cores_calls_run_on_one(kernel, one, many, each, most):
    """Calls that are late by 12 ms, now and then: nearly as many calls as on one thread."""
    busy = kernel(one, many, one + 12 * MS, each)
    busy.run(5.0, most=most)
    seen = busy.run(20.0, most=most)
    assert len(seen) > 0.95 * 20.0 / (one + US)
    assert np.mean(seen > 1) < 0.01 or one > MS  # fewer and longer calls in as many trials


@pytest.mark.parametrize("busy_for", [0.01, 0.5, 100.0])
def test_when_the_load_is_gone_threads_are_back(kernel, busy_for):
    load = [True]
    machine = kernel.of(lambda n: 150 * US if n == 1 else 12 * MS if load[0] else 80 * US)
    load[0] = False
    machine.run(0.1)
    load[0] = True
    machine.run(busy_for)
    load[0] = False
    machine.run(min(2.0 * busy_for + 0.05, 2.1))
    assert np.mean(machine.run(1.0) > 1) > 0.99


def test_a_thread_that_waits_once_in_a_while_changes_nothing(kernel):
    """4 ms in each 1000th call: threads lose 4 ms of the 45 that they gain."""
    machine = kernel(100 * US, 55 * US, 4 * MS, 1000)
    assert np.mean(machine.run(10.0) > 1) > 0.99


@pytest.mark.parametrize("before", [0.0, 100.0])
def test_the_first_late_call_costs_20_ms(kernel, before):
    """Also long after a time of load."""
    many = [12 * MS]
    machine = kernel.of(lambda n: 100 * US if n == 1 else many[0])
    machine.run(before)
    many[0] = 55 * US
    machine.run(5.0)
    many[0] = 30 * MS
    assert machine.run(10 * MS)[-1] == 2
    many[0] = 55 * US
    seen = machine.run(0.5)
    assert 190 < np.sum(seen == 1) < 225  # 20 ms of 0.1 each, and the measurements


def test_the_time_of_compiling_does_not_count(kernel):
    machine = kernel(100 * US, 3 * MS)

    def compile_first(threads_):
        machine.code = machine.call
        machine.now += 5.0
        return machine.call(threads_)

    machine.code = compile_first
    assert list(machine.run(1.0)) == [2]
    (found,) = pace._paces.values()
    assert (found.one, found.unmeasured) == (math.inf, 0.0)
    assert np.mean(machine.run(0.1) > 1) < 0.1


def test_arrays_in_memory_take_five_times_as_long_as_in_the_cache(kernel):
    """By turns, or one after the other: neither passes for late."""
    cold = [False]

    def cost(n):
        return (400 * US if n == 1 else 240 * US) if cold[0] else (80 * US if n == 1 else 45 * US)

    machine = kernel.of(cost)
    for period in (20.0, 0.0004):
        on_threads = []
        for _ in range(int(2 / min(period, 1.0)) // 2 or 1):
            for cold[0] in (False, True):
                on_threads.append(machine.run(min(period, 1.0)))
        assert np.mean(np.concatenate(on_threads) > 1) > 0.97


@pytest.mark.parametrize("other", ["size", "kernel"])
def test_each_kernel_and_size_has_an_account_of_its_own(kernel, other):
    """Threads pay for one and not for the other, in calls by turns."""
    costs = {"short": (100 * US, 9 * MS), "long": (10 * MS, 8 * MS)}
    short = kernel.of(lambda n: costs[now][n > 1])
    long, size = (short, 64 * SIZE) if other == "size" else (Kernel(None), SIZE)
    long.code = short.code
    seen = {"short": [], "long": []}
    for _ in range(3000):
        for now, one_of, elements in (("short", short, SIZE), ("long", long, size)):
            seen[now].append(pace.run(one_of, (), elements, 2)[1])
    assert np.mean(np.array(seen["short"]) > 1) < 0.02
    assert np.mean(np.array(seen["long"]) > 1) > 0.98


def test_rare_calls_on_a_busy_machine(kernel):
    """100 ms between two: a hold grows until it lasts from one call to the next."""
    machine = kernel(100 * US, 12 * MS)
    for _ in range(500):
        pace.run(machine, (), SIZE, 2)
        machine.now += 0.1
    assert np.mean(np.array(machine.seen[100:]) > 1) < 0.1


def test_a_process_that_was_stopped_within_a_call_on_one_thread(kernel):
    """An hour in a call that was to show what one thread takes: later calls are not compared with that."""
    one, many = [100 * US], [55 * US]
    machine = kernel.of(lambda n: one[0] if n == 1 else many[0])
    machine.run(0.5)
    one[0] = 3600.0
    assert machine.run(1.0)[-1] == 1
    one[0], many[0] = 100 * US, 12 * MS
    machine.run(5.0)
    assert np.mean(machine.run(5.0) > 1) < 0.01


def test_what_was_measured_at_a_bad_time_is_measured_again(kernel):
    """50 ms in the first call on one thread: against that, no call on threads is late."""
    calls = itertools.count()
    machine = kernel.of(lambda n: 12 * MS if n > 1 else 100 * US if next(calls) else 50 * MS)
    machine.run(30.0)
    assert np.mean(machine.run(5.0) > 1) < 0.01


def test_a_hold_for_one_call_ends_whatever_another_thread_made_of_the_account(kernel):
    machine = kernel(100 * US, 55 * US)
    machine.run(0.01)
    (found,) = pace._paces.values()
    found.until, found.measured = pace.ONE_CALL, pace.SAMPLES
    assert list(machine.run(0.0005)[:3]) == [1, 2, 2]


rng = np.random.default_rng(0)
x, dy = (rng.standard_normal((64, 1024), dtype=np.float32) for _ in range(2))
row, dy_row = (rng.standard_normal((1, 70_001), dtype=np.float32) for _ in range(2))
weight = rng.standard_normal(1024, dtype=np.float32)
CALLS = {
    "forward": lambda: rn.rms_norm(x, weight),
    "object": lambda: rn.RMSNorm(weight)(x),
    "backward": lambda: rn.rms_norm_backward(dy, x, weight),
    "residual": lambda: rn.add_rms_norm(x, dy, weight),
    "residual, backward": lambda: rn.add_rms_norm_backward(dy, dy, x, weight),
    "long rows": lambda: rn.rms_norm(row),
    "long rows, backward": lambda: rn.rms_norm_backward(dy_row, row),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_keep_an_account_and_no_bit_depends_on_it(name, monkeypatch):
    """Some are on threads and some on one: a call on threads that takes an hour by the clock, and those after it."""
    run, code_threads = pace.run, []

    def spy(*args):
        result, on_threads = run(*args)
        code_threads.append(on_threads)
        return result, on_threads

    def bits():
        results = CALLS[name]()
        return [a.tobytes() for a in (results if isinstance(results, tuple) else [results]) if a is not None]

    bits()  # compiles
    monkeypatch.setattr(threads, "choose", lambda elements: 1 if elements < threads.PARALLEL_ELEMENTS else 2)
    monkeypatch.setattr(pace, "_paces", {})
    monkeypatch.setattr(pace, "run", spy)
    clock, tick = [0.0], [1 * MS]

    def read():
        clock[0] += tick[0]
        return clock[0]

    monkeypatch.setattr(pace, "perf_counter", read)
    want = bits()
    for tick[0] in (1 * MS, 1 * MS, 1 * MS, 3600.0, 1 * MS):
        assert bits() == want
    assert code_threads == [2, 2, 2, 1, 2, 1]
