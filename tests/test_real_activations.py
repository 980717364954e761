"""What four layers of a language model really get: rows with a few values hundreds of times as large as the rest."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
from tolerances import COMPLEX_STEP, DX_ULP, Y_ULP, dx_terms, parameter_tolerance, spacing, worst_ulp

import rmsnorm_np as rn
from rmsnorm_np import reference
from rmsnorm_np.gradcheck import check_gradient

LAYERS = ("first", "early", "last", "final")
NORMS = {"RMSNorm": ("rms_norm", {}), "pRMSNorm": ("rms_norm", {"p": 0.0625}), "LayerNorm": ("layer_norm", {})}


@pytest.fixture(scope="module")
def activations():
    with resources.as_file(resources.files("rmsnorm_np") / "data" / "smollm2_activations.npz") as path:
        return dict(np.load(path))


@pytest.fixture(params=LAYERS)
def layer(request, activations):
    """x (64, 576), weight (576,), eps."""
    name = request.param
    return activations[f"{name}_x"], activations[f"{name}_weight"], float(activations["eps"])


def test_the_data_are_what_their_description_says(activations):
    for name in LAYERS:
        assert activations[f"{name}_x"].shape == (64, 576)
        assert activations[f"{name}_x"].dtype == np.float32
        assert activations[f"{name}_weight"].shape == (576,)
    last = np.abs(activations["last_x"])
    assert int(np.max(last)) == 9470
    assert 10 < np.median(last) < 12


@pytest.mark.parametrize("norm", NORMS)
def test_engine_against_reference(norm, layer, dtype, backend, rng):
    """Forward and backward, in the ULP of the dtype, against the reference in float64."""
    name, options = NORMS[norm]
    own = 0.5 if dtype == np.float64 else 0.0  # ULP that the reference is off by itself, as it rounds to float64
    x, weight, eps = layer
    x, weight = x.astype(dtype), weight.astype(dtype)
    bias, dy = rng.normal(size=576).astype(dtype), rng.normal(size=x.shape).astype(dtype)
    wide = [array.astype(np.float64) for array in (x, weight, bias)]
    exact = getattr(reference, name)(*wide, eps=eps, **options)
    xhat = getattr(reference, name)(wide[0], eps=eps, **options).astype(np.longdouble)
    terms = np.maximum(np.abs(exact - wide[2]), np.abs(wide[2]))

    y = getattr(rn, name)(x, weight, bias, eps=eps, **options, backend=backend)
    assert y.dtype == dtype
    assert worst_ulp(y, exact, terms) <= Y_ULP[dtype.name] + own

    grads = getattr(rn, f"{name}_backward")(dy, x, weight, bias, eps=eps, **options, backend=backend)
    exact = getattr(reference, f"{name}_backward")(dy.astype(np.float64), *wide, eps=eps, **options)
    k = 36 if norm == "pRMSNorm" else 576
    row = wide[0].astype(np.longdouble)
    row = row - np.mean(row, axis=-1, keepdims=True) if norm == "LayerNorm" else row
    rstd = 1 / np.sqrt(np.mean(row[:, :k] ** 2, axis=-1, keepdims=True) + eps)
    g = dy.astype(np.longdouble) * wide[1]
    largest = dx_terms(g, xhat, rstd, k=k, centred=norm == "LayerNorm")
    assert worst_ulp(grads.dx, exact.dx, largest) <= DX_ULP[dtype.name] + own

    for gradient, want, summands in ((grads.dweight, exact.dweight, dy * xhat), (grads.dbias, exact.dbias, 1.0 * dy)):
        magnitudes = np.sum(np.abs(summands.astype(np.longdouble)), axis=0)
        assert gradient.dtype == dtype
        error = np.abs(gradient.astype(np.longdouble) - want)
        assert np.all(error <= parameter_tolerance(want, magnitudes, 64, dtype, dtype) + own * spacing(want, dtype))


def naive_rms_norm(x, weight, eps):
    """RMSNorm as it is often written, every operation in the type of x."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True, dtype=x.dtype)
    return x / np.sqrt(mean_square + x.dtype.type(eps)) * weight


@pytest.mark.engine
@pytest.mark.parametrize("name", ["last", "final"])
def test_massive_activations_overflow_a_naive_float16_norm_and_not_this_one(name, activations, backend):
    eps = float(activations["eps"])
    x, weight = (activations[f"{name}_{which}"].astype(np.float16) for which in ("x", "weight"))
    assert np.all(np.isfinite(x))
    with np.errstate(over="ignore"):
        naive = naive_rms_norm(x, weight, eps)
    exact = reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), eps=eps)
    lost = np.all(naive == 0, axis=-1)  # x / inf
    # In most rows of either layer some square, or the sum, is beyond 65504.
    assert np.count_nonzero(lost) >= 32
    assert np.all(np.max(np.abs(exact[lost]), axis=-1) > 1)

    y = rn.rms_norm(x, weight, eps=eps, backend=backend)
    assert np.all(np.isfinite(y))
    assert worst_ulp(y, exact) <= Y_ULP["float16"]


def test_a_naive_float32_norm_is_several_ulp_off_and_this_one_is_not(layer, backend):
    x, weight, eps = layer
    exact = reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), eps=eps)
    assert worst_ulp(naive_rms_norm(x, weight, eps), exact) > 1.5
    assert worst_ulp(rn.rms_norm(x, weight, eps=eps, backend=backend), exact) <= Y_ULP["float32"]


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_checked_numerically(norm, layer):
    name, options = NORMS[norm]
    x, weight, eps = layer
    function, gradient = getattr(reference, name), getattr(reference, f"{name}_backward")
    report = check_gradient(
        lambda *args: function(*args, eps=eps, **options),
        lambda *args: gradient(*args, eps=eps, **options),
        x.astype(np.float64),
        weight.astype(np.float64),
        directions=3,
        rtol=COMPLEX_STEP,
    )
    assert report.ok, report
    assert report.method == "complex-step"
