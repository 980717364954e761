"""How the rows of a call are cut into blocks for the cache and for threads.

A task takes units of rows: forward a block of rows that stays in the first-level cache; backward a chunk of blocks,
whose shares of dweight and dbias are added up in one row of partial sums. The partial sums are added in order at the end.

Work is cut by shape alone, never by the number of threads, so the bits are the same for any number of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic

from rmsnorm_np.cpu.jit import inlined, piece
from rmsnorm_np.cpu.row import BLOCK, SEGMENT, STORAGE, Arrays, Kinds, Program, given
from rmsnorm_np.cpu.threads import PARALLEL_ELEMENTS, in_parallel
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import LANES, Work, Writer
from rmsnorm_np.ops.operation import Totals

# Elements in a block of rows, which is read twice: in float32 x alone, or x and dy, fit a first-level cache of 32 KiB.
# (Backward with 16384: 5 % slower.) Forward, twice as many halves do, and that is 3 to 8 % faster.
BLOCK_ELEMENTS = 4096
SHORT_ROW = 64  # up to here what is done once a row counts: with 16 elements 1.35 times as fast, with 64 the same
# Each thread has its part of the work in a queue. When that is empty it takes from the others' queues: a core that is
# slow or busy does less, and yet the same rows meet the same core's cache in each call.
APART = 8  # places between two queues: a cache line


class Size(NamedTuple):
    """The numbers of a call: rows of n elements, k of them in the RMS (None: n).

    eps: a number, or an array with one for each row. m: rows of the totals; weight_m, bias_m: of weight and bias, where row
    r uses row r % weight_m. chunks: how many units share a row of the totals. block: rows in a block. streaming: whether to
    write past the cache.
    """

    rows: Any
    n: Any
    k: Any
    eps: Any
    offset: Any
    m: Any
    weight_m: Any
    bias_m: Any
    chunks: Any
    block: Any
    streaming: Any


@inlined
def part_start(part, items, parts):
    return items * part // parts


@intrinsic
def counters(typing_context, count):
    """Room on the stack for so many int64, all zero. Stack that a loop asks for is not given back before the end."""

    def codegen(context, builder, signature, args):
        room = builder.alloca(ir.IntType(64), args[0])
        cgutils.memset(builder, room, builder.mul(args[0], ir.Constant(args[0].type, 8)), 0)
        return room

    return types.CPointer(types.int64)(count), codegen


@intrinsic
def add_atomically(typing_context, numbers, i, number):
    """Add to the int64 in place i while no other thread does; returns what it was before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "monotonic")

    return types.int64(numbers, i, number), codegen


@intrinsic
def pointers(typing_context, record):
    """A record of arrays as one of pointers to their first elements. Pointers count no references: passing an array to a
    function costs two atomic additions, on one cache line for all threads (measured: 6 times slower at n = 64).
    """

    def kind_of(kind):
        if isinstance(kind, types.NoneType):
            return types.none
        if isinstance(kind, types.Array):
            return types.CPointer(kind.dtype)
        return types.NamedTuple([kind_of(k) for k in kind], kind.instance_class)

    def found(context, builder, kind, value):
        if isinstance(kind, types.NoneType):
            return context.get_dummy_value()
        if isinstance(kind, types.Array):
            return context.make_array(kind)(context, builder, value=value).data
        items = [found(context, builder, k, builder.extract_value(value, j)) for j, k in enumerate(kind)]
        return context.make_tuple(builder, kind_of(kind), items)

    def codegen(context, builder, signature, args):
        return found(context, builder, record, args[0])

    return kind_of(record)(record), codegen


def room_for(size):
    """A step: room on the stack for so many float64."""

    def body(w: Writer) -> Any:
        with w.builder.goto_entry_block():  # not cgutils.alloca_once, which would fill it with zeros at each call
            room = w.builder.alloca(ir.ArrayType(ir.DoubleType(), size))
        return w.builder.bitcast(room, ir.DoubleType().as_pointer())

    return step(body, types.CPointer(types.float64))


def pointer_types(kinds: Kinds) -> Any:
    """Numba's type of `Arrays` of these kinds."""
    record = lambda names, kind_of: types.NamedTuple(  # noqa: E731
        [types.none if name is None else types.CPointer(kind_of(name)) for name in names], type(names)
    )
    stored = STORAGE.__getitem__
    parts = (
        record(kinds.reads, stored),
        record(kinds.columns, stored),
        record(kinds.writes, stored),
        record(kinds.totals, lambda _: types.float64),
    )
    return types.NamedTuple(parts, Arrays)


def moved(kinds: Kinds) -> Any:
    """A step: moved(arrays, start, weight_start, bias_start, total_start), the pointers from these elements on."""

    def body(w: Writer, arrays: Arrays, start: Any, weight: Any, bias: Any, total: Any) -> Arrays:
        by = lambda record, place: given(record, lambda data: w.pointer(data, place))  # noqa: E731
        columns = arrays.columns
        columns = columns._replace(
            weight=None if columns.weight is None else w.pointer(columns.weight, weight),
            bias=None if columns.bias is None else w.pointer(columns.bias, bias),
        )
        return Arrays(by(arrays.reads, start), columns, by(arrays.writes, start), by(arrays.totals, total))

    return step(body, pointer_types(kinds))


def equal_rows(kinds: Kinds) -> Any:
    """trivial(row, n): whether an array makes the row trivial, as the operation tells it (`Operation.trivial`)."""
    fields = [(kinds.reads._fields.index(name), number) for name, number in kinds.operation.trivial]

    def one(position, number):
        @piece
        def all_equal(reads, n):
            data = reads[position]
            first = data[0] if number is None else number
            for i in range(n):  # noqa: SIM110 (Numba has no generators to give to `all`)
                if data[i] != first:
                    return False
            return True

        return all_equal

    if not fields:
        return piece(lambda reads, n: False)
    tests = [one(*field) for field in fields]
    first, second = tests[0], tests[-1]
    return piece(lambda reads, n: first(reads, n) or second(reads, n))


def blocks(kinds: Kinds) -> Any:
    """block(arrays, size, marks, first, step, count, total_start): rows first, first + step, …, count of them.

    Returns how many rows were marked and left out, as their sums leave the range.
    """
    program = Program(kinds)
    stages = len(kinds.operation.stages)
    move, room = moved(kinds), room_for(program.size * BLOCK)
    whole, write = program.write()
    short_width = program.width
    numbers_of_row = program.get_numbers(stages - 1)
    has_marks, has_row_eps = kinds.marks, kinds.row_eps
    ordinary = program.is_ordinary() if has_marks else step(lambda w, *a: ir.Constant(ir.IntType(64), 1), types.int64)
    trivial = equal_rows(kinds) if has_marks else piece(lambda reads, n: False)

    if has_row_eps:
        eps_of = piece(lambda eps, row: eps[row])
    else:
        eps_of = inlined(lambda eps, row: eps)

    @inlined
    def row_at(arrays, size, r, total_start):
        weight = 0 if size.weight_m == 1 else r % size.weight_m * size.n
        bias = 0 if size.bias_m == 1 else r % size.bias_m * size.n
        return move((arrays, r * size.n, weight, bias, total_start))

    def measured(s: int) -> Any:
        """The sums of stage s of all rows, then their numbers."""
        segment, get = program.segment(s), program.get_numbers(s - 1)
        put, find = program.put(program.sums[s], program.places[2 * s]), program.find_numbers(s)
        add = step(lambda w, a, b: type(a)(*map(_plus, a, b)), program.sums[s])
        zero = step(lambda w: _zeros(w, program.sums[s]), program.sums[s])
        first_k = kinds.operation.stages[s].first_k and kinds.first_k

        @inlined
        def measure(arrays, size, first, step_, count, room, ahead):
            for j in range(count):
                row = row_at(arrays, size, first + j * step_, 0)
                m = get((room, BLOCK, j))
                sums = zero(())
                stop = size.k if first_k else size.n
                for begin in range(0, stop, SEGMENT):
                    sums = add((sums, segment(row, size.offset, begin, min(begin + SEGMENT, stop), size.k, m, ahead)))
                put((room, BLOCK, j, sums))
            for j in range(count):  # a loop of its own: LLVM takes several roots and divisions at once
                find((room, BLOCK, j, size.n, size.k, eps_of(size.eps, first + j * step_)))

        return measure

    measure = measured(0)
    if stages == 2:
        measure_first, measure_second = measure, measured(1)

        @inlined
        def measure(arrays, size, first, step_, count, room, ahead):
            measure_first(arrays, size, first, step_, count, room, ahead)
            measure_second(arrays, size, first, step_, count, room, ahead)

    @piece
    def block(arrays, size, marks, first, step_, count, total_start):
        numbers = room(())
        # while this block's sums are taken, and its outputs written, the next block is fetched
        ahead = count * step_ * size.n if size.streaming else 0
        measure(arrays, size, first, step_, count, numbers, ahead)
        short = (
            size.n <= SHORT_ROW and size.n % short_width == 0
        )  # then memory.streams has seen to it that rows are aligned
        marked = 0
        for j in range(count):
            r = first + j * step_
            row = row_at(arrays, size, r, total_start)
            if has_marks:
                found = ordinary((numbers, BLOCK, j, size.n, size.k, eps_of(size.eps, r)))
                if found < 0 or (found == 0 and not trivial(row.reads, size.n)):
                    marks[r] = 1
                    marked += 1
                    continue
            m = numbers_of_row((numbers, BLOCK, j))
            if short:
                whole(row, size.offset, size.n, size.k, m, size.streaming, ahead)
            else:
                write(row, size.offset, 0, size.n, size.k, m, size.streaming, ahead)
        return marked

    return block


def _plus(a: Any, b: Any) -> Any:
    from rmsnorm_np.ops.primitives import plus

    return plus(a, b)


def _zeros(w: Writer, shape: Any) -> Any:
    from rmsnorm_np.cpu.tracing import leaves, rebuilt

    return rebuilt(shape, [w.constant(leaf, 0.0) for leaf in leaves(shape)])


def clearer() -> Any:
    """A step: clear(totals, start, n), n float64 of each from start on."""

    def body(w: Writer, totals: Any, start: Any, n: Any) -> None:
        size = w.builder.mul(n, ir.Constant(n.type, 8))
        given(totals, lambda data: cgutils.memset(w.builder, w.pointer(data, start), size, 0))

    return step(body)


def totals_task(names: Totals) -> Any:
    """add(p, partials, totals, count, m, n): columns of piece p. Rows h, h + m, … of count rows of partial sums, added in
    this order, are row h of the totals.
    """
    plain = Work("double", LANES)
    shape = given(names, lambda name: plain.leaf)

    def load(w: Writer, partials: Totals, i: Any, count: Any) -> Totals:
        return given(names, lambda name, data: w.load(data, "float64", i, plain, count), partials)

    def plus_next(w: Writer, sums: Totals, partials: Totals, i: Any, count: Any) -> Totals:
        return given(names, lambda name, a, b: a + b, sums, load(w, partials, i, count))

    def store(w: Writer, totals: Totals, i: Any, sums: Totals, count: Any) -> None:
        given(names, lambda name, data, a: w.store(data, name, i, a, count), totals, sums)

    first, add, put = step(load, shape), step(plus_next, shape), step(store)

    @piece
    def task(p, partials, totals, rows, m, n):
        for h in range(m):
            for i in range(p * SEGMENT, min(p * SEGMENT + SEGMENT, n), LANES):
                count = min(LANES, n - i)
                sums = first((partials, h * n + i, count))
                for t in range(h + m, rows, m):
                    sums = add((sums, partials, t * n + i, count))
                put((totals, h * n + i, sums, count))

    return task


def rows_kernel(kinds: Kinds) -> Any:
    """kernel(arrays, totals, size, marks, threads) -> how many rows were marked.

    arrays.totals: partial sums, (chunks * m, n); totals: what they are added up in, (m, n).
    """
    block = blocks(kinds)
    has_totals = any(kinds.totals)
    clear = clearer()
    add = totals_task(kinds.totals) if has_totals else None

    @piece
    def task(t, tasks, queues, arrays, size, marks):
        units = size.chunks * size.m
        groups = size.rows // size.m
        share = 1 if has_totals else max(1, min(16, units // (8 * tasks)))
        marked = 0
        for turn in range(tasks):
            part = (t + turn) % tasks
            first, stop = part_start(part, units, tasks), part_start(part + 1, units, tasks)
            # taking waits until all that was written past the cache has arrived: not to be done for each few rows
            u = first + add_atomically(queues, part * APART, share)
            while u < stop:
                for unit in range(u, min(u + share, stop)):
                    h, chunk = unit % size.m, unit // size.m
                    clear((arrays.totals, unit * size.n, size.n))
                    last = part_start(chunk + 1, groups, size.chunks)
                    for g in range(part_start(chunk, groups, size.chunks), last, size.block):
                        count = min(size.block, last - g)
                        marked += block(arrays, size, marks, g * size.m + h, size.m, count, unit * size.n)
                u = first + add_atomically(queues, part * APART, share)
        if marked > 0:
            add_atomically(queues, tasks * APART, marked)

    @piece
    def kernel(arrays, totals, size, marks, threads):
        queues = counters(threads * APART + 1)
        in_parallel(task, threads, threads, (threads, queues, pointers(arrays), size, pointers(marks)))
        marked = queues[threads * APART]
        if has_totals and marked == 0:
            partials = size.chunks * size.m
            adders = threads if partials * size.n >= PARALLEL_ELEMENTS else 1
            in_parallel(
                add,
                (size.n + SEGMENT - 1) // SEGMENT,
                adders,
                (pointers(arrays.totals), pointers(totals), partials, size.m, size.n),
            )
        return marked

    return kernel
