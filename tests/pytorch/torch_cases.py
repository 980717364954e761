"""What the tests of `rmsnorm_np.torch` share."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import rmsnorm_np.torch as rt
from rmsnorm_np.torch import operators

SHAPE, N, EPS = (2, 3, 5), 5, 1e-3


@pytest.fixture
def on_reference(monkeypatch):
    """The engine in NumPy: nothing to compile."""
    monkeypatch.setattr(operators, "BACKEND", "reference")


def rms_norm(x, weight=None, weight_offset=0.0):
    """RMSNorm in PyTorch's own operations."""
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return y if weight is None else y * (weight + weight_offset)


def layer_norm(x, weight=None, bias=None, weight_offset=0.0):
    """LayerNorm in PyTorch's own operations."""
    x = x - x.mean(-1, keepdim=True)
    y = rms_norm(x, weight, weight_offset)
    return y if bias is None else y + bias


def _add(norm):
    return lambda x, residual, *parameters: (norm(x + residual, *parameters), x + residual)


def _ours_rms(x, weight=None, **options):
    return rt.rms_norm(x, (N,), weight, EPS, **options)


def _ours_layer(x, weight=None, bias=None, **options):
    return rt.layer_norm(x, (N,), weight, bias, EPS, **options)


# name: (ours, PyTorch's operations, arrays like x, parameters). Which may be None, as it is in some.
CASES = {
    "rms": (_ours_rms, rms_norm, 1, 1),
    "rms without weight": (_ours_rms, rms_norm, 1, 0),
    "rms, 1 + weight": (
        partial(_ours_rms, weight_offset=1.0), partial(rms_norm, weight_offset=1.0), 1, 1,
    ),
    "layer": (_ours_layer, layer_norm, 1, 2),
    "layer without bias": (_ours_layer, layer_norm, 1, 1),
    "layer without weight": (
        lambda x, bias: _ours_layer(x, None, bias), lambda x, bias: layer_norm(x, None, bias), 1, 1,
    ),
    "add rms": (lambda x, residual, w: rt.add_rms_norm(x, residual, (N,), w, EPS), _add(rms_norm), 2, 1),
    "add rms, y alone": (
        lambda x, residual, w: rt.add_rms_norm(x, residual, (N,), w, EPS)[0], lambda *a: _add(rms_norm)(*a)[0], 2, 1,
    ),
    "add rms, h alone": (
        lambda x, residual, w: rt.add_rms_norm(x, residual, (N,), w, EPS)[1], lambda *a: _add(rms_norm)(*a)[1], 2, 1,
    ),
    "add layer": (lambda x, residual, *p: rt.add_layer_norm(x, residual, (N,), *p, EPS), _add(layer_norm), 2, 2),
}  # fmt: skip


def tensors(case, dtype=torch.float64, requires_grad=True):
    """Random arguments of a case."""
    _, _, rows, parameters = CASES[case]
    random = torch.Generator().manual_seed(0)
    shapes = [SHAPE] * rows + [(N,)] * parameters
    made = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes)
    return tuple(a.requires_grad_(requires_grad) for a in made)


def loss(norm):
    """A number that depends on all of a norm's results."""

    def of(*args):
        results = norm(*args)
        return sum(
            (i + a.square()).sum().sin() for i, a in enumerate(results if isinstance(results, tuple) else [results])
        )

    return of
