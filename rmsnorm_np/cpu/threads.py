"""Work on several threads: on how many, and how a kernel hands its tasks to Numba's threads.

Numba's own way, ``prange``, compiles the whole kernel a second time, for threads, and analyses it as a whole; that took
as long as all else. Here a kernel is compiled once and calls the function behind ``prange`` by itself.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import lower_builtin, type_callable
from numba.np.ufunc.parallel import _launch_threads

from rmsnorm_np._threads import get_num_threads
from rmsnorm_np.cpu import mode

# Starting threads costs as long as one thread needs for so many elements in float32: two are 1.06 to 1.09 times as fast
# forward and as fast backward, and with half as many 0.9 and 0.75 times as fast.
PARALLEL_ELEMENTS = 32768


_lost_threads = False  # whether this process was forked from one whose threads it cannot use
_alone = True  # whether the thread that forked was the only one of Python's


def choose(elements: int) -> int:
    """On how many threads to work: on all that there are, or on one where that is sooner done."""
    if elements < PARALLEL_ELEMENTS or _lost_threads or _is_one_at_a_time():
        return 1
    return get_num_threads()


@functools.cache
def layer() -> str:
    """Numba's threading layer: omp, tbb or workqueue. From then on what compiled kernels call is known to LLVM."""
    _launch_threads()  # Numba offers no public way to settle it before a kernel of its own runs
    return str(numba.threading_layer())


def _is_one_at_a_time() -> bool:
    """Whether another Python thread may be using the layer, and that layer ends the process when two do."""
    return layer() == "workqueue" and threading.current_thread() is not threading.main_thread()


def _before_fork() -> None:
    global _alone
    _alone = threading.active_count() == 1


def _after_fork() -> None:
    """GNU OpenMP has no threads in a forked child, and Numba ends a child that asks for some.

    TBB starts new ones. But where another thread was computing, the child can wait for ever for a lock of TBB's which
    was that thread's: 2 of 1500 children did.
    """
    global _lost_threads
    try:
        started = numba.threading_layer()
    except ValueError:  # none was started before the fork
        return
    _lost_threads = _lost_threads or started == "omp" or (started == "tbb" and not _alone)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def in_parallel(task: Callable[..., None], count: int, threads: int, args: tuple[Any, ...]) -> None:
    """Call ``task(t, *args)`` for each t below `count`, on that many threads, or fewer if Numba says so.

    For kernels. Where tasks raise, one of their exceptions is raised when all have ended.
    """
    for t in range(count):
        task(t, *args)


@type_callable(in_parallel)
def _type_in_parallel(context: Any) -> Any:
    def typer(task: Any, count: Any, threads: Any, args: Any) -> Any:
        if isinstance(task, types.Dispatcher) and isinstance(args, types.BaseTuple):
            task.get_call_type(context, (types.intp, *args.types), {})
            return types.none

    return typer


@lower_builtin(in_parallel, types.Dispatcher, types.Integer, types.Integer, types.BaseTuple)
def _in_parallel(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    task, count_type, threads_type, args_type = sig.args
    _, count, threads, values = args
    count = context.cast(builder, count, count_type, types.intp)
    threads = context.cast(builder, threads, threads_type, types.intp)
    # what the tasks share: their arguments, and the exception and the code of one that failed
    room = ir.LiteralStructType([values.type, cgutils.voidptr_t, ir.IntType(32)])
    shared = cgutils.alloca_once_value(builder, builder.insert_value(ir.Constant(room, None), values, 0))
    run, status = _runner(context, builder, task, args_type, shared.type)

    one = count.type(1)
    # a thread gets args[0] + t * steps[0] for the first turn t that is its own: with a null pointer and steps of one, t
    start = cgutils.alloca_once_value(builder, ir.Constant(cgutils.voidptr_t, None))
    step = cgutils.alloca_once_value(builder, one)
    turns = cgutils.alloca_once_value(builder, count)
    pointers = [builder.bitcast(pointer, cgutils.voidptr_t) for pointer in (start, turns, step, shared)]
    alone = builder.or_(builder.icmp_signed("<=", threads, one), builder.icmp_signed("<=", count, one))
    with builder.if_else(alone) as (here, on_threads):
        with here:
            builder.call(run, [start, *pointers[1:]])
        with on_threads:
            ask = cgutils.get_or_insert_function(builder.module, ir.FunctionType(count.type, []), "get_num_threads")
            allowed = builder.call(ask, [])
            fewer = builder.icmp_signed("<", allowed, threads)
            numbers = [count.type(0), one, builder.select(fewer, allowed, threads)]
            function = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t] * 5 + [count.type] * 3)
            parallel_for = cgutils.get_or_insert_function(builder.module, function, "numba_parallel_for")
            builder.call(parallel_for, [builder.bitcast(run, cgutils.voidptr_t), *pointers, *numbers])
    result = builder.load(shared)
    exception = builder.bitcast(builder.extract_value(result, 1), status.excinfoptr.type)
    code = builder.extract_value(result, 2)
    with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, code)):
        context.call_conv.return_status_propagate(builder, status._replace(code=code, excinfoptr=exception))
    return context.get_dummy_value()


def _runner(context: Any, builder: Any, task: Any, args_type: Any, shared_type: Any) -> Any:
    """Some turns as Numba's threads call them, run(args, dimensions, steps, data); and how one of them ended.

    The first is number args[0], dimensions[0] is how many they are, and data points at what the tasks share.
    """
    pointer = cgutils.voidptr_t
    function_type = ir.FunctionType(ir.VoidType(), [pointer.as_pointer(), pointer, pointer, pointer])
    run = ir.Function(builder.module, function_type, builder.module.get_unique_name(f"{builder.function.name}.task"))
    run.linkage = "internal"
    inner = ir.IRBuilder(run.append_basic_block("entry"))
    before = mode.set_standard(inner)  # each thread has a mode of its own
    number_type = context.get_value_type(types.intp)
    first = inner.ptrtoint(inner.load(run.args[0]), number_type)
    turns = inner.load(inner.bitcast(run.args[1], number_type.as_pointer()))
    shared = inner.bitcast(run.args[3], shared_type)
    values = inner.load(cgutils.gep_inbounds(inner, shared, 0, 0))
    call = task.get_call_type(context.typing_context, (types.intp, *args_type.types), {})
    compiled = task.dispatcher.get_compile_result(call)
    context.add_linking_libs([compiled.library])
    with cgutils.for_range(inner, turns) as loop:
        task_args = [inner.add(first, loop.index), *(inner.extract_value(values, i) for i in range(len(args_type)))]
        status, _ = context.call_internal_no_propagate(inner, compiled.fndesc, call, task_args)
        with cgutils.if_unlikely(inner, status.is_error):
            inner.store(inner.bitcast(status.excinfoptr, pointer), cgutils.gep_inbounds(inner, shared, 0, 1))
            inner.store(status.code, cgutils.gep_inbounds(inner, shared, 0, 2))
    mode.restore(inner, before)
    inner.ret_void()
    return run, status
