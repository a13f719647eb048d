"""Where model and solver meet: the forward pass over weights that are laid out for a schedule."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snlp_jax.cache import Past
from snlp_jax.layout import Weights, as_rows, by_chunk, nodes_of
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import KeyValue, Rings, Shared
from snlp_jax.parallel.mesh import kernels_on, over_data
from snlp_jax.parallel.region import pad_layers, real_part, sequential_sharded, solve_sharded
from snlp_jax.solver import (
    BatchAxes,
    Calibration,
    Chunkwise,
    Exact,
    FusedSplit,
    Kept,
    LayerProblem,
    ParallelSegment,
    PerLayer,
    SequentialSegment,
    SkippedSegment,
    Solution,
    sequential,
    solve,
)
from snlp_jax.solver.linear import layer
from snlp_jax.types import Array, Groups, Params, PyTree


class Left(NamedTuple):
    """What a segment leaves behind for the tokens to come."""

    kv: Any
    """``KeyValue``, leaves [n, B, T, K, H]; of every evaluation, in a tuple, where ``kept`` is "every". Layers that
    fill up the stack of a mesh are among them, as they are in the cache."""
    trace: Array | None
    """Outputs of all nodes [n, B, T, D] where they were asked for."""


class Output(NamedTuple):
    """Logits, the two states the head read, and the solution of every parallel region in order."""

    logits_BTV: Array
    h_last: Array
    """[B, T, D], or [B, T, R, D] with residual streams."""
    h_mid: Array
    solutions: tuple[Solution, ...]
    left: tuple[Left | None, ...]
    """See :class:`States`."""


class States(NamedTuple):
    """What the segments leave behind before the head."""

    shared: Shared
    h_last: Array
    h_mid: Array
    solutions: tuple[Solution, ...]
    left: tuple[Left | None, ...]
    """Of every segment; None for layers that are left out, or where nothing was asked for."""


def forward(
    model: LanguageModel,
    weights: Weights,
    tokens_BT: Array,
    *,
    mesh: Mesh | None = None,
    with_stats: bool = False,
    ring_microbatches: int = 1,
    past: Past | None = None,
    kept: Kept | None = None,
    document_BT: Array | None = None,
) -> Output:
    """Logits of ``tokens_BT`` under the schedule the weights were laid out for. Jit it with ``weights`` an argument.

    Args:
        mesh: the one the weights are laid out on. Where the batch is spread over its ``data`` axis, so are the logits.
        ring_microbatches: parts in which the batch goes round the devices, see :func:`snlp_jax.solver.sequential`.
        past: the tokens are those that follow on these.
        kept: leave keys and values behind, those of which evaluation of a region; None where nobody will read them.
        document_BT: number of the document, in its row, of each token, where they attend to their own alone; not with
            ``past``.
    """
    settings: dict[str, Any] = {"with_stats": with_stats, "ring_microbatches": ring_microbatches}
    settings |= {"past": past, "kept": kept, "document_BT": document_BT}
    states = run_segments(model, weights, tokens_BT, mesh=mesh, **settings)
    logits_BTV = model.padded_logits(weights.ends, states.h_last, states.h_mid)
    # Cropping what is split by vocabulary would move pieces of it about.
    logits_BTV = over_data(mesh, logits_BTV)[..., : model.config.vocab_size]
    return Output(logits_BTV, states.h_last, states.h_mid, states.solutions, states.left)


def run_segments(
    model: LanguageModel,
    weights: Weights,
    tokens_BT: Array,
    *,
    mesh: Mesh | None = None,
    with_stats: bool = False,
    ring_microbatches: int = 1,
    past: Past | None = None,
    kept: Kept | None = None,
    traced: Collection[int] = (),
    document_BT: Array | None = None,
) -> States:
    """:func:`forward` without the head; the weights may end before the model does.

    ``traced``: numbers of the segments in order whose traces are wanted too; a region's always is there.
    """
    mid_layer = model.config.mid_layer
    if past is not None and document_BT is not None:
        raise ValueError("tokens that follow on others belong to one document; leave document_BT out.")
    x0_BTD = model.embed(weights.ends, tokens_BT, past.previous_B1 if past else None, document_BT)
    shared = model.shared(x0_BTD, past.length_B if past else None, document_BT)
    h = h_mid = model.expand(x0_BTD)
    solutions: list[Solution] = []
    left: list[Left | None] = []
    none = (None,) * len(weights.segments)
    earlier = (past.rings, past.warm or none) if past else (none, none)
    laid_out = (weights.segments, weights.blocks, weights.tables, weights.fits, weights.is_spread)
    for index, parts in enumerate(zip(*laid_out, *earlier, strict=True)):
        segment, blocks, tables, fit, is_spread, rings, warm = parts
        mid = mid_layer - segment.start if segment.start <= mid_layer < segment.stop else None
        if isinstance(segment, SkippedSegment):
            h_mid = h_mid if mid is None else h
            left.append(None)
            continue
        its_mesh = mesh if is_spread else None
        here = model.adapted(kernels=kernels_on(mesh, is_spread=is_spread))
        settings: dict[str, Any] = {"mesh": its_mesh, "tables": tables, "past": rings, "warm": warm}
        problem = layer_problem(here, weights.ends, blocks, tokens_BT, shared, segment, h, fit, **settings)
        if isinstance(segment, ParallelSegment):
            solution, tapped = _solve_region(problem, segment, mid, its_mesh, with_stats, kept or "last")
            solutions.append(solution if its_mesh is None else real_part(solution, (0, segment.num_nodes)))
        else:
            wanted: dict[str, Any] = {"with_trace": index in traced, "with_aux": kept is not None}
            solution = run_in_order(problem, its_mesh, () if mid is None else (mid,), ring_microbatches, **wanted)
            tapped = solution.tapped[0] if mid is not None else h
        left.append(None if kept is None else Left(_by_layer(solution.aux), solution.trace))
        h, h_mid = solution.value, h_mid if mid is None else tapped
    return States(shared, h, h_mid, tuple(solutions), tuple(left))


def _by_layer(aux: Any) -> Any:
    """Keys and values of every layer [n, B, T, K, H] of what nodes, layers or chunks of them, leave behind."""
    if type(aux) is tuple:
        return tuple(map(_by_layer, aux))
    return None if aux.kv is None else KeyValue(*(leaf.reshape(-1, *leaf.shape[-4:]) for leaf in aux.kv))


def run_in_order(
    problem: LayerProblem,
    mesh: Mesh | None,
    taps: tuple[int, ...] = (),
    ring_microbatches: int = 1,
    with_trace: bool = False,
    with_aux: bool = False,
) -> Solution:
    """The exact pass over layers of one place, or round the devices of a mesh that share them."""
    if mesh is not None:
        settings: dict[str, Any] = {"num_microbatches": ring_microbatches, "with_trace": with_trace}
        return sequential_sharded(problem, mesh=mesh, taps=taps, with_aux=with_aux, **settings)
    if taps == (problem.num_layers - 1,) and not with_trace:  # no trace for the state that comes out anyway
        solution = sequential(problem, with_aux=with_aux)
        return solution._replace(tapped=(solution.value,))
    return sequential(problem, taps=taps, with_trace=with_trace, with_aux=with_aux)


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
    past: Rings | tuple[Rings, ...] | None = None,
    warm: Array | None = None,
    stack: tuple[int, int] | None = None,
) -> LayerProblem:
    """The chain of nodes of one segment, for the solver.

    Args:
        blocks: see :class:`Weights`; a stack may be filled up with layers of zero weights.
        key: of stochastic corrections.
        mesh: over whose layer axis ``blocks`` are sharded, if they are.
        tables: see :class:`Weights`.
        past: keys and values of the tokens before, or those that each evaluation reads.
        warm: the trace that ``Warm`` guesses; without one it is the exact trace one token earlier.
        stack: layers that ``blocks`` hold, where these are more than the segment's; the others pass their input on.
            A segment of part of a sharded stack costs what the whole costs, and no weight moves.
    """
    start, stop = stack or (segment.start, segment.stop)
    needs_jvp = isinstance(segment, ParallelSegment) and segment.correction.needs_forward_mode
    stage = segment.stage if isinstance(segment, ParallelSegment) else PerLayer()
    num_nodes, layers_per_node = nodes_of(segment)
    num_shards = 1 if mesh is None else mesh.shape["layer"]
    is_stack = not isinstance(blocks, list | Groups) and jax.tree.leaves(blocks)
    num_rows = jax.tree.leaves(blocks)[0].shape[0] if is_stack else stop - start
    settings: dict[str, Any] = {"num_rows": num_rows, "tables": tables, "num_shards": num_shards}
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
            "refresh_fn": model.refresh_fn,
        }
    if num_shards > 1 and not is_alike:
        fns["sweep_fn"] = None
    of_nodes = functools.partial(by_chunk, layers_per_chunk=layers_per_node) if isinstance(stage, Chunkwise) else None
    blocks = of_nodes(blocks) if of_nodes and not isinstance(blocks, list) else blocks
    num_layers = num_rows // layers_per_node
    attention = [i for i, kind in enumerate(model.config.kinds[start:stop]) if kind.attn == "full"]
    attention += range(stop - start, num_rows)
    is_steady = not model.config.num_streams or model.config.hyper_maps == "static"
    affine = [i for i, kind in enumerate(model.config.kinds[start:stop]) if is_steady and "full" not in kind]
    one_by_one = isinstance(segment, SequentialSegment) or isinstance(segment.correction, Exact)
    evaluations: list[tuple[Any, Shared]] = []
    for rings in past if isinstance(past, tuple) else () if past is None else (past,):
        is_mixed = isinstance(blocks, Groups)
        is_several = isinstance(segment, SequentialSegment) and len(rings.groups) > 1
        if isinstance(blocks, list) or is_several or (is_mixed and one_by_one):
            blocks = as_rows(blocks, num_layers)
            past_of = {i: rings.layer(row) for row, i in enumerate(attention)}
            rows = [layer(ctx, i)._replace(past=past_of.get(i)) for i in range(num_layers)]
            evaluations.append((rows, shared))
            continue
        is_one = len(rings.groups) == 1 and not is_mixed
        own = ctx._replace(past=rings.groups[0]) if is_one else ctx
        of_all = shared if is_one else shared._replace(past=rings)
        evaluations.append((own if of_nodes is None else of_nodes(own), of_all))
    if not evaluations:
        evaluations.append((ctx if of_nodes is None else of_nodes(ctx), shared))
    own, of_all = evaluations[0]
    first = (segment.start - start) // layers_per_node
    problem = LayerProblem(
        **fns,
        params=blocks,
        ctx=own,
        shared=of_all,
        h_in=h_in,
        num_layers=num_layers,
        anchor=shared.x0_BTD,
        calibration=None if fit is None else dataclasses.replace(fit, layers=pad_layers(fit.layers, num_layers)),
        key=key,
        real=(first, first + num_nodes) if num_layers > num_nodes else None,
        batch_axes=None
        if isinstance(own, list)
        else BatchAxes(*model.batch_axes(own, of_all, int(of_nodes is not None))),
        warm_L=warm,
        evaluations=tuple(evaluations) if isinstance(past, tuple) else (),
        affine=tuple(affine),
    )
    if isinstance(segment, ParallelSegment) and segment.init.is_oracle and warm is None:
        problem = _with_previous_token(problem, mesh)
    return problem


def _solve_region(
    problem: LayerProblem, segment: ParallelSegment, mid: int | None, mesh: Mesh | None, with_stats: bool, kept: Kept
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
        "kept": kept,
    }
    if mesh is not None:
        solution = solve_sharded(problem, segment.correction, mesh=mesh, **settings)
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
