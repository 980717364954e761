"""The norms for JAX arrays on the CPU: under `jax.jit`, `jax.grad`, `jax.vmap` and their like.

>>> import jax
>>> import jax.numpy as jnp
>>> import rmsnorm_np.jax as rj
>>> x, w = jnp.array([[3.0, 4.0]]), jnp.ones(2)
>>> jax.grad(lambda x: rj.rms_norm(x, w)[0, 0])(x)
Array([[ 0.18101934, -0.13576448]], dtype=float32)

Read on in `functions` (what is checked), `primitives` (derivatives and batches), `calls` (which function of this
library computes what) and `handler` (how XLA calls it).
"""

from __future__ import annotations

from rmsnorm_np.jax.functions import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]
