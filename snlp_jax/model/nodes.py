"""What a solver iterates on, a layer or a fused chunk of layers, as the functions of the seam.

A node has three stages: ``before`` (residual path, norm, projections), attention, ``after`` (output projection and
MLP). One node alone takes its window from its context; all nodes at once group attention by window, statically.

A chunk of M layers is one wide layer that reads the state h entering the first:

    x = s h + m x0;  u = x + sum_j w_j Attention_j(rms(x_j));  h' = u + sum_j w_j MLP_j(rms(u));  A = s

    scales = mean (published)   s, m means of the layers' scales; x_j = x; w_j = 1
    scales = own                w_j = prod_{i>j} s_i; s = prod_i s_i; m = sum_j w_j m_j; x_j = s_j h + m_j x0

With branches = mean w_j is divided by M. Streams: H_res, H_pre and H_post are means over the chunk, sub-layer by
sub-layer. Every layer keeps its window, its heads and its value embeddings. M = 1 is the layer itself.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.model.attention import XLA, Kernel, KeyValue, Ring, attend_any, attend_by_window, attend_ring
from snlp_jax.model.block import Block, BlockAux, Context, Shared
from snlp_jax.model.decode_kernel import attend_ring_at_once
from snlp_jax.model.hyper import BranchMaps, LayerMaps, join, residual_path
from snlp_jax.model.layers import project, rms_norm
from snlp_jax.types import Array, PyTree

NodeFn = Callable[[PyTree, Array, Context, Shared], tuple[Array, BlockAux]]
ChooseKernel = Callable[[int, bool], Kernel]
"""Attention kernel for a number of tokens, and whether these follow on a cache."""

LARGE_STATE = 2**8
"""Tokens times streams of a state from which a CPU evaluates nodes one after another rather than all at once: the table
of ``benchmarks/formulation.py``. Behind a cache it is the tokens of a row, which count up to four times, as they have
64 to 256 keys: their scores are held too, and a loop copies the ring of each node, however few tokens read it."""


class NodeFns(NamedTuple):
    """A chain of nodes for the solver."""

    block_fn: NodeFn
    """One node."""
    sweep_fn: NodeFn
    """All nodes at once, every argument but the last leading with the node axis; equals ``vmap(block_fn)``."""
    residual_map: Callable[[PyTree, Context, BlockAux], Array]
    """``(params, ctx, aux)`` of a node -> derivative of its skip path."""
    refresh_fn: NodeFn
    """All nodes' keys and values at inputs h_L, as what they leave behind; nothing else is computed."""


@dataclass(frozen=True)
class LayerNode:
    """One layer. ``merge`` turns its parameters into a :class:`Block`."""

    config: ModelConfig
    merge: Callable[[PyTree], Block]

    def before(self, params: PyTree, h: Array, ctx: Context, shared: Shared) -> tuple[Any, Any, Any]:
        """``(what after needs, queries, keys and values)``, the latter None of a node without attention."""
        return self.merge(params).before(h, ctx, shared)

    def attend(self, q_BTNH: Array, kv: KeyValue, ctx: Context, shared: Shared, kernel: Kernel) -> Array:
        """Attention output of this node alone."""
        if shared.first_B is not None:
            assert ctx.past is not None, "a layer that is evaluated alone needs its earlier tokens in its context"
            return attend_cached(q_BTNH, kv, ctx.past, ctx.window, shared, kernel)
        windows = tuple(sorted(set(self.config.windows)))
        return attend_any(q_BTNH, kv, ctx.window, windows, kernel, shared.document_BT)

    def after(self, params: PyTree, carry: Any, out_BTNH: Array | None, ctx: Context) -> tuple[Array, Array | None]:
        """``(h', skip_BTRR of the aux)``."""
        return self.merge(params).after(carry, out_BTNH, ctx)

    def residual_map(self, params: PyTree, ctx: Context, aux: BlockAux) -> Array:
        """Derivative of the skip path: a scalar, or [R, R] on the streams, or [B, T, R, R] for each token. Dynamic maps
        depend on the state; theirs is the derivative with the maps held fixed."""
        if ctx.hyper is not None:
            return ctx.hyper.skip_RR
        if aux.skip_BTRR is not None:
            return aux.skip_BTRR
        return params["resid_scale"] if self.config.use_x0_resid else jnp.ones(())


@dataclass(frozen=True)
class ChunkNode(LayerNode):
    """M layers as one; parameters and context lead with them. Formulas: see the module.

    No weight is copied: queries, keys, values and the MLP's first product are batched over M, its second product and
    the output projection contract over (M, features).
    """

    scales: Literal["mean", "own"]
    branches: Literal["sum", "mean"]
    windows: tuple[int, ...] | None
    """Of the M layers, where all chunks have the same."""

    def before(self, params: PyTree, h: Array, ctx: Context, shared: Shared) -> tuple[Any, Any, Any]:
        path, scales = residual_path(self.config), self._scales(params)
        x_BTD, carry = path.enter(scales, h, self._wide(ctx), shared)
        if scales and self.scales == "own":
            each_M = {name: params[name] for name in scales}
            x_MBTD = jax.vmap(lambda each: path.enter(each, h, None, shared)[0])(each_M)
        else:
            x_MBTD = jnp.broadcast_to(x_BTD[None], (ctx.window.shape[0], *x_BTD.shape))
        return carry, *jax.vmap(lambda p, x, c: self.merge(p).project(x, c, shared))(params, x_MBTD, ctx)

    def attend(self, q_MBTNH: Array, kv: KeyValue, ctx: Context, shared: Shared, kernel: Kernel) -> Array:
        one = functools.partial(super().attend, shared=shared, kernel=kernel)
        is_cached = shared.first_B is not None
        if not is_cached and self.windows is not None:
            return attend_by_window(q_MBTNH, kv, self.windows, kernel, shared.document_BT)
        if is_cached or kernel.name == "xla":
            return jax.vmap(one)(q_MBTNH, kv, ctx)
        rows = [jax.tree.map(lambda leaf: leaf[j], (q_MBTNH, kv, ctx)) for j in range(len(q_MBTNH))]  # noqa: B023
        return jnp.stack([one(*row) for row in rows])  # a vmap would run the kernels of all windows

    def after(self, params: PyTree, carry: Any, out_MBTNH: Array | None, ctx: Context) -> tuple[Array, Array | None]:
        assert out_MBTNH is not None, "layers that are fused have attention"
        path, wide = residual_path(self.config), self._wide(ctx)
        attended_MBTX = out_MBTNH.reshape(*out_MBTNH.shape[:3], -1)
        attn_BTD = self._add_up("attn", "out", Block.attn_out, params, attended_MBTX)
        u_BTD, carry = path.between(None, carry, wide, attn_BTD)
        normed_MBTD = jnp.broadcast_to(rms_norm(u_BTD, self.config.norm.eps)[None], (len(out_MBTNH), *u_BTD.shape))
        hidden_MBTF = jax.vmap(lambda p, x: self.merge(p).mlp_hidden(x))(params, normed_MBTD)
        return path.leave(carry, wide, self._add_up("mlp", "down", Block.mlp_out, params, hidden_MBTF))

    def residual_map(self, params: PyTree, ctx: Context, aux: BlockAux) -> Array:
        if ctx.hyper is not None:
            return self._maps(ctx.hyper).skip_RR
        return self._scales(params).get("resid_scale", jnp.ones(()))

    def _add_up(
        self, part: str, name: str, branch: Callable[[Block, Array], Array], params: PyTree, x_MBTX: Array
    ) -> Array:
        """``sum_j w_j branch_j(x_j)``: one product, unless each layer has a norm, a bias or scales of its own, or
        its kernel is kept transposed."""
        weights_M = self._branch_weights(params)
        is_alone = name in params[part] and not {f"{name}_bias", f"{name}_scale"} & params[part].keys()
        is_product = is_alone and not self.config.norm.use_post
        out = x_MBTX if is_product else jax.vmap(lambda p, x: branch(self.merge(p), x))(params, x_MBTX)
        if weights_M is not None:
            out = out * weights_M[:, None, None, None]
        if not is_product:
            return out.sum(0)
        kernel_MXD, dtype = params[part][name], self.merge(params).dtype
        x_BTMX = jnp.moveaxis(out.astype(dtype), 0, 2)
        return project(x_BTMX.reshape(*x_BTMX.shape[:2], -1), kernel_MXD.reshape(-1, kernel_MXD.shape[-1]), dtype)

    def _scales(self, params: PyTree) -> dict[str, Array]:
        """s and m of the chunk, where the model has them."""
        if not self.config.use_x0_resid:
            return {}
        resid_M, x0_M = params["resid_scale"], params["x0_scale"]
        if self.scales == "mean":
            return {"resid_scale": resid_M.mean(), "x0_scale": x0_M.mean()}
        return {"resid_scale": jnp.prod(resid_M), "x0_scale": jnp.sum(_products_after(resid_M) * x0_M)}

    def _branch_weights(self, params: PyTree) -> Array | None:
        """w_j; None where all are 1."""
        num_layers = jax.tree.leaves(params["mlp"])[0].shape[0]
        divisor = num_layers if self.branches == "mean" else 1
        if self.scales == "own" and self.config.use_x0_resid:
            return _products_after(params["resid_scale"]) / divisor
        return jnp.full((num_layers,), 1.0 / divisor) if divisor > 1 else None

    def _wide(self, ctx: Context) -> Context:
        """The chunk's context for the residual path."""
        return ctx if ctx.hyper is None else ctx._replace(hyper=self._maps(ctx.hyper))

    @staticmethod
    def _maps(hyper: LayerMaps) -> LayerMaps:
        mean = lambda maps: BranchMaps(*(leaf.mean(0) for leaf in maps))  # noqa: E731
        return join(mean(hyper.attn), mean(hyper.mlp))


def attend_cached(
    q_BTNH: Array, kv: KeyValue, past: Ring, window: Array | int, shared: Shared, kernel: Kernel = XLA
) -> Array:
    """Attention to the tokens before and to those at hand."""
    assert shared.first_B is not None
    if kernel.name == "triton" or kernel.name == "mosaic":
        return attend_ring_at_once(q_BTNH, kv, past, window, shared.first_B, kernel.name, kernel.softcap)
    return attend_ring(q_BTNH, kv, past, window, shared.first_B, kernel.softcap)


def _products_after(scale_M: Array) -> Array:
    """``prod_{i>j} s_i`` for every j, without a division."""
    ones = jnp.ones_like(scale_M[:1])
    return jnp.cumprod(jnp.concatenate([scale_M[1:], ones])[::-1])[::-1]


def node_fns(
    node: LayerNode, windows: Sequence[int], choose_kernel: ChooseKernel, one_by_one_from: int | None = None
) -> NodeFns:
    """The functions of a chain of equal nodes whose layers, in order, have these windows.

    The sweep runs attention once for each distinct window, with the window compiled in, on activations gathered by
    window; the weights are read where they lie. States of ``one_by_one_from`` or more tokens (see ``LARGE_STATE``) go
    through the nodes one after another instead: batched, every operation would pass all states through a CPU's memory.
    Rings of several lengths have no common loop.
    """
    maybe_remat = jax.checkpoint if node.config.remat else lambda fn: fn

    @maybe_remat
    def block(params: PyTree, h: Array, ctx: Context, shared: Shared) -> tuple[Array, BlockAux]:
        carry, q, kv = node.before(params, h, ctx, shared)
        kernel = choose_kernel(h.shape[1], shared.first_B is not None)
        out = None if kv is None else node.attend(q, kv, ctx, shared, kernel)
        new, skip_BTRR = node.after(params, carry, out, ctx)
        return new, BlockAux(kv, skip_BTRR)

    @maybe_remat
    def batched(params: PyTree, h_L: Array, ctx: Context, shared: Shared) -> tuple[Array, BlockAux]:
        carry_L, q, kv = jax.vmap(node.before, in_axes=(0, 0, 0, None))(params, h_L, ctx, shared)
        kernel = choose_kernel(h_L.shape[2], shared.first_B is not None)
        out = None if kv is None else _attend_all(q, kv, ctx, shared, windows, kernel)
        new_L, skip_LBTRR = jax.vmap(node.after)(params, carry_L, out, ctx)
        return new_L, BlockAux(kv, skip_LBTRR)

    def sweep(params: PyTree, h_L: Array, ctx: Context, shared: Shared) -> tuple[Array, BlockAux]:
        is_large = one_by_one_from is not None and _num_held(h_L, ctx) >= one_by_one_from
        if is_large and shared.past is None:
            return jax.lax.map(lambda row: block(*row, shared), (params, h_L, ctx))
        return batched(params, h_L, ctx, shared)

    def refresh(params: PyTree, h_L: Array, ctx: Context, shared: Shared) -> tuple[Array, BlockAux]:
        _, _, kv = jax.vmap(node.before, in_axes=(0, 0, 0, None))(params, h_L, ctx, shared)
        return h_L, BlockAux(kv, None)

    return NodeFns(block, sweep, node.residual_map, refresh)


def _num_held(h_L: Array, ctx: Context) -> float:
    """Tokens of a state as ``LARGE_STATE`` counts them."""
    if ctx.past is None:
        return prod(h_L.shape[1:-1])
    num_tokens = h_L.shape[2]
    num_keys = num_tokens + ctx.past.key_BKSH.shape[-2]
    return num_tokens * min(max(num_keys / 64, 1), 4)


def split_sweep(node: LayerNode, windows: Sequence[int], choose_kernel: ChooseKernel) -> NodeFn:
    """All layers on the x of one chunk, ``s h + m x0`` with mean scales at the first node's input h; not summed:
    ``u_l = x + Attention_l(rms(x))``, ``y_l = u_l + MLP_l(rms(u_l))`` (published as fused split).

    Without residual scales it equals the sweep at equal inputs; q, k and v of all layers are one batched product.
    """
    chunk = ChunkNode(node.config, node.merge, "mean", "sum", None)

    def sweep(params: PyTree, h_L: Array, ctx: Context, shared: Shared) -> tuple[Array, BlockAux]:
        carry, q, kv = chunk.before(params, h_L[0], ctx, shared)
        kernel = choose_kernel(h_L.shape[2], shared.first_B is not None)
        out = _attend_all(q, kv, ctx, shared, windows, kernel)
        new_L, _ = jax.vmap(node.after, in_axes=(0, None, 0, 0))(params, carry, out, ctx)
        return new_L, BlockAux(kv, None)

    return jax.checkpoint(sweep) if node.config.remat else sweep


def _attend_all(q: Array, kv: KeyValue, ctx: Context, shared: Shared, windows: Sequence[int], kernel: Kernel) -> Array:
    """Attention of all layers; the axes before [B, T, heads, H] are layers, or chunks and their layers."""
    cached = functools.partial(attend_cached, kernel=kernel)
    if ctx.past is not None:
        window, axis = _common(windows, ctx.window)
        attend = cached
        for _ in q.shape[:-4]:
            attend = jax.vmap(attend, in_axes=(0, 0, 0, axis, None))
        return attend(q, kv, ctx.past, window, shared)
    flat = lambda x: x.reshape(-1, *x.shape[-4:])  # noqa: E731
    q_LBTNH, kv_L = jax.tree.map(flat, (q, kv))
    if shared.past is not None:
        order = [index for members in shared.past.members for index in members]
        outs = []
        for ring, members in zip(shared.past.groups, shared.past.members, strict=True):
            rows = np.asarray(members)
            group_windows = [windows[index] for index in members]
            window, axis = _common(group_windows, jnp.asarray(group_windows))
            group_q, group_kv = jax.tree.map(lambda x, rows=rows: x[rows], (q_LBTNH, kv_L))
            attend_group = jax.vmap(cached, in_axes=(0, 0, 0, axis, None))
            outs.append(attend_group(group_q, group_kv, ring, window, shared))
        out_LBTNH = jnp.concatenate(outs)[np.argsort(order)]
    else:
        out_LBTNH = attend_by_window(q_LBTNH, kv_L, windows, kernel, shared.document_BT)
    return out_LBTNH.reshape(*q.shape[:-4], *out_LBTNH.shape[1:])


def _common(windows: Sequence[int], each: Array) -> tuple[Array | int, int | None]:
    """``(window, its axis)``: one number where all layers have it, which a kernel need not be handed in an array."""
    return (windows[0], None) if len(set(windows)) == 1 else (each, 0)
