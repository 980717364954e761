"""RMSNorm in 8 bits, with a scale for each row: its own, or one that is given.

Of a row with n elements::

    scale = max(min(max_i |y_i|, scale_ub) / largest, 2**-126), rounded to its dtype
    q     = y / scale, rounded to the nearest number of the format (of two the even one), and saturated

y is that of `rms`, not rounded. The settings of a row, in the place of eps: (eps, the scale that is given, scale_ub).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from rmsnorm_np.ops import rms
from rmsnorm_np.ops.operation import Columns, Extent, Operation, Reads, Stage, scale
from rmsnorm_np.ops.primitives import (
    as_single,
    constant,
    either,
    exceeds,
    largest_magnitude,
    over,
    over_known,
    power_below,
    rounded,
    scaled_and_shifted,
    times,
    with_sign,
)

UNROUNDED = rms.RMS_NORM  # y, before it is rounded to 8 bits
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: a row of zeros has this scale


class Format(NamedTuple):
    """Finite numbers from `lowest` to `highest`, 2**(max(e, exponent) - bits) apart around 2**e.

    largest is what the largest element of a row becomes, where the row decides about its scale.
    """

    lowest: float
    highest: float
    largest: float
    bits: int  # behind the leading one
    exponent: int  # of the smallest normal number
    has_nan: bool  # if not, 0 takes its place


FORMATS = {
    "int8": Format(-128.0, 127.0, 127.0, 7, 7, False),  # 1 apart everywhere, as subnormal numbers are
    "float8_e4m3fn": Format(-448.0, 448.0, 448.0, 3, -6, True),
    "float8_e5m2": Format(-57344.0, 57344.0, 57344.0, 2, -14, True),
}


class Writes(NamedTuple):
    q: Any
    h: Any = None


class Largest(NamedTuple):
    y: Any  # the largest magnitude; NaN if there is one


class Numbers(NamedTuple):
    rstd: Any
    scale: Any
    inverse: Any = None  # 1 / scale, where that is a float32: a float64 has room for it


def normed(h: Any, m: Any, c: Columns) -> Any:
    return scaled_and_shifted(times(h, m.rstd), scale(c), c.bias)


def rstd(s: rms.Squares, n: Any, k: Any, settings: Any, m: None) -> rms.Rstd:
    return rms.rstd(s, n, k, settings[0], m)


def add_magnitude(s: Largest, h: Any, c: Columns, m: rms.Rstd, inside: Any) -> Largest:
    return Largest(largest_magnitude(s.y, rounded(normed(h, m, c))))


def extent_of_two(s: Largest, n: Any, k: Any, settings: Any, m: rms.Rstd) -> Extent:
    return Extent((rounded(m.rstd) * rounded(m.rstd),))


def extent_of_one(s: rms.Squares, n: Any, k: Any, settings: Any, m: None) -> Extent:
    return rms.extent(s, n, k, settings[0], m)


def quantized(value: Any, to: Format) -> Any:
    """The nearest number of the format, a plain number. NaN stays."""
    for bound, beyond in ((to.highest, exceeds(value, constant(to.highest, value))),
                          (to.lowest, exceeds(constant(to.lowest, value), value))):  # fmt: skip
        value = either(beyond, constant(bound, value), value)
    least = constant(2.0**to.exponent, value)
    if -to.lowest <= 2.0**to.exponent:  # the same distance everywhere
        unit = least
    else:
        power = power_below(value)
        unit = either(exceeds(power, least), power, least)
    # what is added is so large that the sum has the format's last digit, and is taken away again
    shift = unit * (1.5 * 2.0 ** (52 - to.bits))
    found = (value + shift) - shift
    return with_sign(found, value) if to.has_nan else found  # int8 has one zero


@cache
def quantized_rms_norm(name: str, given: bool, single: bool) -> Operation:
    """The operation for the format of this name. given: whether the scale is; single: whether it is a float32."""
    to = FORMATS[name]

    def numbers(rstd: Any, scale: Any) -> Numbers:
        return Numbers(rstd, scale, over(constant(1.0, scale), scale) if single else None)

    def given_scale(s: rms.Squares, n: Any, k: Any, settings: Any, m: None) -> Numbers:
        return numbers(rms.rstd(s, n, k, settings[0], m).rstd, settings[1])

    def own_scale(s: Largest, n: Any, k: Any, settings: Any, m: rms.Rstd) -> Numbers:
        y, bound = rounded(s.y), settings[2]
        y = either(exceeds(y, bound), bound, y) / to.largest
        smallest = constant(SMALLEST_SCALE, y)
        y = either(exceeds(smallest, y), smallest, y)
        return numbers(m.rstd, as_single(y) if single else y)

    def q(h: Any, m: Numbers, c: Columns, inside: Any) -> Writes:
        y = normed(h, m, c)
        return Writes(quantized(rounded(over_known(y, m.scale, m.inverse) if single else over(y, m.scale)), to))

    add = rms.RMS_NORM.stages[0].add
    stages: tuple[Stage, ...] = (Stage(rms.Squares, add, given_scale, True),)
    if not given:
        stages = Stage(rms.Squares, add, rstd, True), Stage(Largest, add_magnitude, own_scale, largest=True)
    return Operation(
        f"quantized_rms_norm {name} {'given' if given else 'own'} {'float32' if single else 'float64'}",
        Reads,
        Writes,
        rms.enter,
        stages,
        q,
        extent_of_one if given else extent_of_two,
        keep="h",
        scales="in" if given else "out",
    )
