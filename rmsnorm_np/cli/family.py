"""The functions beside the norms, as the command line times and checks them: a table of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

import rmsnorm_np as rn
from rmsnorm_np.cli import checks, compositions, console, limit, peers
from rmsnorm_np.cli.cases import LIMIT, OURS, OURS_INTO, Case, Entry
from rmsnorm_np.cli.inputs import Array, activations
from rmsnorm_np.cli.timing import Call, interleave, ratio
from rmsnorm_np.ulp import ulp_error

Arrays = dict[str, Any]

EPS = 1e-6
ROWS_COMPARED = 16
NORMS = ("rms_norm", "rms_norm_backward", "layer_norm", "layer_norm_backward")  # which `checks` checks
# half an ULP for the reference, and what the page "Numbers" has, of the result for which it is largest
FLOAT64_BOUNDS = {"gated_rms_norm": 6.0, "gated_rms_norm_backward": 12.0, "quantized_rms_norm": 1.6}
ROWS = ("x", "gate", "dy", "x_dot")  # arrays of the shape of x; the others are one row


class Step(NamedTuple):
    """One call: a function, the names of its arguments, and of its results that have the shape of x."""

    function: str
    arguments: str
    results: str

    def moved(self, itemsize: int) -> float:
        """How many arrays of x's size it has to read and write; q has elements of a byte."""
        rows = [name for name in self.arguments.split() if name in ROWS] + self.results.split()
        return sum(1 / itemsize if name == "q" else 1 for name in rows)


@dataclass(frozen=True)
class Function:
    """What is timed under one name. ways: directions, each so many of the steps, from the first on."""

    label: str
    steps: tuple[Step, ...]
    ways: tuple[tuple[str, int], ...]


_BOTH = ("forward", 1), ("forward+backward", 2)


def _of_norm(norm: str, label: str) -> dict[str, Function]:
    """Forward mode, and two derivatives, of a norm."""
    along = Step(f"{norm}_jvp", "x weight none x_dot weight_dot none", "y_dot")
    twice = Step(f"{norm}_double_backward", "x_dot weight_dot none dy x weight", "ddy dx")
    steps = Step(norm, "x weight", "y"), Step(f"{norm}_backward", "dy x weight", "dx"), twice
    return {
        along.function: Function(label, (along,), (("forward mode", 1),)),
        twice.function: Function(label, steps, (("forward+backward+double backward", 3),)),
    }


FAMILY = {
    "l2_norm": Function(
        "L2 norm", (Step("l2_norm", "x weight", "y"), Step("l2_norm_backward", "dy x weight", "dx")), _BOTH
    ),
    "gated_rms_norm": Function(
        "gated RMSNorm",
        (
            Step("gated_rms_norm", "x gate weight", "y"),
            Step("gated_rms_norm_backward", "dy x gate weight", "dx dgate"),
        ),
        _BOTH,
    ),
    "quantized_rms_norm": Function("RMSNorm, int8", (Step("quantized_rms_norm", "x weight", "q"),), _BOTH[:1]),
    **_of_norm("rms_norm", "RMSNorm"),
    **_of_norm("layer_norm", "LayerNorm"),
}


def arrays_of(x: Array, weight: Array, dy: Array) -> Arrays:
    """All arrays that a step can name: those beside x, weight and dy are made of them."""
    beside = {"gate": dy[::-1, ::-1], "x_dot": dy[::-1], "weight_dot": weight[::-1]}
    return {"x": x, "weight": weight, "dy": dy, "none": None} | {name: a.copy() for name, a in beside.items()}


def run(step: Step, arrays: Arrays, eps: float, backend: str, out: Any = None) -> tuple[Any, ...]:
    """The results of a step."""
    given = [arrays[name] for name in step.arguments.split()]
    result = getattr(rn, step.function)(*given, eps=eps, backend=backend, out=out)
    return result if isinstance(result, tuple) else (result,)


def measure(
    op: str, arrays: Arrays, backend: str, rounds: int, only: Sequence[str], say: Callable[[str], None]
) -> Iterator[Case]:
    """One `Case` for each direction of a function of `FAMILY`; ``say`` is told what comes next."""
    function, x = FAMILY[op], arrays["x"]
    for direction, count in function.ways:
        say(f"{function.label} {direction}, {x.shape[0]}×{x.shape[1]}")
        steps = function.steps[:count]
        nbytes = round(sum(step.moved(x.itemsize) for step in steps) * x.nbytes)
        contenders = _our_calls(steps, arrays, backend)
        contenders[LIMIT] = limit.calls(nbytes // 2)["forward"]  # as many bytes, half of them written
        if "torch" in only:
            contenders |= compositions.torch_calls(op, direction, arrays, EPS, rn.get_num_threads())
        timings = interleave(contenders, rounds=rounds)
        exact = _exact_rows(steps[0], arrays) if count == 1 else None
        entries = tuple(
            Entry(name, timing.seconds, timing.median, nbytes / timing.median, ratio(timing, timings[OURS]),
                  None if name == LIMIT else _error(contenders[name], exact, x.dtype))
            for name, timing in timings.items()
        )  # fmt: skip
        yield Case(function.label, direction, x.dtype.name, x.shape, entries)


def _our_calls(steps: Sequence[Step], arrays: Arrays, backend: str) -> dict[str, Call]:
    def new(step: Step) -> Any:
        made = [np.empty_like(arrays["x"], np.int8 if name == "q" else None) for name in step.results.split()]
        return tuple(made) if len(made) > 1 else made[0]

    outs = [new(step) for step in steps]

    def call() -> Any:
        return [run(step, arrays, EPS, backend) for step in steps][-1]

    def call_into() -> Any:
        return [run(step, arrays, EPS, backend, out) for step, out in zip(steps, outs, strict=True)][-1]

    return {OURS: call, OURS_INTO: call_into}


def _exact_rows(step: Step, arrays: Arrays) -> Array | None:
    """The first rows of the result, of the reference; None for 8 bits."""
    if step.results == "q":
        return None
    some = {name: a[:ROWS_COMPARED] if name in ROWS else a for name, a in arrays.items()}
    exact: Array = run(step, as_float64(some), EPS, "reference")[0]
    return exact


def as_float64(arrays: Arrays) -> Arrays:
    """The same numbers, for the reference to be exact with."""
    return {name: None if a is None else a.astype(np.float64) for name, a in arrays.items()}


def _error(call: Call, exact: Array | None, dtype: np.dtype[Any]) -> float | None:
    """In ULP at |y| or the row's mean |y|, whichever is larger."""
    if exact is None:
        return None
    result: Any = call()
    y = peers.as_numpy(result[0] if isinstance(result, tuple) else result)[: len(exact)].astype(dtype)
    return ulp_error(y, exact, scale=np.mean(np.abs(exact), axis=-1, keepdims=True))


# ---------------------------------------------------------------------------------------------------------------- check


@dataclass(frozen=True)
class Error:
    """The largest error of a result over all layers, in ULP at the row's largest magnitude; of q, in its own steps."""

    function: str
    result: str
    dtype: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether it is in bounds; a NaN is not."""
        return self.error <= self.bound


def check(ops: Sequence[str], as_json: bool) -> int:
    """Compare these functions of `FAMILY` with the reference on the real activations; 1 if one is out of bounds."""
    steps = [step for op in ops for step in FAMILY[op].steps if step.function not in NORMS]
    with console.progress(len(checks.dtypes()) * len(steps)) as say:
        errors = [error for dtype in checks.dtypes() for step in steps for error in check_step(step, dtype, say)]
    passed = all(error.passed for error in errors)
    if as_json:
        console.print_json({"passed": passed, "errors": errors})
    else:
        render_errors(console.stdout(), errors)
    return 0 if passed else 1


def check_step(step: Step, dtype: np.dtype[Any], say: Callable[[str], None]) -> list[Error]:
    """The errors of each result of the CPU engine; the reference gets the same numbers, as float64."""
    say(f"{dtype.name} {step.function}")
    quantised = step.results == "q"
    worst = dict.fromkeys(("scale", "q") if quantised else step.results.split(), 0.0)
    for activation in activations():
        dy = np.random.default_rng(0).standard_normal(activation.x.shape)
        arrays = arrays_of(*(a.astype(dtype) for a in (activation.x, activation.weight, dy)))
        got = run(step, arrays, activation.eps, "cpu")
        wide = as_float64(arrays)
        exact = run(step, wide, activation.eps, "reference")
        if quantised:
            y = rn.reference.rms_norm(wide["x"], wide["weight"], eps=activation.eps)
            found = [ulp_error(got[1], exact[1]), float(np.max(np.abs(got[0] - y / got[1])))]
        else:
            found = [
                ulp_error(a, want, scale=np.max(np.abs(want), axis=-1, keepdims=True))
                for a, want in zip(got, exact[: len(worst)], strict=False)
            ]
        worst = {name: float(np.maximum(worst[name], error)) for name, error in zip(worst, found, strict=True)}
    bound = checks.BOUNDS[dtype.name]
    if dtype == np.float64:
        bound = FLOAT64_BOUNDS.get(step.function, bound)
    return [Error(step.function, name, dtype.name, error, bound) for name, error in worst.items()]


def render_errors(out: Console, errors: Sequence[Error]) -> None:
    """Print the table."""
    names = list(dict.fromkeys(error.dtype for error in errors))
    drawn = console.table("function", "result", *names, left=2)
    for function, result in dict.fromkeys((error.function, error.result) for error in errors):
        found = [error for error in errors if (error.function, error.result) == (function, result)]
        cells = (Text(f"{error.error:.2f}", style="" if error.passed else "bold red") for error in found)
        drawn.add_row(function, result, *cells)
    legend = (
        "At the largest magnitude of a row. In float64 the reference is rounded itself, and silu is no pair. Of q: in "
    )
    console.show(out, "CPU engine against the reference, largest error in ULP", drawn, legend + "steps of int8.")
    failed = ", ".join(dict.fromkeys(error.function for error in errors if not error.passed))
    out.print(f"FAILED: {failed}" if failed else "All checks passed.", style="bold red" if failed else "bold green")
