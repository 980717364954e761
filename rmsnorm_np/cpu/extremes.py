"""Whether a row, and the columns, are in the range in which its sums can be computed; `rare` has those that are not."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from rmsnorm_np.cpu.jit import inlined, piece
from rmsnorm_np.cpu.kinds import Arrays
from rmsnorm_np.cpu.llvm import DOUBLE
from rmsnorm_np.cpu.row import Program
from rmsnorm_np.cpu.shapes import SCALAR
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import Number, Writer
from rmsnorm_np.ops.operation import scale
from rmsnorm_np.ops.records import leaves

# Squares and products between these lose nothing, in float64 pairs (rstd³ times a sum stays in range) and in float32.
BOUNDS = {"exact": 2.0**300, "single": 2.0**90}
MOST_NUMBER = 2.0**100  # and the least is its reciprocal: the numbers of a row that elements meet as float32
# xhat, or dy · rstd, of bfloat16 may be subnormal in float32, off by 2**-150. Times a weight up to here, that is 2**-8
# of the smallest bfloat16; times x, whose mean square is up to here, less than 2**-120 of dweight. Nor does xhat times
# such a weight overflow, which a bias could bring back.
LARGEST_SCALE = 2.0**9
LARGEST_SQUARE = 2.0**40


def verdicts(program: Program) -> tuple[Any, Any]:
    """`judge`, and left_out(row, n, room, stride, j): whether row j is out of range; where rows are marked."""
    if not program.kinds.marks:
        return step(lambda w, *items: None), inlined(lambda row, n, room, stride, j: False)
    verdict, trivial = program.get(SCALAR, program.verdict), is_trivial(program)
    number = step(lambda w, found: found.value, types.float64)

    @inlined
    def left_out(row: Any, n: Any, room: Any, stride: Any, j: Any) -> Any:
        found = number((verdict((room, stride, j)),))
        return found < 0.0 or (found == 0.0 and not trivial(row, n))

    return judge(program), left_out


def _or(first: Any, second: Any) -> Any:
    return piece(lambda row, n: first(row, n) or second(row, n))


def is_trivial(program: Program) -> Any:
    """trivial(row, n): whether an array makes the row trivial, as the operation tells it."""

    def one(name: str, number: float | None) -> Any:
        f = program.kinds.reads._fields.index(name)
        get = inlined(lambda row: row.reads[f])
        if program.kept and f == 0:  # then the row is about what is kept
            kept = program.kinds.writes._fields.index(program.kept)
            get = inlined(lambda row: row.writes[kept])

        @piece
        def all_equal(row: Any, n: Any) -> Any:
            data = get(row)
            first = data[0] if number is None else number
            for i in range(n):  # noqa: SIM110 (Numba has no generators to give to `all`)
                if data[i] != first:
                    return False
            return True

        return all_equal

    found = piece(lambda row, n: False)
    for name, number in program.op.trivial:
        if getattr(program.kinds.reads, name):
            found = _or(found, one(name, number))
    return found


def judge(program: Program) -> Any:
    """judge(room, stride, j, n, k, eps, modest): a verdict in row j's last place, a number, so that LLVM takes several
    rows at once: 1 in range, 0 if only a trivial row is, -1 out of range.

    NaN is in range: scaling the row would not change it. modest: whether `is_modest` found the columns so.
    """
    s = len(program.op.stages) - 1

    def body(w: Writer, room: Any, stride: Any, j: Any, n: Any, k: Any, eps: Any, modest: Any) -> None:
        b, bound = w.builder, BOUNDS[program.work.name]
        sums = program.load(w, program.sums[s], program.places[2 * s], room, stride, j)
        before = program.load(w, program.numbers[s - 1], program.places[2 * s - 1], room, stride, j) if s else None
        n = w.number(n)
        extent = program.op.extent(sums, n, n if k is None else w.number(k), eps, before)
        none = ir.Constant(ir.IntType(1), 0)
        outside, trivial = none, none
        for number in (*extent.within, *extent.nontrivial, *extent.below):
            outside = b.or_(outside, abs(number).exceeds(bound).value)
        for number in extent.within:
            outside = b.or_(outside, number.exceeds(LARGEST_SQUARE if program.guarded else bound).value)
            outside = b.or_(outside, (-abs(number)).exceeds(-1 / bound).value)
        for number in extent.nontrivial:
            trivial = b.or_(trivial, (-abs(number)).exceeds(-1 / bound).value)
        if program.work.name == "single":
            outside = b.or_(outside, b.icmp_signed("==", modest, modest.type(0)))
        if program.guarded:
            for number in leaves(program.load(w, program.numbers[s], program.places[2 * s + 1], room, stride, j)):
                # what is rounded to float32 must keep its digits
                outside = b.or_(outside, abs(number).exceeds(MOST_NUMBER).value)
                small = b.and_((-abs(number)).exceeds(-1 / MOST_NUMBER).value, abs(number).exceeds(0.0).value)
                outside = b.or_(outside, small)
        verdict = b.select(outside, DOUBLE(-1.0), b.select(trivial, DOUBLE(0.0), DOUBLE(1.0)))
        w.put(room, program.place(w, program.verdict, stride, j), Number(b, verdict))

    return step(body)


def is_modest(program: Program) -> Any:
    """modest(arrays, count): 1 if the first count factors of the columns are at most LARGEST_SCALE, else 0."""
    if not (program.work.name == "single" and program.kinds.columns.weight):
        return piece(lambda arrays, count: 1)
    width = program.width

    def body(w: Writer, arrays: Arrays, i: Any, count: Any) -> Any:
        size = abs(scale(program.columns(w, arrays.columns, i, count)))
        return w.any(~size.at_most(LARGEST_SCALE))  # NaN is not; an offset beyond float32 is NaN

    large = step(body, types.boolean)

    @piece
    def modest(arrays: Any, count: Any) -> Any:
        for i in range(0, count, width):
            if large((arrays, i, min(width, count - i))):
                return 0
        return 1

    return modest
