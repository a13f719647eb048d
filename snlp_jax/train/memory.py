"""What a training state takes of a device's memory, and whether it fits."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.config import Config
from snlp_jax.errors import InputError
from snlp_jax.memory import GIB, capacity_of, free_of
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.sharding import bytes_per_device
from snlp_jax.train.loss import Plan
from snlp_jax.train.step import TrainState, make_step, optimizer_of
from snlp_jax.types import Batch

SMALL_SHARE = 32
"""A state that takes less than one part in so many of what is free is taken to fit with all that a step needs."""


def check_state(state: TrainState, mesh: Mesh) -> None:
    """Hold state and gradients against a device's memory, by their shapes alone; every run does so before it compiles.

    Raises:
        InputError: they do not fit, whatever the activations need besides.
    """
    capacity, needed = capacity_of(mesh), sum(state_bytes(state).values())
    if capacity is not None and needed > capacity:
        raise InputError(refusal(needed, capacity, is_state_alone=True))


def check_step(
    model: LanguageModel, config: Config, mesh: Mesh, state: TrainState, row: Mapping[str, np.ndarray]
) -> None:
    """Compile the largest step of a run whose state is not small beside what is free, and hold it against that, before
    anything is allocated. ``row`` as in :func:`step_bytes`.

    Raises:
        InputError: it does not fit.
    """
    free = free_of(mesh)
    if free is None or SMALL_SHARE * sum(state_bytes(state).values()) < free:
        return
    needed = step_bytes(model, config, mesh, state, row)
    if needed is None or needed > free:
        raise InputError(refusal(needed, free))


def step_bytes(
    model: LanguageModel,
    config: Config,
    mesh: Mesh,
    state: TrainState,
    row: Mapping[str, np.ndarray] | None = None,
) -> int | None:
    """Bytes on a device of the compiled step that computes all terms, those that draw a size with their largest: the
    state, and what it needs besides; None where the compiler refused.

    Args:
        row: a window, or several, [B, ...] by its fields, whose shapes count; by default tokens alone.
    """
    largest = lambda term: (max(term.region_sizes),) if term.sample_region else term.region_sizes  # noqa: E731
    plan = Plan(tuple((name, largest(term)) for name, term in config.loss.terms.items()))
    sharding, num_rows = NamedSharding(mesh, PartitionSpec("data")), config.train.batch_size
    row = row or {"tokens": np.zeros((1, config.model.seq_len + 1), np.int32)}
    place = lambda leaf: jax.ShapeDtypeStruct((num_rows, *leaf.shape[1:]), leaf.dtype, sharding=sharding)  # noqa: E731
    batch = Batch(**{name: place(leaf) for name, leaf in row.items()})
    step: Any = make_step(model, optimizer_of(model, config, mesh), config, mesh)
    try:
        program = step.lower(state, batch, plan=plan).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    memory = program.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return needed + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def refusal(needed: int | None, capacity: int | None, *, is_state_alone: bool = False) -> str:
    """One sentence: what is too large, and what would make it smaller."""
    what, remedies = "the parameters, the optimizer's state and the gradients", ""
    if not is_state_alone:
        what = "a training step"
        remedies = "raise train.num_microbatches, set model.remat=True, lower model.seq_len, "
    amount = "more memory than the compiler can place" if needed is None else f"{needed / GIB:.3g} GiB"
    limit = "" if capacity is None else f" of the {capacity / GIB:.3g} GiB"
    remedies += "spread it over more devices (--mesh.data) or choose a smaller model"
    return f"{what} would take {amount}{limit} on each device; {remedies}."


def state_bytes(state: TrainState) -> dict[str, int]:
    params = bytes_per_device(state["params"])
    others = {name: tree for name, tree in state.items() if name not in ("params", "opt_state", "step")}
    parts = {"parameters": params, "optimizer": bytes_per_device(state["opt_state"]), "gradients": params}
    return parts | {name: bytes_per_device(tree) for name, tree in others.items()}
