"""The weights of a schedule: one part for each of its segments."""

import dataclasses
from dataclasses import dataclass, field

import jax

from snlp_jax.solver import Calibration, ParallelSegment, Segment
from snlp_jax.types import Params, PyTree, is_list


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """The weights of one segment of a schedule."""

    blocks: PyTree
    """A stack, leaves [n, ...]; or a list with one tree a node (a layer, or a chunk of layers, leaves [M, ...]); None
    for layers that are left out."""
    tables: PyTree
    """Value embeddings of the segment, see ``snlp_jax/model/value_embed.py``; None where those of the model serve."""
    fit: Calibration | None
    """The calibration that the segment names."""
    segment: Segment = field(metadata={"static": True})
    held: tuple[int, int] = field(metadata={"static": True})
    """Layers that ``blocks`` holds: the segment's, or more."""
    is_spread: bool = field(default=False, metadata={"static": True})
    """Whether ``blocks`` and the rows of the batch are spread over the ``layer`` and ``data`` axes of a mesh, filled up
    with layers of zero weights where the devices do not divide them."""

    @property
    def is_list(self) -> bool:
        """Whether ``blocks`` is a list, whose nodes are read one by one."""
        return is_list(self.blocks)

    @property
    def span(self) -> tuple[int, int]:
        """First layer of the segment, and the one after its last."""
        return self.segment.start, self.segment.stop

    @property
    def num_rows(self) -> int:
        """Layers of the segment, or where it is spread all rows of ``blocks``."""
        if self.is_spread and not self.is_list:
            return jax.tree.leaves(self.blocks)[0].shape[0]
        return self.segment.num_layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """Parameters of a model laid out along a schedule."""

    embed_head: Params
    """``{'embed', 'head'}``: the embedding and the head."""
    parts: tuple[Part, ...]
    ring_microbatches: int = field(default=1, metadata={"static": True})
    """Parts in which a batch goes round the devices, see :func:`snlp_jax.solver.sequential`."""

    @property
    def num_bytes(self) -> int:
        """Of all arrays, each counted once."""
        return sum(leaf.nbytes for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(self)}.values())

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those of the parts, in order of depth."""
        return tuple(part.segment for part in self.parts)

    def before(self, index: int) -> "Weights":
        """The same weights without part ``index`` and those after it: a pass then ends at its input."""
        return dataclasses.replace(self, parts=self.parts[:index])


def nodes_of(segment: Segment) -> tuple[int, int]:
    """Nodes of a segment, and layers a node."""
    if isinstance(segment, ParallelSegment):
        return segment.num_nodes, segment.layers_per_node
    return segment.num_layers, 1


def by_chunk(tree: PyTree, layers_per_chunk: int) -> PyTree:
    """[n, ...] -> [C, M, ...]; no copy under jit."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, layers_per_chunk, *leaf.shape[1:]), tree)
