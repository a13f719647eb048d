"""What a pod would do, without the pod: compile for its chips ahead of time, count, and estimate.

    python benchmarks/plan.py configs/d32s_idn.py --topology v5e:4x4 --mesh layer=16 --solver idn:n=24,k=2

compiles a decode step (``--forward``: a whole sequence; ``--train``: a training step) for v4, v5e, v5p or v6e slices or
for ``h100:8``, and prints the collectives it executes, bytes, FLOPs and memory of a chip and an estimate of its time,
beside two ways to run the same layers in order: tensor parallel, and as a ring. ``--no-compile`` prints the formula
(``benchmarks/plan_formula.py``) instead, for any number of chips. docs/scaling.md says what the estimate is.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.table import Column, Table

from benchmarks.hlo import Program
from benchmarks.hlo_text import COLLECTIVES
from benchmarks.plan_compile import Compiled, Work, compile_plan, held_bytes
from benchmarks.plan_formula import expected
from benchmarks.plan_prices import PricedSlice
from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config, LossConfig, MeshConfig, load_config
from snlp_jax.errors import InputError
from snlp_jax.layout import Spread, abstract_weights
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.mesh import AXES
from snlp_jax.planner.target import plain_kernels, plan_mesh, prepare_environment
from snlp_jax.solver import Schedule


@dataclass(frozen=True)
class Args:
    """Compile for a slice of chips that need not be here, count what the program does, and estimate its time."""

    config: Annotated[str, tyro.conf.Positional]
    """A config file, such as configs/d32s_idn.py."""
    topology: str
    """v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4, h100:8."""
    mesh: str = ""
    """Such as layer=8,tensor=2. Empty: all chips on the layer axis."""
    solver: str = ""
    """A setting in the notation of snlp_jax/notation.py. Empty: the first of the config's eval.solvers."""
    batch: int = 0
    """Sequences, over all chips. 0: one, or of a training step the config's train.batch_size."""
    context: int = 0
    """Tokens in the cache, or of a sequence. 0: the config's model.seq_len."""
    new_tokens: int = 1
    """Tokens of each sequence in a decode step."""
    forward: bool = False
    """Plan the forward pass over whole sequences in place of a decode step."""
    train: bool = False
    """Plan a training step of the config, with its loss, in place of a decode step."""
    sequential: Spread = "tensor"
    """How layers outside of the regions lie on the layer axis."""
    kernel_us: float | None = None
    """What every kernel takes besides its bytes and FLOPs, in microseconds; empty: the assumption of the chip."""
    twins: bool = True
    """Plan the two sequential passes as well."""
    compile: bool = True
    """With --no-compile the formula in place of a compiled program."""
    json: str = ""
    """File to write everything to."""

    @property
    def work(self) -> Work:
        if self.forward and self.train:
            raise InputError("--forward and --train are both given; choose one.")
        if self.train and not self.compile:
            raise InputError("there is no formula for --train; leave out --no-compile.")
        if min(self.batch, self.context) < 0 or self.new_tokens < 1:
            raise InputError("--batch and --context must be 0 or more, and --new-tokens at least 1.")
        kind = "train" if self.train else "forward" if self.forward else "decode"
        return Work(kind, self.batch or 1, self.context, self.new_tokens)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Arm:
    """One way to run the layers."""

    name: str
    schedule: Schedule
    sequential: Spread
    config: Config
    mesh: MeshConfig


@dataclass(frozen=True)
class Estimate:
    """Figures of one chip; times in seconds, of one step. None where only a compiled program has them."""

    name: str
    collectives: dict[str, int]
    payload: dict[str, int]
    held: int
    """Bytes of weights that lie on the chip, of a training step with the optimizer's state."""
    bytes_read: int
    bytes_written: int
    flops: float
    kernels: int
    memory: int | None
    memory_seconds: float
    """Of bytes and FLOPs."""
    exchange_seconds: float
    kernel_seconds: float

    @property
    def seconds(self) -> float:
        return self.memory_seconds + self.exchange_seconds + self.kernel_seconds


def main() -> None:
    run_plan(tyro.cli(Args, prog="python benchmarks/plan.py", description=__doc__))


def run_plan(args: Args) -> dict[str, Any]:
    """Plan, print a table and return what ``--json`` writes."""
    prepare_environment()
    chips, config = PricedSlice.parse(args.topology), plain_kernels(load_config(args.config))
    work = replace(args.work, context=args.context or config.model.seq_len)
    if args.train:
        config = replace(config, train=replace(config.train, batch_size=args.batch or config.train.batch_size))
        work = replace(work, batch_size=config.train.batch_size)
    arms = make_arms(args, config, chips)
    estimates = [plan_arm(arm, chips, work, args.kernel_us, args.compile) for arm in (arms if args.twins else arms[:1])]
    Console(highlight=False).print(make_table(estimates, chips, work))
    record = {
        "args": dataclasses.asdict(args),
        "chip": dataclasses.asdict(chips.chip),
        "work": dataclasses.asdict(work),
        "plans": [dataclasses.asdict(estimate) | {"seconds": estimate.seconds} for estimate in estimates],
    }
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")
    return record


def parse_mesh(text: str, chips: PricedSlice) -> MeshConfig:
    """``layer=8,tensor=2`` as a mesh of all chips; an empty text has all of them on the layer axis."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise InputError(f"mesh {text!r}: cannot read {part!r}; write data=, layer= or tensor= and a number.")
        sizes[name] = int(size)
    mesh = MeshConfig(**(sizes or {"layer": chips.num_chips}))
    places = mesh.data * mesh.layer * mesh.tensor
    if places != chips.num_chips:
        raise InputError(f"mesh {text!r} has {places} places, but {chips} has {chips.num_chips} chips; change one.")
    return mesh


def make_arms(args: Args, config: Config, chips: PricedSlice) -> list[Arm]:
    """The plan, then its two twins on the same chips."""
    mesh, num_layers = parse_mesh(args.mesh, chips), config.model.num_layers
    if config.model.replaced_layers:
        raise InputError(
            f"layers {config.model.replaced_layers} have linear or dropped branches, and the planner counts layers as "
            "trained; plan the model without them."
        )
    if args.work.batch_size % mesh.data and not args.train:
        raise InputError(f"--batch {args.work.batch_size} is not a multiple of data={mesh.data}; change one.")
    setting = args.solver or next(iter(config.eval.solvers), "seq")
    schedule, in_order = parse_schedule(setting, num_layers), Schedule.of(num_layers)
    if not args.train:
        return [
            Arm(setting, schedule, args.sequential, config, mesh),
            Arm("in order, tensor parallel", in_order, "tensor", config, widest_mesh(mesh, config.model.num_kv_heads)),
            Arm("in order, ring", in_order, "ring", config, mesh),
        ]
    wide = MeshConfig(mesh.data, 1, mesh.layer * mesh.tensor)
    return [
        Arm("this loss, layers spread", in_order, "ring", replace(config, mesh=mesh), mesh),
        Arm("this loss, tensor parallel", in_order, "ring", replace(config, mesh=wide), wide),
        Arm("no added loss, layers spread", in_order, "ring", replace(config, mesh=mesh, loss=LossConfig()), mesh),
    ]


def widest_mesh(mesh: MeshConfig, num_heads: int) -> MeshConfig:
    """The same chips, arranged so that as many as can share the heads do: those of the first axis must divide them."""
    num_chips = mesh.layer * mesh.tensor
    first = max(size for size in range(1, num_chips + 1) if num_chips % size == 0 and num_heads % size == 0)
    return MeshConfig(mesh.data, first, num_chips // first)


def plan_arm(arm: Arm, chips: PricedSlice, work: Work, kernel_us: float | None, is_compiled: bool) -> Estimate:
    """Compile one arm, or write down its formula, and estimate."""
    backend = chips.chip.backend
    launch = chips.latency.kernel_launch if kernel_us is None else kernel_us * 1e-6
    compiled: Compiled | None = None
    model = LanguageModel(arm.config.model, arm.config.machine, backend=backend)
    if is_compiled:
        mesh: Any = plan_mesh(arm.mesh, chips)
        compiled = compile_plan(arm.config, arm.schedule, mesh, work, backend=backend, sequential=arm.sequential)
        program = compiled.program
    else:
        shape = (arm.mesh.data, arm.mesh.layer, arm.mesh.tensor)
        mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
        weights = abstract_weights(model, arm.schedule, mesh, arm.sequential)
        program = expected(model, weights, mesh, work, chips.on_chip_bytes)
    held = held_bytes(model, arm.config, arm.schedule, mesh, work, arm.sequential)
    return estimate(arm.name, program, held, compiled, chips, launch)


def estimate(
    name: str, program: Program, held: int, compiled: Compiled | None, chips: PricedSlice, launch: float
) -> Estimate:
    """Price every operation of a program and add up."""
    exchanges = [op for op in program.ops if op.is_collective]
    kernels = [op for op in program.ops if not op.is_collective]
    return Estimate(
        name,
        {kind: count for kind, count in program.collectives.items() if count},
        {kind: size for kind, size in program.payload.items() if size},
        held,
        program.bytes_read,
        program.bytes_written,
        float(program.flops),
        program.num_kernels,
        None if compiled is None else compiled.memory,
        sum(chips.seconds(op, 0.0) for op in kernels),
        sum(map(chips.seconds, exchanges)),
        program.num_kernels * launch,
    )


def make_table(estimates: Sequence[Estimate], chips: PricedSlice, work: Work) -> Table:
    """One column a plan."""
    chip = chips.chip
    what = {
        "decode": f"{work.new_tokens} new token(s) after {work.context}",
        "forward": f"forward pass over {work.context} tokens",
        "train": f"training step, {work.context} tokens",
    }[work.kind]
    title = f"{chips}, batch {work.batch_size}: {what}"
    table = Table(Column("a chip, a step"), title=title, title_justify="left")
    for each in estimates:
        table.add_column(each.name, justify="right")
    for kind in COLLECTIVES:
        if any(kind in each.collectives for each in estimates):
            cells = [(each.collectives.get(kind, 0), each.payload.get(kind, 0)) for each in estimates]
            table.add_row(kind, *(f"{count} ({_bytes(size)})" if count else "0" for count, size in cells))
    row = lambda name, show: table.add_row(name, *map(show, estimates))  # noqa: E731
    row("kernels", lambda each: f"{each.kernels:,}")
    row("read from memory", lambda each: _bytes(each.bytes_read))
    row("written", lambda each: _bytes(each.bytes_written))
    row("GFLOPs in products", lambda each: f"{each.flops / 1e9:,.3g}")
    row("weights and optimizer" if work.kind == "train" else "weights", lambda each: _bytes(each.held))
    if any(each.memory is not None for each in estimates):
        row(f"memory, of {_bytes(chip.hbm_bytes)}", lambda each: _share(each.memory, chip.hbm_bytes))
    table.add_section()
    row("memory and FLOPs", lambda each: _time(each.memory_seconds))
    row("exchanges", lambda each: _time(each.exchange_seconds))
    row("kernel launches", lambda each: _time(each.kernel_seconds))
    row("estimate", lambda each: _time(each.seconds))
    row("against the first", lambda each: f"{each.seconds / estimates[0].seconds:.2f} x")
    return table


def _bytes(size: float) -> str:
    unit = int(np.clip(np.log10(max(size, 1)) // 3, 0, 3))
    return f"{size / 1000**unit:,.3g} {('B', 'kB', 'MB', 'GB')[unit]}"


def _share(memory: int | None, capacity: float) -> str:
    return "" if memory is None else f"{_bytes(memory)} ({memory / capacity:.0%})"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us" if seconds < 0.01 else f"{seconds * 1e3:,.0f} ms"


if __name__ == "__main__":
    run_entry(main)
