"""Check the arguments of a call and bring them into the one form that the engines take.

Every error about an argument but `backend` is raised here or in `_arrays`, `_shapes`, `_numbers` and `_gradient_out`;
`_hints` writes the longer messages. Past this file there is no question left about shape, dtype, axis, layout or
missing values: x is (rows, n), or (outer, n, inner) where an engine takes rows whose elements lie apart; C-contiguous,
aligned, in native byte order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy import ndarray

from rmsnorm_np._arrays import (
    as_array,
    check_given,
    check_out,
    contiguous,
    native_dtype,
    native_dtypes,
    outs_of,
    result_dtype,
)
from rmsnorm_np._broadcast import for_engines
from rmsnorm_np._gradient_out import gradient_out
from rmsnorm_np._numbers import check_eps, check_weight_offset, elements_in_rms
from rmsnorm_np._overlap import begin_together, may_write
from rmsnorm_np._shapes import are_trailing, axes_of, check_same_shape, engine_form, parameter_lead

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]
    Restore: TypeAlias = Callable[[Any], Any]
    Shape: TypeAlias = tuple[int, ...]

# all that a public function, an engine or the reference asks about arguments
__all__ = [
    "LONGEST_APART",
    "Call",
    "Checked",
    "as_array",
    "check_given",
    "check_out",
    "column",
    "engine_arguments",
    "gradient_out",
    "is_ordinary_row",
    "native_dtype",
    "native_dtypes",
    "outs_of",
    "prepare",
    "restore_parameter",
    "result_dtype",
]

_INFINITY = math.inf
LONGEST_APART = 1 << 16  # the CPU engine's longest row whose elements may lie apart; longer ones are copied


def is_ordinary(a: Any) -> bool:
    """Whether an engine can read an array as it is."""
    if type(a) is not ndarray or a.dtype not in native_dtypes:
        return False
    flags = a.flags
    # carray says both of an array that can be written to, in one question
    return bool(flags.carray or (flags.c_contiguous and flags.aligned))


def is_ordinary_row(a: Any, n: int) -> bool:
    """Whether an engine can take a weight or bias as it is."""
    return bool(is_ordinary(a) and a.shape == (n,))


# A whole call


class Call(NamedTuple):
    """The arguments of a call, as given. reads: arrays of one shape or None, of which the first gives the shape; names:
    theirs, and then those of out. parameters: weight, bias, weight_offset. out: arrays to write to, or None.
    dtype: of the first result; None for that of the first array.
    """

    names: tuple[str, ...]
    reads: tuple[Any, ...]
    parameters: tuple[Any, Any, Any]
    out: tuple[Any, ...]
    eps: Any
    p: Any
    axis: Any
    dtype: np.dtype[Any] | None = None


class Checked(NamedTuple):
    """The arguments as an engine takes them: reads (rows, n) or (outer, n, inner); weight, bias (m, n); weight_offset,
    or a `Spread` of these where one call to the engine is not enough.

    out: arrays like x that an engine may write straight to, or None. restore: gives results their public shape, and
    writes them to where the caller asked for them.
    """

    reads: tuple[Any, ...]
    parameters: Any
    out: tuple[Any, ...]
    k: int
    eps: float
    restore: Restore


def _result_dtypes(reads: tuple[Any, ...], call: Call) -> list[Any]:
    """The dtype of each result: unless asked for, the first has that of the first array, the second of the second."""
    dtypes: list[Any] = [None if a is None else a.dtype for a in reads[: len(call.out)]]
    if call.dtype is not None:
        dtypes[0] = np.result_type(call.dtype, np.complex64) if dtypes[0].kind == "c" else call.dtype
    return dtypes


def prepare(call: Call, complex_too: bool = False, apart: int | None = None) -> Checked:
    """Check every argument; put the normalised axes last and join them into one of length n.

    Gives reads of shape (..., n), weight and bias of a shape that broadcasts against them; see `Checked`.
    apart: for an engine, up to which n it takes rows whose elements lie apart. Then reads are (rows, n) or, where that
    saves a copy, (outer, n, inner), and weight and bias (m, n) or a `Spread`.
    """
    x_name, *other_names = call.names[: len(call.reads)]
    x = as_array(x_name, call.reads[0])
    shape: Shape = x.shape
    axes = axes_of(call.axis, shape)
    trailing = are_trailing(axes, x.ndim)
    order = (*(i for i in range(x.ndim) if i not in axes), *axes)
    n = math.prod(shape[i] for i in axes)
    takes_apart = apart is not None and n <= apart and x.flags.c_contiguous
    if call.dtype is not None and call.dtype != x.dtype:
        takes_apart = False  # kernels for such rows write y in the dtype of x
    rows_apart = engine_form(shape, axes) if takes_apart else None
    stays = trailing or rows_apart is not None
    if stays:
        order = tuple(range(x.ndim))
    moved = tuple(shape[i] for i in order)
    form: Shape = rows_apart or ((*moved[: x.ndim - len(axes)], n) if apart is None else (-1, n))
    k, eps = elements_in_rms(n, call.p), check_eps(call.eps)
    weight, bias, weight_offset = call.parameters
    weight_offset = check_weight_offset(weight_offset, weight is not None)

    def rows_of(name: str, value: Any) -> Array | None:
        if value is None:
            return None
        a = as_array(name, value)
        check_same_shape(name, a.shape, x_name, shape, call.names)
        return contiguous(a.transpose(order), native_dtype(name, a.dtype, complex_too)).reshape(form)

    def parameter_of(name: str, value: Any) -> tuple[Array | None, Shape | None]:
        if value is None:
            return None, None
        a = as_array(name, value)
        a_dtype = native_dtype(name, a.dtype, complex_too)
        a_lead = parameter_lead(name, a.shape, shape, axes)
        return contiguous(a, a_dtype).reshape(*a_lead, n), a_lead

    reads = (rows_of(x_name, x), *map(rows_of, other_names, call.reads[1:]))
    (weight, weight_lead), (bias, bias_lead) = parameter_of("weight", weight), parameter_of("bias", bias)
    parameters: Any = weight, bias, weight_offset
    if apart is not None:
        parameters = for_engines(parameters, (weight_lead, bias_lead), shape[: x.ndim - len(axes)])

    given: list[Array | None] = []
    direct: list[Array | None] = []
    names = call.names[len(reads) :]
    for name, out, dtype in zip(names, call.out, _result_dtypes(reads, call), strict=True):
        plain = None if out is None else check_out(name, out, shape, dtype, x_name)
        candidate = None
        if plain is not None and stays and plain.flags.carray and plain.dtype == dtype:
            candidate = plain.reshape(form)
        given.append(plain)
        direct.append(candidate if candidate is not None and may_write(candidate, reads, (weight, bias)) else None)
    if len(given) > 1 and given[0] is not None and given[1] is not None and np.shares_memory(given[0], given[1]):
        raise ValueError(f"{names[0]} and {names[1]} share memory, expected two arrays apart")

    def restore(results: Any) -> Any:
        answers = []
        for result, plain, out in zip(results, given, call.out, strict=True):
            answer = out
            if plain is None:
                answer = None if result is None else publicly(result)
            elif not begin_together(result, plain):  # else an engine has written straight to it
                np.copyto(plain, publicly(result))
            answers.append(answer)
        return answers

    def publicly(result: Array) -> Array:
        result = result.reshape(moved)
        return result if stays else np.ascontiguousarray(result.transpose(np.argsort(order)))

    return Checked(reads, parameters, tuple(direct), k, eps, restore)


def engine_arguments(
    call: tuple[Any, ...], dtype: np.dtype[Any] | None = None, apart: int = LONGEST_APART
) -> tuple[Any, ...]:
    """What an engine takes, as `Checked`, of the arguments of a `Call`: plain tuples, which Python makes faster.

    call: its items up to axis. apart: as in `prepare`. restore is None where the engine's results are the answer.
    """
    # The engine needs less than a microsecond for a small array, far less than the checks in `prepare` take. So the
    # ordinary call, of contiguous native arrays and axis -1, goes past them. What is not ordinary is not judged here.
    _, reads, (weight, bias, weight_offset), out, eps, p, axis = call
    x = reads[0]
    if (
        is_ordinary(x)
        and (shape := x.shape)
        and (n := shape[-1]) > 0
        and type(axis) is int
        and axis == -1
        and (
            weight is None
            or (
                type(weight) is ndarray  # without a call of `is_ordinary`
                and weight.dtype in native_dtypes
                and weight.shape == (n,)
                and (weight.flags.carray or is_ordinary(weight))
            )
        )
        and (bias is None or (is_ordinary(bias) and bias.shape == (n,)))
        and ((a := reads[1]) is None or (is_ordinary(a) and a.shape == shape))
        and ((b := reads[-1]) is a or b is None or (is_ordinary(b) and b.shape == shape))
        and (
            (y := out[0]) is None
            or (
                is_ordinary(y)
                and y.flags.writeable
                and y.shape == shape
                and y.dtype == (x.dtype if dtype is None else dtype)
                and may_write(y, reads, (weight, bias))
            )
        )
        and (len(out) == 1 or out[1] is None or _fits(out[1], reads, (weight, bias), y))
    ):
        k = n if type(p) is float and p == 1.0 else elements_in_rms(n, p)
        if not (type(eps) is float and 0.0 <= eps < _INFINITY):
            eps = check_eps(eps)
        if type(weight_offset) is not float or weight_offset != 0.0:
            weight_offset = check_weight_offset(weight_offset, weight is not None)
        if weight is not None:
            weight = weight[None]
        if bias is not None:
            bias = bias[None]
        parameters = weight, bias, weight_offset
        if len(shape) == 2:
            return reads, parameters, out, k, eps, None
        return tuple(map(_rows, reads)), parameters, tuple(map(_rows, out)), k, eps, _reshaping(shape, out)

    return prepare(Call(*call)._replace(dtype=dtype), apart=apart)


def _fits(second: Array, reads: tuple[Any, ...], parameters: tuple[Any, Any], first: Array | None) -> bool:
    """Whether an engine may write straight to the second array of out, which is like the second that is read."""
    like = reads[1]
    return bool(
        is_ordinary(second)
        and second.flags.writeable
        and second.shape == like.shape
        and second.dtype == like.dtype
        and may_write(second, reads, parameters)
        and (first is None or not np.may_share_memory(first, second))
    )


def column(
    name: str, value: Any, parameter_name: str, parameter: Any, prepared: Array | None, out: Any = (),
    complex_too: bool = False,
) -> Array | None:  # fmt: skip
    """What goes along with a weight or bias, such as its tangent: of exactly its shape, in the form it has `prepared`.

    name, parameter_name: of this and of the parameter, in error messages. value, parameter: both as given. out: arrays
    that an engine writes to while it reads this one: a copy, if they share memory.
    """
    if value is None:
        return None
    if prepared is None:
        raise ValueError(f"{name} is given, expected None without a {parameter_name}")
    a = as_array(name, value)
    check_same_shape(name, a.shape, parameter_name, np.shape(parameter))
    a = contiguous(a, native_dtype(name, a.dtype, complex_too)).reshape(prepared.shape)
    return a.copy() if any(y is not None and np.may_share_memory(a, y) for y in out) else a


def restore_parameter(gradient: Array | None, parameter: Any) -> Array | None:
    """The gradient (m, n) of a weight or bias in the shape of that parameter."""
    if gradient is None:
        return None
    shape: Shape = parameter.shape if type(parameter) is ndarray else np.shape(parameter)
    return gradient.reshape(shape)


def _rows(a: Any) -> Any:
    return None if a is None else a.reshape(-1, a.shape[-1])


def _reshaping(shape: Shape, out: tuple[Any, ...]) -> Restore:
    """Results in the shape of x; the array of out where one was written to."""
    return lambda results: [
        wanted if wanted is not None or result is None else result.reshape(shape)
        for result, wanted in zip(results, out, strict=True)
    ]
