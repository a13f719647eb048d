"""What a run will cost, counted and measured before it begins, and whether it fits."""

import dataclasses
from collections import Counter

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from snlp_jax.config import Config, LossConfig
from snlp_jax.data.chat import prepare_data
from snlp_jax.data.pipeline import TokenData, held_out_batches
from snlp_jax.data.tokenizer import check_vocab
from snlp_jax.errors import InputError
from snlp_jax.eval.report import TABLE_WIDTH
from snlp_jax.memory import GIB, capacity_of
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.chips import Slice, chip_of
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.parallel.processes import is_first
from snlp_jax.planner.target import plain_kernels, plan_mesh, prepare_environment
from snlp_jax.train.flops import run_flops, step_flops
from snlp_jax.train.loss import Plan
from snlp_jax.train.memory import refusal, state_bytes, step_bytes
from snlp_jax.train.optim import param_labels
from snlp_jax.train.start import data_config
from snlp_jax.train.step import abstract_state, optimizer_of

ASSUMED_MFU = 0.4
"""Share of the data sheet's peak that a step is taken to reach. An assumption: nothing is run for it."""


class Budget:
    """What a run takes. Bytes are those of one device."""

    def __init__(self, config: Config, topology: str = "") -> None:
        """Count, and compile the largest step ahead of time, see :func:`plan_run`."""
        data: TokenData | None = None
        if topology:
            prepare_environment()
            chips = Slice.parse(topology)
            config, chip, device = plain_kernels(config), chips.chip, chips.chip.name
            mesh, capacity = plan_mesh(config.mesh, chips), int(chip.hbm_bytes)
            model = LanguageModel(config.model, config.machine, backend=chip.backend)
        else:
            mesh, model = make_mesh(config.mesh), LanguageModel(config.model, config.machine)
            device = jax.devices()[0].device_kind
            chip, capacity = chip_of(device), capacity_of(mesh)  # type: ignore[assignment]
            data = prepare_data(data_config(config, resume=False))
            check_vocab(data.tokenizer, config.model.vocab_size)
        state = abstract_state(model, optimizer_of(model, config, mesh), config, mesh)
        self.config, self.devices = config, f"{mesh.size} x {device}"
        self.params = _params_by_group(model)
        """Numbers of parameters by group of the optimizer."""
        self.flops = flops_of_parts(config)
        """Of a step's matrix products, by part; a term with all that it needs besides the plain step."""
        self.run_flops = run_flops(config)
        """Of all steps, each with the terms that have begun by then."""
        self.tokens = config.train.num_steps * config.train.batch_size * config.model.seq_len
        """That the run reads, repetitions included."""
        self.train_tokens = None if data is None else len(data.train)
        """That the corpus holds; None where nobody looked."""
        self.seconds = None if chip is None else self.run_flops / (ASSUMED_MFU * chip.bf16_flops * mesh.size)
        """At ``ASSUMED_MFU``; None where the peak of the device is not known."""
        self.state_bytes = state_bytes(state)
        seq_len, row = config.model.seq_len, None
        if data is not None:
            row = held_out_batches(data, seq_len=seq_len, batch_size=1, num_batches=1)[0]
        self.step_bytes = step_bytes(model, config, mesh, state, row)
        """Of the compiled step: the state, and what it needs besides; None where the compiler refused."""
        self.capacity: int | None = capacity
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
    budget = Budget(config, topology)
    console = Console(highlight=False, quiet=not is_first())
    console.print(make_table(budget), width=None if console.is_terminal else TABLE_WIDTH)
    if budget.step_bytes is None or (budget.capacity is not None and budget.step_bytes > budget.capacity):
        raise InputError(refusal(budget.step_bytes, budget.capacity))
    return budget


def flops_of_parts(config: Config) -> dict[str, float]:
    """FLOPs of a step by part. A term that draws one of several sizes a step counts with their mean."""
    plain, base = step_flops(dataclasses.replace(config, loss=LossConfig()), Plan()), step_flops(config, Plan())
    parts = {"sequential pass, gradient, optimizer": plain}
    if base > plain:
        parts["mtp"] = base - plain
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


def make_table(budget: Budget) -> Table:
    """Everything, one line each."""
    params, step, num_steps = sum(budget.params.values()), sum(budget.flops.values()), budget.config.train.num_steps
    rows = [("parameters", f"{params:,}", ", ".join(f"{name} {size:,}" for name, size in budget.params.items()))]
    for name, flops in budget.flops.items():
        rows.append(("FLOPs a step", f"{flops:.3g}", f"{name} ({flops / step:.0%})"))
    rows.append(("FLOPs", f"{budget.run_flops:.3g}", f"{num_steps:,} steps; terms count once they begin"))
    if budget.seconds is None:
        rows.append(("time", "?", f"the peak of {budget.devices} is not known"))
    else:
        rows.append(("time", _duration(budget.seconds), f"{budget.devices}, assuming {ASSUMED_MFU:.0%} of its peak"))
    held = budget.train_tokens
    rows.append(("tokens", f"{budget.tokens:,}", f"{budget.tokens / held:.2f} epochs of {held:,}" if held else ""))
    parts = ", ".join(f"{name} {_size(size)}" for name, size in budget.state_bytes.items())
    rows.append(("state, a device", _size(sum(budget.state_bytes.values())), parts))
    if budget.step_bytes is not None:
        limit = budget.capacity
        share = f"{budget.step_bytes / limit:.1%} of {_size(limit)}" if limit else ""
        rows.append(("compiled step, a device", _size(budget.step_bytes), share))
    title = f"{budget.config.name}: the plan"
    table = Table("", "", "", title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.columns[1].justify, table.columns[2].overflow = "right", "fold"
    for row in rows:
        table.add_row(*row)
    return table


def _size(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB else f"{size / 2**20:.3g} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
