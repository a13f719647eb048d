"""Stages: how the layers of a region are grouped into the nodes whose states the solver iterates on."""

from dataclasses import dataclass
from typing import Literal

MidState = Literal["output", "input", "interpolated"]


@dataclass(frozen=True)
class PerLayer:
    """Every layer is a node. K = N iterations reproduce the sequential pass."""

    def num_nodes(self, num_layers: int) -> int:
        return num_layers


@dataclass(frozen=True)
class Chunkwise:
    """C chunks of M consecutive layers, each fused into one wide layer that reads the chunk's input once.

    The M attentions of a chunk read the same state and are summed, and so are the M MLPs; the correction runs between
    chunks. C = 1 is the published *Fused* (one evaluation, nothing to iterate), M = 1 is :class:`PerLayer`. K = C
    iterations reproduce the **fused** model, not the sequential one. (Paper's notation: CxFM.)

    Attributes:
        num_chunks: C; must divide the layers of the region.
        scales: what becomes of per-layer residual scalars: their ``mean`` (published), or each layer's ``own``, so
            that the skip path of a chunk is that of its layers one after another.
        branches: ``sum``, or ``mean`` over the layers of a chunk.
        mid: the state that stands for the output of a layer inside a chunk where the head reads one: the chunk's
            ``output`` (published) or ``input``, or ``interpolated`` between them by the layer's place.
    """

    num_chunks: int
    scales: Literal["mean", "own"] = "mean"
    branches: Literal["sum", "mean"] = "sum"
    mid: MidState = "output"

    def __post_init__(self) -> None:
        if self.num_chunks < 1:
            raise ValueError(f"a stage of {self.num_chunks} chunks is empty; give at least one.")
        for name, choices in (("scales", ("mean", "own")), ("branches", ("sum", "mean"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} is not one of {', '.join(choices)}.")
        if self.mid not in ("output", "input", "interpolated"):
            raise ValueError(f"mid={self.mid} is not one of output, input, interpolated.")

    def num_nodes(self, num_layers: int) -> int:
        return self.num_chunks


@dataclass(frozen=True)
class FusedSplit:
    """Every layer is a node, but all read one x, the region's input with averaged scalars: ``y_l = x + branches``.

    One evaluation only: it does not look at the trace, so a second iteration would not be Newton's and is refused.
    Without residual scalars it equals :class:`PerLayer` at K = 1 from h0.
    """

    def num_nodes(self, num_layers: int) -> int:
        return num_layers


Stage = PerLayer | Chunkwise | FusedSplit
