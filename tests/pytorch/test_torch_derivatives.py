"""Gradients, second derivatives and forward mode, against numerical derivatives and PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves
from torch_cases import CASES, EPS, SHAPE, N, loss, on_reference, tensors  # noqa: F401 (a fixture)

import rmsnorm_np.torch as rt

pytestmark = [
    pytest.mark.usefixtures("on_reference"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # PyTorch's forward mode calls it
]
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_first_derivatives(case):
    torch.autograd.gradcheck(CASES[case][0], tensors(case), check_forward_ad=True, check_batched_forward_grad=True)


@every_case
def test_second_derivatives(case):
    """Reverse over reverse, and forward over reverse."""
    torch.autograd.gradgradcheck(CASES[case][0], tensors(case), check_fwd_over_rev=True)


def every(transform):
    """A transform of a loss by all its arguments."""
    return lambda f, *args: transform(f, tuple(range(len(args))))(*args)


def per_item(f, x, *others):
    """The gradient of each item of a batch, by the parameters too: they are the same for all of them."""
    return vmap(every_gradient(f), (0, *(0 if a.shape == SHAPE else None for a in others)))(x, *others)


def per_parameter(f, x, *others):
    """The same rows under several parameters."""
    if all(a.shape == SHAPE for a in others):
        return every_gradient(f)(x, *others)
    in_dims = tuple(None if a.shape == SHAPE else 1 for a in others)
    parameters = (a if a.shape == SHAPE else torch.stack([a, 2 * a], 1) for a in others)
    return vmap(every_gradient(f), (None, *in_dims))(x, *parameters)


def every_gradient(f):
    return lambda *args: grad(f, tuple(range(len(args))))(*args)


TRANSFORMS = {
    "grad": every(grad),
    "reverse over reverse": every(lambda f, by: jacrev(jacrev(f, by), by)),
    "forward over reverse": every(hessian),
    "reverse over forward": every(lambda f, by: jacrev(jacfwd(f, by), by)),
    "for each of a batch": per_item,
    "for each of some parameters": per_parameter,
    "batch of a batch": lambda f, x, *others: vmap(
        vmap(f, (0, *(0 if a.shape == SHAPE else None for a in others))),
        (1, *(1 if a.shape == SHAPE else None for a in others)),
    )(x, *others),
    "second derivatives for each of a batch": lambda f, x, *others: vmap(
        hessian(f), (0, *(0 if a.shape == SHAPE else None for a in others))
    )(x, *others),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_case
def test_transforms(case, transform):
    """As of the same formula in PyTorch's operations."""
    ours, theirs, *_ = CASES[case]
    args = tensors(case, requires_grad=False)
    results, expected = (TRANSFORMS[transform](loss(norm), *args) for norm in (ours, theirs))
    for a, b in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def test_only_what_is_asked_for():
    """A gradient by the weight alone, and a tangent of the weight alone."""
    x, w = tensors("rms", requires_grad=False)
    dweight = grad(lambda w: rt.rms_norm(x, (N,), w, EPS).sum())(w)
    torch.testing.assert_close(dweight, (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()).sum((0, 1)))
    _, y_dot = jvp(lambda w: rt.rms_norm(x, (N,), w, EPS), (w,), (w,))
    torch.testing.assert_close(y_dot, rt.rms_norm(x, (N,), w, EPS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_gradients_and_tangents(dtype):
    """Each has that of what it belongs to, in mixtures too."""
    x, residual = torch.ones(2, N, dtype=dtype, requires_grad=True), torch.ones(2, N, requires_grad=True)
    w = torch.ones(N, dtype=torch.float64, requires_grad=True)
    for y in (rt.rms_norm(x, (N,), w), rt.rms_norm(x, (N,), w, round_xhat=True), rt.add_rms_norm(x, residual, (N,), w)):
        results = y if isinstance(y, tuple) else (y,)
        by = (x, residual, w) if isinstance(y, tuple) else (x, w)
        grads = torch.autograd.grad(sum(a.double().sum() for a in results), by)
        assert [a.dtype for a in grads] == [a.dtype for a in by]
    with forward_ad.dual_level():
        x, w = (forward_ad.make_dual(a.detach(), torch.ones_like(a)) for a in (x, w))
        y = rt.rms_norm(x, (N,), w, round_xhat=True)
        assert y.dtype == forward_ad.unpack_dual(y).tangent.dtype == torch.float64


def test_no_grad_keeps_nothing():
    x, w = tensors("rms")
    with torch.no_grad():
        assert rt.rms_norm(x, (N,), w).grad_fn is None
    assert rt.rms_norm(x.detach(), (N,), w.detach()).grad_fn is None
    assert rt.rms_norm(x.detach(), (N,), w).grad_fn is not None


def test_derivatives_that_there_are_not():
    x, w = tensors("rms", requires_grad=False)

    def f(t):
        return rt.rms_norm(t * x, (N,), w, EPS).square().sum()

    t = torch.ones((), dtype=x.dtype)
    with pytest.raises(NotImplementedError, match="third derivatives of a norm are not implemented"):
        grad(grad(grad(f)))(t)
    with pytest.raises(NotImplementedError, match="along two directions, is not implemented"):
        jacfwd(jacfwd(f))(t)
