"""Small pieces of one layer: norms, projections, rotary embedding, initialisers."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from snlp_jax.config import NormConfig, RopeScaling
from snlp_jax.types import Array

RMS_EPS = 1.1920929e-07
"""Machine epsilon of float32, as in the published models; the default of ``model.norm.eps``."""
GATE_INPUT = 12
"""Channels of the normed attention input that a value-embedding gate reads."""
SMEAR_INPUT = 24
"""Channels of a token's embedding that the smear gate reads."""
QK_SCALE = 1.2
"""Queries and keys are multiplied by this after their norm."""


def rms_norm(x: Array, eps: float = RMS_EPS) -> Array:
    """``x / rms(x)`` over the last axis, without weights, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def norm_weight(config: NormConfig, width: int) -> Array:
    """Fresh weights of a norm: the factor is 1."""
    return jnp.zeros((width,)) if config.weight == "plus_one" else jnp.ones((width,))


def weigh(normed: Array, weight: Array, config: NormConfig) -> Array:
    """``normed * w``, or ``normed * (1 + w)``, along the last axis."""
    return normed * _along_last(1.0 + weight if config.weight == "plus_one" else weight, normed.ndim)


def project(
    x: Array,
    kernel: Array,
    dtype: Any,
    bias: Array | None = None,
    scale: Array | None = None,
    out_dtype: Any = jnp.float32,
    *,
    is_transposed: bool = False,
) -> Array:
    """``(x @ kernel) * scale + bias`` with operands in ``dtype``, summed in float32: [..., I], [I, O] -> [..., O].

    As a product of two matrices: on a CPU the kernel's gradient is several times slower when batch and time are
    contracted as two axes.

    Args:
        out_dtype: of the result. What is added to the residual stream stays float32; what only the next product reads
            may be in ``dtype``, and is then stored so for the backward pass.
        is_transposed: the kernel is [O, I], see :data:`snlp_jax.model.projections.TRANSPOSED_FROM`.
    """
    rows, multiply = x.reshape(-1, x.shape[-1]).astype(dtype), _product_transposed if is_transposed else _product
    product = multiply(rows, kernel.astype(dtype), out_dtype)
    product = product.reshape(*x.shape[:-1], product.shape[-1])
    product = product if scale is None else product * _along_last(scale, x.ndim)
    product = product if bias is None else product + _along_last(bias, x.ndim)
    return product.astype(out_dtype)


def small_product(x: Array, kernel: Array) -> Array:
    """``x @ kernel`` of maps and gates, in float32 on every backend, whatever the compute dtype."""
    rows, kernel = x.reshape(-1, x.shape[-1]).astype(jnp.float32), kernel.astype(jnp.float32)
    product = jnp.dot(rows, kernel, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(*x.shape[:-1], *kernel.shape[1:])


def _product(x_SI: Array, kernel_IO: Array, out_dtype: Any) -> Array:
    """A product of two matrices that stays one for a single row.

    XLA turns one row's product into a multiplication and a sum, and on GPUs writes all products out in between, in
    float32: twice the kernel's bytes. A second row of zeros keeps it a matrix product there.
    """
    product = lambda x_SI: einsum("SI,IO->SO", x_SI, kernel_IO, out_dtype)  # noqa: E731
    if len(x_SI) > 1:
        return product(x_SI)
    with_zeros = lambda x_SI: product(jnp.pad(x_SI, ((0, 1), (0, 0))))[:1]  # noqa: E731
    return jax.lax.platform_dependent(x_SI, cuda=with_zeros, rocm=with_zeros, default=product)


def _product_transposed(x_SI: Array, kernel_OI: Array, out_dtype: Any) -> Array:
    """The same product with the kernel on the left, where a CPU reads it as it lies.

    Its library packs the right operand anew for every product, which for a few rows takes longer than the arithmetic.
    The barrier keeps the compiler from turning the operands round together with their result. A single row is no matrix
    product, and faster without.
    """
    product = functools.partial(jax.lax.dot_general, preferred_element_type=out_dtype)
    contract_inputs = (((1,), (1,)), ((), ()))
    if len(x_SI) == 1:
        return product(x_SI, kernel_OI, contract_inputs)
    return jax.lax.optimization_barrier(product(kernel_OI, x_SI, contract_inputs)).T


def einsum(formula: str, x: Array, y: Array, out_dtype: Any = jnp.float32) -> Array:
    """The einsum of two arrays of one dtype, summed in float32. Its derivatives are products in that dtype again, also
    where the result is float32 and the arrays are not."""
    if x.dtype == out_dtype:
        return jnp.einsum(formula, x, y, preferred_element_type=out_dtype)
    return _wide_einsum(formula, x, y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _wide_einsum(formula: str, x: Array, y: Array) -> Array:
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def _wide_einsum_jvp(formula: str, primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    is_zero = lambda tangent: isinstance(tangent, jax.custom_derivatives.SymbolicZero)  # noqa: E731
    terms = [jnp.einsum(formula, dx, y)] if not is_zero(dx) else []
    terms += [jnp.einsum(formula, x, dy)] if not is_zero(dy) else []
    out = _wide_einsum(formula, x, y)
    return out, sum((term.astype(jnp.float32) for term in terms), jnp.zeros_like(out))


_wide_einsum.defjvp(_wide_einsum_jvp, symbolic_zeros=True)


def _along_last(vector: Array, ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def rotary_table(
    positions: Array, num_channels: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """Cosines and sines of positions [..., T], each [..., T, H/2], for H channels that turn."""
    inverse = 1.0 / base ** (jnp.arange(0, num_channels, 2, dtype=jnp.float32) / num_channels)
    if scaling is not None and scaling.kind != "none":
        inverse = inverse * _stretch(inverse, num_channels, base, scaling)
    angles = positions.astype(jnp.float32)[..., None] * inverse.reshape(*(1,) * positions.ndim, -1)
    factor = 1.0 if scaling is None else scaling.table_factor
    return (jnp.cos(angles), jnp.sin(angles)) if factor == 1.0 else (factor * jnp.cos(angles), factor * jnp.sin(angles))


def _stretch(inverse: Array, num_channels: int, base: float, scaling: RopeScaling) -> Array:
    """What every frequency is multiplied by, from 1 over ``factor`` (long waves) to 1 (short ones).

    llama3 interpolates between them by the number of turns over the original context, yarn (arXiv 2309.00071) by the
    number of the channel, between the channels that turn ``beta_fast`` and ``beta_slow`` times.
    """
    if scaling.kind == "linear":
        return jnp.full_like(inverse, 1.0 / scaling.factor)
    if scaling.kind == "llama3":
        turns = scaling.original_context * inverse / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return kept + (1.0 - kept) / scaling.factor

    def channel(num_turns: float) -> float:
        wave = scaling.original_context / (num_turns * 2 * math.pi)
        return num_channels * math.log(wave) / (2 * math.log(base))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, num_channels - 1)
    ramp = (jnp.arange(len(inverse), dtype=jnp.float32) - low) / (high - low or 0.001)
    kept = 1.0 - jnp.clip(ramp, 0.0, 1.0)
    return kept + (1.0 - kept) / scaling.factor


def rotate(x_BTNH: Array, cos_TH: Array, sin_TH: Array) -> Array:
    """Rotary embedding of the first 2R channels; a pair is channel i and channel i + R. The table is [T, R], or
    [B, T, R]."""
    num_rotated = 2 * cos_TH.shape[-1]
    rest = x_BTNH[..., num_rotated:]
    x1, x2 = jnp.split(x_BTNH[..., :num_rotated], 2, axis=-1)
    cos, sin = (table.reshape(-1, *table.shape[-2:])[:, :, None] for table in (cos_TH, sin_TH))
    turned = [x1 * cos + x2 * sin, x2 * cos - x1 * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)


def uniform(key: Array, shape: tuple[int, ...], scale: float) -> Array:
    """Uniform numbers with standard deviation ``scale``."""
    bound = 3**0.5 * scale
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
