"""Calls of the norms, and of the functions beside them, as hypothesis draws them, right ones and wrong ones, and what
has to become of each.

All arrays of a call are views of one arena of bytes, so that every byte can be compared afterwards, those between the
elements of an array too, and so that `out` can lie across whatever else there is.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import ml_dtypes
import numpy as np
from conftest import DTYPES
from family import Given, bound_of, exact, silu
from hypothesis import strategies as st
from tolerances import DX_ULP, Y_ULP, dx_terms, parameter_tolerance, spacing, ulp_distance, worst_ulp

import rmsnorm_np as rn
from rmsnorm_np import _arguments
from rmsnorm_np.reference._common import summed


class Signature(NamedTuple):
    """What a function takes beside x, weight, bias and the numbers that all have.

    rows: arrays of x's shape; maybe: others, which may be None; along: what goes along with weight and bias, of their
    shapes; outs: the arguments that results are written to, and whose dtype each has; options: further ones.
    """

    rows: tuple[str, ...] = ()
    maybe: tuple[str, ...] = ()
    along: tuple[str, ...] = ()
    outs: tuple[tuple[str, str], ...] = (("out", "x"),)
    options: tuple[str, ...] = ()


_BACKWARD = Signature(("dy",))
_JVP = Signature((), ("x_dot",), ("weight_dot", "bias_dot"))
_DOUBLE = Signature(("dy",), ("ddx",), ("ddweight", "ddbias"), (("out[0]", "dy"), ("out[1]", "x")))
_GATE = ("p", "norm_before_gate")
NORMS = {
    "rms_norm": Signature(options=("p",)),
    "rms_norm_backward": _BACKWARD._replace(options=("p",)),
    "layer_norm": Signature(),
    "layer_norm_backward": _BACKWARD,
}
FAMILY = {
    "l2_norm": Signature(),
    "l2_norm_backward": _BACKWARD,
    "gated_rms_norm": Signature(("gate",), options=_GATE),
    "gated_rms_norm_backward": Signature(("dy", "gate"), outs=(("out[0]", "x"), ("out[1]", "gate")), options=_GATE),
    "rms_norm_jvp": _JVP._replace(options=("p",)),
    "layer_norm_jvp": _JVP,
    "rms_norm_double_backward": _DOUBLE._replace(options=("p",)),
    "layer_norm_double_backward": _DOUBLE,
    "quantized_rms_norm": Signature(
        maybe=("residual",), outs=(("out", "q"), ("residual_out", "residual")), options=("p", "dtype")
    ),
}
SIGNATURES = NORMS | FAMILY
FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2")
# which of the results each of these is for
PLACES = {"out": 0, "out[0]": 0, "out[1]": 1, "residual_out": 2}

INTEGERS = tuple(map(np.dtype, ("?", "i1", "u2", "i8")))
NO_NUMBERS = (
    *map(np.dtype, ("c8", "c16", "g", "O", "U3", "S3", "M8[D]", "m8[s]", "V3", [("a", "f4")], np.dtypes.StringDType())),
    *map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.int4)),
)
UNVIEWABLE = "OT"  # kinds of dtypes whose elements are references: arrays of their own, not of the arena

# Python values where a number belongs. The errors are those of the argument's own check.
NOT_A_NUMBER = (None, "1e-6", b"1", 1j, [0.5], (), np.ones(2), np.array(True), np.True_, np.ma.masked, object)


class Subclass(np.ndarray):
    """Neither a masked array nor a matrix."""


class Place(NamedTuple):
    """How an array lies in the arena."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    strides: tuple[int, ...]

    def view(self, arena):
        return np.ndarray(self.shape, self.dtype, arena, self.offset, self.strides)

    def cover(self, mask):
        """Mark the bytes of the elements."""
        bytes_of = (*self.shape, self.dtype.itemsize)
        np.ndarray(bytes_of, bool, mask, self.offset, (*self.strides, 1))[...] = True


class Argument(NamedTuple):
    """An array argument: where it lies, and how it is handed over."""

    place: Place | None
    kind: str  # plain, read-only, subclass, list, masked, matrix, or value
    value: object = None

    def of(self, arena):
        if self.place is None:
            return self.value
        view = self.place.view(arena)
        if self.kind == "read-only":
            view.flags.writeable = False
        if self.kind == "subclass":
            return view.view(Subclass)
        if self.kind == "list":
            return view.tolist()
        if self.kind == "masked":
            return np.ma.masked_array(view)
        return view.view(np.matrix) if self.kind == "matrix" else view


class Call(NamedTuple):
    """One call; `wrong` names each argument that must not be accepted, with the error that says so."""

    function: str
    arrays: dict[str, Argument]
    options: dict[str, object]
    size: int
    seed: int
    special: bool
    wrong: frozenset[tuple[str, type[Exception]]]

    def arena(self):
        """Fresh memory with the same content each time: what is no element of an array is not zero either."""
        rng = np.random.default_rng(self.seed)
        arena = np.frombuffer(rng.bytes(self.size), np.uint8).copy()
        for argument in self.arrays.values():
            if argument.place is not None:
                fill(argument.place.view(arena), rng, self.special)
        return arena

    def arguments(self, arena):
        """All arguments, on the arrays of this arena."""
        given = {name: argument.of(arena) for name, argument in self.arrays.items()}
        return given | {n: given[value] if isinstance(value, Same) else value for n, value in self.options.items()}

    def on(self, backend, arena):
        """The result, and the arguments that were used; arrays of a tuple have a name each."""
        arguments = self.arguments(arena)
        given = {name: a for name, a in arguments.items() if "[" not in name}
        if len(given) < len(arguments):
            given["out"] = arguments.get("out[0]"), arguments.get("out[1]")
        return getattr(rn, self.function)(**given, backend=backend), arguments

    def out_places(self):
        """Where results are to go, by the names of `PLACES`."""
        owners = {name: self.options.get(name, name) for name in PLACES}
        return {name: self.arrays[owner].place for name, owner in owners.items() if owner in self.arrays}


class Same(str):
    """An option that is the very object of another argument."""


def fill(view, rng, special):
    """Numbers of either sign and of magnitudes far apart; where they are special, a few infinities, NaN and zeros."""
    if view.dtype.kind in "?biu":
        view[...] = rng.integers(0, 2, view.shape)
    elif view.dtype.newbyteorder("=") in DTYPES:
        values = rng.standard_normal(view.shape) * 2.0 ** rng.uniform(-6, 6, view.shape)
        if special:
            odd = rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-7, 6e4], view.shape)
            values = np.where(rng.random(view.shape) < 0.05, odd, values)
        view[...] = values.astype(view.dtype)


class Arena:
    """Gives places in memory that is not there yet."""

    def __init__(self, draw):
        self.draw = draw
        self.size = 64

    def place(self, shape, dtype, apart=False):
        """Where no other array is, in any order of axes, with steps of any kind; `apart` keeps elements distinct."""
        draw = self.draw
        order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else range(len(shape))[::-1]
        usual = draw(st.booleans())
        strides, step, low, high = [0] * len(shape), dtype.itemsize, 0, 0
        for axis in order:  # from the innermost one out
            factors = (1,) if usual else (1, 2, -1, -2, 3) if apart else (1, 2, -1, -2, 0, 0.5)
            factor = draw(st.sampled_from(factors))
            strides[axis] = int(step * factor) if factor != 0.5 else dtype.itemsize  # as in a sliding window
            reach = strides[axis] * max(0, shape[axis] - 1)
            low, high = low + min(0, reach), high + max(0, reach)
            step = max(step * max(1, shape[axis]) * max(1, math.ceil(abs(factor))), dtype.itemsize)
        start = -(-self.size // 64) * 64 + (0 if usual else draw(st.sampled_from([0, 0, 1, 4])))
        self.size = start - low + high + dtype.itemsize + 64
        return Place(shape, dtype, start - low, tuple(strides))


@st.composite
def calls(draw, mixed=True, most=200, special=True, functions=tuple(NORMS), one_kernel=False):
    """A call. `mixed` has every dtype in every place; otherwise all arrays have that of x, as compiled kernels do.

    one_kernel: of each operation; all arrays are float32, and all are there.
    """
    function = draw(st.sampled_from(functions))
    signature = SIGNATURES[function]
    arena, arrays, options, wrong = Arena(draw), {}, {}, set()

    def seldom(odds=20):
        return draw(st.integers(0, odds)) == odds

    def refuse(name, error):
        wrong.add((name, error))

    def array(name, shape, dtype, apart=False):
        if mixed and seldom():
            dtype = draw(st.sampled_from(NO_NUMBERS))
            refuse(name, TypeError)
        elif dtype.isbuiltin == 1 and dtype.kind == "f" and seldom(6):
            dtype = dtype.newbyteorder()
        kind = "plain"
        if seldom(5):
            kinds = ["read-only", "subclass", "masked"]
            kinds += ["matrix"] * (len(shape) == 2)
            kinds += ["list"] * (math.prod(shape) > 0 and dtype.kind in "fbiu" and (mixed or dtype == np.float64))
            kind = draw(st.sampled_from(kinds))
        if kind in ("masked", "matrix"):
            refuse(name, TypeError)
        if dtype.kind in UNVIEWABLE:
            return Argument(None, "value", np.zeros(shape, dtype))
        place = arena.place(shape, dtype, apart)
        return Argument(place, kind)

    # x, axis
    ndim = draw(st.integers(0, 4)) if seldom(10) else draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(0 if seldom(8) else 1, 7)) for _ in range(ndim))
    if ndim and seldom(4):
        shape = (*shape[:-1][-1:], draw(st.integers(1, most)))
        ndim = len(shape)
    axes = (-1,)
    if ndim == 0:
        refuse("x", ValueError)
    elif draw(st.booleans()):
        axes = tuple(draw(st.lists(st.integers(0, ndim - 1), min_size=1, max_size=ndim, unique=True)))
        signs = draw(st.lists(st.booleans(), min_size=len(axes), max_size=len(axes)))
        axes = tuple(a - ndim if s else a for a, s in zip(axes, signs, strict=True))
        kind = draw(st.sampled_from([int, np.int8, np.int64]))
        options["axis"] = kind(axes[0]) if len(axes) == 1 and draw(st.booleans()) else tuple(map(kind, axes))
    axes = tuple(sorted(a % ndim for a in axes)) if ndim else ()
    if ndim and seldom(15):
        out_of_range = (ndim, -ndim - 1, (), (0, 0), (0, -ndim), (0, ndim))
        no_axis = (1.0, "0", None, True, (0, 0.0), [0], np.array([0]), np.array(0.0), np.True_, np.array([0, 1]))
        if draw(st.booleans()):
            options["axis"] = draw(st.sampled_from(out_of_range))
            refuse("axis", ValueError)
        else:
            options["axis"] = draw(st.sampled_from(no_axis))
            refuse("axis", TypeError)
    if any(shape[a] == 0 for a in axes):
        refuse("x", ValueError)
    dtype = draw(st.sampled_from(DTYPES if not mixed or not seldom(8) else INTEGERS))
    if one_kernel:
        dtype = np.dtype(np.float32)
    arrays["x"] = array("x", shape, dtype)
    if seldom(60):
        junk = draw(st.sampled_from([None, "abc", b"abc", object(), {1}, {"a": 1}, [object()], [10**400], iter([1])]))
        if isinstance(junk, list):
            refuse("axis", ValueError)  # a list has one axis, and that is asked about first
        arrays["x"] = Argument(None, "value", junk)
        refuse("x", TypeError)
        refuse("x", ValueError)  # strings are 0-d, which is as good a reason
    if seldom(60):
        arrays["x"] = Argument(None, "value", draw(st.sampled_from([[[1.0], [2.0, 3.0]], 1.5, 7, True])))
        refuse("x", ValueError)

    # dy and others like x, weight, bias
    def other():
        return dtype if not mixed else draw(st.sampled_from(INTEGERS)) if seldom(8) else draw(st.sampled_from(DTYPES))

    for name in (*signature.rows, *signature.maybe):
        if name in signature.maybe and not one_kernel and draw(st.booleans()):
            options[name] = None
            continue
        if name in signature.rows and function in FAMILY and seldom(60):
            arrays[name] = Argument(None, "value", None)
            refuse(name, TypeError)
            continue
        own_shape = shape
        if seldom():
            own_shape = draw(st.sampled_from([shape[1:], (*shape, 1), (1, *shape), tuple(n + 1 for n in shape)]))
        if own_shape != shape:
            refuse(name, ValueError)
        arrays[name] = array(name, own_shape, other())
    trailing = axes == tuple(range(ndim - len(axes), ndim))
    fits = [shape[i:] for i in range(ndim - len(axes) + 1)] if trailing else [tuple(shape[a] for a in axes)]
    both = draw(st.booleans())
    for name in ("weight", "bias"):
        if not (one_kernel or (both if not mixed else draw(st.booleans()))):
            continue
        fit = draw(st.sampled_from(fits or [()]))
        lead = len(fit) - len(axes)
        if lead > 0 and draw(st.booleans()):  # what broadcasts
            ones = draw(st.lists(st.booleans(), min_size=lead, max_size=lead))
            fit = (*(1 if one else length for one, length in zip(ones, fit, strict=False)), *fit[lead:])
        elif seldom():
            fit = draw(st.sampled_from([(), (1,), (*fit, 1), (1, *fit), tuple(n + 1 for n in fit), fit[:-1]]))
            if not any(
                len(fit) == len(whole) and fit[-len(axes) :] == whole[-len(axes) :]
                and all(a in (1, b) for a, b in zip(fit, whole, strict=True))
                for whole in fits
            ):  # fmt: skip
                refuse(name, ValueError)
        arrays[name] = array(name, fit, other())
    for name, parameter in zip(signature.along, ("weight", "bias"), strict=False):
        options[name] = None
        if function.endswith("jvp") and parameter not in arrays:
            options[parameter] = None
        if not one_kernel and draw(st.booleans()):
            continue
        a = arrays.get(parameter)
        if a is None and not seldom():
            continue
        fit = np.shape(a.value) if a is not None and a.place is None else shape[-1:] if a is None else a.place.shape
        own_shape = draw(st.sampled_from([fit[1:], (*fit, 1), tuple(n + 1 for n in fit)])) if seldom() else fit
        if a is None or own_shape != fit:
            refuse(name, ValueError)
        del options[name]
        arrays[name] = array(name, own_shape, other())

    # numbers
    def number(name, right, wrong_values):
        if draw(st.booleans()):
            return
        if not seldom(12):
            options[name] = draw(right)
        elif draw(st.booleans()):
            options[name] = draw(st.sampled_from(wrong_values))
            refuse(name, ValueError)
        else:
            options[name] = draw(st.sampled_from(NOT_A_NUMBER))
            refuse(name, TypeError)

    infinite = (math.nan, math.inf, -math.inf, 10**400, Fraction(10) ** 400, np.float32("nan"), np.longdouble("inf"))
    tenths = st.sampled_from(
        [0, 0.0, -0.0, 1, 1e-6, np.float32(1e-5), np.float16(0.5), Fraction(1, 3), 5e-324, 3, np.array(0.1)]
    )
    number("eps", tenths | st.floats(0, 1e6), (-1, -1e-300, True, False, Fraction(-1, 2), *infinite))
    if "p" in signature.options and not one_kernel:
        number(
            "p",
            st.sampled_from([1, 1.0, 0.5, np.float32(0.07), Fraction(1, 3), 5e-324]) | st.floats(1e-3, 1),
            (0, 0.0, -0.5, 2, np.nextafter(1.0, 2.0), True, False, Fraction(3, 2), np.float16(0), *infinite),
        )
    if "weight" in arrays and not one_kernel:
        number(
            "weight_offset",
            st.sampled_from([0, 1, 1.0, -1.0, np.float32(0.5), Fraction(1, 4)]) | st.floats(-1e3, 1e3, width=32),
            (True, False, *infinite),
        )
    elif "weight" not in arrays and seldom(30):
        options["weight_offset"] = 1.0
        refuse("weight_offset", ValueError)

    if "norm_before_gate" in signature.options and draw(st.booleans()):
        options["norm_before_gate"] = draw(st.sampled_from([True, False, np.False_]))
        if seldom():
            options["norm_before_gate"] = draw(st.sampled_from([None, 0, 1.0, "no", np.ones(1, bool)]))
            refuse("norm_before_gate", TypeError)
    q_dtype = np.dtype(np.int8)
    if "dtype" in signature.options:
        q_dtype = quantised(draw, seldom, number, options, refuse, axes, shape, one_kernel)

    # out
    places = {}
    for name, like in signature.outs:
        a = arrays.get(like)
        if not draw(st.booleans()):
            continue
        if like == "residual" and a is None:
            if seldom(5):
                options[name] = np.zeros(shape, np.float32)
                refuse(name, ValueError)
            continue
        result = q_dtype if like == "q" else result_dtype(a)
        ways = ["fresh", "fresh", "shape", "dtype", "list", "masked", "read-only", "folded"]
        for one in ("x", *signature.rows, *signature.maybe):
            a = arrays.get(one)
            if a and a.place is not None and a.kind != "list" and a.place.dtype.newbyteorder("=") == result:
                ways += [one, f"across {one}"] + ["view of x", "reversed x"] * (one == "x")
        for one in ("weight", *signature.along, *places):
            if one in arrays and arrays[one].place is not None:
                ways += [f"across {one}"] * (1 + 4 * (one in places))
        out = out_of(draw, draw(st.sampled_from(ways)), arena, arrays, shape, result, lambda e, n=name: refuse(n, e))
        if isinstance(out, Same):
            options[name] = out
        elif out is not None:
            arrays[name] = out
        if out is not None:
            places[name] = arrays[out if isinstance(out, Same) else name].place
    if len(places) == 2 and None not in places.values():
        masks = [np.zeros(arena.size + 128, bool) for _ in places]
        for mask, place in zip(masks, places.values(), strict=True):
            place.cover(mask)
        if (masks[0] & masks[1]).any():
            for name in places:
                refuse(name, ValueError)
    if len(signature.outs) == 2 and "residual_out" not in dict(signature.outs) and seldom(30):
        for name in PLACES:
            arrays.pop(name, None)
            options.pop(name, None)
        options["out"] = draw(st.sampled_from([(), (None,), (None, None, None), [None, None], np.zeros(shape), "out"]))
        wrong = {pair for pair in wrong if not pair[0].startswith("out")}
        refuse("out", TypeError)

    return Call(
        function,
        arrays,
        options,
        arena.size + 64,
        draw(st.integers(0, 2**32 - 1)),
        special and draw(st.booleans()),
        frozenset(wrong),
    )


def result_dtype(a):
    """That of a result like an argument."""
    known = a.place is not None and a.kind != "list" and a.place.dtype.newbyteorder("=") in DTYPES
    return a.place.dtype.newbyteorder("=") if known else np.dtype(np.float64)


def quantised(draw, seldom, number, options, refuse, axes, shape, one_kernel):
    """What quantisation takes; returns the dtype of q."""
    name = "int8" if one_kernel else draw(st.sampled_from(FORMATS))
    options["dtype"] = draw(st.sampled_from([name, np.dtype(name)]))
    if seldom():
        options["dtype"] = draw(st.sampled_from(["int4", np.float32, None, 8, "", "V1"]))
        refuse("dtype", TypeError)
    per_row = tuple(1 if i in axes else length for i, length in enumerate(shape))
    if draw(st.booleans()):
        options["scale"] = draw(
            st.sampled_from([0.05, np.float32(3), 1, np.full(per_row, 0.25), np.full(per_row[1:], 0.1, np.float32)])
        )
        if seldom(8):
            options["scale"] = draw(
                st.sampled_from([0.0, -1.0, np.nan, np.inf, np.full(per_row, -np.inf) if 0 not in per_row else -0.0,
                                 np.ones((2, *per_row)), np.ones((*per_row, 2))])
            )  # fmt: skip
            refuse("scale", ValueError)
        elif seldom():
            options["scale"] = draw(st.sampled_from(["1", 1j, np.ones(per_row, "c8"), np.ma.ones(per_row)]))
            refuse("scale", TypeError)
        if seldom():
            options["scale_ub"] = 1.0
            refuse("scale_ub", ValueError)
    else:
        number("scale_ub", st.sampled_from([1, 0.5, np.float32(2), np.inf, 1e-30]), (0, -1.0, True, np.nan))
        if options.get("scale_ub", 1) is None:  # no number, but here it stands for none
            options["scale_ub"] = "none"
    return np.dtype(name)


def folds(place):
    """Whether elements share memory: by counting the bytes they cover."""
    reach = sum(max(0, step) * max(0, n - 1) for step, n in zip(place.strides, place.shape, strict=True))
    mask = np.zeros(place.offset + reach + place.dtype.itemsize, bool)
    place.cover(mask)
    return mask.sum() < math.prod(place.shape) * place.dtype.itemsize


def out_of(draw, way, arena, arrays, shape, dtype, refuse):
    """An out of one kind, as an argument of its own or as the same object as another. refuse: with an error of it."""
    if way == "fresh":
        swapped = dtype.newbyteorder() if dtype.isbuiltin == 1 and draw(st.booleans()) else dtype
        place = arena.place(shape, swapped, apart=True)
        return Argument(place, draw(st.sampled_from(["plain", "plain", "subclass"])))
    if way == "shape":
        refuse(ValueError)
        return Argument(arena.place((*shape, 2), dtype), "plain")
    if way == "dtype":
        refuse(TypeError)
        wrong = [d for d in (*DTYPES, np.dtype("c8"), np.dtype("i8")) if d != dtype]
        return Argument(arena.place(shape, draw(st.sampled_from(wrong))), "plain")
    if way == "list":
        refuse(TypeError)
        return Argument(None, "value", draw(st.sampled_from([[0.0], 1.0, "out", (), bytearray(8)])))
    if way == "masked":
        refuse(TypeError)
        return Argument(arena.place(shape, dtype, apart=True), "masked")
    if way == "read-only":
        refuse(ValueError)
        return Argument(arena.place(shape, dtype, apart=True), "read-only")
    if way == "folded":
        place = arena.place(shape, dtype, apart=True)
        strides = (*place.strides[:-1], 0) if shape else ()
        place = place._replace(strides=strides)
    else:
        name = way.split()[-1]
        source = arrays[name].place
        if way in arrays:
            if arrays[name].kind in ("masked", "matrix"):
                refuse(TypeError)
            if arrays[name].kind == "read-only":
                refuse(ValueError)
            if arrays[name].kind == "list":
                return None
            place = source
        elif way == "reversed x":
            place = source
            if shape and shape[0] > 1:
                last = source.offset + source.strides[0] * (shape[0] - 1)
                place = source._replace(offset=last, strides=(-source.strides[0], *source.strides[1:]))
        elif way == "view of x":
            place = source
        else:  # across: moved by some bytes, often by a whole number of elements
            place = arena.place(shape, dtype, apart=True)
            by = draw(st.integers(-3, 3)) * dtype.itemsize + draw(st.sampled_from([0, 0, 0, 1]))
            low = sum(min(0, s * max(0, n - 1)) for s, n in zip(place.strides, place.shape, strict=True))
            place = place._replace(offset=max(source.offset + by, -low))
        if way in arrays:
            if math.prod(shape) and folds(place):
                refuse(ValueError)
            return Same(name)
    if math.prod(shape) and folds(place):
        refuse(ValueError)
    return Argument(place, "plain")


# What a result may be off by, against that of the reference, which is rounded as well


def assert_close_family(call, given, got, want):
    """As `assert_close`, of a function beside the norms: exact within its bounds, where all of a row is ordinary."""
    op = call.function + " after" * (not given.get("norm_before_gate", True))
    results = dict(zip(NAMES_OF[call.function], zip(got, want, strict=True), strict=True))
    for a, reference in results.values():
        assert (a is None) == (reference is None)
        assert a is None or (a.dtype, a.shape) == (reference.dtype, reference.shape)
    signature, offset = SIGNATURES[call.function], given.get("weight_offset", 0.0)
    names = "x", *signature.rows, *signature.maybe
    parameters = given.get("weight"), given.get("bias")
    numbers = given.get("eps", 1e-6), given.get("p", 1.0), given.get("axis", -1)
    reads = tuple(given.get(name) for name in names)
    prepared = _arguments.Call((*names, "out"), reads, (*parameters, offset), (None,), *numbers)
    reads, (*columns, offset), _, k, eps, restore_all = _arguments.prepare(prepared)
    x, n = reads[0], reads[0].shape[-1]
    if x.size == 0:
        assert all(a is None or np.array_equal(a, reference) for a, reference in results.values())
        return
    if op == "quantized_rms_norm":
        assert_quantised(*(results[name] for name in ("q", "scale", "h")))
        return
    along = [
        _arguments.column(name, given.get(name), parameter, *pair)
        for name, parameter, *pair in zip(signature.along, ("weight", "bias"), parameters, columns, strict=False)
    ]
    rows = lambda a: None if a is None else np.broadcast_to(a, x.shape).reshape(-1, n)  # noqa: E731
    of_rows = dict(zip(names, map(rows, reads), strict=True))
    v = of_rows.get("x_dot", of_rows.get("ddx"))
    g = Given(rows(x), of_rows.get("gate"), of_rows.get("dy"), v, *map(rows, (*columns, *along)))
    with np.errstate(all="ignore"):
        found = exact(op, g, eps, k / n, offset)
        # 1 / sqrt(mean square + eps) to the fifth is in the formulas: of rows of next to nothing it leaves float64
        about = g.x.astype(np.longdouble)
        if op.endswith("after"):
            about = about * silu(g.gate.astype(np.longdouble))[0]
        if op.startswith("layer"):
            about = about - about.mean(axis=1, keepdims=True)
        ordinary = (about[:, :k] ** 2).mean(axis=1, keepdims=True) + np.longdouble(eps) > 1e-50
    for name, (value, terms) in found.rows.items():
        a = results[name][0]
        sure = ordinary & np.isfinite(value) & (terms < 1e300)
        value, terms = (np.where(sure, one, 0).reshape(x.shape) for one in (value, terms))
        value, terms, sure = (restore_all([one])[0] for one in (value, terms, sure.reshape(x.shape)))
        off = worst_ulp(np.where(sure, a, np.zeros((), a.dtype)), value, terms)
        assert off <= bound_of(op, name, a.dtype) + 0.5, f"{name} is off by {off} ULP"
    for name, parameter in zip(("dweight", "dbias"), columns, strict=True):
        a = results.get(name, (None, None))[0]
        if a is None:
            continue
        with np.errstate(all="ignore"):
            value, size = (summed(one.reshape(x.shape), parameter.shape).ravel() for one in found.sums[name])
            sure = np.isfinite(value) & (size < 1e300) & ordinary.all()
            tolerance = parameter_tolerance(value, size, x.size // n, x.dtype, a.dtype, 2.0**-45)
            near = np.abs(a.astype(np.longdouble).ravel() - value) <= 2 * tolerance
            beyond = np.isinf(a.ravel()) & (np.abs(value) + tolerance >= ml_dtypes.finfo(a.dtype).max)
        assert np.all(near | ~sure | beyond), name


NAMES_OF = {  # of results
    "l2_norm": ("y",),
    "l2_norm_backward": ("dx", "dweight", "dbias"),
    "gated_rms_norm": ("y",),
    "gated_rms_norm_backward": ("dx", "dgate", "dweight", "dbias"),
    "rms_norm_jvp": ("y",),
    "layer_norm_jvp": ("y",),
    "rms_norm_double_backward": ("ddy", "dx", "dweight"),
    "layer_norm_double_backward": ("ddy", "dx", "dweight"),
    "quantized_rms_norm": ("q", "scale", "h"),
}


def assert_quantised(q, scale, h):
    """Pairs of results: one number of the format apart at most, where y / scale was next to the middle of two."""
    a, b = (codes.view(np.int8).astype(int) for codes in q)
    if q[0].dtype != np.int8:  # a sign, and a magnitude
        a, b = (np.where(codes < 0, -(codes + 128), codes) for codes in (a, b))
    assert np.all(np.abs(a - b) <= 1)
    assert np.array_equal(np.isnan(scale[0]), np.isnan(scale[1]))
    with np.errstate(invalid="ignore"):
        assert worst_ulp(*(np.nan_to_num(one, nan=0.0) for one in scale)) <= 1.0
    assert h[0] is None or h[0].tobytes() == h[1].tobytes() or np.array_equal(*h, equal_nan=True)


def assert_close(call, given, got, want):
    """Each array of two results: the same dtype and shape, and values within the bounds of both."""
    names, reads = ("x", "dy", "out"), (given["x"], given.get("dy"))
    parameters = given.get("weight"), given.get("bias"), given.get("weight_offset", 0.0)
    numbers = given.get("eps", 1e-6), given.get("p", 1.0), given.get("axis", -1)
    (x, dy), (w, b, offset), _, k, eps, restore_all = _arguments.prepare(
        _arguments.Call(names, reads, parameters, (None,), *numbers)
    )
    restore = lambda a: restore_all([a])[0]  # noqa: E731
    if x.size == 0:
        for a, reference in zip(got, want, strict=True):
            assert (a is None) == (reference is None)
            assert a is None or (a.dtype == reference.dtype and np.array_equal(a, reference))
        return
    wide = np.longdouble
    name, n = x.dtype.name, x.shape[-1]
    top = ml_dtypes.finfo(x.dtype).max
    with np.errstate(all="ignore"):
        centred = call.function.startswith("layer")
        xw = x.astype(wide)
        if centred:
            xw = xw - xw.mean(axis=-1, keepdims=True)
        rstd = 1 / np.sqrt((xw[..., :k] ** 2).mean(axis=-1, keepdims=True) + wide(eps))
        xhat = xw * rstd
        scale = wide(1) if w is None else wide(offset) + w.astype(wide)
        # What is left of x - mean is no better known than the mean: to 64 bits of the row's size by the reference;
        # by the engine to 106 bits of x, or 53 where x is not float64.
        largest = np.abs(x.astype(wide)).max(axis=-1, keepdims=True)
        known = np.ldexp(wide(4 + n / 8), -106 if name == "float64" else -53) / float(ml_dtypes.finfo(name).eps)
        size = np.abs(xhat)
        if centred:
            size = np.maximum(size, np.abs(xhat).max(axis=-1, keepdims=True) / 256)
            size = np.maximum(size, largest * rstd * known)
        # A factor below the smallest normal number of the type inside has fewer digits than another, and its error is
        # multiplied by the other factor: xhat in y, dy · rstd in dx and dweight. So it counts as no smaller than that.
        # Where it is beyond the range the result may be infinite, also where the other factor is small.
        tiny = wide(np.finfo(np.float32 if dy is None and x.itemsize == 2 else np.float64).tiny)
        # A float64 row out of range is scaled as a whole, until its largest x, and its largest dy, are in [0.5, 1):
        # what is subnormal then has fewer digits, or none. Its xhat, times an rstd of up to 2 · sqrt(n), and its g
        # count as the smallest numbers that have them all.
        tiny *= 2 * np.sqrt(n)
        size = np.maximum(size, tiny)
        if dy is None:
            g = np.broadcast_to(scale, x.shape)
            factor = np.where(xhat != 0, np.maximum(size, tiny), size)
            lost = factor > top
            terms = [np.maximum(factor * np.abs(scale), 0 if b is None else np.abs(b.astype(wide)))]
            bounds = [Y_ULP[name] + 0.5]
            open_rows = np.zeros_like(rstd, bool)
        else:
            g = np.broadcast_to(dy.astype(wide) * scale, x.shape)
            size_of_dy = np.abs(dy.astype(wide))
            factor = np.where(dy != 0, np.maximum(size_of_dy * rstd, tiny), 0)
            lost = factor > top
            terms = [np.maximum(dx_terms(g, xhat, rstd, k, centred=centred), factor * np.abs(scale))]
            bounds = [DX_ULP[name] + 0.5]
            largest_dy = np.where(np.isfinite(dy), size_of_dy, 0).max(axis=-1, keepdims=True)
            size_of_g = np.maximum(np.abs(g), tiny * largest_dy * np.maximum(1, np.abs(scale)))
            sizes = size_of_g, np.maximum(np.abs(xhat), tiny)
            terms = [np.maximum(terms[0], dx_terms(*sizes, rstd, k, centred=centred))]
            terms[0] = np.fmax(terms[0], rstd * size_of_g)  # outside the RMS a NaN of the row is no term
            # The weights of such a row stay as they are, as does what is outside the RMS beside what is inside: their
            # sums, times a cube of its rstd, may overflow.
            factors = np.maximum(1, np.abs(scale)) * np.maximum(1, np.abs(xhat))
            overflows = 8 * n**2.5 * factors > np.finfo(np.float64).max
            open_rows = (name == "float64") & np.broadcast_to(overflows, x.shape).any(axis=-1, keepdims=True)
            term_of_w = np.where(lost, factor, np.maximum(size_of_dy * size, factor * np.abs(xw)))
            for parameter, term in ((w, term_of_w), (b, size_of_dy)):
                terms.append(term if parameter is None else summed(term, parameter.shape))
        # LayerNorm where x is its mean: whether infinity, or 1 / sqrt(0), meets zero or an error of rounding is open.
        # And where x vanishes beside the row's largest: whether infinity meets zero or a number.
        rounding = centred * np.finfo(np.float64).eps * largest
        scaled_by = np.where(np.isfinite(x), np.abs(x.astype(wide)), 0).max(axis=-1, keepdims=True)
        vanishing = tiny * scaled_by if name == "float64" and dy is not None else wide(0)
        near_zero = (np.abs(xw) <= np.fmax(rounding, vanishing)).any(axis=-1, keepdims=True)
        unsure = near_zero & ~np.isfinite(g).all(axis=-1, keepdims=True)
        anything = centred & (np.abs(xw) <= rounding).all(axis=-1, keepdims=True) & (eps <= rounding**2)
    for i, (a, reference) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (reference is None)
        if a is None:
            continue
        assert (a.dtype, a.shape) == (reference.dtype, reference.shape)
        bound = np.nan_to_num(terms[i], nan=0.0, posinf=0.0)
        if i == 0:
            native, bound = reference.astype(x.dtype), restore(bound.reshape(x.shape))
            a = a.astype(x.dtype)
            # where the terms are beyond the range, what is left of them may be infinite by their errors alone
            beyond = bound > top
            a[beyond], native[beyond] = np.clip(a[beyond], -top, top), np.clip(native[beyond], -top, top)
            distance = ulp_distance(a, native, bound)
            distance[restore(np.broadcast_to(lost, x.shape)) & ~np.isfinite(a.astype(wide))] = 0.0
            neither = ~np.isfinite(a.astype(wide)) & ~np.isfinite(native.astype(wide))
            distance[neither & restore(np.broadcast_to(unsure, x.shape))] = 0.0
            distance[restore(np.broadcast_to(anything | open_rows, x.shape))] = 0.0
            assert distance.max() <= bounds[0], f"{distance.max()} ULP"
        else:
            exact = reference.astype(wide)
            allowed = parameter_tolerance(exact, bound.reshape(exact.shape), x.size // n, x.dtype, a.dtype)
            with np.errstate(invalid="ignore"):
                near = np.abs(a.astype(wide) - exact) <= allowed + 0.5 * spacing(exact, a.dtype)
            alike = (np.isnan(exact) & np.isnan(a.astype(wide))) | (exact == a.astype(wide))
            neither = ~np.isfinite(exact) & ~np.isfinite(a.astype(wide))
            beyond = ~np.isfinite(a.astype(wide)) & (bound.reshape(exact.shape) > ml_dtypes.finfo(a.dtype).max)
            assert np.all(near | alike | (neither & unsure.any()) | anything.any() | beyond)
