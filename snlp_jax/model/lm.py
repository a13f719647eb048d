"""The language model: embedding, a stack of blocks, head. Parameters are a nested dict of arrays.

``params = {'embed': ..., 'blocks': leaves [L, ...], 'head': ...}``. Flax NNX declares the parameters and one layer's
maths; only plain jax transforms touch them. The model hands out pieces of the seam (``block_fn``, ``sweep_fn``,
``context``); ``snlp_jax/forward.py`` joins them with a solver.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model.attention import Implementation, attend_any, attend_by_window, choose_implementation
from snlp_jax.model.block import Block, BlockAux, Context, KeyValue, Shared, ValueEmbed
from snlp_jax.model.hyper import LayerMaps, static_maps
from snlp_jax.model.layers import GATE_INPUT, SMEAR_INPUT, project, rms_norm, rotary_table, uniform
from snlp_jax.types import Array, Params, PyTree

LARGE_STATE = 2**10
"""Tokens times streams from which a CPU sweeps layers one by one."""
BlockFn = Callable[[PyTree, Array, Context, Shared], tuple[Array, BlockAux]]


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
    """Untied output projection and the weight of the mid-layer state it subtracts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.padded_vocab_size)
        self.kernel = nnx.Param(0.001 * jax.random.normal(rngs.params(), shape))
        if config.use_mid_subtract:
            self.mid_scale = nnx.Param(jnp.asarray(0.2, jnp.float32))  # not weakly typed: a step would compile twice


class LanguageModel:
    """Pure functions of ``(params, inputs)`` for one :class:`ModelConfig`; holds no arrays."""

    def __init__(self, config: ModelConfig):
        self.config = config
        block = nnx.eval_shape(lambda: Block(config, 0, rngs=nnx.Rngs(0)))
        self._block_graph = nnx.graphdef(block)

    def init(self, key: Array) -> Params:
        """Fresh parameters. Jit it, with ``out_shardings`` where they should be born sharded."""
        config = self.config
        embed_key, head_key, *block_keys = jax.random.split(key, config.num_layers + 2)

        def block(key: Array, layer: Array) -> PyTree:
            return _pure(Block(config, layer, rngs=nnx.Rngs(key)))

        return {
            "embed": _pure(Embedding(config, rngs=nnx.Rngs(embed_key))),
            "blocks": jax.vmap(block)(jnp.stack(block_keys), jnp.arange(config.num_layers)),
            "head": _pure(Head(config, rngs=nnx.Rngs(head_key))),
        }

    def abstract_params(self) -> Params:
        """Shapes and dtypes of :meth:`init`'s result, without computing it."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def dtype(self) -> Any:
        """Of matrix products, on the default backend."""
        if self.config.compute_dtype == "auto":
            return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        return jnp.dtype(self.config.compute_dtype)

    def cast(self, params: Params) -> Params:
        """Matrices and tables in the compute dtype; scalars, gates and maps of the residual path stay float32."""

        def one(path: Any, leaf: Array) -> Array:
            keys = [key.key for key in path]
            num_axes = leaf.ndim - (keys[0] == "blocks")
            return leaf.astype(self.dtype) if num_axes >= 2 and "hyper" not in keys else leaf

        return jax.tree_util.tree_map_with_path(one, params)

    def embed(self, params: Params, tokens_BT: Array) -> Array:
        """``x0_BTD`` float32: normed token embeddings, each mixed with a gated share of its predecessor's."""
        embed = params["embed"]
        e_BTD = rms_norm(jnp.take(embed["token"], tokens_BT, axis=0))
        if not self.config.use_smear:
            return e_BTD
        gate_BT1 = jax.nn.sigmoid(e_BTD[:, 1:, :SMEAR_INPUT] @ embed["smear_gate"])[..., None]
        smeared = e_BTD[:, 1:] + embed["smear_scale"] * gate_BT1 * e_BTD[:, :-1]
        return jnp.concatenate([e_BTD[:, :1], smeared], axis=1)

    def expand(self, x0_BTD: Array) -> Array:
        """The state that enters the first layer: x0 itself, or R streams [B, T, R, D] that are copies of it."""
        R = self.config.num_streams
        if not R:
            return x0_BTD
        return jnp.broadcast_to(x0_BTD[..., None, :], (*x0_BTD.shape[:-1], R, x0_BTD.shape[-1]))

    def shared(self, x0_BTD: Array) -> Shared:
        """What all layers read, for tokens at positions 0 and on.

        Raises:
            InputError: the sequence is longer than the rotary table.
        """
        if x0_BTD.shape[1] > self.config.max_context:
            raise InputError(
                f"{x0_BTD.shape[1]} tokens exceed the rotary table of {self.config.max_context}; "
                "shorten the input or raise model.rotary_multiple."
            )
        cos, sin = rotary_table(x0_BTD.shape[1], self.config.head_dim, self.config.rope_base)
        return Shared(x0_BTD, cos, sin)

    def context(self, params: Params, blocks: PyTree, tokens_BT: Array, start: int, stop: int) -> Context:
        """Context of layers ``start`` to ``stop - 1``, leaves [stop - start, ...]; one gather for all their tables.

        ``blocks``: parameters of these layers, a stack or a list of trees. Static maps between streams are computed
        from them here, once, and no layer reads their logits again.
        """
        config = self.config
        windows = jnp.asarray(config.windows[start:stop], jnp.int32)
        tables = {layer: index for index, layer in enumerate(config.value_embed_layers) if start <= layer < stop}
        hyper = self._static_maps(blocks)
        if not tables:
            return Context(windows, None, hyper)
        value, gate = params["embed"]["value"], params["embed"]["value_gate"]
        index = jnp.asarray(list(tables.values()))
        rows = value[index[:, None, None], tokens_BT[None]]
        rows = rows.reshape(*rows.shape[:3], config.num_kv_heads, config.head_dim)
        where = jnp.asarray([layer - start for layer in tables])
        scatter = lambda x: jnp.zeros((stop - start, *x.shape[1:]), x.dtype).at[where].set(x)  # noqa: E731
        return Context(windows, ValueEmbed(scatter(rows), scatter(gate[index])), hyper)

    def logits(self, params: Params, h_last: Array, h_mid: Array) -> Array:
        """``logits_BTV`` float32, soft-capped, cropped to the tokenizer's vocabulary; sums the states' streams."""
        config, head = self.config, params["head"]
        h = h_last - head["mid_scale"] * h_mid if config.use_mid_subtract else h_last
        h_BTD = h.sum(-2) if config.num_streams else h
        z_BTV = project(rms_norm(h_BTD), head["kernel"], self.dtype)[..., : config.vocab_size]
        return config.logit_softcap * jnp.tanh(z_BTV / config.logit_softcap) if config.logit_softcap else z_BTV

    def block_fn(self, *, forward_mode: bool = False) -> BlockFn:
        """One layer: ``(params_l, h, ctx_l, shared) -> (h', aux_l)``.

        ``forward_mode`` selects XLA attention, the only one with a forward-mode derivative.
        """
        windows = tuple(sorted(set(self.config.windows)))

        def block(params: PyTree, h: Array, ctx: Context, shared: Shared) -> tuple[Array, BlockAux]:
            module = nnx.merge(self._block_graph, params)
            implementation: Implementation = "xla" if forward_mode else self._attention(h.shape[1])
            carry, q, kv = module.before(h, ctx, shared, self.dtype)
            out = attend_any(q, kv.key_BTKH, kv.value_BTKH, ctx.window, windows, implementation)
            new, skip_BTRR = module.after(carry, out, ctx, self.dtype)
            return new, BlockAux(kv, skip_BTRR)

        return jax.checkpoint(block) if self.config.remat else block

    def sweep_fn(self, start: int, stop: int, *, forward_mode: bool = False) -> Callable[..., tuple[Array, BlockAux]]:
        """All of layers ``start`` to ``stop - 1`` at once; equals ``vmap(block_fn)``.

        Attention runs once for each distinct window, with the window compiled in, on activations gathered by window;
        the weights are read where they lie. Long inputs of several streams are the exception on a CPU: there layers run
        one after another, as their states would pass through memory once an operation.
        """
        windows = self.config.windows[start:stop]
        block = self.block_fn()

        def one_by_one(params: PyTree, h_L: Array, ctx: Context, shared: Shared) -> tuple[Array, BlockAux]:
            return jax.lax.map(lambda row: block(*row, shared), (params, h_L, ctx))

        def sweep(params: PyTree, h_L: Array, ctx: Context, shared: Shared) -> tuple[Array, BlockAux]:
            def before(params_l: PyTree, h: Array, ctx_l: Context) -> tuple[Any, Array, KeyValue]:
                return nnx.merge(self._block_graph, params_l).before(h, ctx_l, shared, self.dtype)

            def after(params_l: PyTree, carry: Any, out: Array, ctx_l: Context) -> tuple[Array, Array | None]:
                return nnx.merge(self._block_graph, params_l).after(carry, out, ctx_l, self.dtype)

            carry_L, q, kv = jax.vmap(before)(params, h_L, ctx)
            implementation: Implementation = "xla" if forward_mode else self._attention(h_L.shape[2])
            out = attend_by_window(q, kv.key_BTKH, kv.value_BTKH, windows, implementation)
            new_L, skip_LBTRR = jax.vmap(after)(params, carry_L, out, ctx)
            return new_L, BlockAux(kv, skip_LBTRR)

        batched = jax.checkpoint(sweep) if self.config.remat else sweep

        def choose(params: PyTree, h_L: Array, ctx: Context, shared: Shared) -> tuple[Array, BlockAux]:
            is_large = self.config.num_streams > 1 and h_L[0, ..., 0].size >= LARGE_STATE
            on_cpu = jax.default_backend() == "cpu"
            return (one_by_one if on_cpu and is_large else batched)(params, h_L, ctx, shared)

        return choose

    def residual_map(self, params: PyTree, ctx: Context, aux: BlockAux) -> Array:
        """Derivative of a layer's skip path: a scalar, or [R, R] on the streams, or [B, T, R, R] for each token.

        Dynamic maps depend on the state; the derivative is that of the path with its maps held fixed.
        """
        if ctx.hyper is not None:
            return ctx.hyper.skip_RR
        if aux.skip_BTRR is not None:
            return aux.skip_BTRR
        return params["resid_scale"] if self.config.use_x0_resid else jnp.ones(())

    def check_tokens(self, tokens_BT: Any) -> None:
        """Refuse concrete token ids outside the vocabulary, which a device would silently read as others.

        Raises:
            InputError: names the id.
        """
        if tokens_BT.size == 0:
            raise InputError("there are no tokens; give at least one.")
        low, high = int(tokens_BT.min()), int(tokens_BT.max())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise InputError(f"token id {bad} lies outside the vocabulary of {self.config.vocab_size} entries.")

    def _static_maps(self, blocks: PyTree) -> LayerMaps | None:
        if not self.config.num_streams or self.config.hyper_maps == "dynamic":
            return None
        is_unrolled = isinstance(blocks, list)
        hyper = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(b["hyper"] for b in blocks)) if is_unrolled else None
        return static_maps(hyper if is_unrolled else blocks["hyper"], self.config)

    def _attention(self, seq_len: int) -> Implementation:
        return choose_implementation(
            self.config.attention,
            backend=jax.default_backend(),
            dtype=self.dtype,
            seq_len=seq_len,
            head_dim=self.config.head_dim,
        )


def num_params(params: Params) -> int:
    """Number of parameters of a (possibly abstract) tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _pure(module: nnx.Module) -> PyTree:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
