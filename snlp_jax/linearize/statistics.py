"""What the branches of a model read and add, over any amount of text: moments of (x, y), no sample kept.

branch       x, before any norm                 y, what is added to the residual stream
attention    the attention's input              its output (norms behind it included)
mlp          the MLP's input                    its output
block        the attention's input x            h' - x: both outputs, on one residual stream
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.config import MachineConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.layout import prepare
from snlp_jax.linearize.covariance import Moments
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import Context, Shared
from snlp_jax.parallel.mesh import kernels_on, over_data, put_batch
from snlp_jax.solver import Schedule
from snlp_jax.types import Array, Params, PyTree

Branch = Literal["attention", "mlp", "block"]
BRANCHES: tuple[Branch, ...] = ("attention", "mlp", "block")
Place = tuple[Branch, int]
"""A branch of a layer."""
Batches = Callable[[], Iterable[Mapping[str, np.ndarray]]]
"""Gives batches of equal shape anew at every call: ``tokens`` [B, T + 1], the last of which is not read, and where
documents are masked ``document`` [B, T + 1]."""
Shift = tuple[np.ndarray, np.ndarray]


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
    and devices are merged in float64 on the host. Samples are taken relative to the means of the first batch, which is
    evaluated twice for that, so that means far above the spread cost no digits.

    Memory: on a device the weights, the activations of its rows of a batch and 12 D^2 bytes a branch of one layer; on
    the host 24 D^2 bytes for every branch of every wanted layer (ask for fewer layers at a time where that is much: a
    pass ends behind the last one). Neither grows with the text.

    Args:
        wanted: layers whose branch is whole, by branch.
        skip_first: tokens at the beginning of every window that do not count: attention sinks behave like no other.
        mesh: the rows of batches are spread over its data axis; weights are on every device.
        on_batch: called after each.

    Raises:
        InputError: see :func:`check_wanted`; no text; every token skipped; rows that the devices cannot share.
    """
    check_wanted(model, wanted)
    first = next(iter(batches()), None)
    if first is None:
        raise InputError("there is no text to take statistics of; give at least one batch.")
    rows, length = first["tokens"].shape[0], first["tokens"].shape[1] - 1
    if not 0 <= skip_first < length:
        raise InputError(f"skip_first is {skip_first}, but windows have {length} tokens; give 0 to {length - 1}.")
    if mesh is not None and (mesh.size != mesh.shape["data"] or rows % mesh.shape["data"]):
        raise InputError(
            f"batches of {rows} windows over a mesh of {dict(mesh.shape)}: statistics are spread over its data axis "
            "alone, which must divide the batch."
        )
    run = _pass(model, params, wanted, skip_first, mesh)
    shifts = {place: (part.mean_x, part.mean_y) for place, part in run(first, {}).items()}
    total: dict[Place, Moments] = {}
    for batch in batches():
        parts = run(batch, shifts)
        total = {place: total[place].merge(part) for place, part in parts.items()} if total else parts
        on_batch()
    return {place: part.moved(*shifts[place]) for place, part in total.items()}


def check_wanted(model: LanguageModel, wanted: Mapping[Branch, Sequence[int]]) -> None:
    """Refuse branches that a model does not have.

    Raises:
        InputError: names the branch and the layer; or whole blocks of a model with residual streams.
    """
    config = model.config
    for branch, layers in wanted.items():
        if branch == "block" and layers and config.num_streams:
            raise InputError("a block on several residual streams is no map of one; linearise attention or MLPs.")
        for layer in layers:
            if not 0 <= layer < config.num_layers:
                raise InputError(f"there is no layer {layer} among 0 to {config.num_layers - 1}; name another.")
            if layer not in whole_layers(model, branch):
                raise InputError(f"layer {layer} has no whole {branch}: it is linear or dropped; name another.")


def whole_layers(model: LanguageModel, branch: Branch) -> tuple[int, ...]:
    """Layers whose branch is as it was trained."""
    names = {"attention": ("attn",), "mlp": ("mlp",), "block": ("attn", "mlp")}[branch]
    kinds = enumerate(model.config.kinds)
    return tuple(layer for layer, kind in kinds if all(getattr(kind, name) == "full" for name in names))


# ---------------------------------------------------------------- what passes between the branches


class Taps(NamedTuple):
    """Of one layer, [B, T, D] each."""

    x: Array
    attn: Array
    u: Array
    mlp: Array


@dataclass(frozen=True)
class TappedPath:
    """A residual path that also hands on what the branches read and add: :class:`Taps`, in place of the derivative of
    the skip path that ``leave`` leaves behind."""

    path: Any

    def enter(self, params: PyTree, h: Array, ctx: Any, shared: Any) -> tuple[Array, Any]:
        x_BTD, carry = self.path.enter(params, h, ctx, shared)
        return x_BTD, (carry, x_BTD)

    def between(self, params: PyTree, carry: Any, ctx: Any, attn_BTD: Array) -> tuple[Array, Any]:
        carry, x_BTD = carry
        u_BTD, carry = self.path.between(params, carry, ctx, attn_BTD)
        return u_BTD, (carry, x_BTD, attn_BTD, u_BTD)

    def leave(self, carry: Any, ctx: Any, mlp_BTD: Array) -> tuple[Array, Taps]:
        carry, x_BTD, attn_BTD, u_BTD = carry
        return self.path.leave(carry, ctx, mlp_BTD)[0], Taps(x_BTD, attn_BTD, u_BTD, mlp_BTD)


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

    def samples(x_BTD: Array, shift_D: Array) -> Array:
        x_BTD = x_BTD[:, skip_first:].astype(jnp.float32) - shift_D[None, None]
        return over_data(mesh, x_BTD.reshape(num_devices, -1, x_BTD.shape[-1]))

    @functools.partial(jax.jit, static_argnames="names")
    def step(
        block: PyTree, h: Array, ctx: Context, shared: Shared, shifts: list[Shift], *, names: tuple[Branch, ...]
    ) -> tuple[Array, list[Moments]]:
        new, aux = model.block_fn()(block, h, ctx, shared)
        taps = aux.skip_BTRR
        assert isinstance(taps, Taps)
        pairs = {
            "attention": (taps.x, taps.attn),
            "mlp": (taps.u, taps.mlp),
            "block": (taps.x, taps.attn + taps.mlp),  # not h' - x, which would round
        }
        reduce = jax.vmap(lambda x, y: Moments.of(x, y, with_yy=True))
        found = [reduce(*map(samples, pairs[name], shift)) for name, shift in zip(names, shifts, strict=True)]
        return over_data(mesh, new), jax.tree.map(lambda leaf: over_data(mesh, leaf), found)

    return enter, step


def _pass(
    model: LanguageModel, params: Params, wanted: Mapping[Branch, Sequence[int]], skip_first: int, mesh: Mesh | None
) -> Callable[[Mapping[str, np.ndarray], Mapping[Place, Shift]], dict[Place, Moments]]:
    """From a batch and shifts the moments of the samples minus their shifts (0 where there is none)."""
    num_layers = model.config.num_layers
    whole = dataclasses.replace(model.config, linear_attention=(), linear_mlp=(), dropped_attention=(), dropped_mlp=())
    enter, step = _programs(whole, model.machine, model.backend, skip_first, mesh)
    names_L = [tuple(name for name in BRANCHES if l in wanted.get(name, ())) for l in range(num_layers)]
    stop = max((l + 1 for l, names in enumerate(names_L) if names), default=0)
    weights = prepare(model, params, Schedule.of(num_layers), num_tokens=1, layout="list")
    ends, blocks = weights.embed_head, [tree for part in weights.parts for tree in part.blocks][:stop]
    if mesh is not None:
        ends, blocks = jax.device_put((ends, blocks), NamedSharding(mesh, PartitionSpec()))
    zero_D = np.zeros(model.config.embed_dim, np.float32)

    def moments(batch: Mapping[str, np.ndarray], shifts: Mapping[Place, Shift]) -> dict[Place, Moments]:
        inputs = {name: batch[name][:, :-1] for name in ("tokens", "document") if name in batch}
        inputs = put_batch(mesh, inputs, is_whole=True)
        shared, h = enter(ends, inputs)
        found: dict[Place, Moments] = {}
        for l, (block, names) in enumerate(zip(blocks, names_L, strict=False)):
            ctx = jax.tree.map(lambda leaf: leaf[0], model.context(ends, [block], inputs["tokens"], l, l + 1))
            shift = [shifts.get((name, l), (zero_D, zero_D)) for name in names]
            shift = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), shift)
            h, by_device = step(block, h, ctx, shared, shift, names=names)
            for name, stacked in zip(names, jax.device_get(by_device), strict=True):
                parts = [Moments(*(leaf[i] for leaf in stacked)) for i in range(len(stacked.count))]
                found[name, l] = functools.reduce(Moments.merge, parts[1:], parts[0].on_host())
        return found

    return moments
