"""Where model and solver meet: weights laid out for a schedule, and the forward pass over it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.model import LanguageModel
from snlp_jax.model.block import Shared
from snlp_jax.parallel.region import check_sharding, solve_sharded
from snlp_jax.solver import LayerProblem, ParallelSegment, Schedule, SequentialSegment, Solution, sequential, solve
from snlp_jax.types import Array, Params, PyTree

Layout = Literal["auto", "stack", "list"]

LONG_SWEEP = 64
"""Tokens (batch x length) from which a CPU evaluates the layers of a region faster one by one than batched."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """Parameters split along a schedule: one entry of ``blocks`` a segment, a stack [n, ...] or a list of n trees."""

    ends: Params
    """The embedding and the head."""
    blocks: tuple[PyTree, ...]
    segments: tuple[SequentialSegment | ParallelSegment, ...] = field(metadata={"static": True})

    @property
    def num_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


class Output(NamedTuple):
    """Logits, the two states the head read, and the solution of every parallel region in order."""

    logits_BTV: Array
    h_last_BTD: Array
    h_mid_BTD: Array
    solutions: tuple[Solution, ...]


def prepare(
    model: LanguageModel,
    params: Params,
    schedule: Schedule,
    *,
    num_tokens: int,
    layout: Layout = "auto",
    mesh: Mesh | None = None,
) -> Weights:
    """Cast and lay out the weights for fast evaluation. Call it outside jit: :func:`forward` then copies none of them.

    Args:
        num_tokens: tokens (batch x length) of a forward pass; decides the layout on a CPU.
        layout: ``stack`` keeps [n, ...] leaves (scan, vmap), ``list`` one tree a layer (unrolled; more to compile).
            ``auto``: lists for sequential segments on a CPU and for parallel ones on a CPU from 64 tokens on.
        mesh: regions are laid out over its ``layer`` axis.

    Raises:
        InputError: a region that cannot be spread over the mesh.
    """
    if mesh is not None and mesh.shape["layer"] > 1:
        for segment in schedule.segments:
            if isinstance(segment, ParallelSegment):
                check_sharding(segment.num_layers, segment.correction, mesh.shape["layer"])
    weights = split(model, model.cast(params), schedule)  # not jitted: what needs no cast is not copied
    on_cpu = jax.default_backend() == "cpu"

    def lay_out(segment: SequentialSegment | ParallelSegment, blocks: PyTree) -> PyTree:
        is_parallel = isinstance(segment, ParallelSegment)
        if mesh is not None and is_parallel and mesh.shape["layer"] > 1:
            return jax.device_put(blocks, NamedSharding(mesh, PartitionSpec("layer")))
        unrolled_is_faster = on_cpu and (not is_parallel or num_tokens >= LONG_SWEEP)
        if layout == "list" or (layout == "auto" and unrolled_is_faster):
            return [jax.tree.map(lambda leaf: leaf[i], blocks) for i in range(segment.num_layers)]  # noqa: B023
        return blocks

    blocks = tuple(map(lay_out, weights.segments, weights.blocks))
    ends, replicated = weights.ends, list(blocks)
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        ends = jax.device_put(ends, everywhere)
        for index, segment in enumerate(weights.segments):
            if isinstance(segment, SequentialSegment) or mesh.shape["layer"] == 1:
                replicated[index] = jax.device_put(replicated[index], everywhere)
    return Weights(ends, tuple(replicated), weights.segments)


def split(model: LanguageModel, params: Params, schedule: Schedule) -> Weights:
    """Slice the stack along the schedule. Sequential segments also end where the head's mid-layer state is read."""
    segments = _cut_after(schedule.segments, model.config.mid_layer)
    take = lambda segment: jax.tree.map(lambda leaf: leaf[segment.start : segment.stop], params["blocks"])  # noqa: E731
    ends = {"embed": params["embed"], "head": params["head"]}
    return Weights(ends, tuple(map(take, segments)), segments)


def forward(
    model: LanguageModel, weights: Weights, tokens_BT: Array, *, mesh: Mesh | None = None, with_stats: bool = False
) -> Output:
    """Logits of ``tokens_BT`` under the schedule the weights were laid out for. Jit it with ``weights`` an argument."""
    mid_layer = model.config.mid_layer
    h = h_mid = model.embed(weights.ends, tokens_BT)
    shared = model.shared(h)
    solutions: list[Solution] = []
    for segment, blocks in zip(weights.segments, weights.blocks, strict=True):
        problem = layer_problem(model, weights.ends, blocks, tokens_BT, shared, segment, h)
        tap = mid_layer - segment.start if segment.start <= mid_layer < segment.stop else None
        if isinstance(segment, SequentialSegment):
            h = sequential(problem).value
            if tap is not None:
                h_mid = h
        else:
            solution, tapped = _solve_region(problem, segment, tap, mesh, with_stats)
            solutions.append(solution)
            h = solution.value
            if tapped is not None:
                h_mid = tapped
    return Output(model.logits(weights.ends, h, h_mid), h, h_mid, tuple(solutions))


def layer_problem(
    model: LanguageModel,
    ends: Params,
    blocks: PyTree,
    tokens_BT: Array,
    shared: Shared,
    segment: SequentialSegment | ParallelSegment,
    h_in_BTD: Array,
) -> LayerProblem:
    """The chain of layers of one segment, for the solver."""
    needs_jvp = isinstance(segment, ParallelSegment) and segment.correction.needs_forward_mode
    return LayerProblem(
        block_fn=model.block_fn(forward_mode=needs_jvp),
        params=blocks,
        ctx=model.context(ends, tokens_BT, segment.start, segment.stop),
        shared=shared,
        h_in=h_in_BTD,
        num_layers=segment.num_layers,
        sweep_fn=model.sweep_fn(segment.start, segment.stop),
        residual_map=model.residual_map,
    )


def _solve_region(
    problem: LayerProblem, segment: ParallelSegment, tap: int | None, mesh: Mesh | None, with_stats: bool
) -> tuple[Solution, Array | None]:
    """The region's solution and, where ``tap`` names one, the output of its layer ``tap``."""
    settings: dict[str, Any] = {"num_iters": segment.num_iters, "init": segment.init, "with_stats": with_stats}
    if mesh is not None and mesh.shape["layer"] > 1:
        return solve_sharded(problem, segment.correction, mesh=mesh, tap=tap, **settings)
    solution = solve(problem, segment.correction, **settings)
    return solution, None if tap is None else solution.trace[tap]


def _cut_after(
    segments: Sequence[SequentialSegment | ParallelSegment], layer: int
) -> tuple[SequentialSegment | ParallelSegment, ...]:
    cut: list[SequentialSegment | ParallelSegment] = []
    for segment in segments:
        if isinstance(segment, SequentialSegment) and segment.start <= layer < segment.stop - 1:
            cut += [SequentialSegment(segment.start, layer + 1), SequentialSegment(layer + 1, segment.stop)]
        else:
            cut.append(segment)
    return tuple(cut)
