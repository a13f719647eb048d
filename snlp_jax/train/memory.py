"""What a training state takes of a device's memory, and whether it fits."""

from jax.sharding import Mesh

from snlp_jax.errors import InputError
from snlp_jax.memory import GIB, capacity_of
from snlp_jax.parallel.sharding import bytes_per_device
from snlp_jax.train.step import TrainState


def check_state(state: TrainState, mesh: Mesh) -> None:
    """Hold state and gradients against a device's memory, by their shapes alone; every run does so before it compiles.

    Raises:
        InputError: they do not fit, whatever the activations need besides.
    """
    capacity, needed = capacity_of(mesh), sum(state_bytes(state).values())
    if capacity is not None and needed > capacity:
        raise InputError(refusal(needed, capacity, is_state_alone=True))


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
