"""How many threads the CPU engine may use: one number for the process."""

from __future__ import annotations

import contextlib
import operator
import os
import sys
from _thread import _local  # threading.local: the module takes longer to import than this package
from collections.abc import Iterator

_requested: int | None = None  # by `set_num_threads`


class _Here(_local):
    most = sys.maxsize  # what `at_most` says in this Python thread


_here = _Here()


def set_num_threads(n: int) -> None:
    """Use at most `n` threads in each call of the CPU engine, from now on and from every Python thread.

    No result depends on it, not even in its last bit. Small calls run on one thread whatever `n` is, and so do calls
    that several threads make slower, because other processes hold the cores: see Notes.

    Parameters
    ----------
    n : int
        From 1 to the number of threads that Numba can start: the cores this process may use, or ``NUMBA_NUM_THREADS``.

    Raises
    ------
    TypeError
        If `n` is no int.
    ValueError
        If `n` is below 1 or above that number.

    See Also
    --------
    get_num_threads : the number in force.

    Notes
    -----
    Without a call of this function the number is that in the environment variable ``RMSNORM_NP_NUM_THREADS``, else
    that in ``OMP_NUM_THREADS``, but no more than Numba can start; where neither is set, it is all of them.
    ``numba.set_num_threads``, which holds in the Python thread that called it, can lower the number further there.

    The engine compares what calls take on threads with what they take on one, for each kernel and size. When threads
    have lost time, the next calls run on one for 20 ms, then threads are tried again; each time that fails the pause
    doubles, up to 2 s. On an idle machine one call in 128 times the number of threads runs on one, to measure it.

    Examples
    --------
    >>> import rmsnorm_np as rn
    >>> before = rn.get_num_threads()
    >>> rn.set_num_threads(1)
    >>> rn.get_num_threads()
    1
    >>> rn.set_num_threads(before)
    """
    global _requested
    if isinstance(n, bool):
        raise TypeError("n is a bool, expected an int")
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n is a {type(n).__name__}, expected an int") from None
    most = _most()
    if not 1 <= count <= most:
        raise ValueError(
            f"n is {count}, expected 1 to {most}; for more threads set NUMBA_NUM_THREADS before Numba is imported"
        )
    _requested = count


def get_num_threads() -> int:
    """The number of threads that a call of the CPU engine uses at most.

    Returns
    -------
    int
        What `set_num_threads` said, else what the environment says (see there).

    Raises
    ------
    ValueError
        If ``RMSNORM_NP_NUM_THREADS`` is set, and no whole number from 1 on.

    Examples
    --------
    >>> import rmsnorm_np as rn
    >>> rn.get_num_threads() >= 1
    True
    """
    global _requested
    if _requested is None:
        _requested = min(_from_environment() or _most(), _most())
    return min(_requested, _here.most)


@contextlib.contextmanager
def at_most(n: int) -> Iterator[None]:
    """No more than n threads in each call from this Python thread."""
    before = _here.most
    _here.most = n
    try:
        yield
    finally:
        _here.most = before


def _most() -> int:
    from numba import config

    return int(config.NUMBA_NUM_THREADS)


def _from_environment() -> int | None:
    text = os.environ.get("RMSNORM_NP_NUM_THREADS", "")
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"RMSNORM_NP_NUM_THREADS is {text!r}, expected a whole number of threads, 1 or more")
        return int(text)
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # one number for each level of nesting
    return int(text) if text.isdecimal() and int(text) >= 1 else None  # OpenMP, too, passes over anything else
