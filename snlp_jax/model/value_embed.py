"""Value embeddings: the tables of the layers that have one, gathered for the tokens as a stack of layers reads them.

A stack of ``num_rows`` layers may lie in ``num_shards`` equal parts on different devices. Each part's rows are then
gathered from its own tables, filled up with zeros to the number of the part that has most.
"""

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.model.block import ValueEmbed
from snlp_jax.types import Array, PyTree


def lay_out_tables(config: ModelConfig, embed: PyTree, start: int, stop: int, num_shards: int, num_rows: int) -> PyTree:
    """The tables of layers ``start`` to ``stop - 1`` out of the embedding's parameters: ``{'value', 'value_gate'}``,
    leaves [num_shards * c, ...] for the number c of the part that has most; None where no layer has any."""
    tables_of_part = [row[row >= 0] for row in _tables(config, start, stop, num_shards, num_rows)]
    most = max(map(len, tables_of_part))

    def one(leaf: Array) -> Array:
        owned = [leaf[row[0] : row[-1] + 1] if len(row) else leaf[:0] for row in tables_of_part]
        parts = [jnp.pad(part, [(0, most - len(part))] + [(0, 0)] * (leaf.ndim - 1)) for part in owned]
        return parts[0] if num_shards == 1 else jnp.concatenate(parts)

    return {name: one(embed[name]) for name in ("value", "value_gate")} if most else None


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
    table_PS = _tables(config, start, stop, num_shards, num_rows)
    has_PS = table_PS >= 0
    if not has_PS.any():
        return None
    # The whole model's tables lie with their layers only if every part owns equally many.
    is_apart = tables is not None or num_shards * has_PS.sum(1).max() == len(config.value_embed_layers)
    index_PS = np.cumsum(has_PS, axis=1) - 1 if is_apart else table_PS
    beyond = len(config.value_embed_layers)
    index_PS = np.where(has_PS, index_PS, beyond).reshape(num_shards if is_apart else 1, -1)

    def of_part(value_EVX: Array, gate: Array, index_S: Array) -> ValueEmbed:
        rows = value_EVX.at[index_S[:, None, None], tokens_BT[None]].get(mode="fill", fill_value=0)
        rows = rows.reshape(*rows.shape[:3], config.num_kv_heads, config.head_dim)
        return ValueEmbed(rows, gate.at[index_S].get(mode="fill", fill_value=0))

    held = embed if tables is None else tables
    by_part = lambda leaf: leaf.reshape(len(index_PS), -1, *leaf.shape[1:])  # noqa: E731
    embeds = jax.vmap(of_part)(by_part(held["value"]), by_part(held["value_gate"]), jnp.asarray(index_PS))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), embeds)


def _tables(config: ModelConfig, start: int, stop: int, num_shards: int, num_rows: int) -> np.ndarray:
    """[num_shards, num_rows / num_shards] which of the model's tables is that of each row; -1 where it has none."""
    table_of = {layer: table for table, layer in enumerate(config.value_embed_layers) if layer < stop}
    return np.reshape([table_of.get(start + row, -1) for row in range(num_rows)], (num_shards, -1))
