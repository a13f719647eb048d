"""Time of forward passes, cached steps and their parts: sequential against layer-parallel, on random weights.

    python benchmarks/speed.py                           the cells of this backend's preset, the most important first
    python benchmarks/speed.py --preset quick            a small model, a minute
    python benchmarks/speed.py --kinds cached --shape d2048 --contexts 512 --batches 1 8
    python benchmarks/speed.py --num-layers 16 --embed-dim 256 --num-heads 4 --lengths 128 --solvers idn:n=8,k=1

What the kinds of cells time is said in benchmarks/speed_cells.py and benchmarks/speed_parts.py. All programs of a cell
are compiled ahead of time, their weights cast and laid out outside and passed as arguments, and they run round robin,
every second round backwards, after a warm-up. The fair twin is the fastest sequential form: a scan over the stack, or
layers unrolled over a list, the latter on a GPU also with the memory layout of XLA's choice; on a GPU again without
command buffers (CUDA graphs), and with loops in them too, in a process of its own each. Limits are the bandwidth of a
copy and the rate of a matrix product, measured in the same run. Nothing is said about quality, which random weights do
not have. Writes JSON after every cell, a table in Markdown and, with matplotlib, a plot.
"""

import dataclasses
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks.machine import (
    ROOT,
    SHAPES,
    Dtype,
    ShapeArgs,
    header,
    made_up,
    memory_left,
    out_path,
    random_params,
)
from benchmarks.speed_cells import (
    Cell,
    Form,
    Job,
    Kind,
    Layout,
    Setup,
    cached_jobs,
    forward_jobs,
    machine_of,
    region_jobs,
)
from benchmarks.speed_parts import part_jobs, product_jobs, train_jobs
from benchmarks.speed_presets import PRESETS, default_settings, first_settings
from benchmarks.speed_report import markdown, plot, terminal_table
from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.infer.bench import measure_limits
from snlp_jax.io.files import atomic_write
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Chunkwise

CommandBuffers = Literal["each", "default", "off", "all"]
LONG = 64
"""Tokens from which a CPU is also timed with an unrolled region."""
_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
COMMAND_BUFFERS = {"off": "", "all": _GRAPHS}


@dataclass(frozen=True)
class Args(ShapeArgs):
    """Time forward passes, cached steps and their parts, sequential against layer-parallel."""

    preset: Literal["auto", "cpu", "gpu", "first", "quick"] = "auto"
    """auto: that of this backend. Left aside where kinds, lengths, batches, contexts or a shape are given."""
    kinds: tuple[Kind, ...] = ()
    """forward, cached, region, product, parts, train; of a preset its cells of these kinds, with the other flags
    forward."""
    lengths: tuple[int, ...] = ()
    """Tokens of a sequence that pass through the layers."""
    batches: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    """Tokens in the cache before them, for the kinds that have one."""
    dtypes: tuple[Dtype, ...] = ()
    """Empty: float32 on a CPU, bfloat16 elsewhere; of a preset as it says."""
    solvers: tuple[str, ...] = ()
    """Settings in the notation of snlp_jax/notation.py; empty: the paper's rows, scaled to the depth."""
    layouts: tuple[Layout, ...] = ()
    """Of the solver: stack, list, or mixed (a list for the layers in order, a stack for the region). Empty: mixed, for
    long sequences on a CPU list too."""
    command_buffers: CommandBuffers = "each"
    """On a GPU: in this process as XLA has them by default, and in processes of their own without any and with loops
    too; or one of these alone."""
    repeats: int = 20
    calls: int = 0
    """Runs issued back to back in one reading; 0: 1 on a CPU, 5 elsewhere, to hide the host's dispatch."""
    steps: int = 0
    """Tokens or iterations in a row in one run of kinds that can; 0: 8 on a CPU, 32 elsewhere."""
    time_budget: float = 480.0
    """Seconds after which nothing new is compiled; the rest is listed as skipped."""
    out: str = ""
    """Empty: benchmarks/results/NAME_DEVICE_DATE.json; table and plot lie beside it."""
    name: str = "speed"

    def __post_init__(self) -> None:
        numbers = (*self.lengths, *self.batches, *self.contexts, self.repeats)
        if min(numbers) < 1:
            raise InputError("lengths, batches, contexts and repeats must all be at least 1.")


def main(args: Args) -> dict[str, Any]:
    """Measure everything and return what the JSON file holds. The file is rewritten after each cell."""
    # Before jax looks for devices: processes with other flags share the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    began, on_cpu = time.perf_counter(), jax.default_backend() == "cpu"
    cells, custom = cells_of(args, on_cpu)
    mode = args.command_buffers if jax.default_backend() == "gpu" else "default"
    report = header(custom, dataclasses.asdict(args) | {"out": ""}) | {"command_buffers": mode}
    for cell in cells:
        for setting in settings_of(args, _config(cell, custom)):  # a mistake is told before anything is measured
            parse_schedule(setting, _config(cell, custom).num_layers)
    if mode in COMMAND_BUFFERS:
        cells = [cell for cell in cells if cell.kind in ("cached", "region") and cell.length == 1]
    out, console = out_path(args.out, args.name, report), Console(width=None if sys.stdout.isatty() else 150)
    if mode == "each":
        for other in COMMAND_BUFFERS:
            console.print(f"command buffers: {other} ...", markup=False)
            add_child(report, args, other, 0.2 * args.time_budget)
    deadline = began + args.time_budget
    calls, steps = args.calls or (1 if on_cpu else 5), args.steps or (8 if on_cpu else 32)
    setup: Setup | None = None
    made_for: tuple | None = None
    for index, cell in enumerate(cells):
        left = deadline - time.perf_counter()
        share = max(left / (len(cells) - index), min(left, 0.2 * args.time_budget))
        where = dataclasses.asdict(cell)
        if left <= 0:
            report["skipped"].append(where | {"why": "no time left"})
            continue
        config = _config(cell, custom)
        if reason := too_large(config, cell, on_cpu):
            report["skipped"].append(where | {"why": reason})
            continue
        if cell.dtype not in report["limits"]:
            report["limits"][cell.dtype] = measure_limits(jnp.dtype(cell.dtype), on_cpu)
        settings = settings_of(args, config)
        makes = (cell.shape, cell.dtype, cell.decode_attention, settings)
        if cell.kind != "train" and made_for != makes:
            setup, made_for = None, makes
            gc.collect()
            model = LanguageModel(config, machine_of(cell))
            setup = Setup(model, random_params(model), settings)
        jobs = jobs_of(setup, config, cell, args, on_cpu, steps)
        alive = compile_all(jobs, where, report, time.perf_counter() + 0.8 * share, deadline)
        measure(alive, args.repeats, calls, time.perf_counter() + max(share / 5, 5.0))
        row = where | {"command_buffers": "default" if mode == "each" else mode}
        row |= summarize(alive, report["limits"][cell.dtype])
        report["cells"].append(row)
        report["elapsed_s"] = round(time.perf_counter() - began, 1)
        report["load_average"]["end"] = os.getloadavg()[0]
        atomic_write(out, json.dumps(report, indent=1) + "\n")
        console.print(terminal_table(row))
        del jobs, alive
    atomic_write(out, json.dumps(report, indent=1) + "\n")
    for who in report["skipped"] + report["failed"]:
        console.print("not measured:", *(f"{key}={value}" for key, value in who.items()), markup=False)
    atomic_write(out.with_suffix(".md"), markdown(report))
    drawn = plot(report, out.with_suffix(".png"))
    console.print(f"{time.perf_counter() - began:.0f} s; wrote {out}, .md{' and .png' if drawn else ''}", markup=False)
    return report


def cells_of(args: Args, on_cpu: bool) -> tuple[list[Cell], ModelConfig]:
    """What to time, and the model of the cells whose shape is "custom"."""
    custom = made_up(args)
    names = ("num_layers", "embed_dim", "num_heads", "vocab_size", "seq_len", "window_pattern")
    is_custom = args.shape != "auto" or any(getattr(args, name) is not None for name in names)
    if not (args.lengths or args.batches or args.contexts or is_custom):
        name: Any = args.preset if args.preset != "auto" else ("cpu" if on_cpu else "gpu")
        cells = [cell for cell in PRESETS[name] if not args.kinds or cell.kind in args.kinds]
        return [cell for cell in cells if not args.dtypes or cell.dtype in args.dtypes], custom
    dtypes: Any = args.dtypes or (("float32",) if on_cpu else ("bfloat16",))
    lengths, context = args.lengths or (1,), args.contexts or (min(256, custom.seq_len),)
    cells = []
    for kind, dtype, batch, length in itertools.product(
        args.kinds or ("forward",), dtypes, args.batches or (1,), lengths
    ):
        # Only what a cache makes sense for; a region and its parts have one at one token.
        cached = kind == "cached" or (kind in ("region", "parts") and length == 1)  # a product reads no cache
        cells += [Cell(kind, "custom", dtype, batch, length, c) for c in (context if cached else (0,))]
    return cells, custom


def settings_of(args: Args, config: ModelConfig) -> tuple[str, ...]:
    settings = args.solvers or default_settings(config.num_layers, config.num_streams > 0)
    if args.preset == "first" and not args.solvers and not config.num_streams:
        settings = first_settings(config.num_layers)
    return settings[:2] if args.preset == "quick" and not args.solvers else settings


def jobs_of(setup: Setup | None, config: ModelConfig, cell: Cell, args: Args, on_cpu: bool, steps: int) -> list[Job]:
    """The sequential forms first: without them nothing can be said."""
    if cell.kind == "train":
        return train_jobs(config, cell)
    assert setup is not None
    rows, largest = cell.batch * cell.length, max(setup.settings, key=lambda name: _region_size(setup, name))
    one_row = rows == 1 and not on_cpu
    sequential = [Form("stack"), Form("list")] + [Form("list", is_chosen=True)] * one_row
    forms: dict[str, list[Form]] = {"seq": sequential}
    usual: tuple[Layout, ...] = args.layouts or (("mixed", "list") if on_cpu and rows >= LONG else ("mixed",))
    for index, setting in enumerate(setup.settings):
        is_fused = any(isinstance(region.stage, Chunkwise) for region in setup.schedules[setting].regions)
        layouts = [layout for layout in usual if not (layout == "list" and is_fused and cell.kind == "cached")]
        forms[setting] = [Form(layout, is_chosen) for layout in layouts for is_chosen in (one_row,)]
        if one_row and index == 0:
            forms[setting].append(Form("mixed"))
    if cell.kind == "forward":
        return forward_jobs(setup, cell, forms)
    if cell.kind == "cached":
        return cached_jobs(setup, cell, forms, steps)
    plain = next(name for name in (largest, *setup.settings) if "stage=" not in name)
    if cell.kind == "product":
        return product_jobs(setup, cell, plain, steps)
    if cell.kind == "parts":
        return part_jobs(setup, cell, plain, Form("stack", is_chosen=one_row))
    own = [Form("stack")] + [Form("stack", True)] * one_row + [Form("list")] * (on_cpu and rows >= LONG)
    return region_jobs(setup, cell, plain, {"seq": sequential, plain: own}, steps)


def compile_all(
    jobs: list[Job], where: dict[str, Any], report: dict[str, Any], deadline: float, last: float
) -> list[Job]:
    """Compile and run each twice; what fails or comes too late is told in the report. A cell without both a sequential
    and a parallel form says nothing: these two may take until the ``last`` moment."""
    alive: list[Job] = []
    for job in jobs:
        is_pair = len({other.is_sequential for other in alive}) == 2
        if time.perf_counter() > (deadline if is_pair else last):
            report["skipped"].append(where | job.name | {"why": "no time left in this cell"})
            continue
        try:
            job.run = job.make(job)
            jax.block_until_ready(job.run())
            left = jax.block_until_ready(job.run())
            floats = [leaf for leaf in jax.tree.leaves(left) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            job.facts["is_finite"] = all(bool(jnp.isfinite(leaf).all()) for leaf in floats)
            alive.append(job)
        except (RuntimeError, ValueError) as error:  # out of memory, or a kernel that refuses the shape
            report["failed"].append(where | job.name | {"error": str(error).splitlines()[0][:300]})
    return alive


def measure(jobs: list[Job], repeats: int, calls: int, deadline: float) -> None:
    """Rounds over all jobs, every second one backwards; at least five, however late it is."""
    for index in range(repeats):
        if index >= 5 and time.perf_counter() > deadline:
            return
        for job in jobs[:: -1 if index % 2 else 1]:
            assert job.run is not None
            began, left = time.perf_counter(), None
            for _ in range(calls):
                left = job.run()
            issued = time.perf_counter()
            jax.block_until_ready(left)
            job.seconds.append((time.perf_counter() - began) / calls / job.units)
            job.dispatch.append((issued - began) / calls / job.units)


def summarize(jobs: list[Job], limits: dict[str, float]) -> dict[str, Any]:
    """Times, the fair twin, speed-ups and fractions of the machine's limits."""
    sequential = [job for job in jobs if job.is_sequential]
    twin = min(sequential, key=lambda job: float(np.median(job.seconds)), default=None)
    fastest = min((min(job.seconds) for job in sequential), default=None)
    rows = []
    for job in jobs:
        lower, median, upper = (float(q) for q in np.quantile(job.seconds, (0.25, 0.5, 0.75)))
        by_bytes, by_flops = job.num_bytes / limits["copy_bytes_per_s"], job.flops / limits["matmul_flops_per_s"]
        row = job.name | {"runs": len(job.seconds), "median_ms": 1e3 * median, "lower_quartile_ms": 1e3 * lower}
        row |= {"upper_quartile_ms": 1e3 * upper, "min_ms": 1e3 * min(job.seconds)}
        row |= {"dispatch_ms": 1e3 * float(np.median(job.dispatch))}
        if twin is not None and fastest is not None:
            ratios = np.divide(twin.seconds, job.seconds)  # of the same round
            row |= {"speedup": float(np.median(twin.seconds)) / median, "speedup_of_min": fastest / min(job.seconds)}
            row |= {f"speedup_{name}": float(np.quantile(ratios, q)) for name, q in (("lower", 0.25), ("upper", 0.75))}
        row |= {"bytes": job.num_bytes, "flops": job.flops, "limit_ms": 1e3 * max(by_bytes, by_flops)}
        row |= {"fraction_of_copy": by_bytes / median, "fraction_of_matmul": by_flops / median}
        if peak := job.facts.get("peak_flops"):
            row["mfu"] = job.flops / median / peak
        rows.append(row | job.facts)
    return {"twin": None if twin is None else twin.name, "jobs": rows}


def too_large(config: ModelConfig, cell: Cell, on_cpu: bool) -> str:
    """Why a cell is left out for want of memory; empty where it fits."""
    tables = (2 + len(config.value_embed_layers)) * config.padded_vocab_size * config.embed_dim
    num_params = config.block_weights + tables
    item = jnp.dtype(cell.dtype).itemsize
    # Drawn in float32 and cast; stacks, lists and the forms whose layout XLA chooses; training with its optimizer.
    need = num_params * (24 if cell.kind == "train" else 4 + (3 if on_cpu else 5) * item)
    left = memory_left()
    return f"needs about {need / 1e9:.1f} GB of {left / 1e9:.1f}" if left and need > 0.9 * left else ""


def add_child(report: dict[str, Any], args: Args, mode: str, seconds: float) -> None:
    """The latency-bound cells again in a process of its own, whose XLA reads other flags."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed.json"
        own = dataclasses.replace(args, command_buffers=mode, time_budget=0.7 * seconds, out=str(out))  # type: ignore[arg-type]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer={COMMAND_BUFFERS[mode]}".strip()
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths}
        command = [sys.executable, str(Path(__file__).resolve()), *flags_of(own)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
            why = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        except subprocess.TimeoutExpired:
            why = [f"it took more than {seconds:.0f} s"]
        found = json.loads(out.read_text()) if out.exists() else None
    if found is None:
        report["failed"].append({"command_buffers": mode, "error": why[0][:300]})
        return
    report["cells"] += found["cells"]
    for name in ("skipped", "failed"):
        report[name] += [{"command_buffers": mode} | row for row in found[name]]


def flags_of(args: Args) -> list[str]:
    """The command line that gives ``args``."""
    flags: list[str] = []
    for each in dataclasses.fields(args):
        value = getattr(args, each.name)
        if value != each.default:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{each.name.replace('_', '-')}", *map(str, values)]
    return flags


def _config(cell: Cell, custom: ModelConfig) -> ModelConfig:
    return custom if cell.shape == "custom" else SHAPES[cell.shape]


def _region_size(setup: Setup, setting: str) -> int:
    regions = setup.schedules[setting].regions
    return regions[-1].num_layers if regions and regions[-1].stop == setup.model.config.num_layers else 0


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
