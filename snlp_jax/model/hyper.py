"""Residual paths of a layer: one stream, or R streams that small matrices mix (hyper-connections, mHC).

A layer has two branches, attention and MLP. Its path says what each of them reads and where its output goes:

    one stream       x = s h + m x0;  attention reads x, the MLP u = x + attn;  h' = u + mlp
    R streams        each branch reads H_pre . h;  h <- H_res h + H_post (outer) branch output

H_res comes out of Sinkhorn's iteration: its columns sum to 1, its rows nearly do, so the sum of the streams, which the
head reads, is what a plain residual stream would be. The maps are parameters (``static``, the reference) or functions
of the token's streams (``dynamic``, mHC, arXiv 2512.24880). Streams and maps are float32.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.config import ModelConfig
from snlp_jax.model.layers import rms_norm, small_product
from snlp_jax.types import Array, PyTree, is_list


class BranchMaps(NamedTuple):
    """How one branch is wired; the axes before those named are layers, or batch and time."""

    res_RR: Array
    pre_R: Array
    post_R: Array


class LayerMaps(NamedTuple):
    """Static maps of a layer, and what follows from them when both branches are written out at once."""

    attn: BranchMaps
    mlp: BranchMaps
    skip_RR: Array
    """``H_res^mlp H_res^attn``: the derivative of the layer's skip path."""
    mlp_read_R: Array
    """``H_pre^mlp H_res^attn``: what the MLP reads of the layer's input."""
    mlp_read_attn: Array
    """``H_pre^mlp . H_post^attn``: what the MLP reads of the attention output."""
    attn_write_R: Array
    """``H_res^mlp H_post^attn``: where the attention output ends up."""


def sinkhorn(logits_RR: Array, num_iters: int) -> Array:
    """``exp(logits)`` with its rows, then its columns scaled to sum to 1, ``num_iters`` times, in log space.

    The columns of the result sum to 1; the rows do in the limit.
    """

    def scale(_: int, log_RR: Array) -> Array:
        log_RR = log_RR - jax.nn.logsumexp(log_RR, axis=-1, keepdims=True)
        return log_RR - jax.nn.logsumexp(log_RR, axis=-2, keepdims=True)

    return jnp.exp(jax.lax.fori_loop(0, num_iters, scale, logits_RR.astype(jnp.float32)))


def static_maps(hyper: PyTree, config: ModelConfig) -> LayerMaps:
    """``H_res = Sinkhorn(logits / tau)``, ``H_pre`` and ``H_post`` softmax: of a stack of layers, leaves [n, ...]."""
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), hyper["attn"], hyper["mlp"])
    res = sinkhorn(both["res_logits"] / config.sinkhorn_tau, config.sinkhorn_iters)
    maps = BranchMaps(res, jax.nn.softmax(both["pre_logits"]), jax.nn.softmax(both["post_logits"]))
    return join(BranchMaps(*(leaf[0] for leaf in maps)), BranchMaps(*(leaf[1] for leaf in maps)))


def has_static_maps(config: ModelConfig) -> bool:
    return config.num_streams > 0 and config.hyper_maps == "static"


def maps_of_layers(config: ModelConfig, blocks: PyTree, num_layers: int) -> LayerMaps | None:
    """:func:`static_maps` of the first ``num_layers`` layers of a stack or a list of trees, which may be chunks
    [M, ...]; None for a model without them."""
    if not has_static_maps(config):
        return None
    if not is_list(blocks):
        return static_maps(jax.tree.map(lambda leaf: leaf[:num_layers], blocks["hyper"]), config)
    is_chunked = blocks[0]["hyper"]["attn"]["post_logits"].ndim == 2
    stack = jnp.concatenate if is_chunked else jnp.stack
    return static_maps(jax.tree.map(lambda *leaves: stack(leaves), *(block["hyper"] for block in blocks)), config)


def join(attn: BranchMaps, mlp: BranchMaps) -> LayerMaps:
    """The maps of a layer from those of its branches."""
    return LayerMaps(
        attn,
        mlp,
        skip_RR=compose(mlp.res_RR, attn.res_RR),
        mlp_read_R=jnp.einsum("...Q,...QR->...R", mlp.pre_R, attn.res_RR, precision=jax.lax.Precision.HIGHEST),
        mlp_read_attn=jnp.sum(mlp.pre_R * attn.post_R, axis=-1),
        attn_write_R=jnp.einsum("...QR,...R->...Q", mlp.res_RR, attn.post_R, precision=jax.lax.Precision.HIGHEST),
    )


def compose(outer_RR: Array, inner_RR: Array) -> Array:
    """``outer inner``, in float32 on every backend."""
    return jnp.matmul(outer_RR, inner_RR, precision=jax.lax.Precision.HIGHEST)


def dynamic_maps(wiring: PyTree, h_BTRD: Array, config: ModelConfig) -> BranchMaps:
    """Of every token: ``z = alpha (rms(vec h) phi) + logits``; ``H_pre = sigmoid``, ``H_post = 2 sigmoid``,
    ``H_res = Sinkhorn(exp z)``, without a temperature."""
    B, T, R, D = h_BTRD.shape
    z = small_product(rms_norm(h_BTRD.reshape(B, T, R * D)), wiring["phi"])
    alpha = wiring["alpha"]
    pre, post, res = jnp.split(z, (R, 2 * R), axis=-1)
    pre = alpha[0] * pre + wiring["pre_logits"][None, None]
    post = alpha[1] * post + wiring["post_logits"][None, None]
    res = alpha[2] * res.reshape(B, T, R, R) + wiring["res_logits"][None, None]
    return BranchMaps(sinkhorn(res, config.sinkhorn_iters), jax.nn.sigmoid(pre), 2.0 * jax.nn.sigmoid(post))


# Sums over streams are written out: R is small, and on a CPU the compiler turns one fused pass over the state into a
# quarter of the time of a matrix product with a side of length R.


def read(pre_R: Array, h_BTRD: Array) -> Array:
    """``pre . h`` [B, T, D]; the map is one for all tokens [R] or one a token [B, T, R]."""
    pre_BTR = _per_token(pre_R, 1)
    return functools.reduce(jnp.add, (pre_BTR[..., r, None] * h_BTRD[..., r, :] for r in range(h_BTRD.shape[-2])))


def mix(map_RR: Array, h_BTRD: Array) -> Array:
    """``map h`` [B, T, R, D]; the map is [R, R] or [B, T, R, R]."""
    map_BTRR = _per_token(map_RR, 2)
    rows = (map_BTRR[..., r, None] * h_BTRD[..., None, r, :] for r in range(h_BTRD.shape[-2]))
    return functools.reduce(jnp.add, rows)


def write(post_R: Array, y_BTD: Array) -> Array:
    """``post (outer) y`` [B, T, R, D]; the map is [R] or [B, T, R]."""
    return _per_token(post_R, 1)[..., None] * y_BTD[..., None, :]


def _per_token(leaf: Array, num_axes: int) -> Array:
    return leaf[None, None] if leaf.ndim == num_axes else leaf


# ---------------------------------------------------------------- paths

# ``enter`` gives the attention input, ``between`` the MLP input, each with what the next step needs; ``leave`` gives
# the layer's output and, where it depends on the token, the derivative of the skip path.


@dataclass(frozen=True)
class OneStream:
    """``x = s h + m x0`` (or h), ``u = x + attn``, ``h' = u + mlp``."""

    use_x0_resid: bool

    def enter(self, params: PyTree, h_BTD: Array, ctx: Any, shared: Any) -> tuple[Array, Array]:
        if self.use_x0_resid:
            h_BTD = params["resid_scale"] * h_BTD + params["x0_scale"] * shared.x0_BTD
        return h_BTD, h_BTD

    def between(self, params: PyTree, x_BTD: Array, ctx: Any, attn_BTD: Array) -> tuple[Array, Array]:
        u_BTD = x_BTD + attn_BTD
        return u_BTD, u_BTD

    def leave(self, u_BTD: Array, ctx: Any, mlp_BTD: Array) -> tuple[Array, None]:
        return u_BTD + mlp_BTD, None


@dataclass(frozen=True)
class StaticStreams:
    """Maps from ``ctx.hyper``, both branches written in one pass over the streams: the state between is never made."""

    def enter(self, params: PyTree, h_BTRD: Array, ctx: Any, shared: Any) -> tuple[Array, Array]:
        return read(ctx.hyper.attn.pre_R, h_BTRD), h_BTRD

    def between(self, params: PyTree, h_BTRD: Array, ctx: Any, attn_BTD: Array) -> tuple[Array, tuple[Array, Array]]:
        maps = ctx.hyper
        return read(maps.mlp_read_R, h_BTRD) + maps.mlp_read_attn * attn_BTD, (h_BTRD, attn_BTD)

    def leave(self, carry: tuple[Array, Array], ctx: Any, mlp_BTD: Array) -> tuple[Array, None]:
        (h_BTRD, attn_BTD), maps = carry, ctx.hyper
        written = write(maps.attn_write_R, attn_BTD) + write(maps.mlp.post_R, mlp_BTD)
        return mix(maps.skip_RR, h_BTRD) + written, None


@dataclass(frozen=True)
class DynamicStreams:
    """Maps computed from the streams before each branch; leaves ``H_res^mlp H_res^attn`` of every token behind."""

    config: ModelConfig

    def enter(self, params: PyTree, h_BTRD: Array, ctx: Any, shared: Any) -> tuple[Array, tuple[Array, BranchMaps]]:
        maps = dynamic_maps(params["hyper"]["attn"], h_BTRD, self.config)
        return read(maps.pre_R, h_BTRD), (h_BTRD, maps)

    def between(
        self, params: PyTree, carry: tuple[Array, BranchMaps], ctx: Any, attn_BTD: Array
    ) -> tuple[Array, tuple[Array, BranchMaps, Array]]:
        h_BTRD, attn = carry
        h_BTRD = mix(attn.res_RR, h_BTRD) + write(attn.post_R, attn_BTD)
        mlp = dynamic_maps(params["hyper"]["mlp"], h_BTRD, self.config)
        return read(mlp.pre_R, h_BTRD), (h_BTRD, mlp, compose(mlp.res_RR, attn.res_RR))

    def leave(self, carry: tuple[Array, BranchMaps, Array], ctx: Any, mlp_BTD: Array) -> tuple[Array, Array]:
        h_BTRD, mlp, skip_BTRR = carry
        return mix(mlp.res_RR, h_BTRD) + write(mlp.post_R, mlp_BTD), skip_BTRR


def residual_path(config: ModelConfig) -> OneStream | StaticStreams | DynamicStreams:
    """The path of every layer of a model."""
    if not config.num_streams:
        return OneStream(config.use_x0_resid)
    return StaticStreams() if config.hyper_maps == "static" else DynamicStreams(config)
