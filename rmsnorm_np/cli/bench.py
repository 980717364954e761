"""`bench`: the norms against each installed peer, in turn, with the same numbers in the same dtype.

The functions beside the norms are in `family`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console

import rmsnorm_np as rn
from rmsnorm_np.cli import console, device, family, limit, peers, plot
from rmsnorm_np.cli.cases import DIRECTIONS, LIMIT, OURS, OURS_INTO, Case, Entry
from rmsnorm_np.cli.checks import Step, another
from rmsnorm_np.cli.inputs import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM, Array, Norm, dtype_named
from rmsnorm_np.cli.peers import PEERS, Problem
from rmsnorm_np.cli.timing import Call, Timing, interleave, ratio
from rmsnorm_np.ulp import ulp_error

NORMS = (RMS_NORM, LAYER_NORM)
BY_NAME = {norm.op: norm for norm in (*NORMS, ADD_RMS_NORM, ADD_LAYER_NORM)}
EPS = 1e-6
ROWS_COMPARED = 16  # for the error of y; enough to show a library's rounding


def bench(
    shapes: Sequence[tuple[int, int]],
    dtype: str,
    backend: str,
    rounds: int,
    as_json: bool,
    path: str | None,
    only: Sequence[str] | None,
    ops: Sequence[str],
) -> int:
    """Measure, print and draw; always 0, a benchmark has no wrong answer.

    What cannot work is refused before anything is timed, with `argparse.ArgumentError`.
    """
    if backend == "cuda":
        device.require()
        if only:
            raise argparse.ArgumentError(None, "argument --peers: they run on the CPU, and the backend is 'cuda'")
        only = ()
        beside = [op for op in ops if op in family.FAMILY]
        if beside:
            raise argparse.ArgumentError(None, f"argument --norms: {beside[0]} is timed on the CPU alone")
    chosen = peers.require(only)
    if path is not None:
        plot.require(path)
    ways = sum(len(family.FAMILY[op].ways) if op in family.FAMILY else len(DIRECTIONS) for op in ops)
    with console.progress(len(shapes) * ways) as step:
        cases = list(measure(shapes, dtype_named(dtype), backend, rounds, step, chosen, ops))
    if as_json:
        console.print_json({"backend": backend, "peers": peers.versions(chosen), "cases": cases})
    else:
        render(console.stdout(), cases, backend, chosen)
    if path is not None:
        plot.draw(cases, path)
    return 0


def measure(
    shapes: Sequence[tuple[int, int]],
    dtype: np.dtype[Any],
    backend: str,
    rounds: int,
    step: Step,
    only: Sequence[str] = PEERS,
    ops: Sequence[str] = ("rms_norm", "layer_norm"),
) -> Iterator[Case]:
    """One `Case` after the other, with no other peers than these; ``step`` is told what comes next."""
    rng = np.random.default_rng(0)
    for shape in shapes:
        x, dy = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(2))
        weight = rng.uniform(0.5, 1.5, shape[1]).astype(dtype)
        for op in ops:
            if op in family.FAMILY:
                yield from family.measure(op, family.arrays_of(x, weight, dy), backend, rounds, only, step)
                continue
            norm = BY_NAME[op]
            beside = (another(x), another(dy)) if norm.adds else (None, None)
            for direction in DIRECTIONS:
                step(f"{norm.label} {direction}, {shape[0]}×{shape[1]}")
                problem = Problem(norm.op, direction, x, weight, dy, EPS, *beside)
                yield _measure_case(norm, problem, backend, rounds, only)


def _measure_case(norm: Norm, problem: Problem, backend: str, rounds: int, only: Sequence[str]) -> Case:
    if backend == "cuda":
        contenders = _our_calls(norm, device.moved(problem), backend, device.empty_like)
        contenders[LIMIT] = device.copies(norm.arrays_moved(problem.direction) * problem.x.nbytes)
        timings = interleave(contenders, rounds=rounds, measure=device.seconds)
    else:
        contenders = _our_calls(norm, problem, backend, np.empty_like)
        contenders[LIMIT] = limit.calls(problem.x.nbytes, norm.adds)[problem.direction]
        contenders.update(peers.calls(problem, rn.get_num_threads(), only))
        timings = interleave(contenders, rounds=rounds)
    exact = _exact_rows(norm, problem)
    nbytes = norm.arrays_moved(problem.direction) * problem.x.nbytes
    entries = (
        _entry(name, timings[name], timings[OURS], problem, exact, call, nbytes) for name, call in contenders.items()
    )
    return Case(norm.label, problem.direction, problem.x.dtype.name, problem.x.shape, tuple(entries))


def _our_calls(norm: Norm, problem: Problem, backend: str, empty_like: Callable[[Any], Any]) -> dict[str, Call]:
    x, weight, dy, eps, residual, dh = (
        problem.x, problem.weight, problem.dy, problem.eps, problem.residual, problem.dh
    )  # fmt: skip
    y: Any = (empty_like(x), empty_like(x)) if norm.adds else empty_like(x)
    dx = empty_like(x)

    def forward(out: Any = None) -> Any:
        return norm.forward(x, weight, eps, backend, out, residual)

    def forward_into() -> Any:
        return forward(y)

    def both() -> object:
        found = forward()
        return found, norm.backward(dy, found.h if norm.adds else x, weight, eps, backend, None, dh)

    def both_into() -> object:
        found = forward(y)
        return found, norm.backward(dy, found.h if norm.adds else x, weight, eps, backend, dx, dh)

    if problem.direction == "forward":
        return {OURS: forward, OURS_INTO: forward_into}
    return {OURS: both, OURS_INTO: both_into}


def _entry(name: str, timing: Timing, ours: Timing, problem: Problem, exact: Array, call: Call, nbytes: int) -> Entry:
    ulp = None
    if problem.direction == "forward" and name != LIMIT:
        result: Any = call()
        y = peers.as_numpy(result if problem.residual is None else result[0])[: len(exact)].astype(problem.x.dtype)
        ulp = ulp_error(y, exact, scale=np.abs(problem.weight.astype(np.float64)))
    return Entry(name, timing.seconds, timing.median, nbytes / timing.median, ratio(timing, ours), ulp)


def _exact_rows(norm: Norm, problem: Problem) -> Array:
    x, weight = problem.x[:ROWS_COMPARED], problem.weight.astype(np.float64)
    if problem.residual is not None:
        x = rn.reference.add_rms_norm(x, problem.residual[:ROWS_COMPARED]).h
    exact: Array = norm.alone().forward(x.astype(np.float64), weight, problem.eps, "reference")
    return exact


def render(out: Console, cases: Sequence[Case], backend: str, chosen: Sequence[str] = ()) -> None:
    """Print a table for each operation, and below the last one what the columns mean."""
    for norm, direction in dict.fromkeys((case.norm, case.direction) for case in cases):
        grouped = [case for case in cases if (case.norm, case.direction) == (norm, direction)]
        drawn = console.table("shape", "", "time", "GB/s", "time ratio", "ULP", left=2)
        for case in grouped:
            for index, entry in enumerate(case.entries):
                drawn.add_row(
                    "×".join(map(str, case.shape)) if index == 0 else "",
                    entry.contender,
                    console.seconds(entry.median),
                    console.three_digits(entry.bandwidth / 1e9),
                    "" if entry.contender == OURS else console.ratio(entry.against_ours),
                    "" if entry.ulp is None else f"{entry.ulp:.2f}",
                    end_section=index == len(case.entries) - 1,
                )
        console.show(out, f"{norm}, {direction}, {grouped[0].dtype}, {backend} engine", drawn)
    console.legend(
        out,
        "Time ratio: to rmsnorm_np's time; median of the rounds, in brackets their extremes. GB/s: the bytes that the "
        "operation has to read and write, over its time. limit: a loop that only moves the same bytes. ULP: largest "
        "error of y, in units in the last place at |y| or |weight|, whichever is larger; of functions beside the norms "
        "at |y| or the row's mean |y|.",
    )
    timed = {entry.contender.split()[0] for case in cases for entry in case.entries}
    without = [name for name in chosen if name not in timed]
    if without:
        console.legend(out, f"Not timed, as they have no {cases[0].dtype} kernel for this: {', '.join(without)}.")
