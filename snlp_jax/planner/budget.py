"""What a run will cost, counted and measured before it begins, and whether it fits."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from snlp_jax.config import Config, LossConfig
from snlp_jax.data.chat import prepare_data
from snlp_jax.data.pipeline import TokenData, held_out_batches
from snlp_jax.data.tokenizer import check_vocab
from snlp_jax.errors import InputError
from snlp_jax.eval.report import TABLE_WIDTH
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.chips import Slice, chip_of
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.parallel.processes import is_first
from snlp_jax.planner.target import plain_kernels, plan_mesh, prepare_environment
from snlp_jax.train.flops import run_flops, step_flops
from snlp_jax.train.loss import Plan
from snlp_jax.train.memory import GIB, capacity_of, refusal, state_bytes
from snlp_jax.train.optim import param_labels
from snlp_jax.train.start import data_config
from snlp_jax.train.step import TrainState, abstract_state, make_step, optimizer_of
from snlp_jax.types import Batch

ASSUMED_MFU = 0.4
"""Share of the data sheet's peak that a step is taken to reach. An assumption: nothing is run for it."""


@dataclass(frozen=True)
class Budget:
    """Bytes are those of one device."""

    device: str
    num_devices: int
    params: dict[str, int]
    """Numbers of parameters by group of the optimizer."""
    flops: dict[str, float]
    """Of a step's matrix products, by part; a term with all that it needs besides the plain step."""
    run_flops: float
    """Of all steps, each with the terms that have begun by then."""
    tokens: int
    """That the run reads, repetitions included."""
    train_tokens: int | None
    """That the corpus holds; None where nobody looked."""
    seconds: float | None
    """At ``ASSUMED_MFU``; None where the peak of the device is not known."""
    state_bytes: dict[str, int]
    step_bytes: int | None
    """Of the compiled step: the state, and what it needs besides; None where the compiler refused."""
    capacity: int | None
    """None where the device does not tell."""


def plan_run(config: Config, topology: str = "") -> Budget:
    """Count, compile the largest step ahead of time, print it all; nothing is run and nothing written but the token
    cache.

    Args:
        topology: chips that need not be here, such as ``v5e:2x4``, which ``mesh`` must fill; then the corpus is not
            looked at, and attention is XLA's.

    Raises:
        InputError: the run does not fit, after printing; or it has another mistake that would stop it.
    """
    chips = None
    if topology:
        prepare_environment()
        chips = Slice.parse(topology)
        config = plain_kernels(config)
    mesh = make_mesh(config.mesh) if chips is None else plan_mesh(config.mesh, chips)
    model = LanguageModel(config.model, config.machine, backend=None if chips is None else chips.chip.backend)
    data = None
    if chips is None:
        data = prepare_data(data_config(config, resume=False))
        check_vocab(data.tokenizer, config.model.vocab_size)
    state = abstract_state(model, optimizer_of(model, config, mesh), config, mesh)
    device = jax.devices()[0].device_kind if chips is None else chips.chip.name
    chip = chip_of(device) if chips is None else chips.chip
    flops, total = flops_of_parts(config), run_flops(config)
    capacity = capacity_of(mesh) if chips is None else int(chips.chip.hbm_bytes)
    budget = Budget(
        device=device,
        num_devices=mesh.size,
        params=_params_by_group(model),
        flops=flops,
        run_flops=total,
        tokens=config.train.num_steps * config.train.batch_size * config.model.seq_len,
        train_tokens=None if data is None else len(data.train),
        seconds=None if chip is None else total / (ASSUMED_MFU * chip.bf16_flops * mesh.size),
        state_bytes=state_bytes(state),
        step_bytes=_measure_step(model, config, mesh, state, data),
        capacity=capacity,
    )
    console = Console(highlight=False, quiet=not is_first())
    if not console.is_terminal:
        console = Console(highlight=False, quiet=not is_first(), width=TABLE_WIDTH)
    console.print(make_table(budget, config))
    if budget.step_bytes is None or (capacity is not None and budget.step_bytes > capacity):
        raise InputError(refusal(config, budget.step_bytes, capacity))
    return budget


def flops_of_parts(config: Config) -> dict[str, float]:
    """FLOPs of a step by part. A term that draws one of several sizes a step counts with their mean."""
    plain = dataclasses.replace(config, loss=LossConfig())
    parts = {"sequential pass, gradient, optimizer": step_flops(plain, Plan())}
    base = step_flops(config, Plan())
    if base > parts["sequential pass, gradient, optimizer"]:
        parts["mtp"] = base - parts["sequential pass, gradient, optimizer"]
    for name, term in config.loss.terms.items():
        drawn = [(size,) for size in term.region_sizes] if term.sample_region else [term.region_sizes]
        parts[name] = float(np.mean([step_flops(config, Plan(((name, sizes),))) for sizes in drawn])) - base
    return parts


def _params_by_group(model: LanguageModel) -> dict[str, int]:
    params = model.abstract_params()
    groups: Counter[str] = Counter()
    for label, leaf in zip(jax.tree.leaves(param_labels(params)), jax.tree.leaves(params), strict=True):
        groups[label] += leaf.size
    return dict(groups.most_common())


def _measure_step(
    model: LanguageModel, config: Config, mesh: Mesh, state: TrainState, data: TokenData | None
) -> int | None:
    """Bytes of the compiled step that computes all terms, those that draw a size with their largest."""
    plan = Plan(
        tuple(
            (name, (max(term.region_sizes),) if term.sample_region else term.region_sizes)
            for name, term in config.loss.terms.items()
        )
    )
    step: Any = make_step(model, optimizer_of(model, config, mesh), config, mesh)
    try:
        memory = step.lower(state, _abstract_batch(config, mesh, data), plan=plan).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return needed + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def _abstract_batch(config: Config, mesh: Mesh, data: TokenData | None) -> Batch:
    """The shapes of a batch, with weights and documents where the data has them."""
    seq_len, rows = config.model.seq_len, config.train.batch_size
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    row = {"tokens": np.zeros((1, seq_len + 1), np.int32)}
    if data is not None:
        row = held_out_batches(data, seq_len=seq_len, batch_size=1, num_batches=1)[0]
    place = lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype, sharding=sharding)  # noqa: E731
    return Batch(**jax.tree.map(place, dict(row)))


def make_table(budget: Budget, config: Config) -> Table:
    """Everything, one line each."""
    title = f"{config.name}: the plan"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    total = sum(budget.params.values())
    table.add_row("parameters", f"{total:,}", ", ".join(f"{name} {size:,}" for name, size in budget.params.items()))
    step = sum(budget.flops.values())
    for name, flops in budget.flops.items():
        table.add_row("FLOPs a step", f"{flops:.3g}", f"{name} ({flops / step:.0%})")
    table.add_row("FLOPs", f"{budget.run_flops:.3g}", f"{config.train.num_steps:,} steps; terms count once they begin")
    if budget.seconds is None:
        table.add_row("time", "?", f"the peak of {budget.device!r} is not known")
    else:
        where = f"{budget.num_devices} x {budget.device}"
        table.add_row("time", _duration(budget.seconds), f"{where}, assuming {ASSUMED_MFU:.0%} of its peak")
    epochs = "" if budget.train_tokens is None else (
        f"{budget.tokens / budget.train_tokens:.2f} epochs of {budget.train_tokens:,}"
    )  # fmt: skip
    table.add_row("tokens", f"{budget.tokens:,}", epochs)
    state = sum(budget.state_bytes.values())
    parts = ", ".join(f"{name} {_size(size)}" for name, size in budget.state_bytes.items())
    table.add_row("state, a device", _size(state), parts)
    if budget.step_bytes is not None:
        limit = budget.capacity
        share = "" if limit is None else f"{budget.step_bytes / limit:.1%} of {_size(limit)}"
        table.add_row("compiled step, a device", _size(budget.step_bytes), share)
    return table


def _size(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB else f"{size / 2**20:.3g} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
