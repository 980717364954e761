"""Arrays of other libraries: they come in without a copy, results are ndarrays, and what is refused is named."""

from __future__ import annotations

import re

import numpy as np
import pytest

import rmsnorm_np as rn
from rmsnorm_np._arguments import as_array
from rmsnorm_np.cpu import jit, kernel

VALUES = np.arange(8.0).reshape(2, 4)


class Exported:
    """An array that offers its memory by DLPack and in no other way, from a device of this kind."""

    def __init__(self, array, kind=1, number=0):
        self.array, self.kind, self.number = array, kind, number

    def __dlpack_device__(self):
        return self.kind, self.number

    def __dlpack__(self, **options):
        return self.array.__dlpack__()

    def __len__(self):  # without DLPack NumPy would take it for a list, and read one element after another
        return len(self.array)

    def __getitem__(self, i):
        return self.array[i]


def address(a):
    return a.__array_interface__["data"][0]


def bits(a):
    return a.dtype, a.shape, a.tobytes()


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_what_offers_dlpack_alone_is_not_copied(dtype, backend):
    x, weight = VALUES.astype(dtype), np.arange(4.0).astype(dtype)
    taken = as_array("x", Exported(x))
    assert type(taken) is np.ndarray
    assert address(taken) == address(x)
    x[0, 0] = 7.0
    assert taken[0, 0] == 7.0
    if dtype == "f4":
        y = rn.rms_norm(Exported(x), Exported(weight), backend=backend)
        assert bits(y) == bits(rn.rms_norm(x, weight, backend=backend))


def test_strides_are_kept():
    x = VALUES[:, ::2]
    taken = as_array("x", Exported(x))
    assert (taken.strides, address(taken)) == (x.strides, address(x))


@pytest.mark.parametrize("kind", [3, 11])
def test_pinned_memory_of_the_host_is_taken(kind):
    """NumPy itself looks at nothing but the capsule here, which says CPU."""
    assert np.array_equal(as_array("x", Exported(VALUES, kind)), VALUES)


@pytest.mark.parametrize(
    ("kind", "device"),
    [(2, "CUDA"), (8, "Metal"), (10, "ROCm"), (13, "CUDA managed"), (14, "oneAPI"), (99, "kind 99 in DLPack")],
)
@pytest.mark.parametrize("argument", ["x", "weight", "dy"])
def test_another_device_is_named(kind, device, argument, backend):
    arrays = {"dy": VALUES, "x": VALUES, "weight": np.ones(4)}
    arrays[argument] = Exported(arrays[argument], kind, 3)
    message = f"{argument} is a Exported on device 3 of {device}, expected an array on the CPU"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        rn.rms_norm_backward(**arrays, backend=backend)


def test_what_numpy_cannot_take_is_named(backend):
    class Strange(Exported):
        def __dlpack__(self, **options):
            raise BufferError("no strides")

    class Nowhere(Exported):
        def __dlpack_device__(self):
            raise ValueError("no device")

    for x, error in ((Strange(VALUES), "no strides"), (Nowhere(VALUES), "no device")):
        with pytest.raises((TypeError, ValueError), match=f"^x is not an array: {error}$"):
            rn.rms_norm(x, backend=backend)


def test_a_result_is_not_written_to_another_librarys_array(backend):
    with pytest.raises(TypeError, match=r"^out is of type Exported, expected a numpy.ndarray$"):
        rn.rms_norm(VALUES, out=Exported(VALUES.copy()), backend=backend)


# Read-only arrays, which is how JAX gives its own


def test_a_kernel_compiled_for_read_only_arrays_takes_all(monkeypatch):
    """And the other way round: they are of one type to a kernel."""
    x, weight = VALUES.astype(np.float32), np.arange(4, dtype=np.float32)
    want = rn.rms_norm(x, weight)
    monkeypatch.setattr(kernel, "entries", {})
    kept = x.copy()
    locked = read_only(x)
    assert bits(rn.rms_norm(locked, read_only(weight))) == bits(want)
    assert bits(rn.rms_norm(x, weight)) == bits(want)
    assert np.array_equal(locked, kept)
    assert jit._type_of(locked) == jit._type_of(x)


# The libraries themselves


def torch_array(values, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    array = torch.tensor(values.tolist(), dtype=getattr(torch, dtype))
    return array, array.data_ptr()


def jax_array(values, dtype):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if dtype == "float64" and not jax.config.jax_enable_x64:
        pytest.skip("JAX has no float64 as it is set up")
    array = jax.numpy.asarray(values, dtype)
    return array, array.unsafe_buffer_pointer()


def mlx_array(values, dtype):
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    mx.set_default_device(mx.cpu)
    array = mx.array(values.tolist(), dtype=getattr(mx, dtype))
    return array, address(np.asarray(array.view(getattr(mx, f"int{8 * array.itemsize}"))))


def strict_array(values, dtype):
    xp = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
    if dtype not in ("float32", "float64"):
        pytest.skip("the standard has no float of 16 bits")
    array = xp.asarray(values, dtype=getattr(xp, dtype))
    return array, address(np.from_dlpack(array))


LIBRARIES = {"torch": torch_array, "jax": jax_array, "mlx": mlx_array, "array_api_strict": strict_array}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_arrays_of_other_libraries_are_not_copied(library, dtype):
    x, memory = LIBRARIES[library](VALUES, dtype)
    taken = as_array("x", x)
    assert type(taken) is np.ndarray
    assert taken.dtype.name == dtype
    assert address(taken) == memory
    assert np.array_equal(taken, VALUES)
    weight, _ = LIBRARIES[library](np.arange(4.0), dtype)
    y = rn.rms_norm(x, weight, backend="reference")
    assert type(y) is np.ndarray
    assert bits(y) == bits(rn.rms_norm(VALUES.astype(taken.dtype), np.arange(4).astype(dtype), backend="reference"))
    if dtype == "float32":
        assert bits(rn.rms_norm(x, weight)) == bits(rn.rms_norm(taken.copy(), np.arange(4, dtype=np.float32)))
        grads, want = rn.rms_norm_backward(x, x, weight), rn.rms_norm_backward(taken, taken, as_array("weight", weight))
        assert [bits(a) for a in grads[:2]] == [bits(a) for a in want[:2]]


def test_what_is_written_to_a_tensor_is_seen():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.ones(2, 4, dtype=dtype)
        taken = as_array("x", tensor[:, 1:])
        tensor[1, 1] = 5.0
        assert taken.tolist() == [[1.0, 1.0, 1.0], [5.0, 1.0, 1.0]]


def test_what_pytorch_has_not_computed_yet():
    """A pending negation: DLPack gives the memory as it is, of the other sign."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(TypeError, match=r"^x is not an array: .*negative bit"):
        rn.rms_norm(torch.tensor([1 + 2j, 3 + 4j]).conj().imag, backend="reference")


def test_tensors_without_memory_of_the_host():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for x in (torch.ones(2, 4, device="meta"), torch.eye(4).to_sparse()):
        with pytest.raises((TypeError, ValueError), match=r"^x is not an array: .*(meta|[Ss]parse)"):
            rn.rms_norm(x, backend="reference")
