"""Keys and values of earlier tokens: rings that are as long as their layer's window, not as the text.

A layer of window w reads the last w tokens before those at hand. Its ring has ``S = min(w, capacity) + block`` slots,
where ``block`` is the most tokens that are written at once; position p lies in slot ``p mod S``. What a draft wrote and
a verification rejected lies at positions from the row's length on, and so do the slots it took: they are taken for
tokens S older, which are out of the window. Nothing has to be undone but the length.

Every row of a batch has its own length, so prompts and accepted drafts may differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snlp_jax.model import Model
from snlp_jax.model.attention import slot_positions
from snlp_jax.model.block import KeyValue, Ring, Rings
from snlp_jax.parts import Part, Weights, nodes_of
from snlp_jax.solver import Exact, ParallelSegment
from snlp_jax.solver.linear import stack
from snlp_jax.types import Array

FEW_WRITES = 16
"""Tokens (batch x length) up to which each is written by itself: in place, where a scatter on a CPU is a loop. Not on a
mesh: there every write by a row's number is an exchange between the devices that share the rows."""


class Past(NamedTuple):
    """What a cached forward pass knows of the tokens before."""

    previous_B1: Array
    """The last of them, which the smear mixes into the next."""
    length_B: Array
    """How many there are."""
    rings: "tuple[Rings | tuple[Rings, ...] | None, ...]"
    """Of every segment's layers; one of each evaluation where every evaluation reads its own; None for layers that are
    left out."""
    warm: tuple[Array | None, ...] = ()
    """Trace [n, B, 1, D] of the last token, of segments whose guess it is."""


@dataclass(frozen=True)
class RingPlan:
    """How the rings of a segment's layers are laid out: slots and layers of every group (see ``Rings``)."""

    sizes: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]

    @property
    def num_slots(self) -> int:
        """Of all layers together."""
        return sum(size * len(members) for size, members in zip(self.sizes, self.members, strict=True))


def plan_rings(
    model: Model, weights: Weights, capacity: int, block: int, mesh: Mesh | None = None
) -> tuple[RingPlan | None, ...]:
    """The rings of every segment, for texts of up to ``capacity`` tokens and up to ``block`` written at once.

    Layers in a list have a ring each. Those in a stack share one array where their sizes agree, and are grouped by size
    where not; but over the devices of a mesh's ``layer`` axis, and for a correction that takes them one by one, all are
    as long as the longest. Layers without attention have none and are not counted.
    """
    num_shards = 1 if mesh is None else mesh.shape["layer"]
    return tuple(_plan_part(model, part, capacity, block, num_shards) for part in weights.parts)


def _plan_part(model: Model, part: Part, capacity: int, block: int, num_shards: int) -> RingPlan | None:
    segment, config = part.segment, model.config
    layers = [i for i in config.attention_layers if segment.start <= i < segment.stop]
    if part.blocks is None or not layers:
        return None
    sizes = [min(config.windows[i], capacity) + block for i in layers]
    if part.is_list:
        size = nodes_of(segment)[1]  # the layers of a fused node are read as one stack
        sizes = [max(sizes[i - i % size :][:size]) for i in range(len(sizes))]
        return RingPlan(tuple(sizes), tuple((index,) for index in range(len(sizes))))
    is_exact = isinstance(segment, ParallelSegment) and isinstance(segment.correction.innermost, Exact)
    if (part.is_spread and num_shards > 1) or is_exact:
        return RingPlan((max(sizes),), (tuple(range(part.num_rows)),))
    groups = {size: tuple(i for i, each in enumerate(sizes) if each == size) for size in sorted(set(sizes))}
    return RingPlan(tuple(groups), tuple(groups.values()))


def fill(plan: RingPlan, kv: KeyValue | list[KeyValue], length_B: Array) -> Rings:
    """Rings that hold the last of each row's first ``length_B`` tokens.

    ``kv`` are keys and values [n, B, T, K, H], or a list of n layers' [B, T, K, H].
    """

    def of_group(size: int, members: tuple[int, ...]) -> Ring:
        take = jax.vmap(lambda x_nTKH, index_S: jnp.swapaxes(x_nTKH[:, index_S], 1, 2), in_axes=(1, 0), out_axes=1)
        group = _members_of(kv, members)
        index_BS = jnp.clip(slot_positions(length_B, size), 0, group.key_BTKH.shape[2] - 1)
        return Ring(*(take(leaf, index_BS) for leaf in group))

    return Rings(tuple(map(of_group, plan.sizes, plan.members)), plan.members)


def append(rings: Rings, kv: KeyValue | list[KeyValue], length_B: Array, *, is_on_mesh: bool = False) -> Rings:
    """The rings with the keys and values of T more tokens after ``length_B``, as :func:`fill` reads them; in place
    where the caller donates them. T is at most the ``block`` that they were planned for."""
    most_single = 0 if is_on_mesh else FEW_WRITES

    def of_group(ring: Ring, members: tuple[int, ...]) -> Ring:
        pairs = zip(ring, _members_of(kv, members), strict=True)
        return Ring(*(_write(old, new, length_B, most_single) for old, new in pairs))

    return Rings(tuple(map(of_group, rings.groups, rings.members)), rings.members)


def resized(plan: RingPlan, rings: Rings, length_B: Array) -> Rings:
    """The last of each row's first ``length_B`` tokens in the rings of another plan, none of which is shorter: of the
    same layers and ``block``, for longer texts."""

    def of_group(size: int, members: tuple[int, ...]) -> Ring:
        # Layers whose rings agree now agreed before.
        known = rings.groups[rings.members.index(members)] if members in rings.members else None
        group = known or stack([rings.layer(index) for index in members])
        num_slots = group.key_BKSH.shape[3]
        index_BS = slot_positions(length_B, size) % num_slots
        take = jax.vmap(lambda x_nKSH, index_S: x_nKSH[:, :, index_S], in_axes=(1, 0), out_axes=1)
        return group if size == num_slots else Ring(*(take(leaf, index_BS) for leaf in group))

    return Rings(tuple(map(of_group, plan.sizes, plan.members)), plan.members)


def _members_of(kv: KeyValue | list[KeyValue], members: Sequence[int]) -> KeyValue:
    """Keys and values of some layers, [n, B, T, K, H]."""
    if isinstance(kv, list):
        return stack([kv[index] for index in members])
    if len(members) == kv.key_BTKH.shape[0]:
        return kv
    return jax.tree.map(lambda leaf: leaf[np.asarray(members)], kv)


def _write(ring_nBKSH: Array, new_nBTKH: Array, length_B: Array, most_single: int) -> Array:
    B, T = new_nBTKH.shape[1:3]
    num_slots = ring_nBKSH.shape[3]
    slot_BT = (length_B[:, None] + jnp.arange(T)[None]) % num_slots
    if most_single >= B * T:
        for row in range(B):
            for t in range(T):
                token = jnp.swapaxes(new_nBTKH[:, row : row + 1, t : t + 1], 2, 3)
                ring_nBKSH = jax.lax.dynamic_update_slice(ring_nBKSH, token, (0, row, 0, slot_BT[row, t], 0))
        return ring_nBKSH
    # All axes before the slots lead the indices too, as a batch: were one a window, or moved, the ring would be copied.
    new_nBKTH = jnp.swapaxes(new_nBTKH, 2, 3)
    slot_nBKT = jnp.broadcast_to(slot_BT[None, :, None], new_nBKTH.shape[:-1])
    write = lambda ring_SH, new_TH, slot_T: ring_SH.at[slot_T].set(new_TH)  # noqa: E731
    return jax.vmap(jax.vmap(jax.vmap(write)))(ring_nBKSH, new_nBKTH, slot_nBKT)
