"""Weights laid out for a schedule: cast, cut along its segments, put where they are read, on one device or a mesh."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model import LanguageModel
from snlp_jax.model.kinds import cut, each_stack
from snlp_jax.model.projections import join_projections
from snlp_jax.model.value_embed import lay_out_tables
from snlp_jax.parallel.region import num_padded, pad_layers
from snlp_jax.parallel.sharding import BY_FEATURE, BY_LAYER, shardings_of, with_shardings
from snlp_jax.solver import (
    Calibration,
    Chunkwise,
    FusedSplit,
    HyperConnection,
    ParallelSegment,
    PerLayer,
    ScaledIdentity,
    Schedule,
    Segment,
    SequentialSegment,
    SkippedSegment,
)
from snlp_jax.solver.calibrated import check_calibration
from snlp_jax.types import Groups, Params, PyTree

Layout = Literal["auto", "stack", "list"]
Spread = Literal["tensor", "ring"]
"""How layers that run in order lie on the devices of the layer axis: every layer on all of them, by heads and features
(two all-reduces a layer), or every device its own layers, the state going round (one move a device)."""

LOOPED = (256, 16)
"""Up to which width, and from how many tokens (batch x length) on, a CPU runs layers in order as fast in a loop over
their stack as unrolled, which takes up to thrice as long to compile: the table of ``benchmarks/formulation.py``."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """Parameters split along a schedule, one entry of every tuple a segment.

    An entry of ``blocks`` is a stack [n, ...], or the stacks of a region's kinds of layers, or a list with one tree a
    node (a layer, or a chunk of layers [M, ...]); None for layers that are left out. An entry of ``fits`` is the
    calibration that the segment names, or None.
    """

    ends: Params
    """The embedding and the head."""
    blocks: tuple[PyTree, ...]
    tables: tuple[PyTree, ...]
    """Value embeddings of the segment, see ``snlp_jax/model/value_embed.py``; None where those in ``ends`` serve."""
    fits: tuple[Calibration | None, ...]
    segments: tuple[Segment, ...] = field(metadata={"static": True})
    is_spread: tuple[bool, ...] = field(metadata={"static": True})
    """Whether the segment's layers and the rows of the batch are spread over the ``layer`` and ``data`` axes of a mesh,
    the layers filled up with some of zero weights where the devices do not divide them."""

    @property
    def num_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


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

    On a GPU, without a mesh, kernels that read one input are joined (:mod:`snlp_jax.model.projections`), which copies
    them once. Elsewhere that gains nothing (docs/log.md), and on a mesh heads and features are split kernel by kernel.

    Args:
        num_tokens: tokens (batch x length) of a forward pass; decides the layout on a CPU.
        layout: without a mesh, ``stack`` keeps [n, ...] leaves (scan, vmap), ``list`` one tree a node (unrolled; more
            to compile). ``auto``: stacks, but lists for sequential segments on a CPU outside of :data:`LOOPED`.
        mesh: every weight lives once on the devices of its ``layer`` and ``tensor`` axes (where they divide it):
            regions are sharded over ``layer``, what runs in order as ``sequential`` says, the rest by vocabulary.
        fits: calibrations by the names that the schedule's regions give.

    Raises:
        InputError: a region that cannot be spread over the mesh, or whose calibration is not among ``fits``.
    """
    if mesh is not None:
        weights = arrange(model, model.cast(params), schedule, mesh, sequential, fits)
        return jax.device_put(weights, weights_shardings(model, weights, mesh))
    # Not jitted: what needs no cast is not copied.
    return _lay_out(model, split(model, model.cast(params), schedule, fits), num_tokens, layout)


def _lay_out(model: LanguageModel, weights: Weights, num_tokens: int, layout: Layout) -> Weights:
    """Stacks or lists, of joined kernels or separate ones, see :func:`prepare`."""
    width, tokens = LOOPED
    is_looped = model.backend != "cpu" or (model.config.embed_dim <= width and num_tokens >= tokens)

    def lay_out(segment: Segment, blocks: PyTree) -> PyTree:
        if isinstance(segment, SkippedSegment):
            return blocks
        if model.backend == "gpu":
            blocks = each_stack(join_projections, blocks)
        if isinstance(segment, SequentialSegment):
            is_list = layout == "list" or (layout == "auto" and not is_looped)
            return as_rows(blocks, segment.num_layers) if is_list else blocks
        # A split stage shares one product among all layers, which only a stack can do.
        if layout != "list" or isinstance(segment.stage, FusedSplit):
            return blocks
        is_chunked = isinstance(segment.stage, Chunkwise)
        return as_rows(by_chunk(blocks, segment.layers_per_node) if is_chunked else blocks, segment.num_nodes)

    return dataclasses.replace(weights, blocks=tuple(map(lay_out, weights.segments, weights.blocks)))


def abstract_weights(model: LanguageModel, schedule: Schedule, mesh: Mesh, sequential: Spread = "tensor") -> Weights:
    """What :func:`prepare` would lay out on a mesh, as shapes with shardings: for compilation ahead of time."""
    lay_out = lambda params: arrange(model, model.cast(params), schedule, mesh, sequential)  # noqa: E731
    weights = jax.eval_shape(lay_out, model.abstract_params())
    return with_shardings(weights, weights_shardings(model, weights, mesh))


def weights_shardings(model: LanguageModel, weights: Weights, mesh: Mesh) -> Weights:
    """The sharding of every leaf of weights that are laid out on a mesh."""
    place = lambda tree, layout, prefix="": shardings_of(tree, model.config, mesh, layout, prefix)  # noqa: E731
    place_blocks = lambda blocks, layout: each_stack(lambda stack: place(stack, layout, "blocks/"), blocks)  # noqa: E731
    layouts = [BY_LAYER if is_spread else BY_FEATURE for is_spread in weights.is_spread]
    on_all = NamedSharding(mesh, PartitionSpec())
    return dataclasses.replace(
        weights,
        ends=place(weights.ends, BY_FEATURE),
        blocks=tuple(map(place_blocks, weights.blocks, layouts)),
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
    check_alike(model.config, mesh)
    is_ring = mesh.shape["layer"] > 1 and sequential == "ring"
    return _spread(model, params, split(model, params, schedule, fits, is_ring=is_ring), mesh, sequential)


def _spread(model: LanguageModel, params: Params, weights: Weights, mesh: Mesh, sequential: Spread) -> Weights:
    """Weights that are cut already, see :func:`arrange`."""
    num_devices = mesh.shape["layer"]
    blocks, tables, is_spread = [], [], []
    for segment, stack in zip(weights.segments, weights.blocks, strict=True):
        if isinstance(segment, ParallelSegment):
            spread = num_devices * mesh.shape["data"] > 1
        else:
            spread = num_devices > 1 and isinstance(segment, SequentialSegment) and sequential == "ring"
        num_shards, num_rows = 1, segment.num_layers
        if spread:
            nodes, layers_per_node = nodes_of(segment)
            num_shards, num_rows = num_devices, layers_per_node * num_padded(nodes, num_devices)
        is_spread.append(spread)
        blocks.append(pad_layers(stack, num_rows) if num_rows > segment.num_layers else stack)
        where = (segment.start, segment.stop, num_shards, num_rows)
        is_skipped = isinstance(segment, SkippedSegment)
        tables.append(None if is_skipped else lay_out_tables(model.config, params["embed"], *where))
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
    """The same arrays, every region evaluated in order: the exact pass that fills a cache."""
    to_order = lambda segment: SequentialSegment(segment.start, segment.stop)  # noqa: E731
    segments = [to_order(s) if isinstance(s, ParallelSegment) else s for s in weights.segments]
    return dataclasses.replace(weights, segments=tuple(segments), fits=(None,) * len(segments))


def verifier(
    model: LanguageModel,
    params: Params,
    weights: Weights,
    *,
    layout: Layout = "auto",
    mesh: Mesh | None = None,
    sequential: Spread = "tensor",
) -> Weights:
    """The exact pass over all layers that checks what ``weights`` draft, cut where they are cut.

    Arrays that both passes read in the same form are shared. Where layers in order are lists and regions are stacks
    (layout ``auto`` on a CPU), regions are held twice. On a mesh they stay where they are and are passed round.
    """
    segments = tuple(SequentialSegment(segment.start, segment.stop) for segment in weights.segments)
    params = model.cast(params)
    exact = _cut(model, params, segments, is_ring=False)
    exact = _lay_out(model, exact, 1, layout) if mesh is None else _spread(model, params, exact, mesh, sequential)
    shared: dict[str, list[PyTree]] = {"blocks": [], "tables": [], "is_spread": []}
    for index, (mine, its) in enumerate(zip(weights.blocks, exact.blocks, strict=True)):
        is_shared = mine is not None and isinstance(mine, list) == isinstance(its, list)
        for name, taken in shared.items():
            taken.append(getattr(weights if is_shared else exact, name)[index])
    exact = dataclasses.replace(exact, ends=weights.ends, **{name: tuple(taken) for name, taken in shared.items()})
    return exact if mesh is None else jax.device_put(exact, weights_shardings(model, exact, mesh))


def check_mesh(schedule: Schedule, mesh: Mesh) -> None:
    """Refuse a schedule that the devices of a mesh cannot share.

    Raises:
        InputError: a stage that needs all layers of its region in one place.
    """
    for region in schedule.regions if mesh.shape["layer"] > 1 else ():
        if isinstance(region.stage, FusedSplit):
            raise InputError("a split stage shares one product among all layers and cannot be sharded.")


def check_alike(config: ModelConfig, mesh: Mesh) -> None:
    """Refuse to spread layers that differ.

    Raises:
        InputError: names them.
    """
    if config.replaced_layers and mesh.shape["layer"] > 1:
        raise InputError(
            f"layers {config.replaced_layers} have linear or dropped branches, and layers that differ cannot be spread "
            f"over a mesh with layer={mesh.shape['layer']}; use its data or tensor axis."
        )


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
        replaced = [i for i in config.replaced_layers if region.start <= i < region.stop]
        if replaced and not isinstance(region.stage, PerLayer):
            name = "a split stage" if isinstance(region.stage, FusedSplit) else f"stage={region.stage.num_chunks}xF"
            what = f"{name}{'' if isinstance(region.stage, FusedSplit) else region.layers_per_node}"
            raise InputError(f"{what} fuses layers as trained, but layers {replaced} are replaced; leave out stage=.")


def split(
    model: LanguageModel,
    params: Params,
    schedule: Schedule,
    fits: Mapping[str, Calibration] | None = None,
    *,
    is_ring: bool = False,
) -> Weights:
    """Slice the stack along the schedule. Sequential segments also end where the head's mid-layer state is read, and
    where layers of another kind begin; but those that will go round the devices do not: that state comes back with the
    last one.

    Raises:
        InputError: see :func:`check_schedule`; or a region names a calibration that is not among ``fits`` or lacks
            what the region reads.
    """
    segments = schedule.segments if is_ring else _cut_further(model.config, schedule.segments)
    return with_schedule(model, _cut(model, params, segments, is_ring=is_ring), schedule, fits)


def _cut(model: LanguageModel, params: Params, segments: tuple[Segment, ...], *, is_ring: bool) -> Weights:
    def take(segment: Segment) -> PyTree:
        if isinstance(segment, SkippedSegment):
            return None
        return cut(model.config, params["blocks"], segment.start, segment.stop)

    ends = {"embed": params["embed"], "head": params["head"]}
    none, here = (None,) * len(segments), (is_ring,) * len(segments)
    return Weights(ends, tuple(map(take, segments)), none, none, segments, here)


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
    segments = schedule.segments if is_ring else _cut_further(model.config, schedule.segments)

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


def cut_before(weights: Weights, index: int) -> Weights:
    """The same weights without segment ``index`` and those after it: :func:`run_segments` then ends at its input."""
    names = ("blocks", "tables", "fits", "segments", "is_spread")
    parts = {name: getattr(weights, name)[:index] for name in names}
    return dataclasses.replace(weights, **parts)


def nodes_of(segment: Segment) -> tuple[int, int]:
    """Nodes of a segment, and layers a node."""
    if isinstance(segment, ParallelSegment):
        return segment.num_nodes, segment.layers_per_node
    return segment.num_layers, 1


def as_rows(tree: PyTree, num_rows: int) -> list[PyTree]:
    """One tree for each index of the leading axis."""
    if isinstance(tree, list):
        return tree
    if isinstance(tree, Groups):
        return [tree.layer(index) for index in range(num_rows)]
    return [jax.tree.map(lambda leaf: leaf[i], tree) for i in range(num_rows)]  # noqa: B023


def by_chunk(tree: PyTree, layers_per_chunk: int) -> PyTree:
    """[n, ...] -> [C, M, ...]; no copy under jit."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, layers_per_chunk, *leaf.shape[1:]), tree)


def _cut_further(config: ModelConfig, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Segments outside of regions end after the mid-layer, and after the last of several layers of a kind."""
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
