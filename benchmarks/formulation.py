"""List of layers or stack: which a CPU evaluates faster, by width and number of tokens.

    python benchmarks/formulation.py
    python benchmarks/formulation.py --widths 640 --tokens 1 16 256

One iteration of a region and the same layers in order, each with the weights as a list (unrolled) and as a stack (one
batched sweep, one loop), in turns; at one token with a cache. ``snlp_jax.layout`` chooses by the table that comes out:
the fewest tokens from which the list is the faster of the two for a region, at every width.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.machine import header, out_path, random_params
from benchmarks.speed import compile_all, measure, summarize
from benchmarks.speed_cells import Cell, Form, Setup, region_jobs
from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write
from snlp_jax.model import LanguageModel

FORMS = [Form("stack"), Form("list")]


@dataclass(frozen=True)
class Args:
    """Time lists against stacks."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Channels; heads have 64 of them."""
    tokens: tuple[int, ...] = (1, 4, 16, 32, 64, 128, 512)
    """Of a sequence."""
    num_layers: int = 12
    context: int = 128
    """Tokens in the cache of a single one."""
    repeats: int = 15
    out: str = ""
    """Empty: benchmarks/results/formulation_DEVICE_DATE.json."""


def main(args: Args) -> dict[str, Any]:
    """Measure and return what the JSON file holds."""
    if jax.default_backend() != "cpu":
        raise InputError("lists are an option on a CPU only, where they are chosen by this table; run it there.")
    report = header(ModelConfig(), dataclasses.asdict(args))
    names = ("tokens", "in order: stack ms", "list ms", "region: stack ms", "list ms", "stack over list")
    table = Table("width", *(Column(name, justify="right") for name in names))
    setting = f"idn:n={args.num_layers},k=1"
    for width in args.widths:
        heads = max(width // 64, 1)
        config = ModelConfig(
            num_layers=args.num_layers, embed_dim=width, num_heads=heads, num_kv_heads=heads, seq_len=2048,
            vocab_size=256, compute_dtype="float32", attention="xla",
        )  # fmt: skip
        model = LanguageModel(config)
        setup = Setup(model, random_params(model), (setting,))
        for tokens in args.tokens:
            cell = Cell("region", "custom", "float32", 1, tokens, args.context if tokens == 1 else 0)
            where = {"width": width, "tokens": tokens}
            jobs = region_jobs(setup, cell, setting, {"seq": FORMS, setting: FORMS}, steps=4)
            far = time.perf_counter() + 1e6
            measure(compile_all(jobs, where, report, far, far), args.repeats, 1, far)
            limits = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1.0}  # not asked for here
            rows = summarize(jobs, limits)["jobs"]
            kind_of = lambda row: "seq" if row["setting"] == "seq" else "region"  # noqa: E731
            found = where | {f"{kind_of(row)}_{row['layout']}_ms": row["median_ms"] for row in rows}
            report["cells"].append(found)
            ms = [found[f"{kind}_{layout}_ms"] for kind in ("seq", "region") for layout in ("stack", "list")]
            table.add_row(str(width), str(tokens), *(f"{value:.2f}" for value in ms), f"{ms[2] / ms[3]:.2f}")
    out = out_path(args.out, "formulation", report)
    atomic_write(out, json.dumps(report, indent=1) + "\n")
    Console().print(table, f"wrote {out}")
    return report


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
