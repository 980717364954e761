"""What Python cannot say to the compiler: wide accesses, bits seen as numbers, conversions of 16-bit floats."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

WORD = 4  # bytes of a register

_GLOBAL = 1  # LLVM's number for the address space of device memory


def _address(builder: Any, pointee: Any, array: Any, index: Any) -> Any:
    pointer = builder.gep(array, [index])
    return builder.addrspacecast(builder.bitcast(pointer, pointee.as_pointer()), pointee.as_pointer(_GLOBAL))


def _loader(count: int) -> Any:
    word = ir.IntType(32)
    vector = word if count == 1 else ir.VectorType(word, count)

    @intrinsic
    def load_words(typing_context: Any, array: Any, index: Any) -> Any:
        """`count` words from array[index] on, in one access."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(_address(builder, vector, *arguments), align=WORD * count)
            parts = [value] if count == 1 else [builder.extract_element(value, word(j)) for j in range(count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(types.uint32, count)(array, types.int64), codegen

    return load_words


def _storer(count: int) -> Any:
    word = ir.IntType(32)
    vector = word if count == 1 else ir.VectorType(word, count)

    @intrinsic
    def store_words(typing_context: Any, array: Any, index: Any, words: Any) -> Any:
        """The tuple `words` to array[index] and on, in one access."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, index, words = arguments
            value = builder.extract_value(words, 0)
            if count > 1:
                value = ir.Constant(vector, ir.Undefined)
                for j in range(count):
                    value = builder.insert_element(value, builder.extract_value(words, j), word(j))
            builder.store(value, _address(builder, vector, target, index), align=WORD * count)
            return context.get_dummy_value()

        return types.void(array, types.int64, types.UniTuple(types.uint32, count)), codegen

    return store_words


def _bitcast(source: Any, target: Any) -> Any:
    @intrinsic
    def bits(typing_context: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), codegen

    return bits


load_1, load_2, load_4 = _loader(1), _loader(2), _loader(4)
store_1, store_2, store_4 = _storer(1), _storer(2), _storer(4)
float32_of_bits = _bitcast(types.uint32, types.float32)
bits_of_float32 = _bitcast(types.float32, types.uint32)
float64_of_bits = _bitcast(types.uint64, types.float64)
bits_of_float64 = _bitcast(types.float64, types.uint64)


@intrinsic
def float16_to_float32(typing_context: Any, bits: Any) -> Any:
    """The number with these 16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def float32_to_float16(typing_context: Any, value: Any) -> Any:
    """The bits of the nearest float16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def float32_to_bfloat16(typing_context: Any, value: Any) -> Any:
    """The bits of the nearest bfloat16, by the instruction that GPUs have from compute capability 8.0 on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(16), [ir.FloatType()])
        return builder.asm(kind, "cvt.rn.bf16.f32 $0, $1;", "=h,f", arguments, side_effect=False)

    return types.uint16(types.float32), codegen


@intrinsic
def product(typing_context: Any, a: Any, b: Any) -> Any:
    """a · b, rounded. The compiler does not fuse it with an addition: what it rounds off can be computed."""
    name = f"f{a.bitwidth}"
    letter = {"f32": "f", "f64": "d"}[name]

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_value_type(signature.return_type)
        kind = ir.FunctionType(number, [number, number])
        constraints = f"={letter},{letter},{letter}"
        return builder.asm(kind, f"mul.rn.{name} $0, $1, $2;", constraints, arguments, side_effect=False)

    return a(a, a), codegen


@intrinsic
def rough_reciprocal_root(typing_context: Any, value: Any) -> Any:
    """1 / sqrt(value) of a float64 to some 20 bits, in one instruction; zero, infinity and NaN as they should be."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.DoubleType(), [ir.DoubleType()])
        return builder.asm(kind, "rsqrt.approx.ftz.f64 $0, $1;", "=d,d", arguments, side_effect=False)

    return types.float64(types.float64), codegen


@intrinsic
def opaque(typing_context: Any, word: Any) -> Any:
    """The same word, in no instruction: the compiler takes it for a new one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        return builder.asm(kind, "", "=r,0", arguments, side_effect=True)

    return types.uint32(types.uint32), codegen
