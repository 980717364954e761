"""Norms as objects, which keep their parameters from call to call: how the code of a model reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from rmsnorm_np import _arguments, _backends, _numbers
from rmsnorm_np.layer_norms import layer_norm, layer_norm_backward
from rmsnorm_np.norms import rms_norm, rms_norm_backward
from rmsnorm_np.ops.layer import LAYER_NORM
from rmsnorm_np.ops.rms import RMS_NORM

if TYPE_CHECKING:
    import numpy.typing as npt

    from rmsnorm_np.reference import LayerNormGrads, RMSNormGrads
    from rmsnorm_np.reference._common import GradientsOut

    Array = npt.NDArray[Any]


def _parameter(name: str, value: Any) -> Any:
    """A weight or bias that is kept for later calls: None, a device array, or an array of any layout on the host."""
    if value is None or (type(value) is not ndarray and hasattr(value, "__cuda_array_interface__")):
        return value
    a = _arguments.as_array(name, value)
    _arguments.native_dtype(name, a.dtype)
    if a.ndim == 0:
        raise ValueError(f"{name} has shape (), expected (n,), one number for each element of a row")
    return a


_FORWARD_ALONE = "dtype", "round_xhat"
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "weight": lambda value: _parameter("weight", value),
    "bias": lambda value: _parameter("bias", value),
    "eps": _numbers.check_eps,
    "p": _numbers.check_p,
    "weight_offset": lambda value: _numbers.check_weight_offset(value, has_weight=True),
    "dtype": _arguments.result_dtype,
    "round_xhat": lambda value: _numbers.check_flag("round_xhat", value),
}


def _no_small(x: Any) -> None:
    """The short way where there is none."""


class _Norm:
    """What the norms share: parameters that are checked when they are set, and the short way of small arrays."""

    _operation: Any
    _forward: Callable[..., Any]
    _backward: Callable[..., Any]
    _names: tuple[str, ...]
    dtype: Any
    round_xhat: bool
    _small: list[Callable[[Any], Any] | None]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}, expected one of {self._names}")
        vars(self)[name] = _CHECKS[name](value)
        vars(self)["_small"] = [None]  # a new place: another thread may be filling the old one for the old parameters

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_small": [None]}  # machine code belongs to its process

    def __call__(self, x: npt.ArrayLike, out: Array | None = None) -> Array:
        """The norm of x, see the class."""
        if out is None and type(x) is ndarray:
            y = (self._small[0] or self._find_small())(x)
            if y is not None:
                return y  # type: ignore[no-any-return]
        return self._forward(x, **self._arguments(), out=out)  # type: ignore[no-any-return]

    def backward(self, dy: npt.ArrayLike, x: npt.ArrayLike, out: GradientsOut | None = None) -> Any:
        """The gradients by x, weight and bias, see the class."""
        given = {name: value for name, value in self._arguments().items() if name not in _FORWARD_ALONE}
        return self._backward(dy, x, **given, out=out)

    def _arguments(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self._names}

    def _find_small(self) -> Callable[[Any], Any]:
        """The short way, for the parameters as they are."""
        place = self._small
        given, forward = self._arguments(), self._forward
        found: Callable[[Any], Any] = _no_small
        if self.dtype is None and not self.round_xhat:
            engine = _backends.select(np.empty(0), None)  # the one for host arrays
            found = engine.small(self._operation, given, lambda x: forward(x, **given))
        place[0] = found
        return found

    def __repr__(self) -> str:
        def shown(name: str, value: Any) -> str:
            is_array = name in ("weight", "bias") and value is not None
            if is_array:
                return f"{name}=<{value.dtype} {value.shape}>"
            return f"{name}={str(value) if name == 'dtype' else repr(value)}"

        return f"{type(self).__name__}({', '.join(shown(*item) for item in self._arguments().items())})"


class RMSNorm(_Norm):
    """`rms_norm` with parameters that stay from call to call, over the last axis.

    Calls on small float32 arrays, with parameters of shape (n,), take half of the function's time, which looks at each
    parameter again.

    Parameters
    ----------
    weight : array_like or None, of shape (n,), (heads, n) …
        Factor of each element, as in `rms_norm`. An array is kept as it is, not copied: elements that are changed in
        place count from the next call on.
    bias : array_like, optional
        Added at the end.
    eps : float, default 1e-6
        Added to the mean square.
    p : float, default 1.0
        Fraction of each row that the root mean square is taken over.
    weight_offset : float, default 0.0
        Added to `weight`.
    dtype, round_xhat
        As in `rms_norm`. The gradient does not depend on them.

    Attributes
    ----------
    weight, bias, eps, p, weight_offset, dtype, round_xhat
        As given. Each may be replaced, and is checked then.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not of the kind, or in the range, that `rms_norm` takes. Whether its shape fits that of x is
        seen in the call.

    See Also
    --------
    rms_norm, rms_norm_backward : the functions, with `axis` and `backend`.

    Notes
    -----
    The formula and its source are those of `rms_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import RMSNorm
    >>> norm = RMSNorm(np.array([1.0, 10.0]), eps=0.0)
    >>> x = np.array([[3.0, 4.0]])
    >>> norm(x)
    array([[ 0.84852814, 11.3137085 ]])
    >>> norm.backward(np.array([[1.0, 0.0]]), x).dweight
    array([0.84852814, 0.        ])
    >>> norm.weight = np.ones(2)
    >>> norm(x)
    array([[0.84852814, 1.13137085]])
    """

    weight: Any
    bias: Any
    eps: float
    p: float
    weight_offset: float

    _operation, _forward, _backward = RMS_NORM, staticmethod(rms_norm), staticmethod(rms_norm_backward)
    _names = ("weight", "bias", "eps", "p", "weight_offset", *_FORWARD_ALONE)

    def __init__(
        self,
        weight: npt.ArrayLike | None,
        bias: npt.ArrayLike | None = None,
        *,
        eps: float = 1e-6,
        p: float = 1.0,
        weight_offset: float = 0.0,
        dtype: npt.DTypeLike | None = None,
        round_xhat: bool = False,
    ) -> None:
        self.weight, self.bias, self.eps, self.p, self.weight_offset = weight, bias, eps, p, weight_offset
        self.dtype, self.round_xhat = dtype, round_xhat

    def backward(self, dy: npt.ArrayLike, x: npt.ArrayLike, out: GradientsOut | None = None) -> RMSNormGrads:
        """The gradients by x, weight and bias, as `rms_norm_backward` gives them; out as there."""
        grads: RMSNormGrads = super().backward(dy, x, out)
        return grads


class LayerNorm(_Norm):
    """`layer_norm` with parameters that stay from call to call, over the last axis.

    Parameters
    ----------
    weight : array_like or None, of shape (n,), (heads, n) …
        Factor of each element, as in `rms_norm`; kept as it is, see `RMSNorm`.
    bias : array_like, optional
        Added at the end.
    eps : float, default 1e-6
        Added to the variance.
    weight_offset : float, default 0.0
        Added to `weight`.
    dtype, round_xhat
        As in `rms_norm`. The gradient does not depend on them.

    Attributes
    ----------
    weight, bias, eps, weight_offset, dtype, round_xhat
        As given. Each may be replaced, and is checked then.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not of the kind, or in the range, that `layer_norm` takes.

    See Also
    --------
    layer_norm, layer_norm_backward : the functions, with `axis` and `backend`.

    Notes
    -----
    The formula and its source are those of `layer_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import LayerNorm
    >>> norm = LayerNorm(np.ones(2), np.ones(2), eps=0.0)
    >>> norm(np.array([[3.0, 5.0]]))
    array([[0., 2.]])
    """

    weight: Any
    bias: Any
    eps: float
    weight_offset: float

    _operation, _forward, _backward = LAYER_NORM, staticmethod(layer_norm), staticmethod(layer_norm_backward)
    _names = ("weight", "bias", "eps", "weight_offset", *_FORWARD_ALONE)

    def __init__(
        self,
        weight: npt.ArrayLike | None,
        bias: npt.ArrayLike | None = None,
        *,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        dtype: npt.DTypeLike | None = None,
        round_xhat: bool = False,
    ) -> None:
        self.weight, self.bias, self.eps, self.weight_offset = weight, bias, eps, weight_offset
        self.dtype, self.round_xhat = dtype, round_xhat

    def backward(self, dy: npt.ArrayLike, x: npt.ArrayLike, out: GradientsOut | None = None) -> LayerNormGrads:
        """The gradients by x, weight and bias, as `layer_norm_backward` gives them; out as there."""
        grads: LayerNormGrads = super().backward(dy, x, out)
        return grads
