"""The largest error of each function in each dtype, in ULP: the table of the page "Numbers".

``python docs/measurements/ulp.py`` prints it, from 512 rows of 2,048 random numbers each, in some minutes. The exact
results are those of tests/family.py, in longdouble, which must be wider than float64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from family import ARGUMENTS, bound_of, call, exact, given
from tolerances import SCALE_ULP, worst_ulp

import rmsnorm_np as rn
from rmsnorm_np.cli.inputs import dtype_named
from rmsnorm_np.ops.quantized import FORMATS

SHAPE = 512, 2048
DTYPES = ("float16", "bfloat16", "float32", "float64")
NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
FUNCTIONS = (*NORMS, *(f"{norm}_backward" for norm in NORMS), *ARGUMENTS)
Errors = dict[tuple[str, str], tuple[float, float]]  # by function and result: the error, its bound


def errors_of_norm(op: str, g) -> Errors:
    """y or dx of a norm, with v in the place of a residual and of dh."""
    adds, norm = op.startswith("add_"), op.removeprefix("add_")
    function, parameters = getattr(rn, op), (g.weight, g.bias)
    if op.endswith("backward"):
        value, terms = exact(norm, spread(g)).rows["dx"]
        if adds:
            value, terms = value + g.v, np.maximum(terms, np.abs(g.v))
        result = function(g.dy, g.v, g.x, *parameters) if adds else function(g.dy, g.x, *parameters)
        return {(op, "dx"): (worst_ulp(result.dx, value, terms), bound_of(op, "dx", g.x.dtype))}
    y, h = function(g.x, g.v, *parameters) if adds else (function(g.x, *parameters), g.x)
    return {(op, "y"): (worst_ulp(y, *exact(norm, spread(g._replace(x=h))).rows["y"]), bound_of(op, "y", g.x.dtype))}


def errors_of_family(op: str, g) -> Errors:
    """All results with the shape of x, of a function beside the norms."""
    results = call(op, g)
    label = op.replace(" after", ", gate first")
    return {
        (label, name): (worst_ulp(results[name], *want), bound_of(op, name, g.x.dtype))
        for name, want in exact(op, spread(g)).rows.items()
    }


def errors_quantised(name: str, g) -> Errors:
    """The scale in ULP; and q, as a multiple of the distance between numbers of the format there."""
    to = FORMATS[name]
    q, scale, _ = rn.quantized_rms_norm(g.x, g.weight, g.bias, dtype=name)
    y = exact("rms_norm", spread(g)).rows["y"][0]
    want = np.max(np.abs(y), axis=1, keepdims=True) / np.longdouble(to.largest)
    quotient = y / scale.astype(np.longdouble)
    step = np.ldexp(1.0, np.maximum(np.frexp(quotient)[1] - 1, to.exponent) - to.bits)
    off = float(np.max(np.abs(q.astype(np.longdouble) - np.clip(quotient, to.lowest, to.highest)) / step))
    op = f"quantized_rms_norm, {name}"
    return {(op, "scale"): (worst_ulp(scale, want), SCALE_ULP[g.x.dtype.name]), (op, "q"): (off, 0.5)}


def spread(g):
    """With a row of each parameter for each row of x, as the exact formulas want it."""
    return g._replace(**{name: np.broadcast_to(getattr(g, name), g.x.shape) for name in g._fields[4:]})


def measure(dtype_name: str) -> Errors:
    """Of all functions, in one dtype."""
    g = given(np.random.default_rng(0), SHAPE, dtype_named(dtype_name))
    found: Errors = {}
    for op in FUNCTIONS:
        found |= errors_of_family(op, g) if op in ARGUMENTS else errors_of_norm(op, g)
    for name in FORMATS:
        found |= errors_quantised(name, g)
    return found


if __name__ == "__main__":
    by_dtype = {name: measure(name) for name in DTYPES}
    lines = [["function", "result", *DTYPES, "bound of float64"], ["---"] * 7]
    for op, result in by_dtype["float64"]:
        figures = [by_dtype[name][op, result] for name in DTYPES]
        lines.append([f"`{op}`", result, *(f"{error:.3f}" for error, _ in figures), f"{figures[-1][1]:g}"])
    sys.stdout.writelines(f"| {' | '.join(cells)} |\n" for cells in lines)
