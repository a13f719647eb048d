"""Seconds from nothing to a program that runs: tracing, compiling, and finding it compiled already.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --shape d32s --layouts stack

``trace`` makes the jaxpr and lowers it, ``compile`` compiles that without a cache, ``cached`` is the same compilation
when an earlier process has left it in the persistent cache that train.py, eval.py and infer turn on: it still traces.
Programs: the forward pass in order and by solver settings, the engine's decoding loop, and a training step, plain and
with one solver iteration over three quarters of the layers. Each is made ``--repeats`` times, of which the median.
"""

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.machine import ShapeArgs, header, made_up, out_path
from benchmarks.speed_cells import decoding
from snlp_jax.config import Config, HiddenNormConfig, LossConfig, ModelConfig, TrainConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.io.files import atomic_write
from snlp_jax.layout import prepare
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.train.loss import Plan
from snlp_jax.train.step import abstract_state, make_step, optimizer_of
from snlp_jax.types import Batch

Lower = Callable[[], Any]


@dataclass(frozen=True)
class Args(ShapeArgs):
    """Time tracing and compilation."""

    layouts: tuple[Literal["list", "stack"], ...] = ("list", "stack")
    """How the layers of an evaluation lie: unrolled, or in one loop or batch."""
    length: int = 128
    """Tokens of a forward pass and of a training sequence."""
    context: int = 256
    """Tokens in the cache of a decoding step."""
    repeats: int = 3
    out: str = ""
    """Empty: benchmarks/results/compile_time_DEVICE_DATE.json."""


def main(args: Args) -> dict[str, Any]:
    """Measure and return what the JSON file holds."""
    config = made_up(dataclasses.replace(args, shape="d256") if args.shape == "auto" else args)
    report = header(config, dataclasses.asdict(args))
    table = Table("program", *(Column(f"{name} s", justify="right") for name in ("trace", "compile", "cached")))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for name, lower in programs(config, args):
            readings = [measure(lower, Path(folder)) for _ in range(args.repeats)]
            row = {what: float(np.median([reading[what] for reading in readings])) for what in readings[0]}
            report["cells"].append({"program": name} | row)
            table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    out = out_path(args.out, "compile_time", report)
    atomic_write(out, json.dumps(report, indent=1) + "\n")
    Console().print(table, f"wrote {out}")
    return report


def programs(config: ModelConfig, args: Args) -> Iterator[tuple[str, Lower]]:
    """Names and what lowers them, for arrays that are only described."""
    model, L = LanguageModel(config), config.num_layers
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    n = max(3 * L // 4 // 2 * 2, 2)
    for setting in ("seq", f"idn:n={n},k=1", f"idn:n={n},k=4", f"idn:n={n},k=1,stage={n // 2}xF2"):
        schedule = parse_schedule(setting, L)
        for layout in args.layouts:
            lay_out = functools.partial(prepare, model, schedule=schedule, num_tokens=args.length, layout=layout)
            weights = jax.eval_shape(lay_out, model.abstract_params())
            run = lambda weights, tokens: forward(model, weights, tokens).logits_BTV  # noqa: E731
            yield f"forward, {setting}, {layout}", functools.partial(_lower, run, (), weights, ints(1, args.length))
            if "stage=" not in setting:
                loop, state = decoding(model, weights, 1, args.context)
                decode = functools.partial(_lower, loop.decode, (1,), weights, state, ints())
                yield f"decode, {setting}, {layout}", decode
    config = dataclasses.replace(config, seq_len=min(config.seq_len, args.length))
    model = LanguageModel(config)
    regularizer = LossConfig(hidden_norm=HiddenNormConfig(weight=0.5, region_sizes=(n,)))
    for name, loss in (("plain", LossConfig()), ("regularized", regularizer)):
        whole = Config(model=config, loss=loss, train=TrainConfig(batch_size=4))
        yield f"training step, {name}", functools.partial(_lower_step, model, whole, Batch(ints(4, args.length + 1)))


def measure(lower: Lower, cache: Path) -> dict[str, float]:
    """Seconds to trace and lower, to compile, and of both together where the cache on disk has the program."""
    for entry in cache.iterdir():
        entry.unlink()
    jax.clear_caches()
    began = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter()
    jax.clear_caches()
    again = time.perf_counter()
    lower().compile()
    return {"trace_s": traced - began, "compile_s": compiled - traced, "cached_s": time.perf_counter() - again}


def _lower_step(model: LanguageModel, config: Config, batch: Batch) -> Any:
    optimizer = optimizer_of(model, config)
    plan = Plan(tuple((name, term.region_sizes) for name, term in config.loss.terms.items()))
    state = abstract_state(model, optimizer, config)
    return make_step(model, optimizer, config).lower(state, batch, plan=plan)  # type: ignore[attr-defined]


def _lower(run: Callable, donated: tuple[int, ...], *given: Any) -> Any:
    return jax.jit(run, donate_argnums=donated).lower(*given)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
