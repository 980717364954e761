"""Whether a call that may use threads is sooner done on one: so it is on a machine whose cores are busy.

A call on threads ends when the last of them does. Where other processes hold the cores, that thread waits for one: 4
to 30 ms on Linux, in a call of 0.1 ms, even if the others have long done its work.

No result depends on what is decided here, as work is cut by shape alone.
"""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

from rmsnorm_np.cpu.kernel import Entry

FIRST_HOLD, LAST_HOLD = 0.02, 2.0  # seconds on one thread; under load that lasts, one trial in 2 s costs 1 %
PATIENCE = 0.001  # seconds: threads that sleep, as after a hold, take 0.1 ms to wake
SAVINGS = 0.02  # seconds: what threads that wait for a core may cost an otherwise idle machine without a hold
MEASURE_AFTER = 128  # times what a call on one thread loses: measuring it makes calls less than 1 % slower
SAMPLES = 8  # calls that show the time of one thread: the first of each hold
ONE_CALL = math.inf  # a hold that ends with its first call
OUTLIER = 4  # times the average: more is not believed at once, as one thread waits for a core as well


class Pace:
    """What calls of one kernel at about one size gain by threads: an account in seconds.

    A call on threads adds what one thread would have taken, less what it took itself. When the sum is negative, threads
    do not pay: it is set back, and calls run on one thread for a hold, which is twice as long each time, until threads
    have paid again. What one thread takes is measured in the holds and once in a while, so it is that of the arrays
    and the load of the moment.
    """

    __slots__ = ("gained", "hold", "measured", "one", "unmeasured", "until")

    def __init__(self) -> None:
        self.one = math.inf  # seconds for an element on one thread
        self.measured = 0  # calls in that average
        self.unmeasured = 0.0  # seconds gained since the last of them; before the first, seconds on threads
        self.gained = PATIENCE
        self.hold = FIRST_HOLD
        self.until = -math.inf  # calls before that run on one thread

    def measure(self, one: float) -> None:
        """Take note of a call on one thread, in seconds for an element."""
        calls, one = self.measured + 1, min(one, OUTLIER * self.one)
        self.one = one if calls == 1 else self.one + (one - self.one) / calls
        self.measured = calls  # after the time itself: another Python thread may come between
        if self.until == ONE_CALL:
            self.until = -math.inf

    def settle(self, now: float, took: float, elements: int, threads: int) -> None:
        """Decide how to go on after a call on threads that left the account empty or full."""
        if self.one == math.inf:  # measure it when that takes no longer than the calls before
            self.gained = PATIENCE
            self.unmeasured += took
            if self.unmeasured > threads * took:
                self.one = threads * took / elements  # at most, as threads are at best so many times as fast
                self.until, self.unmeasured = ONE_CALL, 0.0
        elif self.gained <= 0.0:
            self.gained, self.measured = PATIENCE, 0
            self.until, self.hold = now + self.hold, min(2 * self.hold, LAST_HOLD)
        else:
            self.gained, self.hold = SAVINGS / 2, FIRST_HOLD
            self.unmeasured += SAVINGS / 2
            if self.unmeasured > MEASURE_AFTER * threads * (self.one * elements - took):
                self.until, self.unmeasured, self.measured = ONE_CALL, 0.0, min(self.measured, SAMPLES - 1)


_paces: dict[tuple[Entry, int], Pace] = {}


def run(entry: Entry, args: tuple[Any, ...], elements: int, threads: int) -> tuple[Any, int]:
    """Call a kernel on these threads or on one: what it returns, and on how many.

    Behind a kernel Python's own data are out of the first-level cache, so what happens for each call is kept short.
    """
    key = entry, elements.bit_length()
    pace = _paces.get(key)
    if pace is None:
        pace = _paces[key] = Pace()
    code = entry.code
    start = perf_counter()
    if start < pace.until:
        result = code(*args, 1)
        if pace.measured < SAMPLES or pace.until == ONE_CALL:
            pace.measure((perf_counter() - start) / elements)
        return result, 1
    result = code(*args, threads)
    end = perf_counter()
    pace.gained = gained = pace.gained + pace.one * elements - (end - start)
    if not 0.0 < gained < SAVINGS and entry.code is code:  # else this call compiled it
        pace.settle(end, end - start, elements, threads)
    return result, threads
