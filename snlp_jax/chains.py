"""The chain of one part of a schedule: the model's layers as the solver reads them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from snlp_jax.config import ModelConfig
from snlp_jax.layout import are_windows_alike
from snlp_jax.model import Model
from snlp_jax.model.block import Context, Rings, Shared
from snlp_jax.model.kinds import is_affine
from snlp_jax.parallel.region import pad_layers, sequential_sharded
from snlp_jax.parts import Part, by_chunk, nodes_of
from snlp_jax.solver import (
    BatchAxes,
    Chain,
    Chunkwise,
    Correction,
    Exact,
    FusedSplit,
    LayerFns,
    MethodData,
    ParallelSegment,
    PerLayer,
    Place,
    Segment,
    Stage,
    with_affine,
)
from snlp_jax.solver.linear import layer, stack
from snlp_jax.types import Array, Params, PyTree, is_list


class _Span(NamedTuple):
    """Layers ``first`` to ``stop - 1`` of the model, which the chain's rows are.

    ``num_rows`` counts those that fill up the devices too; of devices there are ``num_shards``.
    """

    first: int
    stop: int
    num_rows: int
    num_shards: int

    @property
    def shard_len(self) -> int:
        return self.num_rows // self.num_shards


def chains_of(
    model: Model,
    embed_head: Params,
    part: Part,
    tokens_BT: Array,
    shared: Shared,
    h_in: Array,
    rings: Rings | tuple[Rings, ...] | None = None,
    *,
    mesh: Mesh | None = None,
) -> list[Chain]:
    """The chain of nodes of one part; one for each evaluation where every evaluation reads rings of its own.

    Args:
        embed_head: the embedding and the head, whose value embeddings serve where the part has none.
        tokens_BT: of the pass, for value embeddings.
        shared: what all layers read.
        h_in: state [B, T, D] or [B, T, R, D] that enters the part.
        rings: keys and values of the tokens before.
        mesh: over whose ``layer`` axis the part is spread, if it is. A part that holds more layers than its segment
            has is then solved as a whole, its other layers passing their input on: no weight moves.
    """
    num_nodes, layers_per_node = nodes_of(part.segment)
    first, stop = part.held if part.is_spread else (part.segment.start, part.segment.stop)
    span = _Span(first, stop, part.num_rows, 1 if mesh is None else mesh.shape["layer"])
    blocks, rows = _blocks_of(part, layers_per_node)
    ctx = _context_of(model, embed_head, part, span, tokens_BT)
    place = Place(num_nodes)
    if span.num_rows > part.segment.num_layers:
        index_L = jnp.arange(span.num_rows // layers_per_node) - (part.segment.start - first) // layers_per_node
        place = Place(num_nodes, index_L, is_padded=True)

    def chain(past: Rings | None) -> Chain:
        params, params_rows, num_rows = blocks, rows, span.num_rows // layers_per_node
        ctx_nodes, shared_nodes = _with_rings(ctx, shared, past)
        nodes: PyTree = by_chunk(ctx_nodes, layers_per_node) if _is_chunked(part.segment) else ctx_nodes
        if is_list(blocks) or _is_one_by_one(model, part, past):
            if not is_list(blocks):
                params, params_rows = [layer(blocks, row) for row in rows or range(num_rows)], None
            nodes, shared_nodes = _context_list(model.config, ctx, part.segment, past), shared
        axes = _batch_axes(model, nodes, shared_nodes, int(_is_chunked(part.segment)))
        fns = fns_of(model, part.segment, span, axes)
        return Chain(fns, params, nodes, shared_nodes, h_in, place, num_rows, params_rows)

    each = rings if type(rings) is tuple else (rings,)
    return [chain(past) for past in each]  # type: ignore[arg-type]


def fns_of(model: Model, segment: Segment, span: _Span, batch_axes: BatchAxes) -> LayerFns:
    """The functions of a segment's nodes. A sweep compiles the windows of its layers in, so devices can share one only
    if theirs are alike; else every layer takes its window from its context."""
    is_alike = are_windows_alike(model.config, span.first, span.stop, span.shard_len)
    stop = span.first + span.shard_len if span.num_shards > 1 and is_alike else span.stop
    stage: Stage = PerLayer()
    jvp = False
    if isinstance(segment, ParallelSegment):
        stage, jvp = segment.stage, segment.correction.needs_forward_mode
    if isinstance(stage, Chunkwise):
        num_chunks = (stop - span.first) // (segment.num_layers // stage.num_chunks)
        nodes = model.chunk_fns(span.first, stop, num_chunks, stage.scales, stage.branches, forward_mode=jvp)
        block, sweep, skip, keep = nodes.block_fn, nodes.sweep_fn, nodes.residual_map, nodes.refresh_fn
    else:
        make_sweep = model.split_sweep_fn if isinstance(stage, FusedSplit) else model.sweep_fn
        block, skip, keep = model.block_fn(forward_mode=jvp), model.residual_map, model.refresh_fn
        sweep = make_sweep(span.first, stop, forward_mode=jvp)
    return LayerFns(block, sweep if span.num_shards == 1 or is_alike else None, keep, skip, batch_axes)


def method_data(
    part: Part,
    shared: Shared,
    chain: Chain,
    warm_L: Array | None = None,
    key: Array | None = None,
    *,
    mesh: Mesh | None = None,
) -> MethodData:
    """What the correction and the initial trace of a region may ask for.

    ``warm_L`` is the trace that ``Warm`` guesses. Where it is asked for and not at hand it is the exact trace one token
    earlier, which costs a sequential pass: an oracle.
    """
    segment = part.segment
    if isinstance(segment, ParallelSegment) and segment.init.is_oracle and warm_L is None:
        trace = sequential_sharded(chain, mesh=mesh, with_trace=True).trace
        first = jnp.broadcast_to(chain.h_in[None, :, :1], (chain.num_nodes, *chain.h_in[:, :1].shape))
        warm_L = jnp.concatenate([first, trace[:, :, :-1]], axis=2)
    return MethodData(part.fit, warm_L, shared.x0_BTD, key)


def correction_of(config: ModelConfig, segment: ParallelSegment) -> Correction:
    """The segment's correction, which takes the derivative of layers that are affine themselves."""
    affine = [i - segment.start for i in range(segment.start, segment.stop) if is_affine(config, i)]
    return with_affine(segment.correction, tuple(affine))


# -- Pieces ------------------------------------------------------------------------------------------------------------


def _is_chunked(segment: Segment) -> bool:
    return isinstance(segment, ParallelSegment) and isinstance(segment.stage, Chunkwise)


def _blocks_of(part: Part, layers_per_node: int) -> tuple[PyTree, tuple[int, ...] | None]:
    """Weights of the nodes, a stack or a list, and which of their rows the nodes read."""
    first, stop = part.segment.start - part.held[0], part.segment.stop - part.held[0]
    is_whole = part.is_spread or part.held == (part.segment.start, part.segment.stop)
    if part.is_list:
        return part.blocks, None
    if _is_chunked(part.segment):
        blocks = part.blocks if is_whole else layer(part.blocks, slice(first, stop))
        return by_chunk(blocks, layers_per_node), None
    return part.blocks, None if is_whole else tuple(range(first, stop))


def _context_of(model: Model, embed_head: Params, part: Part, span: _Span, tokens_BT: Array) -> Context:
    """Context of all rows, leaves [num_rows, ...]."""
    blocks = part.blocks
    if not is_list(blocks) and not part.is_spread and model.config.num_streams:
        first = part.segment.start - part.held[0]
        blocks = layer({"hyper": blocks["hyper"]}, slice(first, first + part.segment.num_layers))
    ctx = model.context(
        embed_head,
        blocks,
        tokens_BT,
        span.first,
        span.stop,
        num_rows=span.num_rows,
        tables=part.tables,
        num_shards=span.num_shards,
    )
    return pad_layers(ctx, span.num_rows)


def _is_one_by_one(model: Model, part: Part, past: Rings | None) -> bool:
    """Whether the layers of a stack are read one by one, each at its row, behind a cache.

    In order, rings of several lengths have no common loop. And a GPU's loop over a stack copies every layer's weights
    before it reads them, where rows that are known are read in place (``tests/test_aot.py``): half the bytes.
    """
    if past is None:
        return False
    is_several = len(past.groups) > 1
    if isinstance(part.segment, ParallelSegment):
        return is_several and isinstance(part.segment.correction.innermost, Exact)
    return is_several or (model.backend == "gpu" and not part.is_spread)


def _context_list(config: ModelConfig, ctx: Context, segment: Segment, past: Rings | None) -> list[Context]:
    """One context for each node of a list, with the rings of its layers."""
    attention = [i - segment.start for i in config.attention_layers if segment.start <= i < segment.stop]
    rings = {} if past is None else {index: past.layer(row) for row, index in enumerate(attention)}
    if not _is_chunked(segment):
        return [layer(ctx, index)._replace(past=rings.get(index)) for index in range(segment.num_layers)]
    size = nodes_of(segment)[1]
    chunks = [range(start, start + size) for start in range(0, segment.num_layers, size)]
    stacked = [stack([rings[index] for index in chunk]) if rings else None for chunk in chunks]
    nodes = [layer(ctx, slice(chunk.start, chunk.stop)) for chunk in chunks]
    return [node._replace(past=ring) for node, ring in zip(nodes, stacked, strict=True)]


def _with_rings(ctx: Context, shared: Shared, past: Rings | None) -> tuple[Context, Shared]:
    """The rings of a stack's layers: in the context where all have one length, else in what all layers read."""
    if past is None:
        return ctx, shared
    if len(past.groups) == 1:
        return ctx._replace(past=past.groups[0]), shared
    return ctx, shared._replace(past=past)


def _batch_axes(model: Model, ctx: PyTree, shared: Shared, before: int) -> BatchAxes:
    if not is_list(ctx):
        return BatchAxes(*model.batch_axes(ctx, shared, before))
    axes = [model.batch_axes(node, shared, before) for node in ctx]
    return BatchAxes([ctx_axes for ctx_axes, _, _ in axes], axes[0][1], before)
