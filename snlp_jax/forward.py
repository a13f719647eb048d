"""Where model and solver meet: weights laid out for a schedule, and the forward pass over it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import KeyValue, Shared
from snlp_jax.parallel.mesh import kernels_on, over_data
from snlp_jax.parallel.region import num_padded, pad_layers, real_part, sequential_sharded, solve_sharded
from snlp_jax.parallel.sharding import BY_FEATURE, BY_LAYER, shardings_of, spec_of, with_shardings
from snlp_jax.solver import (
    BatchAxes,
    Calibration,
    Chunkwise,
    FusedSplit,
    HyperConnection,
    LayerProblem,
    ParallelSegment,
    PerLayer,
    ScaledIdentity,
    Schedule,
    Segment,
    SequentialSegment,
    SkippedSegment,
    Solution,
    sequential,
    solve,
)
from snlp_jax.solver.calibrated import check_calibration
from snlp_jax.types import Array, Params, PyTree

Layout = Literal["auto", "stack", "list"]
Spread = Literal["tensor", "ring"]
"""How layers that run in order lie on the devices of the layer axis: every layer on all of them, by heads and features
(two all-reduces a layer), or every device its own layers, the state going round (one move a device)."""

LONG_SWEEP = 64
"""Tokens (batch x length) from which a CPU evaluates the layers of a region faster one by one than batched."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """Parameters split along a schedule, one entry of every tuple a segment.

    An entry of ``blocks`` is a stack [n, ...] or a list with one tree a node (a layer, or a chunk of layers [M, ...]);
    None for layers that are left out. An entry of ``fits`` is the calibration that the segment names, or None.
    """

    ends: Params
    """The embedding and the head."""
    blocks: tuple[PyTree, ...]
    tables: tuple[PyTree, ...]
    """Value embeddings of the segment, see ``LanguageModel.value_tables``; None where those in ``ends`` serve."""
    fits: tuple[Calibration | None, ...]
    segments: tuple[Segment, ...] = field(metadata={"static": True})
    is_spread: tuple[bool, ...] = field(metadata={"static": True})
    """Whether the segment's layers are sharded over the ``layer`` axis of a mesh, filled up with layers of zero weights
    where it does not divide them."""

    @property
    def num_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


class Output(NamedTuple):
    """Logits, the two states the head read, and the solution of every parallel region in order."""

    logits_BTV: Array
    h_last: Array
    """[B, T, D], or [B, T, R, D] with residual streams."""
    h_mid: Array
    solutions: tuple[Solution, ...]


class States(NamedTuple):
    """What the segments leave behind before the head."""

    shared: Shared
    h_last: Array
    h_mid: Array
    solutions: tuple[Solution, ...]


class Past(NamedTuple):
    """What a cached forward pass knows of the S tokens before."""

    previous_B1: Array
    """The last of them."""
    kv: tuple[KeyValue | None, ...]
    """Keys and values [n, B, S, K, H] of every segment's stack; None for layers that are left out."""


def prepare(
    model: LanguageModel,
    params: Params,
    schedule: Schedule,
    *,
    num_tokens: int,
    layout: Layout = "auto",
    mesh: Mesh | None = None,
    sequential: Spread = "tensor",
    fits: Mapping[str, Calibration] | None = None,
) -> Weights:
    """Cast and lay out the weights for fast evaluation. Call it outside jit: :func:`forward` then copies none of them.

    Args:
        num_tokens: tokens (batch x length) of a forward pass; decides the layout on a CPU.
        layout: without a mesh, ``stack`` keeps [n, ...] leaves (scan, vmap), ``list`` one tree a node (unrolled; more
            to compile). ``auto``: lists for sequential segments on a CPU and for parallel ones on a CPU from 64 tokens
            on.
        mesh: every weight lives once on the devices of its ``layer`` and ``tensor`` axes (where they divide it):
            regions are sharded over ``layer``, what runs in order as ``sequential`` says, the rest by vocabulary.
        fits: calibrations by the names that the schedule's regions give.

    Raises:
        InputError: a region that cannot be spread over the mesh, or whose calibration is not among ``fits``.
    """
    if mesh is not None:
        weights = arrange(model, model.cast(params), schedule, mesh, sequential, fits)
        return jax.device_put(weights, weights_shardings(model, weights, mesh))
    weights = split(model, model.cast(params), schedule, fits)  # not jitted: what needs no cast is not copied
    on_cpu = model.backend == "cpu"

    def lay_out(segment: Segment, blocks: PyTree) -> PyTree:
        if isinstance(segment, SkippedSegment):
            return blocks
        if isinstance(segment, SequentialSegment):
            return _rows(blocks, segment.num_layers) if layout == "list" or (layout == "auto" and on_cpu) else blocks
        unrolled_is_faster = layout == "auto" and on_cpu and num_tokens >= LONG_SWEEP
        # A split stage shares one product among all layers, which only a stack can do.
        if isinstance(segment.stage, FusedSplit) or not (layout == "list" or unrolled_is_faster):
            return blocks
        is_chunked = isinstance(segment.stage, Chunkwise)
        return _rows(_by_chunk(blocks, segment.layers_per_node) if is_chunked else blocks, segment.num_nodes)

    return dataclasses.replace(weights, blocks=tuple(map(lay_out, weights.segments, weights.blocks)))


def abstract_weights(model: LanguageModel, schedule: Schedule, mesh: Mesh, sequential: Spread = "tensor") -> Weights:
    """What :func:`prepare` would lay out on a mesh, as shapes with shardings: for compilation ahead of time."""
    lay_out = lambda params: arrange(model, model.cast(params), schedule, mesh, sequential)  # noqa: E731
    weights = jax.eval_shape(lay_out, model.abstract_params())
    return with_shardings(weights, weights_shardings(model, weights, mesh))


def abstract_past(model: LanguageModel, weights: Weights, mesh: Mesh, batch_size: int, num_tokens: int) -> Past:
    """The cache of ``num_tokens`` earlier tokens as shapes with shardings: each segment's lies as its layers do."""
    config = model.config

    def one(blocks: PyTree, is_spread: bool) -> KeyValue | None:
        if blocks is None:
            return None
        num_layers = jax.tree.leaves(blocks)[0].shape[0]
        shape = (num_layers, batch_size, num_tokens, config.num_kv_heads, config.head_dim)
        spec = spec_of("cache", shape, config, mesh, BY_LAYER if is_spread else BY_FEATURE)
        leaf: Any = jax.ShapeDtypeStruct(shape, model.dtype, sharding=NamedSharding(mesh, spec))
        return KeyValue(leaf, leaf)

    by_row = NamedSharding(mesh, PartitionSpec("data"))
    previous_B1: Any = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32, sharding=by_row)
    return Past(previous_B1, tuple(map(one, weights.blocks, weights.is_spread)))


def weights_shardings(model: LanguageModel, weights: Weights, mesh: Mesh) -> Weights:
    """The sharding of every leaf of weights that are laid out on a mesh."""
    place = lambda tree, layout, prefix="": shardings_of(tree, model.config, mesh, layout, prefix)  # noqa: E731
    layouts = [BY_LAYER if is_spread else BY_FEATURE for is_spread in weights.is_spread]
    on_all = NamedSharding(mesh, PartitionSpec())
    return dataclasses.replace(
        weights,
        ends=place(weights.ends, BY_FEATURE),
        blocks=tuple(place(blocks, layout, "blocks/") for blocks, layout in zip(weights.blocks, layouts, strict=True)),
        tables=tuple(place(tables, layout, "embed/") for tables, layout in zip(weights.tables, layouts, strict=True)),
        fits=jax.tree.map(lambda _: on_all, weights.fits),
    )


def arrange(
    model: LanguageModel,
    params: Params,
    schedule: Schedule,
    mesh: Mesh,
    sequential: Spread = "tensor",
    fits: Mapping[str, Calibration] | None = None,
) -> Weights:
    """:func:`split` for a mesh: stacks that its layer axis shares filled up, value embeddings laid out with them.

    Raises:
        InputError: see :func:`check_mesh` and :func:`split`.
    """
    check_mesh(schedule, mesh)
    num_devices = mesh.shape["layer"]
    weights = split(model, params, schedule, fits, is_ring=num_devices > 1 and sequential == "ring")
    blocks, tables, is_spread = [], [], []
    for segment, stack in zip(weights.segments, weights.blocks, strict=True):
        by_feature = isinstance(segment, SequentialSegment) and sequential == "tensor"
        spread = num_devices > 1 and not by_feature and not isinstance(segment, SkippedSegment)
        num_shards, num_rows = 1, segment.num_layers
        if spread:
            nodes, layers_per_node = _nodes(segment)
            num_shards, num_rows = num_devices, layers_per_node * num_padded(nodes, num_devices)
        is_spread.append(spread)
        blocks.append(pad_layers(stack, num_rows))
        is_skipped, shards = isinstance(segment, SkippedSegment), (num_shards, num_rows)
        tables.append(None if is_skipped else model.value_tables(params, segment.start, segment.stop, *shards))
    embed = {name: leaf for name, leaf in weights.ends["embed"].items() if name not in ("value", "value_gate")}
    ends = {"embed": embed, "head": weights.ends["head"]}
    return Weights(ends, tuple(blocks), tuple(tables), weights.fits, weights.segments, tuple(is_spread))


def training_weights(model: LanguageModel, params: Params, mesh: Mesh | None) -> Weights:
    """The sequential pass over parameters as they lie in training, none of them copied. Call it under jit."""
    num_layers = model.config.num_layers
    if mesh is None or mesh.shape["layer"] == 1:
        return split(model, params, Schedule.of(num_layers))
    return Weights(params, (params["blocks"],), (None,), (None,), (SequentialSegment(0, num_layers),), (True,))


def in_order(weights: Weights) -> Weights:
    """The same arrays, every region evaluated in order: the exact pass that checks a draft or fills a cache."""
    to_order = lambda segment: SequentialSegment(segment.start, segment.stop)  # noqa: E731
    segments = [to_order(s) if isinstance(s, ParallelSegment) else s for s in weights.segments]
    return dataclasses.replace(weights, segments=tuple(segments), fits=(None,) * len(segments))


def check_mesh(schedule: Schedule, mesh: Mesh) -> None:
    """Refuse a schedule that the devices of a mesh cannot share.

    Raises:
        InputError: a stage that needs all layers of its region in one place.
    """
    for region in schedule.regions if mesh.shape["layer"] > 1 else ():
        if isinstance(region.stage, FusedSplit):
            raise InputError("a split stage shares one product among all layers and cannot be sharded.")


def check_schedule(config: ModelConfig, schedule: Schedule) -> None:
    """Refuse a schedule that a model cannot run.

    Raises:
        InputError: a correction, initial trace or stage that is made for another kind of residual path.
    """
    for region in schedule.regions:
        if isinstance(region.correction, HyperConnection) and not config.num_streams:
            raise InputError("hcn needs residual streams, but model.num_streams is 0; use idn or sid.")
        if isinstance(region.correction, ScaledIdentity) and config.num_streams:
            raise InputError("sid scales a single residual stream, but this model mixes several; use hcn.")
        if isinstance(region.stage, Chunkwise) and config.num_streams and config.hyper_maps == "dynamic":
            raise InputError("layers whose maps depend on the token cannot be fused; leave out stage=.")
        if isinstance(region.stage, Chunkwise) and config.num_streams and region.stage.scales == "own":
            raise InputError("scales=own is for residual scalars, and this model mixes streams; leave it out.")
        if isinstance(region.stage, FusedSplit) and config.num_streams:
            raise InputError("a split stage is for a single residual stream; use chunks such as stage=4xF2.")


def split(
    model: LanguageModel,
    params: Params,
    schedule: Schedule,
    fits: Mapping[str, Calibration] | None = None,
    *,
    is_ring: bool = False,
) -> Weights:
    """Slice the stack along the schedule. Sequential segments also end where the head's mid-layer state is read; but
    those that will go round the devices do not: that state comes back with the last one.

    Raises:
        InputError: see :func:`check_schedule`; or a region names a calibration that is not among ``fits`` or lacks
            what the region reads.
    """
    segments = schedule.segments if is_ring else _cut_after(schedule.segments, model.config.mid_layer)

    def take(segment: Segment) -> PyTree:
        if isinstance(segment, SkippedSegment):
            return None
        return jax.tree.map(lambda leaf: leaf[segment.start : segment.stop], params["blocks"])

    ends = {"embed": params["embed"], "head": params["head"]}
    none, here = (None,) * len(segments), (is_ring,) * len(segments)
    without_fits = Weights(ends, tuple(map(take, segments)), none, none, segments, here)
    return with_schedule(model, without_fits, schedule, fits)


def with_schedule(
    model: LanguageModel, weights: Weights, schedule: Schedule, fits: Mapping[str, Calibration] | None = None
) -> Weights:
    """The same arrays under the iterations, corrections and guesses of another schedule that cuts the layers alike.

    Raises:
        InputError: see :func:`split`.
    """
    check_schedule(model.config, schedule)
    pairs = zip(weights.segments, weights.is_spread, strict=True)
    is_ring = any(isinstance(segment, SequentialSegment) and is_spread for segment, is_spread in pairs)
    segments = schedule.segments if is_ring else _cut_after(schedule.segments, model.config.mid_layer)

    def find_fit(segment: Segment) -> Calibration | None:
        if not isinstance(segment, ParallelSegment) or not segment.fit:
            return None
        if segment.fit not in (fits or {}):
            raise InputError(f"there is no calibration {segment.fit!r}; fit it first.")
        fit = (fits or {})[segment.fit]
        for method in (segment.correction, segment.init):
            try:
                check_calibration(fit, method, segment.num_nodes)
            except ValueError as error:
                raise InputError(f"calibration {segment.fit!r}: {error}") from error
        return fit

    return dataclasses.replace(weights, fits=tuple(map(find_fit, segments)), segments=segments)


def forward(
    model: LanguageModel,
    weights: Weights,
    tokens_BT: Array,
    *,
    mesh: Mesh | None = None,
    with_stats: bool = False,
    ring_microbatches: int = 1,
    past: Past | None = None,
) -> Output:
    """Logits of ``tokens_BT`` under the schedule the weights were laid out for. Jit it with ``weights`` an argument.

    Args:
        mesh: the one the weights are laid out on. Where the batch is spread over its ``data`` axis, so are the logits.
        ring_microbatches: parts in which the batch goes round the devices, see :func:`snlp_jax.solver.sequential`.
        past: the tokens are those that follow on these.
    """
    settings: dict[str, Any] = {"with_stats": with_stats, "ring_microbatches": ring_microbatches, "past": past}
    states = run_segments(model, weights, tokens_BT, mesh=mesh, **settings)
    logits_BTV = model.padded_logits(weights.ends, states.h_last, states.h_mid)
    # Cropping what is split by vocabulary would move pieces of it about.
    logits_BTV = over_data(mesh, logits_BTV)[..., : model.config.vocab_size]
    return Output(logits_BTV, states.h_last, states.h_mid, states.solutions)


def run_segments(
    model: LanguageModel,
    weights: Weights,
    tokens_BT: Array,
    *,
    mesh: Mesh | None = None,
    with_stats: bool = False,
    ring_microbatches: int = 1,
    past: Past | None = None,
) -> States:
    """:func:`forward` without the head; the weights may end before the model does."""
    mid_layer = model.config.mid_layer
    kvs = past.kv if past else (None,) * len(weights.segments)
    num_past = next((kv.key_BTKH.shape[2] for kv in kvs if kv is not None), 0)
    x0_BTD = model.embed(weights.ends, tokens_BT, past.previous_B1 if past else None)
    shared = model.shared(x0_BTD, num_past)
    h = h_mid = model.expand(x0_BTD)
    solutions: list[Solution] = []
    parts = zip(weights.segments, weights.blocks, weights.tables, weights.fits, weights.is_spread, kvs, strict=True)
    for segment, blocks, tables, fit, is_spread, kv in parts:
        mid = mid_layer - segment.start if segment.start <= mid_layer < segment.stop else None
        if isinstance(segment, SkippedSegment):
            h_mid = h_mid if mid is None else h
            continue
        its_mesh = mesh if is_spread else None
        here = model.adapted(kernels=kernels_on(mesh, is_spread=is_spread))
        problem = layer_problem(
            *(here, weights.ends, blocks, tokens_BT, shared, segment, h, fit), mesh=its_mesh, tables=tables, past=kv
        )
        if isinstance(segment, ParallelSegment):
            solution, tapped = _solve_region(problem, segment, mid, its_mesh, with_stats)
            solutions.append(solution)
        else:
            solution = run_in_order(problem, its_mesh, () if mid is None else (mid,), ring_microbatches)
            tapped = solution.tapped[0] if mid is not None else h
        h, h_mid = solution.value, h_mid if mid is None else tapped
    return States(shared, h, h_mid, tuple(solutions))


def run_in_order(
    problem: LayerProblem,
    mesh: Mesh | None,
    taps: tuple[int, ...] = (),
    ring_microbatches: int = 1,
    with_trace: bool = False,
) -> Solution:
    """The exact pass over layers of one place, or round the devices of a mesh that share them."""
    if mesh is not None:
        settings: dict[str, Any] = {"num_microbatches": ring_microbatches, "with_trace": with_trace}
        return sequential_sharded(problem, mesh=mesh, taps=taps, **settings)
    if taps == (problem.num_layers - 1,) and not with_trace:  # no trace for the state that comes out anyway
        solution = sequential(problem)
        return solution._replace(tapped=(solution.value,))
    return sequential(problem, taps=taps, with_trace=with_trace)


def cut_before(weights: Weights, index: int) -> Weights:
    """The same weights without segment ``index`` and those after it: :func:`run_segments` then ends at its input."""
    names = ("blocks", "tables", "fits", "segments", "is_spread")
    parts = {name: getattr(weights, name)[:index] for name in names}
    return dataclasses.replace(weights, **parts)


def layer_problem(
    model: LanguageModel,
    ends: Params,
    blocks: PyTree,
    tokens_BT: Array,
    shared: Shared,
    segment: SequentialSegment | ParallelSegment,
    h_in: Array,
    fit: Calibration | None = None,
    key: Array | None = None,
    *,
    mesh: Mesh | None = None,
    tables: PyTree = None,
    past: KeyValue | None = None,
    stack: tuple[int, int] | None = None,
) -> LayerProblem:
    """The chain of nodes of one segment, for the solver.

    Args:
        blocks: see :class:`Weights`; a stack may be filled up with layers of zero weights.
        key: of stochastic corrections.
        mesh: over whose layer axis ``blocks`` are sharded, if they are.
        tables: see :class:`Weights`.
        past: keys and values of the tokens before.
        stack: layers that ``blocks`` hold, where these are more than the segment's; the others pass their input on.
            A segment of part of a sharded stack costs what the whole costs, and no weight moves.
    """
    start, stop = stack or (segment.start, segment.stop)
    needs_jvp = isinstance(segment, ParallelSegment) and segment.correction.needs_forward_mode
    stage = segment.stage if isinstance(segment, ParallelSegment) else PerLayer()
    num_nodes, layers_per_node = _nodes(segment)
    num_shards = 1 if mesh is None else mesh.shape["layer"]
    num_rows = stop - start if isinstance(blocks, list) else jax.tree.leaves(blocks)[0].shape[0]
    settings: dict[str, Any] = {"num_rows": num_rows, "tables": tables, "num_shards": num_shards, "past": past}
    ctx = pad_layers(model.context(ends, blocks, tokens_BT, start, stop, **settings), num_rows)
    # A sweep compiles the windows of its layers in, so devices can share one only if theirs are alike.
    windows, shard_len = model.config.windows[start:stop], num_rows // num_shards
    is_alike = all(window == windows[i % shard_len] for i, window in enumerate(windows))
    swept = start + shard_len if num_shards > 1 and is_alike else stop
    fns: dict[str, Any]
    if isinstance(stage, Chunkwise):
        how = ((swept - start) // layers_per_node, stage.scales, stage.branches)
        fns = model.chunk_fns(start, swept, *how, forward_mode=needs_jvp)._asdict()
    else:
        make_sweep_fn = model.split_sweep_fn if isinstance(stage, FusedSplit) else model.sweep_fn
        fns = {
            "block_fn": model.block_fn(forward_mode=needs_jvp),
            "sweep_fn": make_sweep_fn(start, swept, forward_mode=needs_jvp),
            "residual_map": model.residual_map,
        }
    if num_shards > 1 and not is_alike:
        fns["sweep_fn"] = None
    if isinstance(stage, Chunkwise):
        blocks = blocks if isinstance(blocks, list) else _by_chunk(blocks, layers_per_node)
        ctx = _by_chunk(ctx, layers_per_node)
    num_layers = num_rows // layers_per_node
    first = (segment.start - start) // layers_per_node
    problem = LayerProblem(
        **fns,
        params=blocks,
        ctx=ctx,
        shared=shared,
        h_in=h_in,
        num_layers=num_layers,
        anchor=shared.x0_BTD,
        calibration=None if fit is None else dataclasses.replace(fit, layers=pad_layers(fit.layers, num_layers)),
        key=key,
        real=(first, first + num_nodes) if num_layers > num_nodes else None,
        batch_axes=BatchAxes(*model.batch_axes(ctx, before=int(isinstance(stage, Chunkwise)))),
    )
    if isinstance(segment, ParallelSegment) and segment.init.is_oracle:
        problem = _with_previous_token(problem, mesh)
    return problem


def _solve_region(
    problem: LayerProblem, segment: ParallelSegment, mid: int | None, mesh: Mesh | None, with_stats: bool
) -> tuple[Solution, Array]:
    """The region's solution and the state that stands for the output of its layer ``mid``."""
    stage, layers_per_node = segment.stage, segment.layers_per_node
    share = 1.0
    taps: tuple[int, ...] = ()
    if mid is not None:
        node, place = divmod(mid, layers_per_node)
        choice = stage.mid if isinstance(stage, Chunkwise) else "output"
        share = {"output": 1.0, "input": 0.0, "interpolated": (place + 1) / layers_per_node}[choice]
        taps = (node,) if node == 0 or share == 1.0 else (node, node - 1)
    settings: dict[str, Any] = {
        "num_iters": segment.num_iters,
        "init": segment.init,
        "tolerance": segment.tolerance,
        "taps": taps,
        "with_stats": with_stats,
    }
    if mesh is not None:
        solution = solve_sharded(problem, segment.correction, mesh=mesh, **settings)
        solution = real_part(solution, (0, segment.num_nodes))
    else:
        solution = solve(problem, segment.correction, **settings)
    if not taps:
        return solution, problem.h_in
    after, before = solution.tapped[0], solution.tapped[1] if len(taps) > 1 else problem.h_in
    return solution, after if share == 1.0 else share * after + (1.0 - share) * before


def _with_previous_token(problem: LayerProblem, mesh: Mesh | None) -> LayerProblem:
    """Every layer's exact state one token earlier as the ``Warm`` trace; the first token's is the region's input."""
    trace = run_in_order(problem, mesh, with_trace=True).trace
    first = jnp.broadcast_to(problem.h_in[None, :, :1], (problem.num_layers, *problem.h_in[:, :1].shape))
    return dataclasses.replace(problem, warm_L=jnp.concatenate([first, trace[:, :, :-1]], axis=2))


def _nodes(segment: Segment) -> tuple[int, int]:
    """Nodes of a segment, and layers a node."""
    if isinstance(segment, ParallelSegment):
        return segment.num_nodes, segment.layers_per_node
    return segment.num_layers, 1


def _rows(tree: PyTree, num_rows: int) -> list[PyTree]:
    """One tree for each index of the leading axis."""
    return [jax.tree.map(lambda leaf: leaf[i], tree) for i in range(num_rows)]  # noqa: B023


def _by_chunk(tree: PyTree, layers_per_chunk: int) -> PyTree:
    """[n, ...] -> [C, M, ...]; no copy under jit."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, layers_per_chunk, *leaf.shape[1:]), tree)


def _cut_after(segments: Sequence[Segment], layer: int) -> tuple[Segment, ...]:
    cut: list[Segment] = []
    for segment in segments:
        if isinstance(segment, SequentialSegment) and segment.start <= layer < segment.stop - 1:
            cut += [SequentialSegment(segment.start, layer + 1), SequentialSegment(layer + 1, segment.stop)]
        else:
            cut.append(segment)
    return tuple(cut)
