"""A kernel that is compiled on first use and costs little to launch.

What a launch costs counts: a small kernel is done in a few microseconds. So Numba compiles kernels, but does not launch
them: it types all arguments of each call and makes an object of its own of each array. That took 220 µs in a small call
with one launch, on the host of an H200; plain addresses and one signature left 28 for the launch, cuda.core needs 5.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from cuda.core import LaunchConfig, Linker, LinkerOptions, ObjectCode, Stream, launch
from numba import cuda
from numba.cuda import types

if TYPE_CHECKING:
    from collections.abc import Callable

Capability = tuple[int, int]

_UNSIGNED = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}


def array_of(itemsize: int) -> Any:
    """The argument is the address of elements of so many bytes, which the kernel sees as unsigned integers."""
    return types.CPointer(_UNSIGNED[itemsize])


class Kernel:
    """A function for a grid of blocks on GPUs of one compute capability, with the types of its arguments.

    No fastmath: the tails of pairs are rounding errors, and NaN and infinity count.

    threads: of a block; blocks: that a multiprocessor is to have room for, which limits the registers, 0 for no matter.
    """

    def __init__(
        self,
        function: Callable[..., None],
        capability: Capability,
        threads: int,
        blocks: int,
        arguments: tuple[Any, ...],
    ) -> None:
        self.function, self.capability, self.arguments = function, capability, arguments
        self.threads, self.bounds = threads, (threads, blocks) if blocks else threads

    def intermediate_code(self, capability: Capability) -> bytes:
        """The kernel as Numba and libNVVM leave it, for a linker that optimises."""
        code: bytes = cuda.compile(
            self.function, self.arguments, device=False, abi="numba", output="ltoir", cc=capability,
            launch_bounds=self.bounds,
        )[0]  # fmt: skip
        return code

    @cached_property
    def _compiled(self) -> Any:
        cubin = linker(self.intermediate_code(self.capability), self.capability).link("cubin")
        name = re.search(rb"\.text\.(\w+)", bytes(cubin.code))  # the section of its instructions
        if name is None:
            raise RuntimeError(f"the compiler left no kernel for compute capability {self.capability}")
        return cubin.get_kernel(name[1].decode())

    def __call__(self, blocks: int, stream: int, *arguments: Any) -> None:
        """Launch it on the stream with this address; arrays are given by their addresses."""
        launch(_stream(stream), LaunchConfig(grid=blocks, block=self.threads), self._compiled, *arguments)


def linker(code: bytes, capability: Capability, **options: Any) -> Any:
    """What makes machine code of a kernel's intermediate code, by nvJitLink's own optimiser, as Numba does it.

    From PTX, past that, registers are given out in another way, and the tightest kernels were a third slower.
    """
    architecture = "sm_{}{}".format(*capability)
    return Linker(
        ObjectCode.from_ltoir(code), options=LinkerOptions(arch=architecture, link_time_optimization=True, **options)
    )


@lru_cache(maxsize=64)
def _stream(address: int) -> Any:
    return Stream.from_handle(address)
