"""`set_num_threads`: one number for the process, and where it comes from."""

from __future__ import annotations

import threading

import numba
import pytest

import rmsnorm_np as rn
from rmsnorm_np import _threads
from rmsnorm_np.cpu import threads


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """As in a fresh process whose Numba can start four threads, on any machine."""
    monkeypatch.setattr(_threads, "_requested", None)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(threads, "layer", lambda: "omp")  # it would start four
    for name in ("RMSNORM_NP_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("ours", "openmp", "want"),
    [
        (None, None, 4),
        (None, "3", 3),
        ("2", "3", 2),
        ("", "3", 3),
        (None, "3,2", 3),  # OpenMP's list for nested regions
        (None, "auto", 4),  # OpenMP passes over it, too
        (None, "0", 4),
        ("16", None, 4),  # no more than Numba can start
        (None, "16", 4),
    ],
)
def test_the_default_is_the_environments(ours, openmp, want, monkeypatch):
    for name, value in (("RMSNORM_NP_NUM_THREADS", ours), ("OMP_NUM_THREADS", openmp)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert rn.get_num_threads() == want
    assert threads.choose(1 << 20) == want


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_wrong_default_is_an_error(text, monkeypatch):
    monkeypatch.setenv("RMSNORM_NP_NUM_THREADS", text)
    with pytest.raises(ValueError, match=f"RMSNORM_NP_NUM_THREADS is '{text}', expected a whole number"):
        rn.get_num_threads()


def test_it_holds_in_every_python_thread():
    """Numba's own number holds in the thread that set it alone."""
    other = threading.Thread(target=rn.set_num_threads, args=(2,))
    other.start()
    other.join()
    assert rn.get_num_threads() == 2
    assert threads.choose(1 << 20) == 2
    assert threads.choose(1) == 1


@pytest.mark.parametrize("n", [0, -1, 5])
def test_a_number_out_of_range(n):
    with pytest.raises(ValueError, match=f"n is {n}, expected 1 to 4; .* NUMBA_NUM_THREADS"):
        rn.set_num_threads(n)
    assert rn.get_num_threads() == 4


@pytest.mark.parametrize("n", [True, 1.0, "1", None])
def test_no_number(n):
    with pytest.raises(TypeError, match=f"n is a {type(n).__name__}, expected an int"):
        rn.set_num_threads(n)
