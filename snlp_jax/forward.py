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
from snlp_jax.model.block import Shared
from snlp_jax.parallel.region import check_sharding, num_padded, pad_layers, solve_sharded
from snlp_jax.solver import (
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

LONG_SWEEP = 64
"""Tokens (batch x length) from which a CPU evaluates the layers of a region faster one by one than batched."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """Parameters split along a schedule, one entry of ``blocks`` and ``fits`` a segment.

    An entry of ``blocks`` is a stack [n, ...] or a list with one tree a node (a layer, or a chunk of layers [M, ...]);
    None for layers that are left out. An entry of ``fits`` is the calibration that the segment names, or None.
    """

    ends: Params
    """The embedding and the head."""
    blocks: tuple[PyTree, ...]
    fits: tuple[Calibration | None, ...]
    segments: tuple[Segment, ...] = field(metadata={"static": True})

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


def prepare(
    model: LanguageModel,
    params: Params,
    schedule: Schedule,
    *,
    num_tokens: int,
    layout: Layout = "auto",
    mesh: Mesh | None = None,
    fits: Mapping[str, Calibration] | None = None,
) -> Weights:
    """Cast and lay out the weights for fast evaluation. Call it outside jit: :func:`forward` then copies none of them.

    Args:
        num_tokens: tokens (batch x length) of a forward pass; decides the layout on a CPU.
        layout: ``stack`` keeps [n, ...] leaves (scan, vmap), ``list`` one tree a node (unrolled; more to compile).
            ``auto``: lists for sequential segments on a CPU and for parallel ones on a CPU from 64 tokens on.
        mesh: regions are laid out over its ``layer`` axis, filled up with layers of zero weights where it does not
            divide them.
        fits: calibrations by the names that the schedule's regions give.

    Raises:
        InputError: a region that cannot be spread over the mesh, or whose calibration is not among ``fits``.
    """
    num_devices = 1 if mesh is None else mesh.shape["layer"]
    if mesh is not None:
        check_mesh(schedule, mesh)
    weights = split(model, model.cast(params), schedule, fits)  # not jitted: what needs no cast is not copied
    on_cpu = jax.default_backend() == "cpu"

    def lay_out(segment: Segment, blocks: PyTree) -> PyTree:
        if isinstance(segment, SkippedSegment):
            return blocks
        if isinstance(segment, SequentialSegment):
            return _rows(blocks, segment.num_layers) if layout == "list" or (layout == "auto" and on_cpu) else blocks
        if mesh is not None and num_devices > 1:
            padded = segment.layers_per_node * num_padded(segment.num_nodes, num_devices)
            return jax.device_put(pad_layers(blocks, padded), NamedSharding(mesh, PartitionSpec("layer")))
        unrolled_is_faster = layout == "auto" and on_cpu and num_tokens >= LONG_SWEEP
        # A split stage shares one product among all layers, which only a stack can do.
        if isinstance(segment.stage, FusedSplit) or not (layout == "list" or unrolled_is_faster):
            return blocks
        is_chunked = isinstance(segment.stage, Chunkwise)
        return _rows(_by_chunk(blocks, segment.layers_per_node) if is_chunked else blocks, segment.num_nodes)

    blocks = list(map(lay_out, weights.segments, weights.blocks))
    ends = weights.ends
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        ends = jax.device_put(ends, everywhere)
        for index, segment in enumerate(weights.segments):
            if isinstance(segment, SequentialSegment) or num_devices == 1:
                blocks[index] = jax.device_put(blocks[index], everywhere)
    return Weights(ends, tuple(blocks), weights.fits, weights.segments)


def check_mesh(schedule: Schedule, mesh: Mesh) -> None:
    """Refuse a schedule that the devices of a mesh cannot share.

    Raises:
        InputError: a correction or a stage that needs all layers of its region in one place.
    """
    for region in schedule.regions if mesh.shape["layer"] > 1 else ():
        check_sharding(region.correction)
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
    model: LanguageModel, params: Params, schedule: Schedule, fits: Mapping[str, Calibration] | None = None
) -> Weights:
    """Slice the stack along the schedule. Sequential segments also end where the head's mid-layer state is read.

    Raises:
        InputError: see :func:`check_schedule`; or a region names a calibration that is not among ``fits`` or lacks
            what the region reads.
    """
    segments = _cut_after(schedule.segments, model.config.mid_layer)

    def take(segment: Segment) -> PyTree:
        if isinstance(segment, SkippedSegment):
            return None
        return jax.tree.map(lambda leaf: leaf[segment.start : segment.stop], params["blocks"])

    ends = {"embed": params["embed"], "head": params["head"]}
    without_fits = Weights(ends, tuple(map(take, segments)), (None,) * len(segments), segments)
    return with_schedule(model, without_fits, schedule, fits)


def with_schedule(
    model: LanguageModel, weights: Weights, schedule: Schedule, fits: Mapping[str, Calibration] | None = None
) -> Weights:
    """The same arrays under the iterations, corrections and guesses of another schedule that cuts the layers alike.

    Raises:
        InputError: see :func:`split`.
    """
    check_schedule(model.config, schedule)
    segments = _cut_after(schedule.segments, model.config.mid_layer)

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
    model: LanguageModel, weights: Weights, tokens_BT: Array, *, mesh: Mesh | None = None, with_stats: bool = False
) -> Output:
    """Logits of ``tokens_BT`` under the schedule the weights were laid out for. Jit it with ``weights`` an argument."""
    states = run_segments(model, weights, tokens_BT, mesh=mesh, with_stats=with_stats)
    logits_BTV = model.logits(weights.ends, states.h_last, states.h_mid)
    return Output(logits_BTV, states.h_last, states.h_mid, states.solutions)


def run_segments(
    model: LanguageModel, weights: Weights, tokens_BT: Array, *, mesh: Mesh | None = None, with_stats: bool = False
) -> States:
    """:func:`forward` without the head; the weights may end before the model does."""
    mid_layer = model.config.mid_layer
    x0_BTD = model.embed(weights.ends, tokens_BT)
    shared = model.shared(x0_BTD)
    h = h_mid = model.expand(x0_BTD)
    solutions: list[Solution] = []
    for segment, blocks, fit in zip(weights.segments, weights.blocks, weights.fits, strict=True):
        mid = mid_layer - segment.start if segment.start <= mid_layer < segment.stop else None
        if isinstance(segment, ParallelSegment):
            problem = layer_problem(model, weights.ends, blocks, tokens_BT, shared, segment, h, fit)
            solution, tapped = _solve_region(problem, segment, mid, mesh, with_stats)
            solutions.append(solution)
            h, h_mid = solution.value, h_mid if mid is None else tapped
        else:
            if isinstance(segment, SequentialSegment):
                h = sequential(layer_problem(model, weights.ends, blocks, tokens_BT, shared, segment, h)).value
            h_mid = h_mid if mid is None else h
    return States(shared, h, h_mid, tuple(solutions))


def cut_before(weights: Weights, index: int) -> Weights:
    """The same weights without segment ``index`` and those after it: :func:`run_segments` then ends at its input."""
    parts = {name: getattr(weights, name)[:index] for name in ("blocks", "fits", "segments")}
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
) -> LayerProblem:
    """The chain of nodes of one segment, for the solver.

    Args:
        blocks: see :class:`Weights`; a stack may be filled up with layers of zero weights.
        key: of stochastic corrections.
    """
    start, stop = segment.start, segment.stop
    needs_jvp = isinstance(segment, ParallelSegment) and segment.correction.needs_forward_mode
    stage = segment.stage if isinstance(segment, ParallelSegment) else PerLayer()
    num_nodes = stage.num_nodes(segment.num_layers)
    ctx = model.context(ends, blocks, tokens_BT, start, stop)
    fns: dict[str, Any]
    if isinstance(stage, Chunkwise):
        chunk = model.chunk_fns(start, stop, num_nodes, stage.scales, stage.branches, forward_mode=needs_jvp)
        fns = chunk._asdict()
        layers_per_node = segment.num_layers // num_nodes
        blocks = blocks if isinstance(blocks, list) else _by_chunk(blocks, layers_per_node)
        ctx = _by_chunk(ctx, layers_per_node)
    else:
        make_sweep_fn = model.split_sweep_fn if isinstance(stage, FusedSplit) else model.sweep_fn
        fns = {
            "block_fn": model.block_fn(forward_mode=needs_jvp),
            "sweep_fn": make_sweep_fn(start, stop, forward_mode=needs_jvp),
            "residual_map": model.residual_map,
        }
    num_layers = num_nodes if isinstance(blocks, list) else jax.tree.leaves(blocks)[0].shape[0]
    problem = LayerProblem(
        **fns,
        params=blocks,
        ctx=pad_layers(ctx, num_layers),
        shared=shared,
        h_in=h_in,
        num_layers=num_layers,
        anchor=shared.x0_BTD,
        calibration=fit,
        key=key,
        num_real=num_nodes if num_layers > num_nodes else None,
    )
    if isinstance(segment, ParallelSegment) and segment.init.is_oracle:
        problem = _with_previous_token(problem)
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
    if mesh is not None and mesh.shape["layer"] > 1:
        solution = solve_sharded(problem, segment.correction, mesh=mesh, **settings)
    else:
        solution = solve(problem, segment.correction, **settings)
    if not taps:
        return solution, problem.h_in
    after, before = solution.tapped[0], solution.tapped[1] if len(taps) > 1 else problem.h_in
    return solution, after if share == 1.0 else share * after + (1.0 - share) * before


def _with_previous_token(problem: LayerProblem) -> LayerProblem:
    """Every layer's exact state one token earlier as the ``Warm`` trace; the first token's is the region's input."""
    trace = sequential(problem, with_trace=True).trace
    first = jnp.broadcast_to(problem.h_in[None, :, :1], (problem.num_layers, *problem.h_in[:, :1].shape))
    return dataclasses.replace(problem, warm_L=jnp.concatenate([first, trace[:, :, :-1]], axis=2))


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
