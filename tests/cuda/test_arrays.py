"""Device arrays of any library and their streams, with a driver that only writes down what it was asked."""

from __future__ import annotations

import types

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

    def as_cuda_array(value, sync):
        assert not sync, "the host would wait"
        interface = value.__cuda_array_interface__
        dtype = np.dtype(interface["typestr"])
        return types.SimpleNamespace(
            shape=interface["shape"], strides=(4 * dtype.itemsize, dtype.itemsize), dtype=dtype
        )

    driver = types.SimpleNamespace(
        external_stream=lambda address: f"stream {address}",
        event=lambda timing: Event(asked),
        as_cuda_array=as_cuda_array,
    )
    monkeypatch.setattr(arrays, "cuda", driver)
    return asked


def test_a_call_runs_on_the_stream_of_x_and_waits_for_the_others(asked):
    assert arrays.stream_for((Foreign(), None, Foreign())) == 0
    assert arrays.stream_for((Foreign(7), None, Foreign(7))) == "stream 7"
    assert asked == []
    assert arrays.stream_for((Foreign(7), Foreign(9), None, Foreign(8), Foreign(9))) == "stream 7"
    assert asked == [("stream 9", "stream 7"), ("stream 8", "stream 7")]


def test_a_given_stream_waits_for_all(asked):
    with arrays.use_stream(5):
        assert arrays.stream_for((Foreign(7), Foreign(), Foreign(7))) == "stream 5"
    assert asked == [("stream 7", "stream 5")]
    with arrays.use_stream("a stream of Numba"):
        assert arrays.stream_for((Foreign(),)) == "a stream of Numba"
    with pytest.raises(KeyError), arrays.use_stream(5):
        raise KeyError
    assert arrays.stream_for((Foreign(),)) == 0


def test_what_is_taken_for_an_array(asked, monkeypatch):
    monkeypatch.setattr(arrays, "viewed", lambda array, shape, strides, dtype: dtype)
    assert arrays.as_device_array("x", Foreign()).dtype == np.float32
    assert arrays.as_device_array("x", Foreign(typestr="<V2")) == ml_dtypes.bfloat16
    for typestr in ("<i8", ">f4", "<c8", "<V4"):
        with pytest.raises(
            TypeError, match=r"dy has dtype .*, expected float16, bfloat16, float32 or float64 on a device"
        ):
            arrays.as_device_array("dy", Foreign(typestr=typestr))
    for name in ("dy", "weight", "bias", "out"):
        with pytest.raises(TypeError, match=rf"{name} is a host array \(ndarray\), .* numba.cuda.to_device"):
            arrays.as_device_array(name, np.ones(3))
