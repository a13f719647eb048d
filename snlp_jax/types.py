"""Type aliases and the legend of axis letters used in names, einsum strings and sharding specs.

B batch, T query time, S key time, D embed, F mlp, N query heads, K kv heads, G = N/K, H head dim, V vocab,
L layers (of the model, or of the parallel region at hand), C chunks, M layers per chunk, R residual streams.
A name such as ``h_LBTD`` wears its shape. Iterations are always ``num_iters``, never K.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

Array = jax.Array
PyTree = Any
Params = dict[str, Any]
"""Nested dict of arrays. Everything under ``params['blocks']`` leads with the layer axis: that of the layers which have
it, see ``snlp_jax/model/kinds.py``."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Trees of N layers whose structures differ: those of one structure stacked, leaves of a group [n, ...]."""

    groups: tuple[PyTree, ...]
    members: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    """Layers of each group, in order."""

    @property
    def num_layers(self) -> int:
        return sum(map(len, self.members))

    @property
    def rows(self) -> tuple[int, ...]:
        """Where every layer stands in the groups one behind the other."""
        order = [index for members in self.members for index in members]
        return tuple(sorted(range(len(order)), key=order.__getitem__))

    def layer(self, index: int) -> PyTree:
        """One layer's tree."""
        group, members = next((g, m) for g, m in zip(self.groups, self.members, strict=True) if index in m)
        return jax.tree.map(lambda leaf: leaf[members.index(index)], group)


class Batch(NamedTuple):
    """What a training step reads: numpy arrays from the data, jax arrays in the step."""

    tokens: Any
    """int32 [B, T + 1]; the first T are inputs, the last T targets."""
    weight: Any = None
    """float32 [B, T]: how much each target counts; None where all count alike."""
    document: Any = None
    """int32 [B, T + 1]: number of the document, in its row, that each token belongs to, where tokens attend to their
    own document alone; None where they attend to whatever stands before them."""
