"""One layer: its parameters (Flax NNX) and its maths, alone and for all layers at once.

    x = resid_scale * h + x0_scale * x0
    u = x + Attention(rms(x));  h' = u + MLP(rms(u))

without the scales in other families than nanochat's (Gemma: ``u = x + rms(Attention(rms(x)))`` and so on), or the same
two branches on several streams (``snlp_jax/model/hyper.py``). A branch may be linear, ``x W + b`` with its input before
the norm in place of all of it, or dropped (``snlp_jax/model/kinds.py``). A layer is computed in three stages so that
the layer-batched sweep can group attention by window without touching the weights: ``before`` (mix, norm, projections),
``attend``, ``after`` (output projection and MLP).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from snlp_jax.config import Kind, ModelConfig
from snlp_jax.model.attention import attend
from snlp_jax.model.hyper import Hyper, LayerMaps, residual_path
from snlp_jax.model.layers import GATE_INPUT, QK_SCALE, norm_weight, rms_norm, rotate, small_product, uniform, weigh
from snlp_jax.model.projections import head_widths, linear, linear_of_each
from snlp_jax.types import Array


class ValueEmbed(NamedTuple):
    """A layer's value embeddings: rows_BTKH gathered for the tokens, and the kernel [12, K] of their gate."""

    rows_BTKH: Array
    gate: Array


class Context(NamedTuple):
    """What a layer reads besides its parameters; leaves lead with the layer axis."""

    window: Array
    """int32 scalar, tokens to the left."""
    value_embed: ValueEmbed | None
    """Zero for the layers of a stack that have none; None where no layer of the stack has any."""
    hyper: LayerMaps | None
    """Static maps between residual streams; None for other models."""
    past: "Ring | None" = None
    """Keys and values of the tokens before these; None where these are the first."""
    is_local: Array | None = None
    """Whether the layer reads the rotary table of S layers; None where all layers read one."""


class Shared(NamedTuple):
    """What all layers read."""

    x0_BTD: Array
    cos_TH: Array
    """[T, H/2], or [B, T, H/2] where every row has its own positions."""
    sin_TH: Array
    """Negative where pairs turn forward."""
    first_B: Array | None = None
    """Position of each row's first token, which is the number of tokens before; None where these are the first."""
    past: "Rings | None" = None
    """Keys and values of the tokens before, of all layers that are evaluated at once, where their windows differ; else
    they are in each layer's context."""
    document_BT: Array | None = None
    """Number of the document, in its row, that each token belongs to, where tokens attend to their own alone; not
    together with tokens before."""
    local_cos_TH: Array | None = None
    """Of S layers, where theirs is another table."""
    local_sin_TH: Array | None = None


class KeyValue(NamedTuple):
    """Keys (rotated, normed) and values (with value embeddings) of a layer's tokens."""

    key_BTKH: Array
    value_BTKH: Array


class Ring(NamedTuple):
    """Keys and values of a layer's last S tokens: position p lies in slot p mod S (``snlp_jax/cache.py``)."""

    key_BKSH: Array
    value_BKSH: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rings:
    """The rings of consecutive layers, those of equal size stacked: leaves of ``groups`` are [n, B, K, S, H]."""

    groups: tuple[Ring, ...]
    members: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    """Layers of each group, in order, counted from the first of these."""

    @property
    def num_layers(self) -> int:
        return sum(map(len, self.members))

    def layer(self, index: int) -> Ring:
        """One layer's ring; of a group of one nothing is copied."""
        group, members = next((g, m) for g, m in zip(self.groups, self.members, strict=True) if index in m)
        return jax.tree.map(lambda leaf: leaf[members.index(index)], group)


class BlockAux(NamedTuple):
    """What a layer leaves behind."""

    kv: KeyValue | None
    """None of a layer without attention; in a stack those of the layers that have it, in order of depth."""
    skip_BTRR: Array | None
    """Derivative of the skip path where it depends on the token (dynamic hyper-connections), else None."""


class Attention(nnx.Module):
    """Query, key, value and output projections; head h reads kv head ``h // (N / K)``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, H = config.embed_dim, config.head_dim
        scale = D**-0.5
        self.query = nnx.Param(uniform(rngs.params(), (D, config.num_heads * H), scale))
        self.key = nnx.Param(uniform(rngs.params(), (D, config.num_kv_heads * H), scale))
        self.value = nnx.Param(uniform(rngs.params(), (D, config.num_kv_heads * H), scale))
        self.out = nnx.Param(jnp.zeros((config.num_heads * H, D)))
        if config.use_qkv_bias:
            self.query_bias = nnx.Param(jnp.zeros((config.num_heads * H,)))
            self.key_bias = nnx.Param(jnp.zeros((config.num_kv_heads * H,)))
            self.value_bias = nnx.Param(jnp.zeros((config.num_kv_heads * H,)))
        if config.use_out_bias:
            self.out_bias = nnx.Param(jnp.zeros((D,)))
        if config.use_qk_norm and config.norm.weight != "none":
            self.query_norm = nnx.Param(norm_weight(config.norm, H))
            self.key_norm = nnx.Param(norm_weight(config.norm, H))


class Mlp(nnx.Module):
    """Two projections around a squared ReLU, or three around a product with a gate."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, F = config.embed_dim, config.mlp_width
        names = ("up",) if config.mlp == "relu2" else ("up", "gate")
        for name in names:
            setattr(self, name, nnx.Param(uniform(rngs.params(), (D, F), 0.4 * D**-0.5)))
        self.down = nnx.Param(jnp.zeros((F, D)))
        if config.use_mlp_bias:
            for name in names:
                setattr(self, f"{name}_bias", nnx.Param(jnp.zeros((F,))))
            self.down_bias = nnx.Param(jnp.zeros((D,)))

    def hidden(self, normed_BTD: Array, dtype: jnp.dtype) -> Array:
        """Between the two projections, [B, T, F] in ``dtype``."""
        if self.config.mlp == "relu2":
            return jnp.square(jax.nn.relu(linear(self, "up", normed_BTD, dtype, dtype)))
        up_BTF, gate_BTF = linear_of_each(self, "mlp", (self.config.mlp_width,) * 2, normed_BTD, dtype)
        return (jax.nn.silu(gate_BTF) if self.config.mlp == "swiglu" else jax.nn.gelu(gate_BTF)) * up_BTF


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

    def __call__(self, x_BTD: Array, dtype: jnp.dtype) -> Array:
        if hasattr(self, "kernel"):
            y_BTD = linear(self, "kernel", x_BTD, dtype)
        else:
            y_BTD = linear(self, "up", linear(self, "down", x_BTD, dtype, dtype), dtype)
        return y_BTD + self.bias[...].reshape(1, 1, -1)


class Norms(nnx.Module):
    """Weights of the norms before a layer's branches, and of those behind them where there are such."""

    def __init__(self, config: ModelConfig, kind: Kind):
        branches = [name for name in ("attn", "mlp") if getattr(kind, name) == "full"]
        for name in (*branches, *(f"{name}_post" for name in branches if config.norm.use_post)):
            setattr(self, name, nnx.Param(norm_weight(config.norm, config.embed_dim)))


class Block(nnx.Module):
    """One layer. Fresh output projections are zero: at initialisation a layer only mixes streams, or adds x0.

    ``layer`` is its index, and may be traced.
    """

    def __init__(self, config: ModelConfig, layer: Array | int, kind: Kind, *, rngs: nnx.Rngs):
        self.config, self.kind = config, kind
        self.path = residual_path(config)
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

    def __call__(self, h: Array, ctx: Context, shared: Shared, dtype: jnp.dtype) -> Array:
        """One layer from h to h', with XLA's attention. Solvers call its three stages one by one."""
        carry, q_BTNH, kv = self.before(h, ctx, shared, dtype)
        out_BTNH = None
        if q_BTNH is not None and kv is not None:
            out_BTNH = attend(q_BTNH, *kv, ctx.window, "xla", shared.document_BT, self.config.attention_softcap)
        return self.after(carry, out_BTNH, ctx, dtype)[0]

    def before(
        self, h: Array, ctx: Context, shared: Shared, dtype: jnp.dtype
    ) -> tuple[Any, Array | None, KeyValue | None]:
        """``(what after needs, q_BTNH, keys and values)``, the latter in ``dtype`` and None without attention; h is
        [B, T, D] or [B, T, R, D]."""
        x_BTD, carry = self.path.enter(self, h, ctx, shared)
        if self.kind.attn != "full":
            return (carry, self.replaced("attn", x_BTD, dtype)), None, None
        q_BTNH, kv = self.project(x_BTD, ctx, shared, dtype)
        return carry, q_BTNH, kv

    def replaced(self, branch: str, x_BTD: Array, dtype: jnp.dtype) -> Array:
        """What a branch that is linear or dropped adds to the stream at its input, which no norm has seen."""
        if getattr(self.kind, branch) == "none":
            return jnp.zeros_like(x_BTD)
        return getattr(self, f"linear_{branch}")(x_BTD, dtype)

    def project(self, x_BTD: Array, ctx: Context, shared: Shared, dtype: jnp.dtype) -> tuple[Array, KeyValue]:
        """Queries, keys and values of the normed attention input."""
        config = self.config
        B, T, _ = x_BTD.shape
        normed = self.weigh(rms_norm(x_BTD, config.norm.eps), "attn")
        each = linear_of_each(self.attn, "attn", head_widths(config), normed, dtype)
        q, k, v = (x_BTX.reshape(B, T, -1, config.head_dim) for x_BTX in each)
        table, is_weighted = _table_of(ctx, shared), config.norm.weight != "none"

        def turned(name: str, x_BTNH: Array) -> Array:
            if config.use_qk_norm and is_weighted:
                weight = getattr(self.attn, f"{name}_norm")[...]
                x_BTNH = weigh(rms_norm(x_BTNH, config.norm.eps), weight, config.norm)
            return rotate(x_BTNH, *table)

        q, k = turned("query", q), turned("key", k)
        if config.use_qk_norm and not is_weighted:
            q, k = QK_SCALE * rms_norm(q), QK_SCALE * rms_norm(k)
        if config.attention_scale:  # the kernels multiply scores by H^-0.5
            q = config.attention_scale * config.head_dim**0.5 * q
        if ctx.value_embed is not None:
            gate_BTK = 3.0 * jax.nn.sigmoid(small_product(normed[..., :GATE_INPUT], ctx.value_embed.gate))
            v = v + gate_BTK[..., None] * ctx.value_embed.rows_BTKH
        return q.astype(dtype), KeyValue(k.astype(dtype), v.astype(dtype))

    def after(
        self, carry: Any, attended_BTNH: Array | None, ctx: Context, dtype: jnp.dtype
    ) -> tuple[Array, Array | None]:
        """Output projection and MLP: ``(h', skip_BTRR of the aux)``."""
        if attended_BTNH is None:
            carry, attn_BTD = carry
        else:
            attn_BTD = self.attn_out(attended_BTNH.reshape(*attended_BTNH.shape[:2], -1), dtype)
        u_BTD, carry = self.path.between(self, carry, ctx, attn_BTD)
        if self.kind.mlp != "full":
            return self.path.leave(carry, ctx, self.replaced("mlp", u_BTD, dtype))
        hidden_BTF = self.mlp_hidden(rms_norm(u_BTD, self.config.norm.eps), dtype)
        return self.path.leave(carry, ctx, self.mlp_out(hidden_BTF, dtype))

    def attn_out(self, attended_BTX: Array, dtype: jnp.dtype) -> Array:
        """What the attention branch adds to the stream."""
        return self._post(linear(self.attn, "out", attended_BTX, dtype), "attn_post")

    def mlp_hidden(self, normed_BTD: Array, dtype: jnp.dtype) -> Array:
        """Between the MLP's projections, from its normed input without weights."""
        return self.mlp.hidden(self.weigh(normed_BTD, "mlp"), dtype)

    def mlp_out(self, hidden_BTF: Array, dtype: jnp.dtype) -> Array:
        """What the MLP adds to the stream."""
        return self._post(linear(self.mlp, "down", hidden_BTF, dtype), "mlp_post")

    def weigh(self, normed_BTD: Array, name: str) -> Array:
        """The weights of the named norm applied, where norms have weights."""
        if self.config.norm.weight == "none":
            return normed_BTD
        return weigh(normed_BTD, getattr(self.norms, name)[...], self.config.norm)

    def _post(self, branch_BTD: Array, name: str) -> Array:
        norm = self.config.norm
        return self.weigh(rms_norm(branch_BTD, norm.eps), name) if norm.use_post else branch_BTD


def _table_of(ctx: Context, shared: Shared) -> tuple[Array, Array]:
    """Cosines and sines of a layer."""
    if ctx.is_local is None:
        return shared.cos_TH, shared.sin_TH
    assert shared.local_cos_TH is not None and shared.local_sin_TH is not None
    cos_TH = jnp.where(ctx.is_local, shared.local_cos_TH, shared.cos_TH)
    return cos_TH, jnp.where(ctx.is_local, shared.local_sin_TH, shared.sin_TH)
