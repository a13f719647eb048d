"""Branches replaced by affine maps, or dropped: an ordinary model with fewer weights and a smaller cache.

``u = x + Attention(norm(x))`` becomes ``u = x + x W + b`` (or ``u = x``), and the MLP likewise: x is what the branch
reads before its norm, and the map stands for all that it adds to the stream, norms behind it included (Erdogan et al.,
"Neural Block Linearization", arXiv 2505.21077). A whole block is linearised by dropping its attention and fitting the
map of its MLP to ``h' - x``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model.kinds import map_present, owners
from snlp_jax.types import Array, Params


class AffineMap(NamedTuple):
    """``x W + b``."""

    kernel_DD: Array
    bias_D: Array


def replace(
    config: ModelConfig,
    params: Params,
    *,
    attention: Mapping[int, AffineMap | None] | None = None,
    mlp: Mapping[int, AffineMap | None] | None = None,
    rank: int = 0,
) -> tuple[ModelConfig, Params]:
    """The config and the parameters of the model whose named layers' branches are maps, or dropped where None stands.

    Layers that were replaced before stay as they are. Call it outside jit; what does not change is not copied.

    Args:
        rank: of the maps' factors; 0 keeps whole matrices. A matrix of a higher rank becomes the nearest of this one.

    Raises:
        InputError: a layer that does not exist or whose branch is replaced already, a map of another width, or a rank
            that is not that of the maps which the model has.
    """
    given = {"attention": attention or {}, "mlp": mlp or {}}
    _check(config, given)
    adds_maps = any(new is not None for maps in given.values() for new in maps.values())
    if adds_maps:
        check_rank(config, rank)

    def layers(kind: Literal["linear", "dropped"], branch: str) -> tuple[int, ...]:
        added = [layer for layer, new in given[branch].items() if (new is None) == (kind == "dropped")]
        return tuple(sorted({*getattr(config, f"{kind}_{branch}"), *added}))

    new_config = dataclasses.replace(
        config,
        linear_attention=layers("linear", "attention"),
        dropped_attention=layers("dropped", "attention"),
        linear_mlp=layers("linear", "mlp"),
        dropped_mlp=layers("dropped", "mlp"),
        linear_rank=rank if adds_maps else config.linear_rank,
    )
    names = {"linear_attn": "attention", "linear_mlp": "mlp"}

    def kept(path: str, leaf: Array) -> Array | None:
        return None if path.split("/")[0] in names else _rows(leaf, owners(config, path), owners(new_config, path))

    blocks = map_present(kept, params["blocks"])
    for name, branch in names.items():
        leaves = {layer: _leaves(new, rank) for layer, new in given[branch].items() if new is not None}
        for row, layer in enumerate(owners(config, name)):
            leaves[layer] = jax.tree.map(lambda leaf, row=row: leaf[row], params["blocks"][name])
        if leaves:
            blocks[name] = jax.tree.map(lambda *rows: jnp.stack(rows), *(leaves[layer] for layer in sorted(leaves)))

    def kept_value(path: str, leaf: Array) -> Array | None:
        is_value = path in ("value", "value_gate")
        return _rows(leaf, config.value_embed_layers, new_config.value_embed_layers) if is_value else leaf

    return new_config, {**params, "embed": map_present(kept_value, params["embed"]), "blocks": blocks}


def check_rank(config: ModelConfig, rank: int) -> None:
    """Refuse maps of another rank than those which the model has. Raises InputError."""
    if (config.linear_attention or config.linear_mlp) and rank != config.linear_rank:
        raise InputError(f"rank {rank} is not that of the model's maps, which is {config.linear_rank}; give that one.")


def _check(config: ModelConfig, given: Mapping[str, Mapping[int, AffineMap | None]]) -> None:
    for branch, maps in given.items():
        replaced = getattr(config, f"linear_{branch}") + getattr(config, f"dropped_{branch}")
        for layer, new in sorted(maps.items()):
            if not 0 <= layer < config.num_layers:
                raise InputError(f"there is no layer {layer}; layers are 0 to {config.num_layers - 1}.")
            if layer in replaced:
                raise InputError(f"the {branch} of layer {layer} is replaced already; leave it out.")
            if new is not None and (*new.kernel_DD.shape, *new.bias_D.shape) != (config.embed_dim,) * 3:
                rows, columns = new.kernel_DD.shape
                raise InputError(
                    f"the map for the {branch} of layer {layer} is of width {rows} to {columns} with a bias of "
                    f"{len(new.bias_D)}; it must be {config.embed_dim}."
                )


def _rows(leaf: Array, before: Sequence[int], after: Sequence[int]) -> Array | None:
    """Of a stack of the layers ``before`` the rows of those that are in ``after`` too; None where there are none."""
    rows = [row for row, layer in enumerate(before) if layer in after]
    if len(rows) == len(before):
        return leaf
    return leaf[np.asarray(rows)] if rows else None


def _leaves(new: AffineMap, rank: int) -> dict[str, Array]:
    """The map, or of a rank the nearest product of [D, r] and [r, D], singular values split evenly between the two."""
    bias_D = jnp.asarray(new.bias_D, jnp.float32)
    if not rank:
        return {"kernel": jnp.asarray(new.kernel_DD, jnp.float32), "bias": bias_D}
    u_DX, s_X, v_XD = np.linalg.svd(np.asarray(new.kernel_DD, np.float64), full_matrices=False)
    root_X = np.sqrt(s_X[:rank])
    down_DX, up_XD = u_DX[:, :rank] * root_X, root_X[:, None] * v_XD[:rank]
    return {"down": jnp.asarray(down_DX, jnp.float32), "up": jnp.asarray(up_XD, jnp.float32), "bias": bias_D}
