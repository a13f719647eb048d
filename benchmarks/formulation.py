"""List of layers or stack, batched or in a loop: which a CPU evaluates faster, by width and number of tokens.

    python benchmarks/formulation.py
    python benchmarks/formulation.py --widths 640 --tokens 1 16 256

The same layers in order, in a loop over their stack and unrolled over a list, and one iteration of them as a region:
all at once, in a loop, and unrolled; in turns, at one token with a cache. ``snlp_jax.layout.LOOPED`` and
``snlp_jax.model.nodes.LARGE_STATE`` are chosen by the table that comes out.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.machine import header, out_path, random_params
from benchmarks.speed import compile_all, measure
from benchmarks.speed_cells import Cell, Form, Setup, region_jobs
from snlp_jax.config import MachineConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write
from snlp_jax.model import LanguageModel

STACK, LIST = Form("stack"), Form("list")
FORMS = ("seq_loop_ms", "seq_list_ms", "region_batched_ms", "region_loop_ms", "region_list_ms")


@dataclass(frozen=True)
class Args:
    """Time lists against stacks, batched and in a loop."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Channels; heads have 64 of them."""
    tokens: tuple[int, ...] = (1, 4, 16, 32, 64, 128, 256, 512)
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
    names = ("tokens", "in order: loop ms", "list ms", "region: batched ms", "loop ms", "list ms")
    table = Table("width", *(Column(name, justify="right") for name in names))
    setting = f"idn:n={args.num_layers},k=1"
    for width in args.widths:
        heads = max(width // 64, 1)
        config = ModelConfig(
            num_layers=args.num_layers, embed_dim=width, num_heads=heads, num_kv_heads=heads, seq_len=2048,
            vocab_size=256,
        )  # fmt: skip
        model = LanguageModel(config, MachineConfig(compute_dtype="float32", attention="xla"))
        params = random_params(model)
        batched = Setup(model.adapted(one_by_one_from=sys.maxsize), params, (setting,))
        looped = Setup(model.adapted(one_by_one_from=1), params, (setting,))
        for tokens in args.tokens:
            cell = Cell("region", "custom", "float32", 1, tokens, args.context if tokens == 1 else 0)
            where = {"width": width, "tokens": tokens}
            steps = 4 if tokens == 1 else 1  # in a row, which would allocate the memory of a long pass only once
            jobs = region_jobs(batched, cell, setting, {"seq": [STACK, LIST], setting: [STACK]}, steps)
            jobs += region_jobs(looped, cell, setting, {setting: [STACK, LIST]}, steps)
            far = time.perf_counter() + 1e6
            alive = compile_all(jobs, where, report, far, far)
            measure(alive, args.repeats, 1, far)
            ms = [1e3 * float(np.median(job.seconds)) for job in alive]
            report["cells"].append(where | dict(zip(FORMS, ms, strict=True)))
            table.add_row(str(width), str(tokens), *(f"{value:.2f}" for value in ms))
    out = out_path(args.out, "formulation", report)
    atomic_write(out, json.dumps(report, indent=1) + "\n")
    Console().print(table, f"wrote {out}")
    return report


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
