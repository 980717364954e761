"""The public functions of RMSNorm with a gate, as state space models (Mamba-2) have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmsnorm_np import _arguments, _backends, _numbers, reference
from rmsnorm_np.ops import gated
from rmsnorm_np.reference import GatedNormGrads

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


def gated_rms_norm(
    x: npt.ArrayLike,
    gate: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    norm_before_gate: bool = True,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    dtype: npt.DTypeLike | None = None,
    round_xhat: bool = False,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """RMSNorm with a gate: rms_norm(x) · silu(gate), or rms_norm(x · silu(gate)), in one pass over memory.

    Parameters
    ----------
    x : array_like
        As x of `rms_norm`.
    gate : array_like
        Shape of x; any of the dtypes of x, whatever that of x.
    weight, bias, eps, p, axis, weight_offset, backend
        As given to `rms_norm`.
    norm_before_gate : bool, default True
        True multiplies the norm, weight and bias included, by ``silu(gate)``; False multiplies x by it, and then takes
        the norm of the product.
    out : ndarray, optional
        Where y is written: exactly the shape and dtype of y, writable, any layout. It may be x or gate.

    Returns
    -------
    y : ndarray
        Shape and dtype of x; `out` if that was given.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm`; a TypeError too if gate is None or `norm_before_gate` is no bool, a ValueError if gate has
        another shape than x.

    See Also
    --------
    gated_rms_norm_backward : its gradients.
    rmsnorm_np.reference.gated_rms_norm : the same in readable NumPy.

    Notes
    -----
    ::

        silu(gate) = gate · sigmoid(gate) = gate / (1 + exp(-gate))

        y = rms_norm(x, weight, bias) · silu(gate)        norm_before_gate
        y = rms_norm(x · silu(gate), weight, bias)        not norm_before_gate

    The exponential is taken of ``-abs(gate)``: no finite gate overflows or gives NaN. The product x · silu(gate) is not
    rounded before its norm is taken. ``norm_before_gate=False`` is ``RMSNormGated`` of Mamba-2 (Dao and Gu, ICML
    2024, arXiv:2405.21060). Its ``group_size`` is a reshape here, see the examples. Accuracy as in `rms_norm`,
    but in float64, where silu is not computed in pairs: 5.5 ULP, and 10.5 if not `norm_before_gate`.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import gated_rms_norm
    >>> gated_rms_norm(np.array([[3.0, 4.0]]), np.array([[0.0, 100.0]]), eps=0.0)
    array([[  0.        , 113.13708499]])

    Groups, with the shapes of Mamba-2: x and gate are (batch, seqlen, d_ssm), weight is (d_ssm,), and each group of
    ``group_size = d_ssm // ngroups`` neighbours has an RMS of its own:

    >>> batch, seqlen, ngroups, group_size = 2, 5, 4, 8
    >>> d_ssm = ngroups * group_size
    >>> x, gate, weight = np.ones((batch, seqlen, d_ssm)), np.ones((batch, seqlen, d_ssm)), np.ones(d_ssm)
    >>> groups = ngroups, group_size
    >>> y = gated_rms_norm(
    ...     x.reshape(batch, seqlen, *groups), gate.reshape(batch, seqlen, *groups), weight.reshape(groups),
    ...     norm_before_gate=False,
    ... ).reshape(x.shape)
    """
    engine = _backends.select(x, backend)
    if engine is reference:
        return reference.gated_rms_norm(
            x, gate, weight, bias, norm_before_gate=norm_before_gate, eps=eps, p=p, axis=axis,
            weight_offset=weight_offset, dtype=dtype, round_xhat=round_xhat, out=out,
        )  # fmt: skip
    _arguments.check_given("gate", gate)
    _numbers.check_flag("norm_before_gate", norm_before_gate)
    operation = gated.NORM_FIRST if norm_before_gate else gated.GATE_FIRST
    call = ("x", "gate", "out"), (x, gate), (weight, bias, weight_offset), (out,), eps, p, axis
    (y,), _ = _backends.run(engine, operation, call, dtype=dtype, round_xhat=round_xhat)
    return y  # type: ignore[no-any-return]


def gated_rms_norm_backward(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    gate: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    norm_before_gate: bool = True,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: tuple[Array | None, Array | None] | None = None,
    backend: str | None = None,
) -> GatedNormGrads:
    """Gradients of a loss with respect to x, gate, weight and bias of `gated_rms_norm`, from the gradient by y.

    Nothing but x and gate is kept from the forward pass.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss by y. Shape of x; any of the dtypes of x, whatever that of x.
    x, gate, weight, bias, norm_before_gate, eps, p, axis, weight_offset, backend
        As given to `gated_rms_norm`. If not `norm_before_gate`, only the shape and the dtype of `bias` matter.
    out : tuple of ndarray or None, optional
        Where dx and dgate are written: ``(dx, dgate)``, each exactly of the shape and dtype of that result, writable,
        any layout; or None. They may be dy, x or gate, but must not share memory with each other.

    Returns
    -------
    GatedNormGrads
        A named tuple: ``dx`` with the shape and dtype of x, ``dgate`` with those of gate, ``dweight`` with those of
        weight, ``dbias`` with those of bias (float64 for a parameter of integers). ``dweight`` and ``dbias`` are None
        where the parameter is None.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `gated_rms_norm`; a ValueError too if dy has another shape than x; a TypeError if `out` is no tuple of two.

    See Also
    --------
    gated_rms_norm : the forward function.
    rms_norm_backward : the gradients of the norm.
    rmsnorm_np.reference.gated_rms_norm_backward : the same in readable NumPy.

    Notes
    -----
    With ``s = silu(gate)`` and its derivative ``ds = sigmoid(gate) · (1 + gate · sigmoid(-gate))``::

        norm_before_gate       dx, dweight, dbias from rms_norm_backward(dy · s, x, weight, bias)
                               dgate = dy · rms_norm(x, weight, bias) · ds
        not norm_before_gate   du, dweight, dbias from rms_norm_backward(dy, x · s, weight, bias)
                               dx = du · s,  dgate = du · x · ds

    No intermediate result is rounded to a dtype of the arguments. Accuracy as in `rms_norm_backward`,
    but in float64: dx within 10.5 ULP and dgate within 11.5, and 40.5 and 52.5 if not `norm_before_gate`.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import gated_rms_norm_backward
    >>> dy, x, gate = np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]]), np.array([[0.0, 100.0]])
    >>> gated_rms_norm_backward(dy, x, gate, eps=0.0).dgate
    array([[0.42426407, 0.        ]])
    """
    _arguments.check_given("dy", dy)
    engine = _backends.select(x, backend)
    if engine is reference:
        return reference.gated_rms_norm_backward(
            dy, x, gate, weight, bias, norm_before_gate=norm_before_gate, eps=eps, p=p, axis=axis,
            weight_offset=weight_offset, out=out,
        )  # fmt: skip
    _arguments.check_given("gate", gate)
    _numbers.check_flag("norm_before_gate", norm_before_gate)
    operation = gated.NORM_FIRST_BACKWARD if norm_before_gate else gated.GATE_FIRST_BACKWARD
    names, outs = ("x", "gate", "dy", "out[0]", "out[1]"), _arguments.outs_of(out, ("dx", "dgate"))
    call = names, (x, gate, dy), (weight, bias, weight_offset), outs, eps, p, axis
    (dx, dgate), (dweight, dbias) = _backends.run(engine, operation, call)
    return GatedNormGrads(dx, dgate, dweight, dbias)
