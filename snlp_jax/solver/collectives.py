"""What devices exchange inside ``shard_map``, where the layers of a chain are spread over a mesh axis."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Axis:
    """The mesh axis over which layers are spread, within ``shard_map``.

    The index is handed in, not asked for where it is needed: the TPU's compiler cannot tell it within a loop of a
    program that leaves another axis automatic (jax 0.10 to 0.12).
    """

    name: str = field(metadata={"static": True})
    index: jax.Array
    """int32 scalar: this device's place on the axis."""
    rows_name: str | None = field(default=None, metadata={"static": True})
    """Mesh axis over which the first axis of the state (a batch) is spread, if it is."""

    @property
    def size(self) -> int:
        """Devices of the axis."""
        return jax.lax.axis_size(self.name)


def all_gather_packed(tree: PyTree, axis: Axis) -> PyTree:
    """Every device's ``tree``, leaves [devices, ...], in one all_gather.

    Leaves of one dtype are packed into one array; a tree of several dtypes takes one all_gather for each. An array is
    filled up to a multiple of 128 numbers: of other sizes the TPU's compiler makes an all-reduce of all devices' parts.
    """
    leaves, treedef = jax.tree.flatten(tree)
    gathered: list[Any] = [None] * len(leaves)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        places = [place for place, leaf in enumerate(leaves) if leaf.dtype == dtype]
        flat, unravel = ravel_pytree([leaves[place] for place in places])
        of_all = jax.lax.all_gather(jnp.pad(flat, (0, -flat.size % 128)), axis.name)
        for place, leaf in zip(places, jax.vmap(unravel)(of_all[:, : flat.size]), strict=True):
            gathered[place] = leaf
    return jax.tree.unflatten(treedef, gathered)


def broadcast_from(owned: Sequence[tuple[int, PyTree]], axis: Axis) -> list[PyTree]:
    """Of pairs (device, tree) the tree as that device holds it, on all devices, in one all_reduce."""

    def keep(owner: int, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.where(axis.index == owner, leaf, 0), tree)

    flat, unravel = ravel_pytree([keep(owner, tree) for owner, tree in owned])
    return unravel(jax.lax.psum(flat, axis.name))


def pipeline(
    evaluate: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]], states_M: PyTree, axis: Axis
) -> tuple[PyTree, PyTree, PyTree]:
    """M states pass through the devices of an axis one after another, like parts on a conveyor.

    Device i makes its output of state j in tick i + j, so M states take M + n - 1 ticks on n devices. The state moves
    on M + n - 2 times, one collective-permute each. In the other ticks a device works on what nobody reads.

    Args:
        evaluate: ``(state, index) -> (state for the next device, anything to keep)``, of the local layers.
        states_M: leaves [M, ...], what enters the first device; the same on all.

    Returns:
        What entered this device, what left it and what it kept, leaves [M, ...].
    """
    num_devices = axis.size
    num_states = jax.tree.leaves(states_M)[0].shape[0]
    neighbours = [(device, device + 1) for device in range(num_devices - 1)]

    def work(state: PyTree, tick: jax.Array | int) -> tuple[PyTree, PyTree]:
        new, kept = evaluate(state, jnp.clip(tick - axis.index, 0, num_states - 1))
        return new, (state, new, kept)

    def move_and_work(state: PyTree, tick: jax.Array) -> tuple[PyTree, PyTree]:
        received = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis.name, neighbours), state)
        fresh = jax.tree.map(lambda leaf: leaf[jnp.minimum(tick, num_states - 1)], states_M)
        return work(jax.tree.map(lambda new, old: jnp.where(axis.index == 0, new, old), fresh, received), tick)

    state, first = work(jax.tree.map(lambda leaf: leaf[0], states_M), 0)
    _, others = jax.lax.scan(move_and_work, state, jnp.arange(1, num_states + num_devices - 1))
    ticks = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, others)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, axis.index, num_states), ticks)
