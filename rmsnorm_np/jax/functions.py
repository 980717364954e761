"""The public functions: arguments are checked, and handed to the primitives."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rmsnorm_np._arrays import check_given, native_dtype
from rmsnorm_np._numbers import check_eps, check_weight_offset, elements_in_rms
from rmsnorm_np._shapes import axes_of, check_same_shape, parameter_lead
from rmsnorm_np.jax.calls import FORWARD, Call
from rmsnorm_np.jax.primitives import bind
from rmsnorm_np.reference import AddNorm

if TYPE_CHECKING:
    from jax.typing import ArrayLike


def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    p: float = 1.0,
    weight_offset: float = 0.0,
) -> jax.Array:
    """`rmsnorm_np.rms_norm` of JAX arrays on the CPU, over the last axis.

    Parameters
    ----------
    x : array_like, of any shape with at least one axis
        float16, bfloat16, float32 or float64; integers are taken as JAX's default float.
    weight, bias : array_like, optional
        Factor of each element, and what is added at the end; any of these dtypes. Of shape ``(n,)``, or one that
        broadcasts against x and has its last axis in full.
    eps, p, weight_offset : float
        As in `rmsnorm_np.rms_norm`: numbers, not traced values.

    Returns
    -------
    y : jax.Array
        Shape and dtype of x.

    Raises
    ------
    TypeError
        If an array is None or has another dtype, or a number is none, such as a traced value.
    ValueError
        If a shape does not fit, or a number is out of range.
    NotImplementedError
        If it is compiled for a device other than the CPU.

    See Also
    --------
    rmsnorm_np.rms_norm : the formula, its accuracy, and all parameters.

    Notes
    -----
    Under `jax.jit` the kernel reads and writes XLA's memory: nothing is copied. First derivatives in both modes are
    kernels, and so are second ones but forward over forward; what lies beyond is computed by operations of JAX's.
    `jax.vmap` makes one call of a batch; where each item has its own weight, the engine takes the items one by one.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from rmsnorm_np.jax import rms_norm
    >>> x = jnp.array([[3.0, 4.0]])
    >>> jax.jit(rms_norm)(x, jnp.ones(2))
    Array([[0.8485281, 1.1313708]], dtype=float32)
    >>> jax.grad(lambda x: rms_norm(x)[0, 0])(x)
    Array([[ 0.18101934, -0.13576448]], dtype=float32)
    """
    return _norm("rms_norm", {"x": x, "weight": weight, "bias": bias}, eps, p, weight_offset)["y"]


def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> jax.Array:
    """`rmsnorm_np.layer_norm` of JAX arrays on the CPU, over the last axis.

    Parameters
    ----------
    x, weight, bias, eps, weight_offset
        As in `rms_norm`.

    Returns
    -------
    y : jax.Array
        Shape and dtype of x.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `rms_norm`.

    See Also
    --------
    rmsnorm_np.layer_norm : the formula, its accuracy, and all parameters.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from rmsnorm_np.jax import layer_norm
    >>> layer_norm(jnp.array([[3.0, 5.0]]), bias=jnp.ones(2), eps=0.0)
    Array([[0., 2.]], dtype=float32)
    """
    return _norm("layer_norm", {"x": x, "weight": weight, "bias": bias}, eps, 1.0, weight_offset)["y"]


def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    p: float = 1.0,
    weight_offset: float = 0.0,
) -> AddNorm:
    """`rmsnorm_np.add_rms_norm` of JAX arrays on the CPU: h = x + residual, and its norm, in one pass over memory.

    Parameters
    ----------
    x : array_like
        As in `rms_norm`.
    residual : array_like
        Shape of x; any of the dtypes of x.
    weight, bias, eps, p, weight_offset
        As in `rms_norm`.

    Returns
    -------
    AddNorm
        A named tuple: ``y`` with the shape and dtype of x, ``h`` with those of residual.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `rms_norm`; a ValueError too if residual has another shape than x.

    See Also
    --------
    rmsnorm_np.add_rms_norm : the formula, its accuracy, and all parameters.

    Notes
    -----
    The gradient adds that of h to what comes through the norm in the same pass.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from rmsnorm_np.jax import add_rms_norm
    >>> y, h = add_rms_norm(jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 2.0]]), eps=0.0)
    >>> h
    Array([[3., 4.]], dtype=float32)
    """
    arrays = {"x": x, "residual": _given("residual", residual), "weight": weight, "bias": bias}
    return AddNorm(**_norm("rms_norm", arrays, eps, p, weight_offset))


def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> AddNorm:
    """`rmsnorm_np.add_layer_norm` of JAX arrays on the CPU: h = x + residual, and its norm.

    Parameters
    ----------
    x, residual, weight, bias, eps, weight_offset
        As in `add_rms_norm`.

    Returns
    -------
    AddNorm
        As from `add_rms_norm`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `add_rms_norm`.

    See Also
    --------
    rmsnorm_np.add_layer_norm : the formula, its accuracy, and all parameters.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from rmsnorm_np.jax import add_layer_norm
    >>> y, h = add_layer_norm(jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 3.0]]), eps=0.0)
    >>> y
    Array([[-1.,  1.]], dtype=float32)
    """
    arrays = {"x": x, "residual": _given("residual", residual), "weight": weight, "bias": bias}
    return AddNorm(**_norm("layer_norm", arrays, eps, 1.0, weight_offset))


def _norm(norm: str, given: dict[str, Any], eps: Any, p: Any, weight_offset: Any) -> dict[str, Any]:
    """The results by their names. All checks are here: beyond it, JAX may be tracing."""
    check_given("x", given["x"])
    arrays = {name: _array(name, value) for name, value in given.items() if value is not None}
    x = arrays["x"]
    axes = axes_of(-1, x.shape)
    n = x.shape[-1]
    for name in ("weight", "bias"):
        if name in arrays:
            parameter_lead(name, arrays[name].shape, x.shape, axes)
    if "residual" in arrays:
        check_same_shape("residual", arrays["residual"].shape, "x", x.shape)
    p = elements_in_rms(n, p) / n  # in float64 this gives the same number of elements again
    call = Call(norm, check_eps(eps), p, check_weight_offset(weight_offset, "weight" in arrays))
    return _run(arrays, call)  # type: ignore[no-any-return]


def _given(name: str, value: Any) -> Any:
    check_given(name, value)
    return value


def _array(name: str, value: Any) -> Any:
    if not isinstance(value, jax.Array):  # a traced value is one
        try:
            value = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} is not an array: {error}") from error
    native_dtype(name, np.dtype(value.dtype))
    return value


@functools.partial(jax.jit, static_argnames="call", inline=True)
def _run(arrays: dict[str, Any], call: Call) -> dict[str, Any]:
    ndim = arrays["x"].ndim

    def prepared(a: Any) -> Any:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            a = a.astype(float)
        return a.reshape((1,) * (ndim - a.ndim) + a.shape)

    # in the order of the primitive's arguments: a dict that went through jit is sorted
    ordered: dict[str, Any] = {
        name: prepared(arrays[name]) for name in ("x", "residual", "weight", "bias") if name in arrays
    }
    return bind(call, FORWARD, ordered)
