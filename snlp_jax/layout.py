"""Weights laid out for a schedule: cast, cut along its segments, put where they are read, on one device or a mesh.

There is one canonical stack of all layers. A part of a schedule reads some of its rows: on a CPU through views of the
same memory, on accelerators by their index under jit. So weights of many schedules hold each array once.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.checks import check_alike, check_mesh, check_schedule
from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model import Model
from snlp_jax.model.kinds import cut, layer_of, rows_of
from snlp_jax.model.projections import FEW_TOKENS, join_projections, transpose_kernels
from snlp_jax.model.value_embed import lay_out_tables
from snlp_jax.parallel.region import num_padded, pad_layers
from snlp_jax.parallel.sharding import BY_FEATURE, BY_LAYER, shardings_of, with_shardings
from snlp_jax.parts import Part, Weights, nodes_of
from snlp_jax.solver import (
    Calibration,
    Chunkwise,
    FusedSplit,
    ParallelSegment,
    Schedule,
    Segment,
    SequentialSegment,
    SkippedSegment,
)
from snlp_jax.solver.calibrated import check_calibration
from snlp_jax.types import Params, PyTree, is_list

Layout = Literal["auto", "stack", "list"]
Spread = Literal["tensor", "ring"]
"""How layers that run in order lie on the devices of the layer axis: every layer on all of them, by heads and features
(two all-reduces a layer), or every device some layers, the state going round (one move a device)."""

LOOPED = (256, 16)
"""Up to which width, and from how many tokens (batch x length) on, a CPU runs layers in order as fast in a loop over
their stack as unrolled, which takes up to thrice as long to compile: the table of ``benchmarks/formulation.py``."""


# -- For evaluation ----------------------------------------------------------------------------------------------------


def prepare(
    model: Model,
    params: Params,
    schedule: Schedule,
    *,
    num_tokens: int = 1,
    layout: Layout = "auto",
    mesh: Mesh | None = None,
    sequential: Spread = "tensor",
    fits: Mapping[str, Calibration] | None = None,
) -> Weights:
    """Lay out the weights for fast evaluation. Call it outside jit: :func:`snlp_jax.forward` then copies none of them.

    For several schedules call :func:`canonical` once and hand its result in: they share every array.

    Args:
        num_tokens: tokens (batch x length) of a forward pass; decides the layout on a CPU.
        layout: without a mesh, ``stack`` keeps [n, ...] leaves (scan, vmap), ``list`` one tree a node (unrolled; more
            to compile). ``auto``: stacks, but lists for sequential segments on a CPU outside of :data:`LOOPED`.
        mesh: every weight lives once on the devices of its ``layer`` and ``tensor`` axes (where they divide it):
            regions are spread over ``layer``, what runs in order as ``sequential`` says, the rest by vocabulary.
        fits: calibrations by the names that the schedule's regions give.

    Raises:
        InputError: a schedule that the model cannot run, a layout with a mesh, a region that cannot be spread over the
            mesh, or whose calibration is not among ``fits``.
    """
    if mesh is not None:
        if layout != "auto":
            raise InputError(f"layout {layout!r} means nothing on a mesh, where weights are stacks; leave it out.")
        weights = arrange(model, model.cast(params), schedule, mesh, sequential, fits)
        return jax.device_put(weights, weights_shardings(model, weights, mesh))
    segments = _cut_further(model.config, _checked(model.config, schedule))
    return _laid_out(model, canonical(model, params, num_tokens), segments, _form_of(model, num_tokens, layout), fits)


def canonical(model: Model, params: Params, num_tokens: int = 1) -> Params:
    """The one copy of the parameters that weights of all schedules read, without a mesh: in the compute dtype.

    On a GPU kernels that read one input are joined, on a CPU those of a wide model transposed, where ``num_tokens``
    (batch x length) are few at a time (:mod:`snlp_jax.model.projections`). Both copy the kernels once; what is in its
    form already is not copied.
    """
    params = model.cast(params)
    if model.backend == "gpu":
        return params | {"blocks": join_projections(params["blocks"])}
    if model.backend == "cpu" and model.config.embed_dim >= model.transposed_from and num_tokens <= FEW_TOKENS:
        return transpose_kernels(params)
    return params


def split(model: Model, params: Params, schedule: Schedule, fits: Mapping[str, Calibration] | None = None) -> Weights:
    """Stacks along a schedule, of parameters as they are: what :func:`prepare` lays out, for use under jit.

    Raises:
        InputError: see :func:`prepare`.
    """
    return _laid_out(model, params, _cut_further(model.config, _checked(model.config, schedule)), "stack", fits)


def with_schedule(
    model: Model, weights: Weights, schedule: Schedule, fits: Mapping[str, Calibration] | None = None
) -> Weights:
    """The same arrays under the iterations, corrections and guesses of another schedule that cuts the layers alike.

    Raises:
        InputError: see :func:`prepare`.
    """
    segments = _checked(model.config, schedule)
    if len(segments) != len(weights.parts):
        segments = _cut_further(model.config, segments)
    parts = tuple(
        dataclasses.replace(part, segment=segment, fit=_fit_of(segment, fits))
        for part, segment in zip(weights.parts, segments, strict=True)
    )
    return dataclasses.replace(weights, parts=parts)


def _form_of(model: Model, num_tokens: int, layout: Layout) -> Layout:
    """The form of layers in order: ``stack`` or ``list``; ``list`` of all layers where it was asked for."""
    width, tokens = LOOPED
    is_looped = model.backend != "cpu" or (model.config.embed_dim <= width and num_tokens >= tokens)
    return "stack" if layout == "auto" and is_looped else layout


def _laid_out(
    model: Model, params: Params, segments: Sequence[Segment], form: Layout, fits: Mapping[str, Calibration] | None
) -> Weights:
    parts = tuple(_lay_out(model, params, segment, form, fits) for segment in segments)
    return Weights({"embed": params["embed"], "head": params["head"]}, parts)


def _lay_out(
    model: Model, params: Params, segment: Segment, form: Layout, fits: Mapping[str, Calibration] | None
) -> Part:
    """One part; ``form`` as :func:`_form_of` gives it, where ``auto`` means lists for layers in order alone."""
    config, span = model.config, (segment.start, segment.stop)
    fit = _fit_of(segment, fits)
    if isinstance(segment, SkippedSegment):
        return Part(None, None, fit, segment, span)
    is_region = isinstance(segment, ParallelSegment)
    # A split stage shares one product among all layers, which only a stack can do.
    is_split = isinstance(segment, ParallelSegment) and isinstance(segment.stage, FusedSplit)
    is_unrolled = (form == "list" and not is_split) or (form == "auto" and not is_region)
    if model.backend != "cpu" and not is_unrolled and not config.replaced_layers:
        return Part(params["blocks"], None, fit, segment, (0, config.num_layers))
    blocks = cut(config, params["blocks"], *span)
    if is_unrolled and not is_list(blocks):
        blocks = _node_list(blocks, segment)
    return Part(blocks, None, fit, segment, span)


def _node_list(stack: PyTree, segment: Segment) -> list[PyTree]:
    """One tree for each node of a segment, out of its stack."""
    num_nodes, layers_per_node = nodes_of(segment)
    if isinstance(segment, ParallelSegment) and isinstance(segment.stage, Chunkwise):
        starts = range(0, segment.num_layers, layers_per_node)
        return [jax.tree.map(lambda leaf: rows_of(leaf, i, i + layers_per_node), stack) for i in starts]  # noqa: B023
    return [layer_of(stack, index) for index in range(num_nodes)]


def in_order(weights: Weights) -> Weights:
    """The same arrays, every region evaluated in order: the exact pass that fills a cache."""

    def one(part: Part) -> Part:
        if not isinstance(part.segment, ParallelSegment):
            return part
        blocks = part.blocks
        if is_list(blocks) and isinstance(part.segment.stage, Chunkwise):
            blocks = [layer_of(chunk, j) for chunk in blocks for j in range(part.segment.layers_per_node)]
        return dataclasses.replace(part, blocks=blocks, segment=SequentialSegment(*part.span), fit=None)

    return dataclasses.replace(weights, parts=tuple(map(one, weights.parts)))


def verifier(
    model: Model,
    params: Params,
    weights: Weights,
    *,
    layout: Layout = "auto",
    mesh: Mesh | None = None,
    sequential: Spread = "tensor",
) -> Weights:
    """The exact pass over all layers that checks what ``weights`` draft, cut where they are cut.

    Without a mesh it reads the arrays that the drafter reads. On a mesh regions stay where they are and the state is
    passed round.
    """
    segments = [SequentialSegment(*part.span) for part in weights.parts]
    if mesh is None:
        exact = _laid_out(model, canonical(model, params), segments, _form_of(model, 1, layout), None)
        return dataclasses.replace(weights, parts=exact.parts)
    params = model.cast(params)
    exact = in_order(weights)
    parts = tuple(
        _spread(model, params, segment, mesh, sequential, None) if part.blocks is None else part
        for part, segment in zip(exact.parts, segments, strict=True)
    )
    exact = dataclasses.replace(exact, parts=parts)
    return jax.device_put(exact, weights_shardings(model, exact, mesh))


# -- On a mesh ---------------------------------------------------------------------------------------------------------


def abstract_weights(model: Model, schedule: Schedule, mesh: Mesh, sequential: Spread = "tensor") -> Weights:
    """What :func:`prepare` would lay out on a mesh, as shapes with shardings: for compilation ahead of time."""
    lay_out = lambda params: arrange(model, model.cast(params), schedule, mesh, sequential)  # noqa: E731
    weights = jax.eval_shape(lay_out, model.abstract_params())
    return with_shardings(weights, weights_shardings(model, weights, mesh))


def weights_shardings(model: Model, weights: Weights, mesh: Mesh) -> Weights:
    """The sharding of every leaf of weights that are laid out on a mesh."""
    on_all = NamedSharding(mesh, PartitionSpec())

    def one(part: Part) -> Part:
        layout = BY_LAYER if part.is_spread else BY_FEATURE

        place = functools.partial(shardings_of, config=model.config, mesh=mesh, layout=layout, prefix="blocks/")
        lists = [place(tree, is_one_layer=True) for tree in part.blocks] if part.is_list else None
        tables = shardings_of(part.tables, model.config, mesh, layout, "embed/")
        fit = jax.tree.map(lambda _: on_all, part.fit)
        return dataclasses.replace(part, blocks=lists or place(part.blocks), tables=tables, fit=fit)

    embed_head = shardings_of(weights.embed_head, model.config, mesh, BY_FEATURE)
    return dataclasses.replace(weights, embed_head=embed_head, parts=tuple(map(one, weights.parts)))


def arrange(
    model: Model,
    params: Params,
    schedule: Schedule,
    mesh: Mesh,
    sequential: Spread = "tensor",
    fits: Mapping[str, Calibration] | None = None,
) -> Weights:
    """Weights for a mesh, of parameters that are cast: stacks that its layer axis shares are filled up, and value
    embeddings laid out with them. They still have to be put where :func:`weights_shardings` says.

    Raises:
        InputError: see :func:`check_mesh` and :func:`prepare`.
    """
    check_mesh(schedule, mesh)
    check_alike(model.config, mesh)
    segments = _checked(model.config, schedule)
    if mesh.shape["layer"] == 1 or sequential != "ring":
        segments = _cut_further(model.config, segments)
    parts = tuple(_spread(model, params, segment, mesh, sequential, fits) for segment in segments)
    embed = {name: leaf for name, leaf in params["embed"].items() if name not in ("value", "value_gate")}
    return Weights({"embed": embed, "head": params["head"]}, parts)


def _spread(
    model: Model,
    params: Params,
    segment: Segment,
    mesh: Mesh,
    sequential: Spread,
    fits: Mapping[str, Calibration] | None,
) -> Part:
    """One part on a mesh, see :func:`arrange`."""
    span, num_devices, fit = (segment.start, segment.stop), mesh.shape["layer"], _fit_of(segment, fits)
    if isinstance(segment, SkippedSegment):
        return Part(None, None, fit, segment, span)
    if isinstance(segment, ParallelSegment):
        is_spread = num_devices * mesh.shape["data"] > 1
    else:
        is_spread = num_devices > 1 and sequential == "ring"
    blocks = cut(model.config, params["blocks"], *span)
    num_shards, num_rows = 1, segment.num_layers
    if is_spread and not is_list(blocks):
        num_nodes, layers_per_node = nodes_of(segment)
        num_shards, num_rows = num_devices, layers_per_node * num_padded(num_nodes, num_devices)
        blocks = pad_layers(blocks, num_rows)
        if not are_windows_alike(model.config, *span, num_rows // num_devices):
            warnings.warn(
                f"the attention windows of layers {span[0]}-{span[1]} differ between devices that hold "
                f"{num_rows // num_devices} layers each, so every layer computes scores for the longest window; choose "
                "mesh.layer so that each device holds whole repetitions of model.window_pattern.",
                stacklevel=2,
            )
    tables = lay_out_tables(model.config, params["embed"], *span, num_shards, num_rows)
    return Part(blocks, tables, fit, segment, span, is_spread)


def are_windows_alike(config: ModelConfig, start: int, stop: int, shard_len: int) -> bool:
    """Whether the layers of every device have the same windows, which one compiled sweep needs."""
    windows = config.windows[start:stop]
    return all(window == windows[i % shard_len] for i, window in enumerate(windows))


def training_weights(model: Model, params: Params, mesh: Mesh | None) -> Weights:
    """The sequential pass over parameters as they lie in training. Call it under jit, where nothing is copied."""
    whole = (0, model.config.num_layers)
    if mesh is None or mesh.shape["layer"] == 1:
        return split(model, params, Schedule.of(model.config.num_layers))
    part = Part(params["blocks"], None, None, SequentialSegment(*whole), whole, True)
    return Weights({"embed": params["embed"], "head": params["head"]}, (part,))


# -- Pieces ------------------------------------------------------------------------------------------------------------


def _checked(config: ModelConfig, schedule: Schedule) -> tuple[Segment, ...]:
    check_schedule(config, schedule)
    return schedule.segments


def _fit_of(segment: Segment, fits: Mapping[str, Calibration] | None) -> Calibration | None:
    """The calibration that a segment names.

    Raises:
        InputError: it is not among ``fits``, or lacks what the segment reads.
    """
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


def _cut_further(config: ModelConfig, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Segments outside of regions end after the mid-layer, whose state the head reads, and where layers begin or end
    that have to be read one by one."""
    pieces: list[Segment] = []
    for segment in segments:
        if isinstance(segment, ParallelSegment):
            pieces.append(segment)
            continue
        ends = [i + 1 for i in range(segment.start, segment.stop - 1) if config.kinds[i] != config.kinds[i + 1]]
        if segment.start <= config.mid_layer < segment.stop - 1:
            ends.append(config.mid_layer + 1)
        places = [segment.start, *sorted(set(ends)), segment.stop]
        pieces += [type(segment)(start, stop) for start, stop in zip(places, places[1:], strict=False)]
    return tuple(pieces)
