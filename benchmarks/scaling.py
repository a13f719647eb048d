"""Where spreading layers over chips wins and where it loses: estimates for 1 to 256 chips, checked by compiling.

    python benchmarks/scaling.py                  the whole sweep, two minutes; needs libtpu and the CUDA plugin
    python benchmarks/scaling.py --no-check       the formula alone, nothing compiled

A decode step of a model like the d32 configs (heads of 128, windows SSSL), one sequence, 2048 tokens in the cache.
Three quarters of the depth are a region with K iterations of Identity, as published (n = 24 of 32); the rest runs in
order. Every arm may arrange its chips as layer x tensor as suits it best, and the fair twin is the faster of the two
sequential passes, tensor parallel and ring. The formula is that of benchmarks/plan_formula.py, the prices are
those of snlp_jax/parallel/chips.py: estimates, nothing ran. The check compiles some of the plans ahead of time and
holds counts, bytes and FLOPs against the formula. Writes benchmarks/results/scaling_DATE.json and docs/scaling.png.
"""

import dataclasses
import datetime
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.table import Table

from benchmarks.hlo import Program
from benchmarks.plan_compile import Work, compile_plan
from benchmarks.plan_formula import expected
from benchmarks.plan_prices import ON_CHIP_BYTES, PricedSlice
from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config, MeshConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write
from snlp_jax.io.provenance import git_commit
from snlp_jax.layout import Spread, abstract_weights, with_schedule
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.chips import Chip
from snlp_jax.parallel.mesh import AXES
from snlp_jax.parts import Weights
from snlp_jax.planner.target import plan_mesh, prepare_environment

ROOT = Path(__file__).resolve().parents[1]
WORK = Work("decode", batch_size=1, context=2048)
SLICES = {
    "v5e": ("1x1", "1x2", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("1x1x1", "1x1x2", "1x2x2", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "h100": ("1", "2", "4", "8"),
}
WIDTHS = (640, 1024, 2048, 4096, 8192)
DEPTHS = (16, 32, 64, 128)
ITERATIONS = (1, 2, 3, 4)
CHECKS = (
    # topology, mesh, depth, width, setting ("" is the sequential pass), how the sequential pass lies
    ("v5e:2x4", (8, 1), 16, 1024, "", "tensor"),
    ("v5e:2x4", (8, 1), 16, 1024, "", "ring"),
    ("v5e:2x4", (8, 1), 16, 1024, "idn:n=12,k=1", "tensor"),
    ("v5e:2x4", (8, 1), 16, 1024, "idn:n=12,k=4", "tensor"),
    ("v5e:2x4", (8, 1), 32, 2048, "idn:n=24,k=2", "tensor"),
    ("v5e:2x4", (8, 1), 32, 2048, "", "tensor"),
    ("v5e:2x4", (2, 4), 32, 2048, "idn:n=24,k=2", "tensor"),
    ("v5e:4x4", (16, 1), 32, 2048, "idn:n=24,k=2", "tensor"),
    ("v5e:4x4", (16, 1), 64, 1024, "idn:n=48,k=2", "ring"),
    ("v5e:4x4", (4, 4), 32, 4096, "idn:n=24,k=2", "tensor"),
    ("v5e:8x8", (16, 4), 32, 2048, "idn:n=24,k=2", "tensor"),
    ("v5e:8x8", (64, 1), 128, 1024, "idn:n=96,k=1", "tensor"),
    ("v5e:16x16", (32, 8), 32, 8192, "idn:n=24,k=2", "tensor"),
    ("v5e:16x16", (64, 4), 64, 8192, "", "tensor"),
    ("v5p:2x2x2", (8, 1), 32, 2048, "idn:n=24,k=2", "tensor"),
    ("v5p:2x2x4", (16, 1), 32, 2048, "", "tensor"),
    ("v5p:4x4x4", (16, 4), 64, 4096, "idn:n=48,k=3", "tensor"),
    ("h100:8", (8, 1), 32, 2048, "idn:n=24,k=2", "tensor"),
    ("h100:8", (8, 1), 32, 2048, "", "tensor"),
    ("h100:8", (8, 1), 32, 2048, "", "ring"),
    ("h100:8", (2, 4), 32, 4096, "idn:n=24,k=2", "tensor"),
)


@dataclass(frozen=True)
class Args:
    """Estimate decode steps on 1 to 256 chips, and check the formula on some of them by compiling."""

    check: bool = True
    """Compile the checks; --no-check leaves them out."""
    widths: tuple[int, ...] = WIDTHS
    """Multiples of 128."""
    depths: tuple[int, ...] = DEPTHS
    """Multiples of 4."""
    out: str = ""
    """Empty: benchmarks/results/scaling_DATE.json."""
    plot: str = "docs/scaling.png"
    """Empty: no plot."""

    def __post_init__(self) -> None:
        if any(width % 128 or width < 128 for width in self.widths) or any(depth % 4 for depth in self.depths):
            raise InputError("--widths must be multiples of 128, the size of a head, and --depths of 4.")


@dataclass(frozen=True)
class Row:
    """Seconds of the best arrangement of every arm on one slice, with what a kernel takes besides and without."""

    topology: str
    depth: int
    width: int
    iterations: int
    seconds: float
    mesh: tuple[int, int]
    """layer x tensor, of the region's arm."""
    tensor: float
    ring: float
    fused: float
    """Like ``seconds``, with kernels that take their bytes and FLOPs alone."""
    tensor_fused: float
    ring_fused: float

    @property
    def gain(self) -> float:
        return min(self.tensor, self.ring) / self.seconds

    @property
    def gain_fused(self) -> float:
        return min(self.tensor_fused, self.ring_fused) / self.fused


def model_config(depth: int, width: int) -> ModelConfig:
    heads = width // 128
    return ModelConfig(
        vocab_size=32_768,
        num_layers=depth,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        seq_len=2048,
        window_pattern="SSSL",
    )


class Shapes(LanguageModel):
    """A model that works out its shapes only once."""

    @cache  # noqa: B019
    def abstract_params(self) -> Any:
        return super().abstract_params()


@cache
def model_of(depth: int, width: int, backend: str) -> Shapes:
    return Shapes(model_config(depth, width), backend=backend)


@cache
def laid_out(model: LanguageModel, mesh: AbstractMesh, setting: str, sequential: Spread) -> Weights:
    return abstract_weights(model, parse_schedule(setting, model.config.num_layers), mesh, sequential)


@cache
def formula(depth: int, width: int, mesh: tuple[int, int], setting: str, sequential: Spread, chip: Chip) -> Program:
    """Operations of one arm on a mesh of layer x tensor."""
    model, shape = model_of(depth, width, chip.backend), AbstractMesh((1, *mesh), AXES, axis_types=(AxisType.Auto,) * 3)
    any_k = setting.partition(",k=")[0] or "seq"  # the iterations do not change where weights lie
    weights = with_schedule(model, laid_out(model, shape, any_k, sequential), parse_schedule(setting or "seq", depth))
    return expected(model, weights, shape, WORK, ON_CHIP_BYTES.get(chip.name, 0.0))


def price(program: Program, chips: PricedSlice, kernel_launch: float | None = None) -> float:
    return sum(chips.seconds(op, kernel_launch) for op in program.ops)


def best(
    chips: PricedSlice, depth: int, width: int, setting: str, sequential: Spread
) -> tuple[float, float, tuple[int, int]]:
    """Seconds of the fastest arrangement, those of the fastest without launches, and the former."""
    num_chips = chips.num_chips
    first = 2 if sequential == "ring" and num_chips > 1 else 1  # a ring of one chip is none
    meshes = [(layer, num_chips // layer) for layer in range(first, num_chips + 1) if num_chips % layer == 0]
    programs = [(formula(depth, width, mesh, setting, sequential, chips.chip), mesh) for mesh in meshes]
    timed = [(price(program, chips), mesh) for program, mesh in programs]
    seconds, mesh = min(timed)
    return seconds, min(price(program, chips, 0.0) for program, _ in programs), mesh


def sweep(args: Args) -> Iterator[Row]:
    for (name, shapes), depth, width in itertools.product(SLICES.items(), args.depths, args.widths):
        for shape in shapes:
            chips = PricedSlice.parse(f"{name}:{shape}")
            tensor, tensor_fused, _ = best(chips, depth, width, "", "tensor")
            ring, ring_fused, _ = best(chips, depth, width, "", "ring")
            for iterations in ITERATIONS:
                setting = f"idn:n={3 * depth // 4},k={iterations}"
                seconds, fused, mesh = best(chips, depth, width, setting, "tensor")
                twins = tensor, ring, fused, tensor_fused, ring_fused
                yield Row(str(chips), depth, width, iterations, seconds, mesh, *twins)


def check(
    topology: str, mesh: tuple[int, int], depth: int, width: int, setting: str, sequential: Spread
) -> dict[str, Any]:
    """Compile one plan and put its figures beside those of the formula."""
    chips, began = PricedSlice.parse(topology), time.perf_counter()
    config = Config(model=model_config(depth, width))
    on = plan_mesh(MeshConfig(layer=mesh[0], tensor=mesh[1]), chips)
    schedule = parse_schedule(setting or "seq", depth)
    compiled = compile_plan(config, schedule, on, WORK, backend=chips.chip.backend, sequential=sequential)
    programs = {"compiled": compiled.program, "formula": formula(depth, width, mesh, setting, sequential, chips.chip)}
    figures = {
        name: {
            "collectives": {kind: count for kind, count in program.collectives.items() if count},
            "payload": sum(program.payload.values()),
            "flops": float(program.flops),
            "bytes_read": program.bytes_read,
            "bytes_written": program.bytes_written,
            "kernels": program.num_kernels,
            "seconds": price(program, chips),
        }
        for name, program in programs.items()
    }
    plan = {"topology": topology, "mesh": mesh, "depth": depth, "width": width, "setting": setting or "seq"}
    memory = {"memory": compiled.memory, "compile_seconds": time.perf_counter() - began}
    return plan | {"sequential": sequential} | memory | figures


def main(args: Args) -> dict[str, Any]:
    prepare_environment()
    console, date = Console(highlight=False), datetime.date.today().isoformat()
    checks = []
    for index, each in enumerate(CHECKS if args.check else ()):
        checks.append(check(*each))  # type: ignore[arg-type]
        console.print(f"compiled {index + 1} of {len(CHECKS)}: {' '.join(map(str, each))}")
    rows = list(sweep(args))
    fields = [field.name for field in dataclasses.fields(Row)]
    report = {
        "date": date,
        "commit": git_commit(),
        "jax": version("jax"),
        "work": dataclasses.asdict(WORK),
        "chips": {
            name: dataclasses.asdict(PricedSlice.parse(f"{name}:{shapes[0]}").chip) for name, shapes in SLICES.items()
        },
        "checks": checks,
        "fields": fields,
        "rows": [[_short(getattr(row, name)) for name in fields] for row in rows],
    }
    out = Path(args.out) if args.out else ROOT / "benchmarks" / "results" / f"scaling_{date}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in report.items() if name != "rows"}
    lines = ",\n".join(json.dumps(row) for row in report["rows"])
    atomic_write(out, json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n]}\n")
    console.print(check_table(checks)) if checks else None
    for chip in SLICES:
        console.print(gain_table(rows, chip))
    if args.plot:
        plot(rows, ROOT / args.plot)
    return report


def check_table(checks: Sequence[dict[str, Any]]) -> Table:
    """Compiled over formula."""
    table = Table("plan", "collectives", title="compiled / formula", title_justify="left")
    for name in ("payload", "FLOPs", "read", "kernels", "time"):
        table.add_column(name, justify="right")
    for each in checks:
        compiled, estimate = each["compiled"], each["formula"]
        mesh = "x".join(map(str, each["mesh"]))
        name = f"{each['topology']} {mesh} L{each['depth']} D{each['width']} {each['setting']} {each['sequential']}"
        same = compiled["collectives"] == estimate["collectives"]
        counts = " ".join(f"{kind} {count}" for kind, count in sorted(compiled["collectives"].items()))
        figures = ("payload", "flops", "bytes_read", "kernels", "seconds")
        ratios = [f"{compiled[figure] / estimate[figure]:.2f}" for figure in figures]
        table.add_row(name, counts if same else f"{counts}, not {estimate['collectives']}", *ratios)
    return table


def gain_table(rows: Sequence[Row], chip: str) -> Table:
    """Where the region wins: how much faster than the faster sequential pass, with launches and without."""
    of_chip = [row for row in rows if row.topology.startswith(f"{chip}:")]
    topologies = list(dict.fromkeys(row.topology for row in of_chip))
    table = Table("depth", "width", "K", title=f"{chip}: sequential / region, (without launches)", title_justify="left")
    for topology in topologies:
        table.add_column(topology.split(":")[1], justify="right")
    for depth, width, k in itertools.product(
        sorted({row.depth for row in of_chip}), sorted({row.width for row in of_chip}), (1, 2, 4)
    ):
        cells = {row.topology: row for row in of_chip if (row.depth, row.width, row.iterations) == (depth, width, k)}
        shown = (f"{cells[name].gain:.2f} ({cells[name].gain_fused:.2f})" for name in topologies)
        table.add_row(str(depth), str(width), str(k), *shown)
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """Latency over chips, and the gain over chips and width, and over chips and depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), constrained_layout=True)
    depths, widths = sorted({row.depth for row in rows}), sorted({row.width for row in rows})
    depth = 32 if 32 in depths else depths[0]
    width = 2048 if 2048 in widths else widths[0]
    for row_of_axes, chip in zip(axes, ("v5e", "h100"), strict=True):
        of_chip = [row for row in rows if row.topology.startswith(f"{chip}:")]
        size = {row.topology: PricedSlice.parse(row.topology).num_chips for row in of_chip}
        counts = sorted(set(size.values()))
        find = {(size[row.topology], row.depth, row.width, row.iterations): row for row in of_chip}
        line, by_width, by_depth = row_of_axes
        for name, of in (("tensor parallel", "tensor"), ("ring", "ring")):
            times = [getattr(find[n, depth, width, 1], of) * 1e6 for n in counts]
            line.plot(counts, times, "k--" if of == "tensor" else "k:", label=f"in order, {name}")
        for k in (1, 2, 4):
            line.plot(counts, [find[n, depth, width, k].seconds * 1e6 for n in counts], "o-", label=f"region, K = {k}")
        line.set(xscale="log", yscale="log", xlabel="chips", ylabel="estimated us a token")
        line.set_title(f"{chip}: depth {depth}, width {width}")
        line.set_xticks(counts, map(str, counts))
        line.legend(fontsize=7)
        shown = (by_width, widths, [[find[n, depth, w, 2] for n in counts] for w in widths], f"width (depth {depth})")
        deep = (by_depth, depths, [[find[n, d, width, 2] for n in counts] for d in depths], f"depth (width {width})")
        for axis, ticks, cells, label in (shown, deep):
            gains = np.array([[row.gain for row in line_of_rows] for line_of_rows in cells])
            axis.imshow(np.log2(gains), cmap="RdYlGn", vmin=-2, vmax=2, aspect="auto")
            for (i, j), gain in np.ndenumerate(gains):
                axis.text(j, i, f"{gain:.2f}", ha="center", va="center", fontsize=8)
            axis.set_xticks(range(len(counts)), map(str, counts))
            axis.set_yticks(range(len(ticks)), map(str, ticks))
            axis.set(xlabel="chips", ylabel=label, title=f"{chip}: sequential / region, K = 2")
    figure.suptitle("Estimates of a decode step, batch 1, cache 2048, three quarters of the layers in the region")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    run_entry(lambda: main(tyro.cli(Args, description=__doc__)))
