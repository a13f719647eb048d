"""One layer's maths, alone and for all layers at once.

    x = resid_scale * h + x0_scale * x0
    u = x + Attention(rms(x));  h' = u + MLP(rms(u))

without the scales in other families than nanochat's (Gemma: ``u = x + rms(Attention(rms(x)))`` and so on), or the same
two branches on several streams (``snlp_jax/model/hyper.py``). A branch may be linear, ``x W + b`` with its input before
the norm in place of all of it, or dropped (``snlp_jax/model/kinds.py``). A layer is computed in three stages so that
the layer-batched sweep can group attention by window without touching the weights: ``before`` (mix, norm, projections),
``attend``, ``after`` (output projection and MLP).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.config import ModelConfig
from snlp_jax.model.attention import Kernel, KeyValue, Ring, attend
from snlp_jax.model.hyper import LayerMaps
from snlp_jax.model.layers import GATE_INPUT, QK_SCALE, project, rms_norm, rotate, small_product, weigh
from snlp_jax.model.projections import JOINED, head_widths
from snlp_jax.types import Array, PyTree


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rings:
    """The rings of consecutive layers, those of equal size stacked: leaves of ``groups`` are [n, B, K, S, H]."""

    groups: tuple[Ring, ...]
    members: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    """Layers of each group, in order, counted from the first of these."""

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


OnInput = Callable[[str, str, Array], None]
"""Called with the part of a layer, the name of a kernel and its input."""


@dataclass(frozen=True)
class Block:
    """One layer's maths over its parameters, which may be of a kind that the config has none of, and in another form
    than that of training (``snlp_jax/model/projections.py``)."""

    config: ModelConfig
    params: PyTree
    path: Any
    """Its residual path (``snlp_jax/model/hyper.py``)."""
    dtype: Any
    """Of operands of products, queries, keys and values."""
    on_input: OnInput | None = None

    def __call__(self, h: Array, ctx: Context, shared: Shared) -> Array:
        """One layer from h to h', with XLA's attention. Solvers call its three stages one by one."""
        carry, q_BTNH, kv = self.before(h, ctx, shared)
        out_BTNH = None
        if q_BTNH is not None and kv is not None:
            kernel = Kernel("xla", self.config.attention_softcap)
            out_BTNH = attend(q_BTNH, kv, ctx.window, kernel, shared.document_BT)
        return self.after(carry, out_BTNH, ctx)[0]

    def before(self, h: Array, ctx: Context, shared: Shared) -> tuple[Any, Array | None, KeyValue | None]:
        """``(what after needs, q_BTNH, keys and values)``, the latter None without attention; h is [B, T, D] or
        [B, T, R, D]."""
        x_BTD, carry = self.path.enter(self.params, h, ctx, shared)
        if "attn" not in self.params:
            return (carry, self.replaced("attn", x_BTD)), None, None
        return carry, *self.project(x_BTD, ctx, shared)

    def replaced(self, branch: str, x_BTD: Array) -> Array:
        """What a branch that is linear or dropped adds to the stream at its input, which no norm has seen."""
        part = f"linear_{branch}"
        if part not in self.params:
            return jnp.zeros_like(x_BTD)
        if not {"kernel", "kernel_t"}.isdisjoint(self.params[part]):
            y_BTD = self.linear(part, "kernel", x_BTD)
        else:
            y_BTD = self.linear(part, "up", self.linear(part, "down", x_BTD, self.dtype))
        return y_BTD + self.params[part]["bias"].reshape(1, 1, -1)

    def project(self, x_BTD: Array, ctx: Context, shared: Shared) -> tuple[Array, KeyValue]:
        """Queries, keys and values of the normed attention input."""
        config = self.config
        B, T, _ = x_BTD.shape
        normed = self.weigh(rms_norm(x_BTD, config.norm.eps), "attn")
        each = self.linear_of_each("attn", head_widths(config), normed)
        q, k, v = (x_BTX.reshape(B, T, -1, config.head_dim) for x_BTX in each)
        table, is_weighted = _table_of(ctx, shared), config.norm.weight != "none"

        def turned(name: str, x_BTNH: Array) -> Array:
            if config.use_qk_norm and is_weighted:
                weight = self.params["attn"][f"{name}_norm"]
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
        return q.astype(self.dtype), KeyValue(k.astype(self.dtype), v.astype(self.dtype))

    def after(self, carry: Any, attended_BTNH: Array | None, ctx: Context) -> tuple[Array, Array | None]:
        """Output projection and MLP: ``(h', skip_BTRR of the aux)``."""
        if attended_BTNH is None:
            carry, attn_BTD = carry
        else:
            attn_BTD = self.attn_out(attended_BTNH.reshape(*attended_BTNH.shape[:2], -1))
        u_BTD, carry = self.path.between(self.params, carry, ctx, attn_BTD)
        if "mlp" not in self.params:
            return self.path.leave(carry, ctx, self.replaced("mlp", u_BTD))
        hidden_BTF = self.mlp_hidden(rms_norm(u_BTD, self.config.norm.eps))
        return self.path.leave(carry, ctx, self.mlp_out(hidden_BTF))

    def attn_out(self, attended_BTX: Array) -> Array:
        """What the attention branch adds to the stream."""
        return self._post(self.linear("attn", "out", attended_BTX), "attn_post")

    def mlp_hidden(self, normed_BTD: Array) -> Array:
        """Between the MLP's projections, [B, T, F] in ``dtype``, from its normed input without weights."""
        config, normed_BTD = self.config, self.weigh(normed_BTD, "mlp")
        if config.mlp == "relu2":
            return jnp.square(jax.nn.relu(self.linear("mlp", "up", normed_BTD, self.dtype)))
        up_BTF, gate_BTF = self.linear_of_each("mlp", (config.mlp_width,) * 2, normed_BTD)
        return (jax.nn.silu(gate_BTF) if config.mlp == "swiglu" else jax.nn.gelu(gate_BTF)) * up_BTF

    def mlp_out(self, hidden_BTF: Array) -> Array:
        """What the MLP adds to the stream."""
        return self._post(self.linear("mlp", "down", hidden_BTF), "mlp_post")

    def weigh(self, normed_BTD: Array, name: str) -> Array:
        """The weights of the named norm applied, where norms have weights."""
        if self.config.norm.weight == "none":
            return normed_BTD
        return weigh(normed_BTD, self.params["norms"][name], self.config.norm)

    def linear(self, part: str, name: str, x: Array, out_dtype: Any = jnp.float32) -> Array:
        """``(x W) s + b`` with kernel ``name`` of a part, and its scales and bias where it has them, in
        ``out_dtype``, see :func:`snlp_jax.model.layers.project`."""
        if self.on_input is not None:
            self.on_input(part, name, x)
        tree, is_transposed = self.params[part], f"{name}_t" in self.params[part]
        kernel, bias, scale = tree[name + "_t" * is_transposed], tree.get(f"{name}_bias"), tree.get(f"{name}_scale")
        return project(x, kernel, self.dtype, bias, scale, out_dtype, is_transposed=is_transposed)

    def linear_of_each(self, part: str, widths: Sequence[int], x: Array) -> Sequence[Array]:
        """The products, in ``dtype``, of one input with the kernels that :data:`JOINED` names, in whichever form the
        layer has them."""
        joined, names = JOINED[part]
        if joined not in self.params[part]:
            return [self.linear(part, name, x, self.dtype) for name in names]
        return jnp.split(self.linear(part, joined, x, self.dtype), list(accumulate(widths))[:-1], axis=-1)

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
