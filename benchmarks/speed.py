"""Time of one forward pass: sequential against layer-parallel, on random weights.

    python benchmarks/speed.py                                     demo shape on a CPU, d32s elsewhere
    python benchmarks/speed.py --shape d2048 --lengths 1 128
    python benchmarks/speed.py --num-layers 16 --embed-dim 256 --num-heads 4 --solvers idn:n=8,k=1

Every arm is the whole forward (embedding, layers, head), compiled ahead of time; weights are cast and laid out once,
outside, and passed as arguments; all arms of a cell (dtype, batch, length) run round robin after a warm-up. The fair
twin is the faster of two sequential passes: a scan over the stack, and layers unrolled over a list. A length of 1 has
no cache: it stands for the weight traffic of decoding. Nothing is said about quality, which random weights do not have.
"""

import dataclasses
import itertools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.eval.weights import prepare_all
from snlp_jax.forward import forward
from snlp_jax.io.files import atomic_write
from snlp_jax.io.provenance import git_commit
from snlp_jax.layout import Weights
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Schedule, SequentialSegment

ROOT = Path(__file__).resolve().parents[1]
Dtype = Literal["float32", "bfloat16"]
Layout = Literal["stack", "list", "mixed"]


def _d32(embed_dim: int) -> ModelConfig:
    num_heads = embed_dim // 128
    size = {"num_layers": 32, "embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_heads}
    return ModelConfig(vocab_size=32_768, seq_len=2048, window_pattern="SSSL", **size)


SHAPES = {"demo": ModelConfig(), "d32s": _d32(640), "d1024": _d32(1024), "d2048": _d32(2048)}


@dataclass(frozen=True)
class ShapeArgs:
    """Which model: shared by the benchmarks that make one up."""

    shape: Literal["auto", "demo", "d32s", "d1024", "d2048"] = "auto"
    """auto: demo on a CPU, d32s elsewhere. The six flags below replace single fields of it."""
    num_layers: int | None = None
    embed_dim: int | None = None
    num_heads: int | None = None
    vocab_size: int | None = None
    seq_len: int | None = None
    window_pattern: str | None = None


@dataclass(frozen=True)
class Args(ShapeArgs):
    """Time the forward pass, sequential against layer-parallel."""

    lengths: tuple[int, ...] = ()
    """Tokens of a sequence; empty: 1 64 256 on a CPU, 1 128 2048 elsewhere."""
    batches: tuple[int, ...] = (1,)
    solvers: tuple[str, ...] = ()
    """Settings in the notation of snlp_jax/notation.py; empty: the paper's d32s rows, scaled to the depth."""
    layouts: tuple[Layout, ...] = ()
    """Of the solver's arms: stack, list, or mixed (a list for the layers in order, a stack for the region).
    Empty: mixed and list on a CPU, stack and mixed elsewhere."""
    dtypes: tuple[Dtype, ...] = ()
    """Empty: float32 on a CPU, bfloat16 elsewhere."""
    repeats: int = 20
    calls: int = 0
    """Forward passes issued back to back in one reading; 0: 1 on a CPU, 5 elsewhere, to hide the host's dispatch."""
    time_budget: float = 450.0
    """Seconds, shared out evenly over the cells, after which nothing new is compiled; the rest is listed as skipped."""
    out: str = ""
    """Empty: benchmarks/results/speed_DEVICE_DATE.json."""

    def __post_init__(self) -> None:
        if not self.batches or min(*self.lengths, *self.batches, self.repeats) < 1:
            raise InputError("lengths, batches and repeats must all be at least 1.")


@dataclass
class Arm:
    """One way to compute the forward pass."""

    setting: str
    layout: Layout
    schedule: Schedule
    weights: Weights
    run: Callable[[], jax.Array] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    dispatch: list[float] = field(default_factory=list)


def main(args: Args) -> dict[str, Any]:
    """Measure everything and return what the JSON file holds. The file is rewritten after each cell."""
    began, on_cpu = time.perf_counter(), jax.default_backend() == "cpu"
    config = made_up(args)
    settings = args.solvers or default_settings(config.num_layers)
    for setting in settings:
        parse_schedule(setting, config.num_layers)  # a mistake is told before anything is measured
    layouts = args.layouts or (("mixed", "list") if on_cpu else ("stack", "mixed"))
    calls = args.calls or (1 if on_cpu else 5)
    dtypes = args.dtypes or (("float32",) if on_cpu else ("bfloat16",))
    lengths = args.lengths or ((1, 64, 256) if on_cpu else (1, 128, 2048))
    cells = list(itertools.product(dtypes, args.batches, lengths))
    report = header(config, dataclasses.asdict(args) | {"calls": calls, "out": ""})
    out = out_path(args.out, "speed", report)
    console, model, arms = Console(width=None if sys.stdout.isatty() else 140), None, []
    for index, (dtype, batch, length) in enumerate(cells):
        if model is None or model.config.compute_dtype != dtype:
            report["limits"][dtype] = measure_limits(jnp.dtype(dtype), on_cpu)
            # cuDNN attention takes no float32.
            attention = "xla" if dtype == "float32" else config.attention
            model = LanguageModel(dataclasses.replace(config, compute_dtype=dtype, attention=attention))
            arms = make_arms(model, settings, layouts)
        # Four fifths of a cell's share of the budget are for compiling; what a cell leaves unused goes to the next.
        share = args.time_budget / len(cells)
        deadline = began + share * (index + 1)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)))
        where = {"dtype": dtype, "batch": batch, "length": length}
        for arm in arms:
            arm.run, arm.seconds, arm.dispatch = None, [], []
            who = where | {"setting": arm.setting, "layout": arm.layout}
            if time.perf_counter() > deadline - share / 5:
                report["skipped"].append(who)
                continue
            try:
                compile_arm(arm, model, tokens)
            except (RuntimeError, ValueError) as error:  # out of memory, or a kernel that refuses the shape
                report["failed"].append(who | {"error": str(error).splitlines()[0][:300]})
        alive = [arm for arm in arms if arm.run is not None]
        measure(alive, args.repeats, calls, deadline)
        cell = where | summarize(alive, model.config, batch, length, report["limits"][dtype])
        report["cells"].append(cell)
        report["elapsed_s"] = round(time.perf_counter() - began, 1)
        report["load_average"]["end"] = os.getloadavg()[0]
        atomic_write(out, json.dumps(report, indent=1) + "\n")
        console.print(_table(cell))
    for who in report["skipped"] + report["failed"]:
        console.print("not measured:", *who.values(), markup=False)
    console.print(f"{report['elapsed_s']} s; wrote {out}", markup=False)
    return report


def default_settings(num_layers: int) -> tuple[str, ...]:
    """The paper's rows for 32 layers, their regions scaled to ``num_layers`` and no more iterations than layers."""
    rows = ((24, 1, "h0"), (24, 2, "h0"), (24, 4, "h0"), (12, 2, "batch_forward"), (8, 1, "h0"), (8, 4, "h0"))
    scaled = [(max(1, round(num_layers * n / 32)), k, init) for n, k, init in rows]
    return tuple(dict.fromkeys(f"idn:n={n},k={min(k, n)},init={init}" for n, k, init in scaled))


def random_params(model: LanguageModel) -> Any:
    """Fresh parameters in the compute dtype whose output projections are not zero."""

    def init(key: jax.Array) -> Any:
        params = model.init(key)
        for index, (part, name) in enumerate((("attn", "out"), ("mlp", "down"))):
            shape = params["blocks"][part][name].shape
            noise = jax.random.normal(jax.random.fold_in(key, index), shape)
            params["blocks"][part][name] = 0.5 * shape[-2] ** -0.5 * noise
        return model.cast(params)

    return jax.jit(init)(jax.random.key(0))


def make_arms(model: LanguageModel, settings: tuple[str, ...], layouts: tuple[Layout, ...]) -> list[Arm]:
    """The two sequential arms, then every solver setting in every layout. They share what arrays they can."""
    params = random_params(model)
    ends = {name: params[name] for name in ("embed", "head")}
    schedules = {setting: parse_schedule(setting, model.config.num_layers) for setting in ("seq", *settings)}

    def lay_out(kind: Literal["stack", "list"]) -> dict[str, Weights]:
        laid_out = prepare_all(model, params, list(schedules.values()), num_tokens=1, layout=kind)
        return dict(zip(schedules, laid_out, strict=True))

    stacks, lists = lay_out("stack"), lay_out("list")

    def arm(setting: str, layout: Layout) -> Arm:
        segments = stacks[setting].segments
        is_list = [layout == "list" or (layout == "mixed" and isinstance(s, SequentialSegment)) for s in segments]
        blocks = tuple((lists if use else stacks)[setting].blocks[index] for index, use in enumerate(is_list))
        weights = dataclasses.replace(stacks[setting], ends=ends, blocks=blocks)
        return Arm(setting, layout, schedules[setting], weights)

    wanted: list[tuple[str, Layout]] = [("seq", "stack"), ("seq", "list")]
    wanted += [(setting, layout) for layout in layouts for setting in settings]
    return [arm(setting, layout) for setting, layout in wanted]


def compile_arm(arm: Arm, model: LanguageModel, tokens: jax.Array) -> None:
    """Compile ahead of time and run twice."""
    began = time.perf_counter()
    program = jax.jit(lambda weights, tokens: forward(model, weights, tokens).logits_BTV)
    compiled = program.lower(arm.weights, tokens).compile()
    arm.facts = {"compile_s": round(time.perf_counter() - began, 2)}
    arm.run = lambda: compiled(arm.weights, tokens)
    arm.facts["is_finite"] = bool(jnp.isfinite(arm.run()).all())
    jax.block_until_ready(arm.run())
    memory = compiled.memory_analysis()
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    peak = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    arm.facts |= {"peak_bytes": peak, "temp_bytes": sizes["temp"]}


def measure(arms: list[Arm], repeats: int, calls: int, deadline: float) -> None:
    """Rounds over all arms, every second one backwards; at least five, however late it is."""
    for index in range(repeats):
        if index >= 5 and time.perf_counter() > deadline:
            return
        for arm in arms[:: -1 if index % 2 else 1]:
            began = time.perf_counter()
            for _ in range(calls):
                logits = arm.run()
            issued = time.perf_counter()
            jax.block_until_ready(logits)
            arm.seconds.append((time.perf_counter() - began) / calls)
            arm.dispatch.append((issued - began) / calls)


def summarize(arms: list[Arm], config: ModelConfig, batch: int, length: int, limits: dict[str, float]) -> dict:
    """Times, the fair twin, speed-ups and fractions of the machine's limit."""
    sequential = {arm.layout: statistics.median(arm.seconds) for arm in arms if arm.setting == "seq"}
    twin = min(sequential, key=lambda layout: sequential[layout], default=None)
    rows = []
    for arm in arms:
        lower, median, upper = (float(q) for q in np.quantile(arm.seconds, (0.25, 0.5, 0.75)))
        num_bytes, flops = work(config, arm.schedule, batch, length)
        limit = max(num_bytes / limits["copy_bytes_per_s"], flops / limits["matmul_flops_per_s"])
        row = {"setting": arm.setting, "layout": arm.layout, "depth": arm.schedule.depth, "runs": len(arm.seconds)}
        row |= {"median_ms": 1e3 * median, "lower_quartile_ms": 1e3 * lower, "upper_quartile_ms": 1e3 * upper}
        row |= {"min_ms": 1e3 * min(arm.seconds), "dispatch_ms": 1e3 * statistics.median(arm.dispatch)}
        row |= {"speedup": sequential[twin] / median if twin else None, "num_block_evals": arm.schedule.num_block_evals}
        row |= {"weight_bytes": num_bytes, "flops": flops, "limit_ms": 1e3 * limit, "fraction_of_limit": limit / median}
        rows.append(row | arm.facts)
    return {"twin": twin, "twin_ms": 1e3 * sequential[twin] if twin else None, "arms": rows}


def work(config: ModelConfig, schedule: Schedule, batch: int, length: int) -> tuple[int, int]:
    """Bytes of weights that a forward must read, and its FLOPs.

    A layer's weights are read once an evaluation; activations are left out. Attention counts the visible pairs of
    query and key, twice two FLOPs a channel each; norms and other elementwise work are left out.
    """
    D, kv_dim, V = config.embed_dim, config.num_kv_heads * config.head_dim, config.padded_vocab_size
    itemsize, num_tokens = jnp.dtype(config.compute_dtype).itemsize, batch * length
    layer_weights = 2 * D * D + 2 * D * kv_dim + 2 * config.mlp_ratio * D * D
    gathered = num_tokens * (D + len(config.value_embed_layers) * kv_dim)
    num_bytes = itemsize * (schedule.num_block_evals * layer_weights + D * V + gathered)
    flops = 2 * num_tokens * (schedule.num_block_evals * layer_weights + D * V)
    for segment in schedule.segments:
        evals = segment.num_block_evals // segment.num_layers
        for window in config.windows[segment.start : segment.stop]:
            pairs = int(np.minimum(np.arange(length), window).sum()) + length
            flops += 4 * evals * batch * D * pairs
    return num_bytes, flops


def measure_limits(dtype: Any, on_cpu: bool) -> dict[str, float]:
    """What this machine reaches now: bytes read plus written by an addition in place, and FLOPs of a square product."""
    num_bytes, side = (2**26, 1024) if on_cpu else (2**30, 8192)
    a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    copy = jax.jit(lambda x: x + jnp.ones((), dtype), donate_argnums=0)  # into the same memory: no new pages
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))

    def fastest(run: Callable[[jax.Array], jax.Array], x: jax.Array, in_place: bool) -> float:
        readings = []
        for _ in range(11):  # the first compiles
            began = time.perf_counter()
            y = jax.block_until_ready(run(x))
            readings.append(time.perf_counter() - began)
            x = y if in_place else x
        return min(readings)

    x = jnp.ones(num_bytes // dtype.itemsize, dtype)
    return {
        "copy_bytes_per_s": 2 * num_bytes / fastest(copy, x, True),
        "matmul_flops_per_s": 2 * side**3 / fastest(product, a, False),
    }


def made_up(args: ShapeArgs) -> ModelConfig:
    """The model that the flags describe."""
    name = ("demo" if jax.default_backend() == "cpu" else "d32s") if args.shape == "auto" else args.shape
    names = ("num_layers", "embed_dim", "num_heads", "vocab_size", "seq_len", "window_pattern")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "num_heads" in given:
        given["num_kv_heads"] = given["num_heads"]
    return dataclasses.replace(SHAPES[name], **given)


def header(config: ModelConfig, args: dict[str, Any]) -> dict[str, Any]:
    """What every report opens with, and its empty lists."""
    device = jax.devices()[0]
    machine = {"backend": device.platform, "machine": platform.machine(), "num_cores": os.cpu_count()}
    return {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "device": {"kind": device.device_kind} | machine,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "model": dataclasses.asdict(config),
        "args": args,
        "load_average": {"start": os.getloadavg()[0]},
        "limits": {},
    } | {name: [] for name in ("cells", "skipped", "failed")}


def out_path(given: str, benchmark: str, report: dict[str, Any]) -> Path:
    """``given``, or benchmarks/results/BENCHMARK_DEVICE_DATE.json; its folder exists then."""
    name = re.sub(r"[^a-z0-9]+", "-", report["device"]["kind"].lower()).strip("-")
    out = Path(given or ROOT / f"benchmarks/results/{benchmark}_{name}_{report['date']}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _table(cell: dict[str, Any]) -> Table:
    title = f"{cell['dtype']}, batch {cell['batch']}, {cell['length']} tokens; twin: sequential {cell['twin']}"
    numbers = ("depth", "median ms", "quartiles", "speed-up", "of limit", "peak MB", "compile s")
    table = Table("setting", "layout", *(Column(name, justify="right") for name in numbers), title=title)
    for arm in cell["arms"]:
        speedup = "-" if arm["speedup"] is None else f"{arm['speedup']:.2f}x"
        quartiles = f"{arm['lower_quartile_ms']:.3f}-{arm['upper_quartile_ms']:.3f}"
        times = (str(arm["depth"]), f"{arm['median_ms']:.3f}", quartiles, speedup, f"{arm['fraction_of_limit']:.0%}")
        table.add_row(arm["setting"], arm["layout"], *times, f"{arm['peak_bytes'] / 1e6:.0f}", str(arm["compile_s"]))
    return table


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
