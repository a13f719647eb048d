"""Small pieces of one layer: norms, projections, rotary embedding, initialisers."""

from typing import Any

import jax
import jax.numpy as jnp

from snlp_jax.types import Array

RMS_EPS = 1.1920929e-07
"""Machine epsilon of float32, as in the published models."""
GATE_INPUT = 12
"""Channels of the normed attention input that a value-embedding gate reads."""
SMEAR_INPUT = 24
"""Channels of a token's embedding that the smear gate reads."""
QK_SCALE = 1.2
"""Queries and keys are multiplied by this after their norm."""


def rms_norm(x: Array) -> Array:
    """``x / rms(x)`` over the last axis, without weights, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + RMS_EPS)


def project(x: Array, kernel: Array, dtype: Any) -> Array:
    """``x @ kernel`` with operands in ``dtype`` and a float32 result: [..., I], [I, O] -> [..., O].

    As a product of two matrices: on a CPU the kernel's gradient is several times slower when batch and time are
    contracted as two axes.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    product = jnp.dot(rows, kernel.astype(dtype), preferred_element_type=jnp.float32)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def rotary_table(positions: Array, head_dim: int, base: float) -> tuple[Array, Array]:
    """Cosines and sines of positions [..., T], each [..., T, H/2]."""
    inverse = 1.0 / base ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * inverse.reshape(*(1,) * positions.ndim, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: Array, cos_TH: Array, sin_TH: Array) -> Array:
    """Rotary embedding; a pair is channel i and channel i + H/2. The table is [T, H/2], or [B, T, H/2]."""
    x1, x2 = jnp.split(x_BTNH, 2, axis=-1)
    cos, sin = (table.reshape(-1, *table.shape[-2:])[:, :, None] for table in (cos_TH, sin_TH))
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def uniform(key: Array, shape: tuple[int, ...], scale: float) -> Array:
    """Uniform numbers with standard deviation ``scale``."""
    bound = 3**0.5 * scale
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
