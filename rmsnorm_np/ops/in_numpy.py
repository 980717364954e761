"""What NumPy lacks of what numbers do in :mod:`rmsnorm_np.ops`, and the sum without loss that is used for it."""

from __future__ import annotations

from typing import Any

import numpy as np


def two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """(a + b, what it rounds off): Knuth, The Art of Computer Programming, vol. 2, 4.2.2."""
    total = a + b
    second = total - a
    return total, (a - (total - second)) + (b - second)


def dtype_of(name: str) -> Any:
    """NumPy's dtype of this name; bfloat16 is ml_dtypes'."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a · b + c in NumPy, to the last bit but for ties: the product in two parts (Dekker), then a two-sum."""
    if np.result_type(a, b, c) != np.float64:
        wide = np.asarray(a, np.float64) * np.asarray(b, np.float64) + c
        return wide.astype(np.result_type(a, b, c))
    (ah, al), (bh, bl) = _split(a), _split(b)
    head = a * b
    tail = ((ah * bh - head) + ah * bl + al * bh) + al * bl
    total, error = two_sum(head, c)
    return np.where(np.isfinite(tail) & np.isfinite(error), total + (error + tail), head + c)


def _split(a: Any) -> tuple[Any, Any]:
    """Two halves of 26 bits, whose products are exact (Veltkamp)."""
    wide = a * 134217729.0  # 2**27 + 1
    head = wide - (wide - a)
    return head, a - head
