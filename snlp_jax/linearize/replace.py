"""Branches replaced by affine maps, or dropped: an ordinary model with fewer weights and a smaller cache.

``u = x + Attention(norm(x))`` becomes ``u = x + x W + b`` (or ``u = x``), and the MLP likewise: x is what the branch
reads before its norm, and the map stands for all that it adds to the stream, norms behind it included (Erdogan et al.,
"Neural Block Linearization", arXiv 2505.21077). A whole block is linearised by dropping its attention and fitting the
map of its MLP to ``h' - x``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import Kind, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model.kinds import owners
from snlp_jax.types import Array, Params


class AffineMap(NamedTuple):
    """``x W + b``."""

    kernel_DD: Array | tuple[Array, Array]
    """W, or its factors [D, r] and [r, D]."""
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
    given = {"attention": dict(attention or {}), "mlp": dict(mlp or {})}
    fields: dict[str, Any] = {}
    for name, maps in given.items():
        before = {kind: getattr(config, f"{kind}_{name}") for kind in ("linear", "dropped")}
        for layer, new in sorted(maps.items()):
            if not 0 <= layer < config.num_layers:
                raise InputError(f"there is no layer {layer}; layers are 0 to {config.num_layers - 1}.")
            if layer in before["linear"] + before["dropped"]:
                raise InputError(f"the {name} of layer {layer} is replaced already; leave it out.")
            _check_width(new, config.embed_dim, f"the map for the {name} of layer {layer}")
        for kind, layers in before.items():
            added = [layer for layer, new in maps.items() if (new is None) == (kind == "dropped")]
            fields[f"{kind}_{name}"] = tuple(sorted({*layers, *added}))
    has_maps = bool(config.linear_attention + config.linear_mlp)
    adds_maps = any(new is not None for maps in given.values() for new in maps.values())
    if has_maps and adds_maps and rank != config.linear_rank:
        raise InputError(f"rank {rank} is not that of the model's maps, which is {config.linear_rank}; give that one.")
    fields["linear_rank"] = rank if adds_maps else config.linear_rank
    new_config = dataclasses.replace(config, **fields)

    blocks: dict[str, Any] = {}
    rows = {"linear_attn": given["attention"], "linear_mlp": given["mlp"]}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["blocks"]):
        keys = tuple(key.key for key in path)
        if keys[0] not in rows:
            _put(blocks, keys, _kept(config, new_config, "/".join(keys), leaf))
    for name, maps in rows.items():
        leaves = {layer: _leaves(new, rank) for layer, new in maps.items() if new is not None}
        for row, layer in enumerate(owners(config, name)):
            leaves[layer] = jax.tree.map(lambda leaf, row=row: leaf[row], params["blocks"][name])
        if leaves:
            blocks[name] = jax.tree.map(lambda *rows: jnp.stack(rows), *(leaves[layer] for layer in sorted(leaves)))
    return new_config, {**params, "embed": _embed(config, new_config, params["embed"]), "blocks": blocks}


def _kept(config: ModelConfig, new: ModelConfig, path: str, leaf: Array) -> Array | None:
    before, after = owners(config, path), owners(new, path)
    rows = [row for row, layer in enumerate(before) if layer in after]
    if not rows:
        return None
    return leaf if len(rows) == len(before) else leaf[np.asarray(rows)]


def _embed(config: ModelConfig, new: ModelConfig, embed: Params) -> Params:
    """Without the value embeddings of layers that have no values any more."""
    before, after = config.value_embed_layers, new.value_embed_layers
    if before == after:
        return embed
    rows = np.asarray([row for row, layer in enumerate(before) if layer in after], int)
    tables = {name: embed[name][rows] for name in ("value", "value_gate") if len(rows)}
    return {name: leaf for name, leaf in embed.items() if name not in ("value", "value_gate")} | tables


def _leaves(new: AffineMap, rank: int) -> dict[str, Array]:
    bias_D = jnp.asarray(new.bias_D, jnp.float32)
    if not rank:
        kernel = new.kernel_DD
        whole = kernel[0] @ kernel[1] if isinstance(kernel, tuple) else kernel
        return {"kernel": jnp.asarray(whole, jnp.float32), "bias": bias_D}
    down_DX, up_XD = new.kernel_DD if isinstance(new.kernel_DD, tuple) else _factors(new.kernel_DD, rank)
    missing = rank - down_DX.shape[1]
    if missing < 0:
        down_DX, up_XD = _factors(down_DX @ up_XD, rank)
    elif missing:
        down_DX, up_XD = jnp.pad(down_DX, [(0, 0), (0, missing)]), jnp.pad(up_XD, [(0, missing), (0, 0)])
    return {"down": jnp.asarray(down_DX, jnp.float32), "up": jnp.asarray(up_XD, jnp.float32), "bias": bias_D}


def _factors(kernel_DD: Any, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest product of [D, r] and [r, D], singular values split evenly between the two."""
    u_DX, s_X, v_XD = np.linalg.svd(np.asarray(kernel_DD, np.float64), full_matrices=False)
    root_X = np.sqrt(s_X[:rank])
    return u_DX[:, :rank] * root_X, root_X[:, None] * v_XD[:rank]


def _check_width(new: AffineMap | None, width: int, what: str) -> None:
    if new is None:
        return
    factors = new.kernel_DD if isinstance(new.kernel_DD, tuple) else (new.kernel_DD, new.kernel_DD)
    shape = (*factors[0].shape[:1], *factors[1].shape[1:], *new.bias_D.shape)
    if shape != (width,) * 3:
        raise InputError(f"{what} is of width {shape[0]} to {shape[1]} with a bias of {shape[2]}; it must be {width}.")


def _put(tree: dict[str, Any], keys: tuple[str, ...], leaf: Array | None) -> None:
    if leaf is None:
        return
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = leaf


def merge_affine(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same function with fewer layers: neighbours that are affine as a whole become one linear MLP.

    A layer whose branches are both linear or dropped is ``h -> h (I + A) (I + M) + c``; several in a row are one map
    with ``I + W = prod (I + A_i) (I + M_i)``, multiplied out in float64. Layers that are dropped as a whole go.

    Raises:
        InputError: the model's layers read x0 or several streams, or it counts its layers (value embeddings in every
            second one, a mid-layer state): one map then is not what several were; or its maps are of low rank.
    """
    reasons = {
        "model.use_x0_resid": config.use_x0_resid,
        "model.use_value_embeds": config.use_value_embeds,
        "model.use_mid_subtract": config.use_mid_subtract,
        "model.num_streams": config.num_streams,
        "model.linear_rank": config.linear_rank,
    }
    for name, value in reasons.items():
        if value:
            raise InputError(f"affine layers cannot be merged in a model with {name} {value}; leave them as they are.")
    runs: list[list[int]] = []
    for layer, kind in enumerate(config.kinds):
        if "full" in kind:
            runs.append([layer])
        elif runs and "full" not in config.kinds[runs[-1][-1]]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    kinds, letters, maps, kept = [], "", [], []
    for run in runs:
        if "full" not in config.kinds[run[0]]:
            merged = _product(config, params["blocks"], run)
            if merged is None:
                continue
            kinds.append(Kind("none", "linear"))
            maps.append(merged)
        else:
            kinds.append(config.kinds[run[0]])
            kept += run
            if kinds[-1].mlp == "linear":
                maps.append(_row(config, params["blocks"], "linear_mlp", run[0]))
        letters += config.letters[run[-1]]
    named = lambda branch, what: tuple(i for i, kind in enumerate(kinds) if getattr(kind, branch) == what)  # noqa: E731
    new_config = dataclasses.replace(
        config,
        num_layers=len(kinds),
        window_pattern=letters,
        ends_long=letters.endswith("L"),
        linear_attention=named("attn", "linear"),
        dropped_attention=named("attn", "none"),
        linear_mlp=named("mlp", "linear"),
        dropped_mlp=named("mlp", "none"),
    )
    blocks = {name: tree for name, tree in params["blocks"].items() if not name.startswith("linear_")}
    rows = np.asarray([i for i, layer in enumerate(owners(config, "linear_attn")) if layer in kept], int)
    if len(rows):
        blocks["linear_attn"] = jax.tree.map(lambda leaf: leaf[rows], params["blocks"]["linear_attn"])
    if maps:
        blocks["linear_mlp"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *maps)
    return new_config, {**params, "blocks": blocks}


def _row(config: ModelConfig, blocks: Params, name: str, layer: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[owners(config, name).index(layer)], blocks[name])


def _product(config: ModelConfig, blocks: Params, run: list[int]) -> dict[str, Array] | None:
    """The map of layers that are affine one after another; None for the identity."""
    whole_DD, bias_D = np.eye(config.embed_dim), np.zeros(config.embed_dim)
    is_identity = True
    for layer in run:
        for name, branch in zip(("linear_attn", "linear_mlp"), config.kinds[layer], strict=True):
            if branch == "linear":
                row = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), _row(config, blocks, name, layer))
                step_DD = np.eye(config.embed_dim) + row["kernel"]
                whole_DD, bias_D, is_identity = whole_DD @ step_DD, bias_D @ step_DD + row["bias"], False
    if is_identity:
        return None
    kernel_DD = whole_DD - np.eye(config.embed_dim)
    return {"kernel": jnp.asarray(kernel_DD, jnp.float32), "bias": jnp.asarray(bias_D, jnp.float32)}
