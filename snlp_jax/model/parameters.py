"""The parameters of a model and their fresh values, declared with Flax NNX: embedding, layers, head.

Nothing but these declarations knows Flax. Everybody else reads the nested dictionaries of arrays that :func:`fresh`
makes of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from snlp_jax.config import Kind, ModelConfig
from snlp_jax.model.layers import GATE_INPUT, SMEAR_INPUT, norm_weight, uniform
from snlp_jax.model.projections import head_widths
from snlp_jax.types import Array, PyTree

DYNAMIC_OFF_DIAGONAL = -4.0
"""Fresh off-diagonal logit of a dynamic H_res: e^-4 beside e^0, near the identity but not out of a gradient's reach."""
DYNAMIC_SCALE = 0.01
"""Fresh weight of what a dynamic map adds to its logits."""


def fresh(declared: Callable[..., nnx.Module], key: Array, *args: Any) -> PyTree:
    """Fresh parameters of a class of this file, as a nested dictionary."""
    return nnx.to_pure_dict(nnx.state(declared(*args, rngs=nnx.Rngs(key)), nnx.Param))


def _logit(p: Array) -> Array:
    return jnp.log(p) - jnp.log1p(-p)


class Embedding(nnx.Module):
    """Token table, smear, and the value-embedding tables of the layers that have one."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        V, kv_dim = config.padded_vocab_size, config.num_kv_heads * config.head_dim
        self.token = nnx.Param(0.8 * jax.random.normal(rngs.params(), (V, config.embed_dim)))
        if config.use_smear:
            self.smear_gate = nnx.Param(0.02 * jax.random.uniform(rngs.params(), (SMEAR_INPUT,)))
            self.smear_scale = nnx.Param(jnp.zeros(()))
        num_tables = len(config.value_embed_layers)
        if num_tables:
            self.value = nnx.Param(uniform(rngs.params(), (num_tables, V, kv_dim), config.embed_dim**-0.5))
            gate_shape = (num_tables, GATE_INPUT, config.num_kv_heads)
            self.value_gate = nnx.Param(0.02 * jax.random.uniform(rngs.params(), gate_shape))


class Head(nnx.Module):
    """Output projection, unless it is the token table, its norm's weight, the weight of the mid-layer state it
    subtracts, and the matrices [M, D, D] before it that make it look further ahead.

    These begin as the identity: each head then says what the next-token head says, in a space that the projection can
    read. From 0 the norm behind them would have a derivative of 1 / sqrt(eps), about 3000.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.padded_vocab_size)
        if not config.use_tied_head:
            self.kernel = nnx.Param(0.001 * jax.random.normal(rngs.params(), shape))
        if config.norm.weight != "none":
            self.norm = nnx.Param(norm_weight(config.norm, config.embed_dim))
        if config.use_mid_subtract:
            self.mid_scale = nnx.Param(jnp.asarray(0.2, jnp.float32))  # not weakly typed: a step would compile twice
        if config.num_mtp_heads:
            self.mtp = nnx.Param(jnp.tile(jnp.eye(config.embed_dim), (config.num_mtp_heads, 1, 1)))


class Attention(nnx.Module):
    """Query, key, value and output projections; head h reads kv head ``h // (N / K)``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, H = config.embed_dim, config.head_dim
        for name, width in zip(("query", "key", "value"), head_widths(config), strict=True):
            setattr(self, name, nnx.Param(uniform(rngs.params(), (D, width), D**-0.5)))
            if config.use_qkv_bias:
                setattr(self, f"{name}_bias", nnx.Param(jnp.zeros((width,))))
        self.out = nnx.Param(jnp.zeros((config.num_heads * H, D)))
        if config.use_out_bias:
            self.out_bias = nnx.Param(jnp.zeros((D,)))
        if config.use_qk_norm and config.norm.weight != "none":
            self.query_norm = nnx.Param(norm_weight(config.norm, H))
            self.key_norm = nnx.Param(norm_weight(config.norm, H))


class Mlp(nnx.Module):
    """Two projections around a squared ReLU, or three around a product with a gate."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.mlp_width
        for name in ("up",) if config.mlp == "relu2" else ("up", "gate"):
            setattr(self, name, nnx.Param(uniform(rngs.params(), (D, F), 0.4 * D**-0.5)))
            if config.use_mlp_bias:
                setattr(self, f"{name}_bias", nnx.Param(jnp.zeros((F,))))
        self.down = nnx.Param(jnp.zeros((F, D)))
        if config.use_mlp_bias:
            self.down_bias = nnx.Param(jnp.zeros((D,)))


class Linear(nnx.Module):
    """``x W + b`` in place of a branch; W is one matrix, or two with ``linear_rank`` channels between them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, X = config.embed_dim, config.linear_rank
        if X:
            self.down = nnx.Param(uniform(rngs.params(), (D, X), D**-0.5))
            self.up = nnx.Param(jnp.zeros((X, D)))
        else:
            self.kernel = nnx.Param(jnp.zeros((D, D)))
        self.bias = nnx.Param(jnp.zeros((D,)))


class Norms(nnx.Module):
    """Weights of the norms before a layer's branches, and of those behind them where there are such."""

    def __init__(self, config: ModelConfig, kind: Kind):
        branches = [name for name in ("attn", "mlp") if getattr(kind, name) == "full"]
        for name in (*branches, *(f"{name}_post" for name in branches if config.norm.use_post)):
            setattr(self, name, nnx.Param(norm_weight(config.norm, config.embed_dim)))


class Wiring(nnx.Module):
    """Logits of one branch's maps; ``branch`` counts branches from the bottom of the model.

    Fresh static maps: H_res is the identity to 2e-4, H_pre prefers stream ``branch mod R``, H_post is uniform. Fresh
    dynamic maps are nearly the same, through their own nonlinearities: the tests say how near.
    """

    def __init__(self, config: ModelConfig, branch: Array | int, *, rngs: nnx.Rngs):
        R = config.num_streams
        off_diagonal = 1.0 - jnp.eye(R)
        pre = (jnp.arange(R) == branch % R).astype(jnp.float32) - 1.0
        if config.hyper_maps == "static":
            self.res_logits = nnx.Param(-0.5 * off_diagonal)
            self.pre_logits = nnx.Param(pre)
            self.post_logits = nnx.Param(jnp.zeros((R,)))
            return
        self.res_logits = nnx.Param(DYNAMIC_OFF_DIAGONAL * off_diagonal)
        self.pre_logits = nnx.Param(_logit(jax.nn.softmax(pre)))
        self.post_logits = nnx.Param(_logit(jnp.full((R,), 0.5 / R, jnp.float32)))
        width = R * config.embed_dim
        self.phi = nnx.Param(uniform(rngs.params(), (width, R * R + 2 * R), width**-0.5))
        self.alpha = nnx.Param(jnp.full((3,), DYNAMIC_SCALE, jnp.float32))


class Hyper(nnx.Module):
    """Wiring of a layer's two branches."""

    def __init__(self, config: ModelConfig, layer: Array | int, *, rngs: nnx.Rngs):
        self.attn = Wiring(config, 2 * layer, rngs=rngs)
        self.mlp = Wiring(config, 2 * layer + 1, rngs=rngs)


class Layer(nnx.Module):
    """One layer. Fresh output projections are zero: at initialisation a layer only mixes streams, or adds x0.

    ``layer`` is its index, and may be traced.
    """

    def __init__(self, config: ModelConfig, layer: Array | int, kind: Kind, *, rngs: nnx.Rngs):
        if kind.attn == "full":
            self.attn = Attention(config, rngs=rngs)
        elif kind.attn == "linear":
            self.linear_attn = Linear(config, rngs=rngs)
        if kind.mlp == "full":
            self.mlp = Mlp(config, rngs=rngs)
        elif kind.mlp == "linear":
            self.linear_mlp = Linear(config, rngs=rngs)
        if config.norm.weight != "none" and "full" in kind:
            self.norms = Norms(config, kind)
        if config.use_x0_resid:
            depth = layer / max(config.num_layers - 1, 1)
            self.resid_scale = nnx.Param(jnp.asarray(1.15 - 0.10 * depth, jnp.float32))
            self.x0_scale = nnx.Param(jnp.asarray(0.20 - 0.15 * depth, jnp.float32))
        if config.num_streams:
            self.hyper = Hyper(config, layer, rngs=rngs)
