"""The language model: embedding, a stack of blocks, head. Parameters are a nested dict of arrays.

``params = {'embed': ..., 'blocks': leaves [L, ...], 'head': ...}``. Flax NNX declares them
(``snlp_jax/model/parameters.py``); everything else is a function of the dict. The model hands out pieces of the seam
(``block_fn``, ``sweep_fn``, ``context``); ``snlp_jax/forward.py`` joins them with a solver.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import Kind, MachineConfig, ModelConfig, RopeScaling
from snlp_jax.errors import InputError
from snlp_jax.model.attention import Implementation, Kernel, Ring, choose_decoding, choose_implementation
from snlp_jax.model.block import Block, BlockAux, Context, OnInput, Shared, ValueEmbed
from snlp_jax.model.hyper import has_static_maps, maps_of_layers, residual_path, static_maps
from snlp_jax.model.kinds import join, kinds_in, take
from snlp_jax.model.layers import SMEAR_INPUT, project, rms_norm, rotary_table, small_product, weigh
from snlp_jax.model.nodes import LARGE_STATE, ChooseKernel, ChunkNode, LayerNode, NodeFn, NodeFns, node_fns, split_sweep
from snlp_jax.model.parameters import Embedding, Head, Layer, fresh
from snlp_jax.model.projections import FEW_TOKENS, TRANSPOSED_FROM, head_kernel, head_widths, separate_projections
from snlp_jax.model.value_embed import gather
from snlp_jax.types import Array, Params, PyTree


class LanguageModel:
    """Pure functions of ``(params, inputs)`` for one :class:`ModelConfig`; holds no arrays.

    ``machine`` says in what precision and with which kernels they compute. ``backend`` is what they are compiled for
    ("cpu", "gpu", "tpu"), where that is not what jax runs on.
    """

    def __init__(self, config: ModelConfig, machine: MachineConfig = MachineConfig(), *, backend: str | None = None):
        self.config = config
        self.machine = machine
        self._backend = backend
        self._fetch: Callable[[PyTree], PyTree] = lambda params: params
        self._kernels: frozenset[Implementation] = frozenset(get_args(Implementation))
        self._wrap_path: Callable[[Any], Any] = lambda path: path
        self._on_input: OnInput | None = None
        self._one_by_one_from = LARGE_STATE
        self.transposed_from = machine.transposed_from or TRANSPOSED_FROM

    def __call__(self, params: Params, tokens_BT: Array, document_BT: Array | None = None) -> Array:
        """``logits_BTV``: one layer after another, with no schedule, no cache and no mesh.

        This is what the model computes. ``snlp_jax/forward.py`` computes the same in other orders, and tests compare
        both. ``document_BT`` numbers the document of each token, where tokens attend to their own document alone.
        """
        config, embed = self.config, params["embed"]
        x0_BTD = self.embed(params, tokens_BT, document_BT=document_BT)
        shared = self.shared(x0_BTD, document_BT=document_BT)
        h = h_mid = self.expand(x0_BTD)
        for layer, window in enumerate(jnp.asarray(config.windows)):
            block = jax.tree.map(lambda leaf: leaf[0], take(config, params["blocks"], layer, layer + 1))
            value_embed = None
            if layer in config.value_embed_layers:
                table = config.value_embed_layers.index(layer)
                rows_BTX = embed["value"][table][tokens_BT]
                rows_BTKH = rows_BTX.reshape(*tokens_BT.shape, config.num_kv_heads, config.head_dim)
                value_embed = ValueEmbed(rows_BTKH, embed["value_gate"][table])
            maps = static_maps(block["hyper"], config) if has_static_maps(config) else None
            is_local = jnp.asarray(config.letters[layer] == "S") if config.rope.local_base else None
            h = self.block(block)(h, Context(window, value_embed, maps, None, is_local), shared)
            if layer == config.mid_layer:
                h_mid = h
        return self.logits(params, h, h_mid)

    def init(self, key: Array) -> Params:
        """Fresh parameters. Jit it, with ``out_shardings`` where they should be born sharded."""
        config = self.config
        embed_key, head_key, *block_keys = jax.random.split(key, config.num_layers + 2)

        def stack(kind: Kind, layers: tuple[int, ...]) -> PyTree:
            of_layer = lambda key, layer: fresh(Layer, key, config, layer, kind)  # noqa: E731
            return jax.vmap(of_layer)(jnp.stack([block_keys[layer] for layer in layers]), jnp.asarray(layers))

        kinds = kinds_in(config, 0, config.num_layers)
        return {
            "embed": fresh(Embedding, embed_key, config),
            "blocks": join([stack(*item) for item in kinds.items()], list(kinds.values())),
            "head": fresh(Head, head_key, config),
        }

    def abstract_params(self) -> Params:
        """Shapes and dtypes of :meth:`init`'s result, without computing it."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def adapted(
        self,
        *,
        fetch: Callable[[PyTree], PyTree] | None = None,
        kernels: Collection[Implementation] | None = None,
        wrap_path: Callable[[Any], Any] | None = None,
        on_input: OnInput | None = None,
        one_by_one_from: int | None = None,
    ) -> "LanguageModel":
        """The same model for programs over several devices, that look into its layers, or that are compared.

        Args:
            fetch: applied to one layer's parameters wherever its maths reads them: what is split can be gathered there.
            kernels: attention kernels that run there besides XLA's own, of those that this model may use; others are
                replaced by XLA's under ``auto``.
            wrap_path: gives what stands in place of a layer's residual path (``snlp_jax/model/hyper.py``).
            on_input: called with part, name and input of every product of a layer, or of the head, with a kernel, while
                they are traced.
            one_by_one_from: in place of ``LARGE_STATE`` (``snlp_jax/model/nodes.py``).
        """
        model = copy.copy(self)
        model._fetch, model._wrap_path = fetch or self._fetch, wrap_path or self._wrap_path
        model._on_input = on_input or self._on_input
        model._kernels = self._kernels if kernels is None else self._kernels & {"xla", *kernels}
        model._one_by_one_from = self._one_by_one_from if one_by_one_from is None else one_by_one_from
        return model

    @property
    def backend(self) -> str:
        return self._backend or jax.default_backend()

    @property
    def dtype(self) -> Any:
        """Of matrix products, on this backend."""
        if self.machine.compute_dtype == "auto":
            return jnp.float32 if self.backend == "cpu" else jnp.bfloat16
        return jnp.dtype(self.machine.compute_dtype)

    def cast(self, params: Params) -> Params:
        """Matrices and tables in the compute dtype; scalars, gates and maps of the residual path stay float32, and
        kernels of eight bits as they are."""

        def one(path: Any, leaf: Array) -> Array:
            keys = [key.key for key in path]
            num_axes = leaf.ndim - (keys[0] == "blocks")
            is_cast = num_axes >= 2 and not {"hyper", "value_gate"} & set(keys) and leaf.dtype.itemsize > 1
            return leaf.astype(self.dtype) if is_cast else leaf

        return jax.tree_util.tree_map_with_path(one, params)

    def embed(
        self, params: Params, tokens_BT: Array, previous_B1: Array | None = None, document_BT: Array | None = None
    ) -> Array:
        """``x0_BTD`` float32: token embeddings, normed or scaled where the family does so, each mixed with a gated
        share of its predecessor's.

        Args:
            previous_B1: the token before the first, where there is one.
            document_BT: number of each token's document, where nothing is to be mixed across their boundaries.
        """
        embed = params["embed"]
        if previous_B1 is not None and self.config.use_smear:
            return self.embed(params, jnp.concatenate([previous_B1, tokens_BT], axis=1))[:, 1:]
        e_BTD = jnp.take(embed["token"], tokens_BT, axis=0)
        e_BTD = rms_norm(e_BTD, self.config.norm.eps) if self.config.norm.use_embed else e_BTD.astype(jnp.float32)
        if self.config.embed_scale != 1.0:
            e_BTD = self.config.embed_scale * e_BTD
        if not self.config.use_smear:
            return e_BTD
        gate_BT1 = jax.nn.sigmoid(small_product(e_BTD[:, 1:, :SMEAR_INPUT], embed["smear_gate"]))[..., None]
        if document_BT is not None:
            gate_BT1 *= (document_BT[:, 1:] == document_BT[:, :-1])[..., None]
        smeared = e_BTD[:, 1:] + embed["smear_scale"] * gate_BT1 * e_BTD[:, :-1]
        return jnp.concatenate([e_BTD[:, :1], smeared], axis=1)

    def expand(self, x0_BTD: Array) -> Array:
        """The state that enters the first layer: x0 itself, or R streams [B, T, R, D] that are copies of it."""
        *lead, D = x0_BTD.shape
        R = self.config.num_streams
        return jnp.broadcast_to(x0_BTD[..., None, :], (*lead, R, D)) if R else x0_BTD

    def shared(self, x0_BTD: Array, first_B: Array | None = None, document_BT: Array | None = None) -> Shared:
        """What all layers read, for tokens at positions 0 and on, or in row b at positions ``first_B[b]`` and on.

        With ``document_BT`` tokens attend to their own document alone. Positions go on across boundaries: only their
        differences count.

        Raises:
            InputError: the sequence is longer than the rotary embedding reaches.
        """
        if x0_BTD.shape[1] > self.config.max_context:
            raise InputError(
                f"{x0_BTD.shape[1]} tokens exceed the rotary table of {self.config.max_context}; "
                "shorten the input or raise model.rotary_multiple."
            )
        position_T = jnp.arange(x0_BTD.shape[1])
        positions = position_T if first_B is None else first_B[:, None] + position_T[None]
        rope = self.config.rope
        sign = 1 if rope.direction == "backward" else -1

        def table(base: float, scaling: RopeScaling | None) -> tuple[Array, Array]:
            cos_TH, sin_TH = rotary_table(positions, self.config.num_rotated, base, scaling)
            return cos_TH, sin_TH if sign == 1 else -sin_TH

        local = table(rope.local_base, None) if rope.local_base else (None, None)
        return Shared(x0_BTD, *table(self.config.rope_base, rope.scaling), first_B, None, document_BT, *local)

    def context(
        self,
        embed_head: Params,
        blocks: PyTree,
        tokens_BT: Array,
        start: int,
        stop: int,
        *,
        num_rows: int = 0,
        tables: PyTree = None,
        num_shards: int = 1,
    ) -> Context:
        """Context of layers ``start`` to ``stop - 1``, leaves [stop - start, ...]; one gather for all their tables.

        Args:
            embed_head: parameters of the embedding and the head.
            blocks: parameters of these layers, a stack or a list of trees. Static maps between streams are computed
                from them here, once, and no layer reads their logits again.
            num_rows: layers of the stack with those of zero weights that fill it up; 0 where there are none.
            tables: value embeddings as :func:`snlp_jax.model.value_embed.lay_out_tables` gives them; those in
                ``embed_head`` where there are none.
            num_shards: equal parts of the stack that lie on different devices: each part's rows are gathered from its
                own tables.
        """
        config, num_rows = self.config, num_rows or stop - start
        windows = jnp.asarray(config.windows[start:stop], jnp.int32)
        value_embed = gather(config, embed_head["embed"], tables, tokens_BT, start, stop, num_shards, num_rows)
        letters = np.asarray(list(config.letters[start:stop]))
        is_local = jnp.asarray(letters == "S") if config.rope.local_base else None
        return Context(windows, value_embed, maps_of_layers(config, blocks, stop - start), None, is_local)

    def batch_axes(self, ctx: Context, shared: Shared, before: int = 0) -> tuple[Context, Shared, int]:
        """Batch axis of every leaf of one node's context, of what all share, and of what a node leaves behind; a node
        that is a chunk of layers has ``before=1`` axis of them."""
        axis = lambda leaf, axes: None if leaf is None else axes  # noqa: E731
        value_embed = axis(ctx.value_embed, ValueEmbed(before, None))  # type: ignore[arg-type]
        past = axis(ctx.past, Ring(before, before))  # type: ignore[arg-type]
        position, document = axis(shared.first_B, 0), axis(shared.document_BT, 0)
        local, rings = axis(shared.local_cos_TH, position), axis(shared.past, 1)
        shared_axes = Shared(0, position, position, position, rings, document, local, local)  # type: ignore[arg-type]
        return Context(None, value_embed, None, past), shared_axes, before  # type: ignore[arg-type]

    def logits(self, params: Params, h_last: Array, h_mid: Array) -> Array:
        """``logits_BTV`` float32, soft-capped, cropped to the tokenizer's vocabulary; sums the states' streams."""
        return self.padded_logits(params, h_last, h_mid)[..., : self.config.vocab_size]

    def padded_logits(self, params: Params, h_last: Array, h_mid: Array) -> Array:
        """:meth:`logits` of all ``padded_vocab_size`` entries, of which those past the vocabulary mean nothing."""
        return self.unembed(params, self.readout(params, h_last, h_mid))

    def readout(self, params: Params, h_last: Array, h_mid: Array) -> Array:
        """``y_BTD``: what the head reads, before its norm."""
        config = self.config
        h = h_last - params["head"]["mid_scale"] * h_mid if config.use_mid_subtract else h_last
        return h.sum(-2) if config.num_streams else h

    def unembed(self, params: Params, y_BTD: Array) -> Array:
        """``cap * tanh(rms(y) W / cap)`` of all ``padded_vocab_size`` entries."""
        head, cap, x_BTD = params["head"], self.config.logit_softcap, self.head_input(params, y_BTD)
        if self._on_input is not None:
            self._on_input("head", "kernel", x_BTD)
        is_few = self.backend == "cpu" and x_BTD.size // x_BTD.shape[-1] <= FEW_TOKENS
        kernel, is_transposed = head_kernel(params, is_tied=self.config.use_tied_head, is_few=is_few)
        z_BTV = project(x_BTD, kernel, self.dtype, scale=head.get("kernel_scale"), is_transposed=is_transposed)
        return cap * jnp.tanh(z_BTV / cap) if cap else z_BTV

    def head_input(self, params: Params, y_BTD: Array) -> Array:
        """What the head's kernel multiplies: ``rms(y)``, with the norm's weight."""
        norm, normed_BTD = self.config.norm, rms_norm(y_BTD, self.config.norm.eps)
        return normed_BTD if norm.weight == "none" else weigh(normed_BTD, params["head"]["norm"], norm)

    def look_ahead(self, params: Params, y_BTD: Array, k: int) -> Array:
        """``y P_k``: what the head reads for the token k after the next, k from 1 to ``num_mtp_heads``."""
        return project(y_BTD, params["head"]["mtp"][k - 1], self.dtype)

    def logits_ahead(self, params: Params, h_last: Array, h_mid: Array, num_heads: int) -> Array:
        """``logits_BMV`` of the first ``num_heads`` heads that look further ahead, from the states [B, 1, ...] of one
        token. The projection is read once for all of them."""
        y_B1D = self.readout(params, h_last, h_mid)
        y_BMD = jnp.concatenate([self.look_ahead(params, y_B1D, k + 1) for k in range(num_heads)], axis=1)
        return self.unembed(params, y_BMD)[..., : self.config.vocab_size]

    def block_fn(self, *, forward_mode: bool = False) -> NodeFn:
        """One layer: ``(params_l, h, ctx_l, shared) -> (h', aux_l)``.

        ``forward_mode`` selects XLA attention, the only one with a forward-mode derivative.
        """
        return self._node_fns(self._layer_node(), (), forward_mode).block_fn

    def sweep_fn(self, start: int, stop: int, *, forward_mode: bool = False) -> NodeFn:
        """All of layers ``start`` to ``stop - 1`` at once; equals ``vmap(block_fn)``."""
        return self._node_fns(self._layer_node(), self.config.windows[start:stop], forward_mode).sweep_fn

    @property
    def refresh_fn(self) -> NodeFn:
        """Of layers evaluated at once, their keys and values alone, as what they leave behind; no query is computed."""
        refresh_fn, widths = self._node_fns(self._layer_node(), (), False).refresh_fn, head_widths(self.config)
        return lambda stack, *rest: refresh_fn(separate_projections(stack, "attn", widths), *rest)

    @property
    def residual_map(self) -> Callable[[PyTree, Context, BlockAux], Array]:
        """``(params_l, ctx_l, aux_l)`` -> derivative of a layer's skip path: a scalar, or [R, R] on the streams, or
        [B, T, R, R] for each token."""
        return self._layer_node().residual_map

    def chunk_fns(
        self,
        start: int,
        stop: int,
        num_chunks: int,
        scales: Literal["mean", "own"] = "mean",
        branches: Literal["sum", "mean"] = "sum",
        *,
        forward_mode: bool = False,
    ) -> NodeFns:
        """Layers ``start`` to ``stop - 1`` as equal chunks, each fused into one wide layer; parameters and context
        lead with [C, M]. The formulas are in ``snlp_jax/model/nodes.py``.

        Raises:
            InputError: the layers do not divide into chunks, or their maps between streams depend on the token, or
                ``scales`` has nothing to act on.
        """
        config, num_layers = self.config, stop - start
        if num_chunks < 1 or num_layers % num_chunks:
            raise InputError(f"{num_layers} layers do not divide into {num_chunks} equal chunks; choose a divisor.")
        if config.num_streams and config.hyper_maps == "dynamic":
            raise InputError("layers whose maps depend on the token cannot be fused; set model.hyper_maps to 'static'.")
        if config.num_streams and scales == "own":
            raise InputError("scales 'own' is for residual scalars, and this model mixes streams; use 'mean'.")
        windows, M = config.windows[start:stop], num_layers // num_chunks
        patterns = {windows[i : i + M] for i in range(0, num_layers, M)}
        alike = patterns.pop() if len(patterns) == 1 else None
        node = ChunkNode(config, self.block, scales, branches, alike)
        return self._node_fns(node, windows, forward_mode)

    def split_sweep_fn(self, start: int, stop: int, *, forward_mode: bool = False) -> NodeFn:
        """A sweep whose attentions all read one input: see :func:`snlp_jax.model.nodes.split_sweep`.

        Raises:
            InputError: the model has several residual streams.
        """
        if self.config.num_streams:
            raise InputError("a split stage is for a single residual stream, and this model mixes several.")
        return split_sweep(self._layer_node(), self.config.windows[start:stop], self._choose_kernel(forward_mode))

    def check_tokens(self, tokens_BT: Any) -> None:
        """Refuse concrete token ids outside the vocabulary, which a device would silently read as others.

        Raises:
            InputError: names the id.
        """
        if tokens_BT.size == 0:
            raise InputError("there are no tokens; give at least one.")
        low, high = int(tokens_BT.min()), int(tokens_BT.max())
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(
                f"token id {low if low < 0 else high} lies outside the vocabulary of {self.config.vocab_size} entries."
            )

    def block(self, params: PyTree) -> Block:
        """The layer that these are the parameters of."""
        path = self._wrap_path(residual_path(self.config))
        return Block(self.config, self._fetch(params), path, self.dtype, self._on_input)

    def _layer_node(self) -> LayerNode:
        return LayerNode(self.config, self.block)

    def _node_fns(self, node: LayerNode, windows: Sequence[int], forward_mode: bool) -> NodeFns:
        one_by_one_from = self._one_by_one_from if self.backend == "cpu" else None
        return node_fns(node, windows, self._choose_kernel(forward_mode), one_by_one_from)

    def _choose_kernel(self, forward_mode: bool) -> ChooseKernel:
        """What ``machine`` asks for, or under ``auto`` XLA's where the choice is not among those that are allowed.

        Raises:
            InputError: ``machine`` asks for a kernel that does not run here.
        """
        backend, head_dim, softcap = self.backend, self.config.head_dim, self.config.attention_softcap

        def choose(num_tokens: int, is_cached: bool) -> Kernel:
            name = "decode_attention" if is_cached else "attention"
            requested = "xla" if forward_mode else getattr(self.machine, name)
            if is_cached:
                chosen = choose_decoding(requested, backend=backend, num_tokens=num_tokens, head_dim=head_dim)
            else:
                chosen = choose_implementation(
                    requested, backend=backend, dtype=self.dtype, seq_len=num_tokens, head_dim=head_dim, softcap=softcap
                )
            if chosen not in self._kernels and requested != "auto":
                raise InputError(f"machine.{name} {requested!r} does not run over this mesh; use 'auto' or 'xla'.")
            return Kernel(chosen if chosen in self._kernels else "xla", softcap)

        return choose


def num_params(params: Params) -> int:
    """Number of parameters of a (possibly abstract) tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
