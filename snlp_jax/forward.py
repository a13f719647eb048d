"""Where model and solver meet: the forward pass over weights that are laid out for a schedule."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from jax.sharding import Mesh

from snlp_jax.cache import Past
from snlp_jax.chains import chains_of, correction_of, method_data
from snlp_jax.model import Model
from snlp_jax.model.block import BlockAux, KeyValue, Shared
from snlp_jax.parallel.mesh import kernels_on, over_data
from snlp_jax.parallel.region import first_nodes, on_devices, sequential_sharded, solve_sharded
from snlp_jax.parts import Part, Weights
from snlp_jax.pieces import over_time
from snlp_jax.solver import (
    Chain,
    Chunkwise,
    MethodData,
    ParallelSegment,
    SkippedSegment,
    Solution,
    Wanted,
    solve_each,
)
from snlp_jax.types import Array, Params, PyTree, is_list

CacheRule = Literal["last_eval", "refreshed", "per_iteration"]
"""Whose keys and values are kept of a region: those of the last evaluation, of one more at the corrected trace, or of
every evaluation, that of the initial trace included, in a tuple."""


Ends = tuple[Array, Array]
"""The two states that the head reads: after the last layer and after the middle one."""


class Keep(NamedTuple):
    """What a pass leaves behind for the tokens to come."""

    rule: CacheRule = "last_eval"
    traces: tuple[int, ...] = ()
    """Parts that run in order whose traces are wanted too; a region's always is there."""


class CacheUpdate(NamedTuple):
    """What one part leaves behind for the tokens to come."""

    kv: PyTree
    """``KeyValue`` of its layers, leaves [n, B, T, K, H], layers that fill up a mesh included; of a list of layers a
    list, leaves [B, T, K, H], of those that have attention. A tuple of these under the rule "per_iteration"."""
    trace: Array | None
    """Outputs of all nodes [n, B, T, D] or [n, B, T, R, D], where they were asked for."""


class States(NamedTuple):
    """What the parts leave behind before the head."""

    shared: Shared
    h_last: Array
    """[B, T, D], or [B, T, R, D] with residual streams."""
    h_mid: Array
    solutions: tuple[Solution, ...]
    """Of every parallel region, in order."""
    updates: tuple[CacheUpdate | None, ...]
    """Of every part; None for layers that are left out, or where nothing was asked for."""

    @property
    def ends(self) -> Ends:
        return self.h_last, self.h_mid


class Output(NamedTuple):
    """Logits, and what :class:`States` says of the pass before the head."""

    logits_BTV: Array
    h_last: Array
    h_mid: Array
    solutions: tuple[Solution, ...]
    updates: tuple[CacheUpdate | None, ...]


def forward(
    model: Model,
    weights: Weights,
    tokens_BT: Array,
    *,
    mesh: Mesh | None = None,
    past: Past | None = None,
    document_BT: Array | None = None,
    with_stats: bool = False,
    keep: Keep | None = None,
) -> Output:
    """Logits of ``tokens_BT`` under the schedule the weights were laid out for. Jit it with ``weights`` an argument.

    Args:
        mesh: the one the weights are laid out on. Where the batch is spread over its ``data`` axis, so are the logits.
        past: the tokens are those that follow on these.
        document_BT: number of the document, in its row, of each token, where they attend to their own alone; not with
            ``past``.
        with_stats: residual norms in the solutions' ``stats``.
        keep: leave keys and values behind; None where nobody will read them.

    Raises:
        ValueError: both ``past`` and ``document_BT`` are given.
    """
    states = run_parts(
        model, weights, tokens_BT, mesh=mesh, past=past, document_BT=document_BT, with_stats=with_stats, keep=keep
    )
    logits_BTV = logits_of(model, weights, states.h_last, states.h_mid, mesh)
    return Output(logits_BTV, states.h_last, states.h_mid, states.solutions, states.updates)


def logits_of(model: Model, weights: Weights, h_last: Array, h_mid: Array, mesh: Mesh | None) -> Array:
    """What the head makes of the two states that it reads."""
    return head_logits(model, weights.embed_head, h_last, h_mid, mesh)


def head_logits(model: Model, embed_head: Params, h_last: Array, h_mid: Array, mesh: Mesh | None) -> Array:
    """:func:`logits_of` for the parameters of the embedding and the head alone."""
    logits_BTV = model.padded_logits(embed_head, h_last, h_mid)
    # Cropping what is split by vocabulary would move pieces of it about.
    return over_data(mesh, logits_BTV)[..., : model.config.vocab_size]


def read_logits(
    read: Callable[..., PyTree],
    model: Model,
    embed_head: Params,
    ends: Sequence[Ends],
    *trees: PyTree,
    mesh: Mesh | None = None,
) -> PyTree:
    """``read(*logits, *trees)`` for all tokens, in pieces where the logits are large (snlp_jax/pieces.py).

    Args:
        read: of logits [B, t, V], one for each of ``ends``, and of what belongs to the same tokens gives a tree with
            leaves [B, t, ...]; no token's depends on another's.
        ends: what the head reads of one or several passes.
        trees: leaves [B, T, ...], of as many tokens.
    """

    def of_piece(embed_head: Params, ends: Sequence[Ends], *pieces: PyTree) -> PyTree:
        return read(*(head_logits(model, embed_head, *each, mesh) for each in ends), *pieces)

    size = model.config.padded_vocab_size
    return over_time(of_piece, embed_head, tuple(ends), *trees, vocab_size=size, mesh=mesh)


def run_parts(
    model: Model,
    weights: Weights,
    tokens_BT: Array,
    *,
    mesh: Mesh | None = None,
    past: Past | None = None,
    document_BT: Array | None = None,
    with_stats: bool = False,
    keep: Keep | None = None,
) -> States:
    """:func:`forward` without the head; the weights may end before the model does."""
    if past is not None and document_BT is not None:
        raise ValueError("tokens that follow on others belong to one document; leave document_BT out.")
    x0_BTD = model.embed(weights.embed_head, tokens_BT, past.previous_B1 if past else None, document_BT)
    shared = model.shared(x0_BTD, past.length_B if past else None, document_BT)
    h = h_mid = model.expand(x0_BTD)
    solutions: list[Solution] = []
    updates: list[CacheUpdate | None] = []
    for index, part in enumerate(weights.parts):
        segment, mid = part.segment, _mid_of(model, part)
        if isinstance(segment, SkippedSegment):
            h_mid = h_mid if mid is None else h
            updates.append(None)
            continue
        part_mesh = mesh if part.is_spread else None
        part_model = model.adapted(kernels=kernels_on(mesh, is_spread=part.is_spread))
        rings = past.rings[index] if past else None
        chains = chains_of(part_model, weights.embed_head, part, tokens_BT, shared, h, rings, mesh=part_mesh)
        if isinstance(segment, ParallelSegment):
            warm_L = past.warm[index] if past and past.warm else None
            data = method_data(part, shared, chains[0], warm_L, mesh=part_mesh)
            segment = dataclasses.replace(segment, correction=correction_of(model.config, segment))
            solution, tapped = _solve_region(chains, segment, data, mid, part_mesh, with_stats, keep)
            is_padded = part.num_rows > segment.num_layers
            solutions.append(first_nodes(solution, segment.num_nodes) if is_padded else solution)
        else:
            taps = () if mid is None else (mid,)
            wants_trace = keep is not None and index in keep.traces
            solution = sequential_sharded(
                chains[0],
                mesh=part_mesh,
                with_trace=wants_trace,
                with_aux=keep is not None,
                taps=taps,
                num_microbatches=weights.ring_microbatches,
            )
            tapped = solution.tapped[0] if taps else h
        updates.append(None if keep is None else CacheUpdate(kv_by_layer(solution.aux), solution.trace))
        h, h_mid = solution.value, h_mid if mid is None else tapped
    return States(shared, h, h_mid, tuple(solutions), tuple(updates))


def _mid_of(model: Model, part: Part) -> int | None:
    """The layer of a part, from its first, whose output the head reads besides the last; None of other parts."""
    mid = model.config.mid_layer - part.segment.start
    return mid if 0 <= mid < part.segment.num_layers else None


def kv_by_layer(aux: PyTree) -> PyTree:
    """Keys and values of every layer of what nodes, layers or chunks of them, leave behind."""
    if is_list(aux):
        kvs = [node.kv for node in aux if node.kv is not None]
        is_chunked = bool(kvs) and kvs[0].key_BTKH.ndim == 5
        return [KeyValue(*(leaf[j] for leaf in kv)) for kv in kvs for j in range(len(kv[0]))] if is_chunked else kvs
    if isinstance(aux, BlockAux):
        return None if aux.kv is None else KeyValue(*(leaf.reshape(-1, *leaf.shape[-4:]) for leaf in aux.kv))
    return tuple(map(kv_by_layer, aux))


def _solve_region(
    chains: list[Chain],
    segment: ParallelSegment,
    data: MethodData,
    mid: int | None,
    mesh: Mesh | None,
    with_stats: bool,
    keep: Keep | None,
) -> tuple[Solution, Array]:
    """The region's solution, and the state that stands for the output of its layer ``mid``: that of the node which
    holds the layer and, in a share, that of the node before it or the region's input."""
    taps: tuple[int, ...] = ()
    share = 1.0
    if mid is not None:
        node, place = divmod(mid, segment.layers_per_node)
        choice = segment.stage.mid if isinstance(segment.stage, Chunkwise) else "output"
        share = {"output": 1.0, "input": 0.0, "interpolated": (place + 1) / segment.layers_per_node}[choice]
        taps = (node,) if node == 0 or share == 1.0 else (node, node - 1)
    rule = keep.rule if keep else "last_eval"
    want = Wanted(taps, with_stats, "refreshed" if rule == "refreshed" else "last")
    solution = solve_segment(chains, segment, data, mesh, want, is_each=rule == "per_iteration")
    if not taps:
        return solution, chains[0].h_in
    after, before = solution.tapped[0], solution.tapped[1] if len(taps) > 1 else chains[0].h_in
    return solution, after if share == 1.0 else share * after + (1.0 - share) * before


def solve_segment(
    chains: list[Chain],
    segment: ParallelSegment,
    data: MethodData,
    mesh: Mesh | None,
    want: Wanted,
    *,
    is_each: bool = False,
) -> Solution:
    """Solve a region as its segment says; ``is_each``: every evaluation reads one of ``chains``, or the only one."""
    correction, init = segment.correction, segment.init
    if is_each:
        each = chains if len(chains) > 1 else chains * (init.num_evals + segment.num_iters)
        run = lambda chains, data: solve_each(chains, correction, init, data, want=want)  # noqa: E731
        return on_devices(run, each, data, mesh, want)
    num_iters, tolerance = segment.num_iters, segment.tolerance
    return solve_sharded(
        chains[0], correction, init, data, mesh=mesh, num_iters=num_iters, tolerance=tolerance, want=want
    )
