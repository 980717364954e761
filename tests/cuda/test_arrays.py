"""Device arrays of any library and their streams, with a driver that only writes down what it was asked."""

from __future__ import annotations

import types
import weakref

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from rmsnorm_np.cuda import arrays


class Foreign:
    """An array of another library."""

    def __init__(self, stream=None, typestr="<f4"):
        self.__cuda_array_interface__ = {
            "shape": (2, 4), "typestr": typestr, "data": (4096, False), "strides": None, "version": 3, "stream": stream,
        }  # fmt: skip


class Event:
    def __init__(self, asked):
        self.asked = asked

    def record(self, stream):
        self.recorded = stream

    def wait(self, stream):
        self.asked.append((self.recorded, stream))


@pytest.fixture
def asked(monkeypatch):
    """Pairs (the stream that an event was recorded on, the stream that was made to wait for it)."""
    asked = []
    driver = types.SimpleNamespace(
        external_stream=lambda address: address, default_stream=lambda: "default", event=lambda timing: Event(asked)
    )
    monkeypatch.setattr(arrays, "cuda", driver)
    return asked


def stream_for(*streams):
    return arrays.stream_for(tuple(None if stream is None else arrays.seen("x", Foreign(stream)) for stream in streams))


def test_a_call_runs_on_the_stream_of_x_and_waits_for_the_others(asked):
    assert stream_for(0, None, 0) == 0
    assert stream_for(7, None, 7) == 7
    assert asked == []
    assert stream_for(7, 9, None, 8, 9) == 7
    assert asked == [(9, 7), (8, 7)]


def test_a_given_stream_waits_for_all(asked):
    class Stream:
        def __int__(self):
            return 3

    with arrays.use_stream(5):
        assert stream_for(7, 0, 7) == 5
    assert asked == [(7, 5)]
    with arrays.use_stream(Stream()):
        assert stream_for(0) == 3
    with arrays.use_stream(0):
        assert stream_for(7) == 0
    assert asked[1:] == [(7, "default")]
    with pytest.raises(KeyError), arrays.use_stream(5):
        raise KeyError
    assert stream_for(0) == 0


def test_what_is_taken_for_an_array():
    array = arrays.seen("x", Foreign())
    assert array[:4] == (4096, (2, 4), (16, 4), np.dtype(np.float32))
    assert arrays.seen("x", Foreign(typestr="<V2")).dtype == ml_dtypes.bfloat16
    for typestr in ("<i8", ">f4", "<c8", "<V4"):
        with pytest.raises(
            TypeError, match=r"dy has dtype .*, expected float16, bfloat16, float32 or float64 on a device"
        ):
            arrays.seen("dy", Foreign(typestr=typestr))
    for name in ("dy", "weight", "bias", "out"):
        with pytest.raises(TypeError, match=rf"{name} is a host array \(ndarray\), .* numba.cuda.to_device"):
            arrays.seen(name, np.ones(3))
    masked = Foreign()
    masked.__cuda_array_interface__["mask"] = Foreign()
    with pytest.raises(TypeError, match="x has a mask"):
        arrays.seen("x", masked)


def test_an_array_on_a_gpu_without_the_interface_is_not_called_a_host_array():
    class Array:
        def __dlpack_device__(self):
            return 2, 0

    with pytest.raises(TypeError, match=r"x \(Array\) lies on a GPU, but has no __cuda_array_interface__"):
        arrays.seen("x", Array())


def test_scratch_stays_while_kernels_are_launched_on_it(monkeypatch):
    """What a call has asked for is not given back before the call says so; small memory is used again."""

    class Memory:
        device_ctypes_pointer = types.SimpleNamespace(value=4096)

        def __init__(self, size):
            self.size = size

    made = []

    def empty(shape, dtype, stream):
        memory = Memory(*shape)
        made.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(arrays, "empty", empty)
    monkeypatch.setattr(arrays, "cuda", types.SimpleNamespace(current_context=lambda: "context"))
    monkeypatch.setattr(arrays, "_scratch", arrays._Scratch())
    assert arrays.scratch((100, 300, 5), 0) == [4096, 4096 + 256, 4096 + 768]
    arrays.leave_scratch()
    assert arrays.scratch((200,), 0) == [4096]
    assert len(made) == 1
    arrays.scratch((100,), 7)  # another stream may not wait for the first
    assert len(made) == 2
    arrays.scratch((2**27,), 7)
    assert made[2]() is not None
    arrays.leave_scratch()
    assert made[2]() is None
