"""What the branches of a model read and add, over any amount of text: moments of (x, y), no sample kept.

branch       x, before any norm                 y, what is added to the residual stream
attention    the attention's input              its output (norms behind it included)
mlp          the MLP's input                    its output
block        the attention's input x            h' - x: both outputs, on one residual stream
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.config import MachineConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.layout import prepare
from snlp_jax.linearize.covariance import Moments, total
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import Context, Shared
from snlp_jax.parallel.mesh import kernels_on, over_data, put_batch
from snlp_jax.solver import Schedule
from snlp_jax.types import Array, Params, PyTree

Branch = Literal["attention", "mlp", "block"]
PARTS: dict[Branch, tuple[str, ...]] = {"block": ("attn", "mlp"), "attention": ("attn",), "mlp": ("mlp",)}
"""The sub-layers of each branch, in the order in which branches are chosen: what takes most of a layer first."""
Place = tuple[Branch, int]
"""A branch of a layer."""
Batches = Callable[[], Iterable[Mapping[str, np.ndarray]]]
"""Gives batches of equal shape anew at every call: ``tokens`` [B, T + 1], the last of which is not read, and where
documents are masked ``document`` [B, T + 1]."""


def branch_moments(
    model: LanguageModel,
    params: Params,
    batches: Batches,
    wanted: Mapping[Branch, Sequence[int]],
    *,
    skip_first: int = 0,
    mesh: Mesh | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[Place, Moments]:
    """Count, means, C_xx, C_yx, C_yy of the wanted branches of layers, in one pass over the text.

    A layer is one compiled program, for each kind of layer there is, run layer after layer; a model of which more is
    replaced since compiles no layer anew. A batch is reduced in float32, on each device its own rows, and batches
    and devices are merged in float64 on the host.

    Memory: on a device the weights, the activations of its rows of a batch and 12 D^2 bytes a branch of one layer; on
    the host 24 D^2 bytes for every branch of every wanted layer (ask for fewer layers at a time where that is much: a
    pass ends behind the last one). Neither grows with the text.

    Args:
        wanted: layers whose branch is whole, by branch.
        skip_first: tokens at the beginning of every window that do not count: attention sinks behave like no other.
        mesh: the rows of batches, which its data axis divides, are spread over that; weights are on every device.
        on_batch: called after each.

    Raises:
        InputError: a branch that a layer has not; no text; every token skipped.
    """
    for branch, layers in wanted.items():
        if missing := sorted(set(layers) - set(whole_layers(model, branch))):
            raise InputError(f"layers {missing} have no whole {branch}; name others.")
    text = iter(batches())
    first = next(text, None)
    if first is None or not 0 <= skip_first < first["tokens"].shape[1] - 1:
        raise InputError(f"there is no text to take statistics of, without the first {skip_first} tokens; give more.")
    num_layers, num_devices = model.config.num_layers, 1 if mesh is None else mesh.shape["data"]
    names_L = [tuple(name for name in PARTS if l in wanted.get(name, ())) for l in range(num_layers)]
    whole = dataclasses.replace(model.config, linear_attention=(), linear_mlp=(), dropped_attention=(), dropped_mlp=())
    enter, step = _programs(whole, model.machine, model.backend, skip_first, mesh)
    weights = prepare(model, params, Schedule.of(num_layers), num_tokens=first["tokens"].size, layout="list")
    stop = max((l + 1 for l, names in enumerate(names_L) if names), default=0)
    ends, blocks = weights.embed_head, [tree for part in weights.parts for tree in part.blocks][:stop]
    if mesh is not None:
        ends, blocks = jax.device_put((ends, blocks), NamedSharding(mesh, PartitionSpec()))

    def moments(batch: Mapping[str, np.ndarray]) -> dict[Place, Moments]:
        inputs = {name: batch[name][:, :-1] for name in ("tokens", "document") if name in batch}
        inputs = put_batch(mesh, inputs, is_whole=True)
        shared, h = enter(ends, inputs)
        found: dict[Place, Moments] = {}
        for l, (block, names) in enumerate(zip(blocks, names_L, strict=False)):
            ctx = jax.tree.map(lambda leaf: leaf[0], model.context(ends, [block], inputs["tokens"], l, l + 1))
            h, by_device = step(block, h, ctx, shared, names=names)
            found |= {(name, l): part for name, part in jax.device_get(by_device).items()}
        on_batch()
        return total(jax.tree.map(itemgetter(i), found) for i in range(num_devices))

    return total(map(moments, itertools.chain([first], text)))


def whole_layers(model: LanguageModel, branch: Branch) -> tuple[int, ...]:
    """Layers whose branch is as it was trained; a block on several residual streams is no map of one."""
    if branch == "block" and model.config.num_streams:
        return ()
    kinds = enumerate(model.config.kinds)
    return tuple(layer for layer, kind in kinds if all(getattr(kind, part) == "full" for part in PARTS[branch]))


# ---------------------------------------------------------------- what passes between the branches


@dataclass(frozen=True)
class TappedPath:
    """A residual path that also hands on what the branches read and add, (x, y) [B, T, D] by branch, in place of the
    derivative of the skip path that ``leave`` leaves behind."""

    path: Any

    def enter(self, params: PyTree, h: Array, ctx: Any, shared: Any) -> tuple[Array, Any]:
        x_BTD, carry = self.path.enter(params, h, ctx, shared)
        return x_BTD, (carry, x_BTD)

    def between(self, params: PyTree, carry: Any, ctx: Any, attn_BTD: Array) -> tuple[Array, Any]:
        carry, x_BTD = carry
        u_BTD, carry = self.path.between(params, carry, ctx, attn_BTD)
        return u_BTD, (carry, x_BTD, attn_BTD, u_BTD)

    def leave(self, carry: Any, ctx: Any, mlp_BTD: Array) -> tuple[Array, dict[Branch, tuple[Array, Array]]]:
        carry, x_BTD, attn_BTD, u_BTD = carry
        both_BTD = attn_BTD + mlp_BTD  # not h' - x, which would round
        taps: dict[Branch, tuple[Array, Array]] = {"attention": (x_BTD, attn_BTD), "mlp": (u_BTD, mlp_BTD)}
        return self.path.leave(carry, ctx, mlp_BTD)[0], taps | {"block": (x_BTD, both_BTD)}


@functools.lru_cache(maxsize=8)
def _programs(config: ModelConfig, machine: MachineConfig, backend: str, skip_first: int, mesh: Mesh | None) -> Any:
    """``enter``: from the embedding and the inputs what all layers read, and the state that enters the first; ``step``:
    from a layer its output, and moments with an axis of devices before the others. Compiled when first called, once for
    every kind of layer, for all models of a config, whichever of their branches are replaced: ``config`` has none."""
    kernels = kernels_on(mesh, is_spread=False)
    model = LanguageModel(config, machine, backend=backend).adapted(kernels=kernels, wrap_path=TappedPath)
    num_devices = 1 if mesh is None else mesh.shape["data"]

    @jax.jit
    def enter(ends: PyTree, inputs: Mapping[str, Array]) -> tuple[Shared, Array]:
        document_BT = inputs.get("document")
        x0_BTD = over_data(mesh, model.embed(ends, inputs["tokens"], None, document_BT))
        return model.shared(x0_BTD, None, document_BT), model.expand(x0_BTD)

    def samples(x_BTD: Array) -> Array:
        x_BTD = x_BTD[:, skip_first:].astype(jnp.float32)
        return over_data(mesh, x_BTD.reshape(num_devices, -1, x_BTD.shape[-1]))

    @functools.partial(jax.jit, static_argnames="names")
    def step(
        block: PyTree, h: Array, ctx: Context, shared: Shared, *, names: tuple[Branch, ...]
    ) -> tuple[Array, dict[Branch, Moments]]:
        new, aux = model.block_fn()(block, h, ctx, shared)
        reduce = jax.vmap(lambda x, y: Moments.of(x, y, with_yy=True))
        pairs: Any = aux.skip_BTRR
        found = {name: reduce(*map(samples, pairs[name])) for name in names}
        return over_data(mesh, new), jax.tree.map(lambda leaf: over_data(mesh, leaf), found)

    return enter, step
