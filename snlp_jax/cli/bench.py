"""The table and the line of JSON of ``python -m snlp_jax.infer RUN --bench``."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Column, Table

from snlp_jax.cli import tuning
from snlp_jax.cli.tuning import NEVER, ROWS, WIDTHS, Reading
from snlp_jax.config.check import require
from snlp_jax.errors import InputError
from snlp_jax.infer.bench import Record, measure, measure_limits, step_cost
from snlp_jax.infer.engine import Engine
from snlp_jax.infer.requests import Request
from snlp_jax.io.progress import Progress

COLUMNS = {
    "first token ms": lambda record: f"{1e3 * record['ttft_sec']:.0f}",
    "ms a token": lambda record: f"{1e3 * record['tpot_sec']:.2f}",
    "tokens/s": lambda record: f"{record['tok_per_sec']:.1f}",
    "of the first": lambda record: f"{record['ratio']:.2f}x",
    "GB/s": lambda record: _or_dash(record["gb_per_sec"], "{:.1f}"),
    "bandwidth": lambda record: _or_dash(record["mbu_pct"], "{:.0f}%"),
    "acceptance": lambda record: _or_dash(record["acceptance"], "{:.0%}"),
    "peak GiB": lambda record: f"{record['peak_vram_bytes'] / 2**30:.2f}",
}


@dataclass(frozen=True)
class BenchArgs:
    bench: bool = False
    """Instead of text: how fast this machine decodes, in order, by --solver and by --speculate (or, without either, by
    half of the layers at once and by ngram), as a table and a last line of JSON."""
    bench_rows: tuple[int, ...] = (1, 8)
    """Numbers of texts at once."""
    bench_prompt: int = 256
    """Tokens of a prompt: of --prompt, again and again, or else of Python source. --max-new-tokens are decoded."""
    bench_repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("bench_prompt", "bench_repeats"):
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            require(value >= 1, f"{flag} is {value}; it must be at least 1.")
        for rows in self.bench_rows:
            require(rows >= 1, f"--bench-rows has {rows}; give numbers from 1 on.")


def print_bench(engines: Mapping[str, Engine], prompt: Sequence[int], new_tokens: int, args: BenchArgs) -> None:
    """Measure the engines, show a table as it grows on stderr, and write the summary and all records as one line."""
    first, device = next(iter(engines.values())), jax.local_devices()[0]
    for engine in engines.values():
        engine.check([Request(prompt, new_tokens)])
    limits = measure_limits(jnp.dtype(first.model.dtype), device.platform == "cpu")
    table = Table("rows", "setting", *(Column(name, justify="right") for name in COLUMNS))
    records: list[Record] = []
    num_runs = len(args.bench_rows) * (args.bench_repeats + 1) * len(engines)
    with Progress("timing", num_runs) as progress:
        sizes = (args.bench_rows, new_tokens, args.bench_repeats)
        for record in measure(engines, prompt, *sizes, limits, progress.advance):
            records.append(record)
            table.add_row(str(record["batch"]), str(record["setting"]), *(show(record) for show in COLUMNS.values()))
            print(f"{record['batch']} rows, {record['setting']}: {record['tok_per_sec']:.1f} tokens/s", file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    context = len(prompt) + new_tokens // 2
    num_bytes, _ = step_cost(first, 1, context)
    summary = {
        "gpu": device.device_kind,
        "num_cores": os.cpu_count(),
        "params": sum(leaf.size for leaf in jax.tree.leaves(first.model.abstract_params())),
        "weight_bytes": first.weights.num_bytes,
        "context": context,
        "ceiling_bs1_tok_per_sec": limits["copy_bytes_per_s"] / num_bytes,
        "prompt_tokens": len(prompt),
        "decode_tokens": new_tokens,
        **limits,
    }
    print(json.dumps({"summary": summary, "bench": records}))


def print_tuning() -> None:
    """Measure the forms of products on this CPU, show them, and keep the choice."""
    if jax.default_backend() != "cpu":
        raise InputError("--tune measures products of a CPU, and this is none; leave it out.")
    names = ("kernels as trained, ms", "transposed, ms")
    table = Table("width", "rows", *(Column(name, justify="right") for name in names))
    readings: list[Reading] = []
    with Progress("tuning", len(WIDTHS) * len(ROWS)) as progress:
        for reading in tuning.measure():
            readings.append(reading)
            milliseconds = (f"{value:.2f}" for value in (reading.plain_ms, reading.transposed_ms))
            table.add_row(str(reading.width), str(reading.rows), *milliseconds)
            progress.advance()
    chosen = tuning.keep(readings)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    text = "of no width" if chosen == NEVER else f"of models of width {chosen} and more"
    print(f"kernels {text} are kept transposed", file=sys.stderr)


def _or_dash(value: float | int | str | None, form: str) -> str:
    return "--" if value is None else form.format(value)
