"""The passes of one training step over the parameters as they lie in training."""

import dataclasses
import functools
from typing import NamedTuple

from jax.sharding import Mesh

from snlp_jax.chains import chains_of, correction_of, method_data
from snlp_jax.checks import check_alike
from snlp_jax.forward import solve_segment
from snlp_jax.model import Model
from snlp_jax.model.kinds import cut
from snlp_jax.parallel.mesh import kernels_on, over_data
from snlp_jax.parallel.region import sequential_sharded
from snlp_jax.parallel.sharding import gather_channels
from snlp_jax.parts import Part
from snlp_jax.solver import ParallelSegment, Segment, SequentialSegment, Solution, Wanted
from snlp_jax.types import Array, Batch, Params, PyTree, is_list


class Exact(NamedTuple):
    """What the sequential pass gives."""

    h_after: dict[int, Array]
    """State [B, T, D] or [B, T, R, D] after the layers that were asked for; -1 is what enters the first."""
    trace: Array | None
    """Of all layers [L, ...], where it was asked for."""


class Passes:
    """One batch through one set of parameters, in order and by the solver. Build it under jit.

    On a mesh with a layer axis no weight moves along it: the sequential pass goes round the devices, and a region's
    iterations run on the whole stack, whose other layers pass their input on. Along a data axis weights are gathered
    where they are used: a layer at a time in the sequential pass, unless that is a ring, which would gather them again
    for every microbatch; all of them at once in a region, which reads them all at once.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        key: Array | None = None,
        *,
        mesh: Mesh | None = None,
        ring_microbatches: int = 1,
    ) -> None:
        """Gather what every pass reads, and embed the inputs."""
        if mesh is not None:
            check_alike(model.config, mesh)
        self.model, self.batch, self.key, self.mesh, self.ring_microbatches = model, batch, key, mesh, ring_microbatches
        embed_head = self._gathered({"embed": params["embed"], "head": params["head"]})
        self.ring = mesh if mesh is not None and mesh.shape["layer"] > 1 else None
        """The mesh, where layers are spread over it."""
        blocks = params["blocks"] if self.ring is None else self._gathered(params["blocks"], "blocks/")
        self.params = embed_head | {"blocks": blocks}
        """The embedding and the head are whole along the data axis."""
        document_BT = None if batch.document is None else batch.document[:, :-1]
        x0_BTD = over_data(mesh, model.embed(self.params, batch.tokens[:, :-1], document_BT=document_BT))
        self.shared, self.h_in = model.shared(x0_BTD, document_BT=document_BT), model.expand(x0_BTD)

    def in_order(self, layers: tuple[int, ...], *, with_trace: bool = False) -> Exact:
        """The sequential pass, with the states after ``layers``."""
        config, ring = self.model.config, self.ring
        fetch = None
        if ring is None and self.mesh is not None:  # a layer at a time
            fetch = functools.partial(self._gathered, prefix="blocks/", is_one_layer=True)
        model = self.model.adapted(fetch=fetch, kernels=kernels_on(self.mesh, is_spread=ring is not None))
        part = self._part(SequentialSegment(0, config.num_layers), is_spread=ring is not None)
        (chain,) = chains_of(model, self.params, part, self.batch.tokens[:, :-1], self.shared, self.h_in, mesh=ring)
        solution = sequential_sharded(
            chain, mesh=ring, with_trace=with_trace, taps=layers, num_microbatches=self.ring_microbatches
        )
        return Exact(dict(zip(layers, solution.tapped, strict=True)) | {-1: self.h_in}, solution.trace)

    def solve(self, region: ParallelSegment, h_start: Array, taps: tuple[int, ...] = ()) -> Solution:
        """The region solved from the state that enters it; ``taps`` are layers of the model."""
        mesh = self.mesh  # where the layers or the batch of a region are spread over it
        mesh = mesh if mesh is not None and mesh.shape["layer"] * mesh.shape["data"] > 1 else None
        model = self.model.adapted(kernels=kernels_on(self.mesh, is_spread=mesh is not None))
        part = self._part(region, is_spread=mesh is not None)
        (chain,) = chains_of(model, self.params, part, self.batch.tokens[:, :-1], self.shared, h_start, mesh=mesh)
        data = method_data(part, self.shared, chain, key=self.key, mesh=mesh)
        want = Wanted(tuple(tap - self.first_row(region) for tap in taps))
        region = dataclasses.replace(region, correction=correction_of(model.config, region))
        return solve_segment([chain], region, data, mesh, want)

    def first_row(self, region: Segment) -> int:
        """The layer that row 0 of a region's trace belongs to."""
        return region.start if self.ring is None else 0

    def _part(self, segment: Segment, *, is_spread: bool) -> Part:
        config = self.model.config
        whole, blocks = (0, config.num_layers), self.params["blocks"]
        if self.ring is not None:
            return Part(blocks, None, None, segment, whole, True)
        span = (segment.start, segment.stop)
        blocks = cut(config, blocks, *span)
        if isinstance(segment, ParallelSegment):
            if is_list(blocks):
                blocks = [self._gathered(tree, "blocks/", is_one_layer=True) for tree in blocks]
            else:
                blocks = self._gathered(blocks, "blocks/")
        return Part(blocks, None, None, segment, span, is_spread)

    def _gathered(self, tree: PyTree, prefix: str = "", *, is_one_layer: bool = False) -> PyTree:
        """Parameters whole along the data axis, see :func:`snlp_jax.parallel.sharding.gather_channels`."""
        model, mesh = self.model, self.mesh
        if mesh is None or mesh.shape["data"] == 1:
            return tree
        return gather_channels(tree, model.config, mesh, dtype=model.dtype, prefix=prefix, is_one_layer=is_one_layer)
