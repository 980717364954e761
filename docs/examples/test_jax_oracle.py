"""A JAX function against the oracle: value and gradients, with pRMSNorm's p."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsnorm_np import reference


def my_p_rms_norm(x, weight, k, eps=1e-6):
    mean_square = jnp.mean(jnp.square(x[..., :k]), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * weight


@pytest.mark.parametrize(("n", "p", "k"), [(64, 1.0, 64), (64, 0.0625, 4), (100, 0.07, 7)])
def test_my_p_rms_norm(n, p, k):
    rng = np.random.default_rng(0)
    dy, x = rng.normal(size=(2, 3, n)).astype(np.float32)
    weight = rng.uniform(0.5, 1.5, n).astype(np.float32)
    y, vjp = jax.vjp(lambda x, weight: my_p_rms_norm(x, weight, k), x, weight)
    dx, dweight = vjp(jnp.asarray(dy))

    np.testing.assert_allclose(y, reference.rms_norm(x, weight, p=p), rtol=2e-6)
    grads = reference.rms_norm_backward(dy, x, weight, p=p)
    np.testing.assert_allclose(dx, grads.dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dweight, grads.dweight, rtol=1e-5, atol=1e-5)
