"""Time several calls in turn, so that whatever else the machine does hits them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]
Measure = Callable[[Call, int], float]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds per call in the middle round."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times longer one contender took than another: the median over rounds, and its extremes."""

    median: float
    low: float
    high: float


def wall_seconds(call: Call, calls: int) -> float:
    """Seconds per call over ``calls`` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def interleave(
    contenders: Mapping[str, Call],
    *,
    rounds: int = 5,
    turn_seconds: float = 0.01,
    warm_seconds: float = 0.004,
    budget_seconds: float = 10.0,
    min_rounds: int = 3,
    called_before: bool = False,
    measure: Measure = wall_seconds,
) -> dict[str, Timing]:
    """Time each contender once a round, round after round.

    A turn is ``warm_seconds`` of calls that are not timed (they bring the contender's own data and threads back, while
    the last one's threads, which go on waiting for work, fall asleep), then as many as fill ``turn_seconds``, timed
    together. A call that fills ``turn_seconds`` and 25 times ``warm_seconds`` is a turn by itself. No round starts when
    the budget is spent, but ``min_rounds`` always run. Before the first round each contender is called once, to compile
    or load whatever it needs; not where all were ``called_before``. ``measure`` takes a call and how often to make it,
    and gives seconds per call.
    """
    if not called_before:
        for call in contenders.values():
            call()
    long = max(25 * warm_seconds, turn_seconds)
    estimates: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + budget_seconds
    for done in range(rounds):
        if done >= min_rounds and time.perf_counter() > end:
            break
        for name, call in contenders.items():
            if done == 0:
                estimates[name] = measure(call, 1)
                if estimates[name] < long:
                    estimates[name] = _estimate(call, turn_seconds / 100, measure)
                else:  # that was its first turn
                    seconds[name].append(estimates[name])
                    continue
            if estimates[name] < long:
                warm = time.perf_counter() + warm_seconds
                call()
                while time.perf_counter() < warm:
                    call()
            calls = max(1, min(10_000, round(turn_seconds / max(estimates[name], 1e-9))))
            seconds[name].append(measure(call, calls))
    return {name: Timing(tuple(measured)) for name, measured in seconds.items()}


def ratio(slower: Timing, faster: Timing) -> Ratio:
    """Compare two contenders round by round: what disturbed both in a round cancels."""
    ratios = [a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def _estimate(call: Call, short: float, measure: Measure) -> float:
    """Seconds per call, from one, or from ten where that was short."""
    once = measure(call, 1)
    return measure(call, 10) if once < short else once
