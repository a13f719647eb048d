"""Value embeddings: the tables of the layers that have one, gathered for the tokens as a stack of layers reads them.

A stack of ``num_rows`` layers may lie in ``num_shards`` equal parts on different devices. Each part's rows are then
gathered from its own tables, filled up with zeros to the number of the part that has most.
"""

import jax
import jax.numpy as jnp

from snlp_jax.config import ModelConfig
from snlp_jax.model.block import ValueEmbed
from snlp_jax.types import Array, PyTree


def lay_out_tables(config: ModelConfig, embed: PyTree, start: int, stop: int, num_shards: int, num_rows: int) -> PyTree:
    """The tables of layers ``start`` to ``stop - 1`` out of the embedding's parameters: ``{'value', 'value_gate'}``,
    leaves [num_shards * c, ...] for the number c of the part that has most; None where no layer has any."""
    shard_len = num_rows // num_shards
    slots = _slots(config, start, stop, num_shards, shard_len)
    if slots is None:
        return None
    first = _tables_before(config, start)
    parts: dict[str, list[Array]] = {"value": [], "value_gate": []}
    for row in slots:
        count = sum(slot < shard_len for slot in row)
        for name, part in parts.items():
            leaf = embed[name][first : first + count]
            part.append(jnp.pad(leaf, [(0, len(row) - count)] + [(0, 0)] * (leaf.ndim - 1)))
        first += count
    return {name: part[0] if num_shards == 1 else jnp.concatenate(part) for name, part in parts.items()}


def gather(
    config: ModelConfig,
    embed: PyTree,
    tables: PyTree,
    tokens_BT: Array,
    start: int,
    stop: int,
    num_shards: int,
    num_rows: int,
) -> ValueEmbed | None:
    """Value embeddings of the tokens for every layer of a stack, leaves [num_rows, ...], 0 where a layer has none; None
    where no layer has any.

    Args:
        embed: the embedding's parameters, which serve where there are no ``tables``.
        tables: what :func:`lay_out_tables` gives.
    """
    shard_len = num_rows // num_shards
    slots = _slots(config, start, stop, num_shards, shard_len)
    if slots is None:
        return None
    first = 0
    if tables is None:
        tables, first = embed, _tables_before(config, start)
        # The whole model's tables lie with their layers only if every part owns equally many.
        if len(config.value_embed_layers) != num_shards * len(slots[0]):
            num_shards, shard_len = 1, num_rows
            slots = _slots(config, start, stop, num_shards, shard_len)

    def place(x: Array, slots: Array) -> Array:
        return jnp.zeros((shard_len, *x.shape[1:]), x.dtype).at[slots].set(x, mode="drop")

    def of_part(value_EVX: Array, gate: Array, slots: Array) -> ValueEmbed:
        index = first + jnp.arange(len(slots))
        rows = value_EVX[index[:, None, None], tokens_BT[None]]
        rows = rows.reshape(*rows.shape[:3], config.num_kv_heads, config.head_dim)
        return ValueEmbed(place(rows, slots), place(gate[index], slots))

    value, gate, slots_S = tables["value"], tables["value_gate"], jnp.asarray(slots)
    if num_shards == 1:
        return of_part(value, gate, slots_S[0])
    by_part = lambda x: x.reshape(num_shards, -1, *x.shape[1:])  # noqa: E731
    embeds = jax.vmap(of_part)(by_part(value), by_part(gate), slots_S)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), embeds)


def _tables_before(config: ModelConfig, start: int) -> int:
    return sum(layer < start for layer in config.value_embed_layers)


def _slots(config: ModelConfig, start: int, stop: int, num_shards: int, shard_len: int) -> list[list[int]] | None:
    """For each part of a stack the positions, within it, of its layers with a table, filled up with ``shard_len`` (no
    position) to equal lengths; None where no layer has a table."""
    owners = [layer - start for layer in config.value_embed_layers if start <= layer < stop]
    if not owners:
        return None
    rows = [[i - part * shard_len for i in owners if i // shard_len == part] for part in range(num_shards)]
    most = max(map(len, rows))
    return [row + [shard_len] * (most - len(row)) for row in rows]
