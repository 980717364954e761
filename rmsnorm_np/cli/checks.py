"""Check the CPU engine on the real activations. Everything here returns plain data; nothing is printed.

``python -m rmsnorm_np.cli.checks DTYPE ...`` only compiles what the checks of these dtypes need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rmsnorm_np.cli import ahead, plain
from rmsnorm_np.cli.inputs import LAYERS, NORMS, Activation, Array, Norm, activations, dtype_named
from rmsnorm_np.ulp import ulp_error

Step = Callable[[str], None]

# In ULP. The reference is exact for the three narrow types. For float64 it is itself rounded to float64, hence the
# engine's bound of 1 and one half on top.
BOUNDS = {"float16": 0.51, "bfloat16": 0.51, "float32": 0.51, "float64": 1.5}

# How each engine's gradient is checked: Numba's kernels take no complex numbers.
METHODS: dict[str, Literal["complex-step", "finite-difference"]] = {
    "reference": "complex-step",
    "cpu": "finite-difference",
}
GRADIENT_ROWS = 4  # of each layer; a derivative takes about a hundred calls


@dataclass(frozen=True)
class InputStats:
    """The size of the numbers that enter a layer."""

    rms: float
    median: float  # of the absolute values
    largest: float  # absolute value


@dataclass(frozen=True)
class Error:
    """The worst errors of one norm in one dtype, in ULP of that dtype."""

    norm: str
    dtype: str
    y: float  # and of h, where the norm adds
    dx: float
    dweight: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether all three are in bounds; a NaN is not."""
        return all(error <= self.bound for error in (self.y, self.dx, self.dweight))


@dataclass(frozen=True)
class Gradient:
    """The verdict of `rmsnorm_np.gradcheck` on one norm in float64; the figures are relative."""

    norm: str
    backend: str
    method: str
    verdict: str
    error: float
    estimate_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the gradient was found right; inconclusive is not enough."""
        return self.verdict == "right"


@dataclass(frozen=True)
class Naive:
    """The errors of ``x / sqrt(mean(x * x) + eps) * weight`` with every step in x's dtype."""

    dtype: str
    lost_rows: int  # rows that came out as zeros or not finite
    rows: int
    ulp: float  # the worst error of the rows that are left


@dataclass(frozen=True)
class LayerCheck:
    """Everything that is looked at for one layer."""

    layer: str
    input: InputStats
    errors: tuple[Error, ...]
    gradients: tuple[Gradient, ...]
    naive: tuple[Naive, ...]

    @property
    def passed(self) -> bool:
        """Whether every check of this layer passed."""
        return all(error.passed for error in self.errors) and all(gradient.passed for gradient in self.gradients)


def dtypes() -> list[np.dtype[Any]]:
    """The types to check. float64 only where the reference has something wider to compute in."""
    names = ["float32", "float16", "bfloat16"]
    if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps:
        names.append("float64")
    return [dtype_named(name) for name in names]


def count_steps() -> int:
    """How often `check` calls its ``step``."""
    return len(LAYERS) * (len(NORMS) * len(dtypes()) + 1) + 1


def check(step: Step) -> list[LayerCheck]:
    """Check all layers; ``step`` is told what comes next."""
    layers = activations()
    errors: dict[str, list[Error]] = {layer: [] for layer in LAYERS}
    here, elsewhere = dtypes()[:2], dtypes()[2:]
    with ahead.running(__name__, *(dtype.name for dtype in elsewhere)) as wait_for_kernels:
        for dtype in (*here, *elsewhere):
            if dtype is elsewhere[0]:
                step("waiting for the second process to compile")
                wait_for_kernels()
            for activation in layers:
                for norm in NORMS:
                    step(f"{dtype.name} {norm.label}, layer {activation.layer}")
                    errors[activation.layer].append(check_engine(norm, activation, dtype))
    results = []
    for activation in layers:
        step(f"gradients, layer {activation.layer}")
        gradients = tuple(check_gradients(norm, activation, backend) for norm in NORMS for backend in METHODS)
        naive = tuple(check_naive(activation, np.dtype(dtype)) for dtype in (np.float16, np.float32))
        stats = describe(activation.x)
        results.append(LayerCheck(activation.layer, stats, tuple(errors[activation.layer]), gradients, naive))
    return results


def describe(x: Array) -> InputStats:
    """The size of the numbers in x."""
    magnitude = np.abs(x.astype(np.float64))
    return InputStats(float(np.sqrt(np.mean(magnitude**2))), float(np.median(magnitude)), float(magnitude.max()))


def another(array: Array) -> Array:
    """An array of the same shape and dtype with other numbers of the same size: its rows in reverse order."""
    reverse: Array = array[::-1].copy()
    return reverse


def check_engine(norm: Norm, activation: Activation, dtype: np.dtype[Any]) -> Error:
    """Compare the CPU engine with the reference; the reference gets the same numbers, as float64."""
    x, weight = activation.x.astype(dtype), activation.weight.astype(dtype)
    dy = np.random.default_rng(0).standard_normal(x.shape).astype(dtype)
    residual, dh = (another(x), another(dy)) if norm.adds else (None, None)
    eps, alone = activation.eps, norm.alone()
    y = norm.forward(x, weight, eps, "cpu", residual=residual)
    error_of_h = 0.0
    if residual is not None:  # from here on x is h, which all else is about
        exact_h = x.astype(np.float64) + residual.astype(np.float64)
        y, x = y
        error_of_h = ulp_error(x, exact_h)
    wide_x, wide_weight, wide_dy = (array.astype(np.float64) for array in (x, weight, dy))
    wide_dh = np.zeros_like(wide_dy) if dh is None else dh.astype(np.float64)
    dx, dweight, _ = norm.backward(dy, x, weight, eps, "cpu", dh=dh)
    exact_y = alone.forward(wide_x, wide_weight, eps, "reference")
    exact_dx, exact_dweight, _ = norm.backward(wide_dy, wide_x, wide_weight, eps, "reference", dh=wide_dh)
    xhat = alone.forward(wide_x, np.ones_like(wide_weight), eps, "reference")
    centred = wide_x - wide_x.mean(axis=-1, keepdims=True) if norm.centres else wide_x
    rstd = np.linalg.norm(xhat, axis=-1, keepdims=True) / np.linalg.norm(centred, axis=-1, keepdims=True)
    # Where x is close to the row's mean, the reference's own mean is not exact enough to tell the last digits of y.
    reference_eps = 4 * float(np.finfo(np.longdouble).eps) if norm.centres else 0.0
    mean_error = reference_eps * np.mean(np.abs(wide_x), axis=-1, keepdims=True) * rstd * np.abs(wide_weight)
    # dx is a sum of terms that may cancel: its error is measured against the largest of them.
    outer_term = rstd * wide_dy * wide_weight
    largest_term = np.max(np.abs([outer_term, exact_dx - outer_term - wide_dh, wide_dh]), axis=0)
    # dweight is a sum over rows in float64, rounded at the end: the sum's own error does not count, nor that of its
    # terms, which are float32 for 16-bit types: five roundings.
    term_error = 5 * 2.0**-24 if dtype.itemsize == 2 else 0.0
    sum_error = (len(x) * 2.0**-53 + term_error) * np.abs(wide_dy * xhat).sum(axis=0)
    return Error(
        norm.label,
        dtype.name,
        float(np.maximum(ulp_error(y, exact_y, forgiven=mean_error), error_of_h)),  # NaN if one is
        ulp_error(dx, exact_dx, scale=largest_term),
        ulp_error(dweight, exact_dweight, forgiven=sum_error),
        BOUNDS[dtype.name],
    )


def check_gradients(norm: Norm, activation: Activation, backend: str) -> Gradient:
    """Compare dx and dweight of one engine with numerical derivatives of the same engine's y, in float64."""
    from rmsnorm_np.gradcheck import check_gradient

    x, weight = activation.x[:GRADIENT_ROWS].astype(np.float64), activation.weight.astype(np.float64)
    residual = another(x)

    def function(x: Array, weight: Array) -> Array:
        result = norm.forward(x, weight, activation.eps, backend, residual=residual)
        return np.stack(result) if norm.adds else result

    def gradient(dy: Array, x: Array, weight: Array) -> tuple[Any, ...]:
        if not norm.adds:
            return norm.backward(dy, x, weight, activation.eps, backend)
        return norm.backward(dy[0], x + residual, weight, activation.eps, backend, dh=dy[1])

    found = check_gradient(function, gradient, x, weight, method=METHODS[backend])
    tolerance = max(part.tolerance for part in found.inputs)
    return Gradient(norm.label, backend, found.method, found.verdict, found.error, found.estimate_error, tolerance)


def check_naive(activation: Activation, dtype: np.dtype[Any]) -> Naive:
    """The errors of the norm as one writes it first, every step in `dtype`."""
    x, weight = activation.x.astype(dtype), activation.weight.astype(dtype)
    exact = NORMS[0].forward(x.astype(np.float64), weight.astype(np.float64), activation.eps, "reference")
    with np.errstate(over="ignore", invalid="ignore"):  # the overflow is what this is about
        y = plain.forward(NORMS[0], x, weight, activation.eps)
    kept = np.isfinite(y).all(axis=-1) & (y != 0).any(axis=-1)
    return Naive(dtype.name, int((~kept).sum()), len(x), ulp_error(y[kept], exact[kept]))


def compile_for(names: Sequence[str]) -> None:
    """Run the checks of these dtypes on one layer, for the kernels that they compile."""
    activation = activations()[0]
    for dtype in dtypes():
        for norm in NORMS:
            if dtype.name in names:
                check_engine(norm, activation, dtype)
                if dtype.name == "float64":
                    check_gradients(norm, activation, "cpu")


if __name__ == "__main__":
    compile_for(sys.argv[1:])
