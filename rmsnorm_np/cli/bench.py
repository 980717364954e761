"""`bench`: the norms against each installed peer, in turn, with the same numbers in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from rmsnorm_np.cli import PEERS, console, device, peers
from rmsnorm_np.cli.checks import Step
from rmsnorm_np.cli.inputs import LAYER_NORM, RMS_NORM, Array, Norm, dtype_named
from rmsnorm_np.cli.peers import Problem
from rmsnorm_np.cli.timing import Call, Ratio, Timing, interleave, ratio
from rmsnorm_np.ulp import ulp_error

NORMS = (RMS_NORM, LAYER_NORM)
ARRAYS_MOVED = {"forward": 2, "forward+backward": 5}  # x, y; then dy, x, dx
EPS = 1e-6
ROWS_COMPARED = 16  # for the error of y; enough to show a library's rounding
OURS = "rmsnorm_np"
OURS_INTO = "rmsnorm_np, out="
LIMIT = "limit"  # the same bytes moved by a loop that hardly computes, or by a copy on the device


@dataclass(frozen=True)
class Entry:
    """How one contender did."""

    contender: str
    seconds: tuple[float, ...]  # per call, one entry a round
    median: float
    bandwidth: float  # bytes a second of those that the operation has to read and write
    against_ours: Ratio  # its time over the time of rmsnorm_np, which allocates its results as peers do
    # The worst error of y; None where y is not returned. In ULP at |y| or |weight|, whichever is larger: where a mean
    # was subtracted, |y| alone can be next to nothing, and any library's error huge beside it.
    ulp: float | None


@dataclass(frozen=True)
class Case:
    """One operation on one shape, and all who took part."""

    norm: str
    direction: str
    dtype: str
    shape: tuple[int, int]
    entries: tuple[Entry, ...]


def bench(
    shapes: Sequence[tuple[int, int]],
    dtype: str,
    backend: str,
    rounds: int,
    as_json: bool,
    plot: str | None,
    only: Sequence[str] = PEERS,
) -> int:
    """Measure, print and draw; always 0, a benchmark has no wrong answer."""
    if backend == "cuda":
        device.require()
    with console.progress(len(shapes) * len(NORMS) * len(ARRAYS_MOVED)) as step:
        cases = list(measure(shapes, dtype_named(dtype), backend, rounds, step, only))
    if as_json:
        console.print_json({"backend": backend, "peers": peers.versions(only), "cases": cases})
    else:
        render(Console(highlight=False), cases, backend)
    if plot is not None:
        from rmsnorm_np.cli.plot import draw

        draw(cases, plot)
    return 0


def measure(
    shapes: Sequence[tuple[int, int]],
    dtype: np.dtype[Any],
    backend: str,
    rounds: int,
    step: Step,
    only: Sequence[str] = PEERS,
) -> Iterator[Case]:
    """One `Case` after the other, with no other peers than these; ``step`` is told what comes next."""
    rng = np.random.default_rng(0)
    for shape in shapes:
        x, dy = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(2))
        weight = rng.uniform(0.5, 1.5, shape[1]).astype(dtype)
        for norm in NORMS:
            for direction in ARRAYS_MOVED:
                step(f"{norm.label} {direction}, {shape[0]}×{shape[1]}")
                problem = Problem(norm.op, direction, x, weight, dy, EPS)
                yield _measure_case(norm, problem, backend, rounds, only)


def _measure_case(norm: Norm, problem: Problem, backend: str, rounds: int, only: Sequence[str]) -> Case:
    if backend == "cuda":
        contenders = _our_calls(norm, device.moved(problem), backend, device.empty_like)
        contenders[LIMIT] = device.copies(ARRAYS_MOVED[problem.direction] * problem.x.nbytes)
        timings = interleave(contenders, rounds=rounds, measure=device.seconds)
    else:
        from rmsnorm_np.cpu import limit

        contenders = _our_calls(norm, problem, backend, np.empty_like)
        contenders[LIMIT] = limit.calls(problem.x.nbytes)[problem.direction]
        contenders.update(peers.calls(problem, _threads(), only))
        timings = interleave(contenders, rounds=rounds)
    exact = _exact_rows(norm, problem)
    entries = (_entry(name, timings[name], timings[OURS], problem, exact, call) for name, call in contenders.items())
    return Case(norm.label, problem.direction, problem.x.dtype.name, problem.x.shape, tuple(entries))


def _our_calls(norm: Norm, problem: Problem, backend: str, empty_like: Callable[[Any], Any]) -> dict[str, Call]:
    x, weight, dy, eps = problem.x, problem.weight, problem.dy, problem.eps
    y, dx = empty_like(x), empty_like(x)

    def forward() -> Array:
        return norm.forward(x, weight, eps, backend)

    def forward_into() -> Array:
        return norm.forward(x, weight, eps, backend, out=y)

    def both() -> object:
        return norm.forward(x, weight, eps, backend), norm.backward(dy, x, weight, eps, backend)

    def both_into() -> object:
        return norm.forward(x, weight, eps, backend, out=y), norm.backward(dy, x, weight, eps, backend, out=dx)

    if problem.direction == "forward":
        return {OURS: forward, OURS_INTO: forward_into}
    return {OURS: both, OURS_INTO: both_into}


def _entry(name: str, timing: Timing, ours: Timing, problem: Problem, exact: Array, call: Call) -> Entry:
    ulp = None
    if problem.direction == "forward" and name != LIMIT:
        y = peers.as_numpy(call())[: len(exact)].astype(problem.x.dtype)
        ulp = ulp_error(y, exact, scale=np.abs(problem.weight.astype(np.float64)))
    bandwidth = ARRAYS_MOVED[problem.direction] * problem.x.nbytes / timing.median
    return Entry(name, timing.seconds, timing.median, bandwidth, ratio(timing, ours), ulp)


def _exact_rows(norm: Norm, problem: Problem) -> Array:
    x, weight = problem.x[:ROWS_COMPARED].astype(np.float64), problem.weight.astype(np.float64)
    return norm.forward(x, weight, problem.eps, "reference")


def _threads() -> int:
    import numba

    return int(numba.get_num_threads())


def render(out: Console, cases: Sequence[Case], backend: str) -> None:
    """Print a table for each operation."""
    for norm, direction in dict.fromkeys((case.norm, case.direction) for case in cases):
        chosen = [case for case in cases if (case.norm, case.direction) == (norm, direction)]
        drawn = console.table("shape", "", "time", "GB/s", "slower", "ULP", left=2)
        for case in chosen:
            for index, entry in enumerate(case.entries):
                drawn.add_row(
                    "×".join(map(str, case.shape)) if index == 0 else "",
                    entry.contender,
                    console.seconds(entry.median),
                    f"{entry.bandwidth / 1e9:.1f}",
                    "" if entry.contender == OURS else console.ratio(entry.against_ours),
                    "" if entry.ulp is None else f"{entry.ulp:.2f}",
                    end_section=index == len(case.entries) - 1,
                )
        console.show(
            out,
            f"{norm}, {direction}, {chosen[0].dtype}, {backend} engine",
            "Slower: than rmsnorm_np, median of the rounds and their extremes. GB/s: of the bytes that have to be read "
            "and written. Limit: the same bytes, only moved. ULP: worst error of y, at |y| or "
            "|weight|, whichever is larger.",
            drawn,
        )
