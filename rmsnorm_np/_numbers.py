"""Check the arguments that are numbers: eps, p and weight_offset, any real number, also as a 0-d array; and flags."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from collections.abc import Callable


def check_eps(eps: Any) -> float:
    """Give eps as a float, finite and not negative."""
    return _number("eps", eps, "a finite number >= 0", lambda value: 0.0 <= value < math.inf)


def check_weight_offset(weight_offset: Any, has_weight: bool) -> float:
    """Give weight_offset as a finite float, zero where there is no weight to add it to."""
    offset = _number("weight_offset", weight_offset, "a finite number", math.isfinite)
    if offset != 0.0 and not has_weight:
        raise ValueError(f"weight_offset is {weight_offset!r}, expected 0.0 without a weight to add it to")
    return offset


def elements_in_rms(n: int, p: Any) -> int:
    """Give k = ceil(n * p), the number of leading elements that the RMS is taken over.

    p is a rounded number, and rounding must not add an element: 100 * 0.07 is 7.000000000000001 in floating point.
    p, the product and the factor below are each off by 2**-53 or less, relative; the factor takes off 2**-50. So
    n * p ends up below the integer that was meant, and far above the integer before it for every n < 2**49.
    """
    fraction = _number("p", p, "a number with 0 < p <= 1", lambda value: 0.0 < value <= 1.0)
    if type(p) is not float and isinstance(scalar := _scalar(p), np.floating):
        fraction = float(str(scalar))  # np.float32(0.07) means 0.07 and not 0.07000000029802322
    return math.ceil(n * fraction * (1.0 - 2.0**-50))


def check_scale_ub(scale_ub: Any, scale: Any) -> float:
    """Give the largest magnitude that a row's own scale is made for, infinity for None. A given scale has none."""
    if scale_ub is None:
        return math.inf
    if scale is not None:
        raise ValueError(f"scale_ub is {scale_ub!r}, expected None where scale is given")
    return _number("scale_ub", scale_ub, "a number > 0", lambda value: value > 0.0)


def check_flag(name: str, value: Any) -> bool:
    """Give the value, True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def check_p(p: Any) -> Any:
    """Give p, a number with 0 < p <= 1."""
    elements_in_rms(1, p)
    return _scalar(p)


def _number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    scalar = value if type(value) is float else _scalar(value)
    is_real = isinstance(scalar, Real) and not isinstance(scalar, np.timedelta64)  # an Integral, to NumPy
    if not is_real or isinstance(scalar, bool):
        number = math.nan
    else:
        try:
            number = float(scalar)
        except OverflowError:  # an int larger than any float
            number = math.inf
    if not fits(number):
        raise (ValueError if is_real else TypeError)(f"{name} is {value!r}, expected {expected}")
    return number


def _scalar(value: Any) -> Any:
    """The element of a 0-d array, which is how np.load returns a number; any other value as it is."""
    if isinstance(value, ndarray) and value.ndim == 0:
        value = value[()]
    return np.float32(value) if type(value).__name__ == "bfloat16" else value  # Python knows no bfloat16 as Real
