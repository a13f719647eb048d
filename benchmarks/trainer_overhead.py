"""What the training loop costs beside its steps: host overhead, waiting for data, and memory over a long run.

    python benchmarks/trainer_overhead.py
    python benchmarks/trainer_overhead.py --config configs/d32s_base.py --source PATH --steps 40      # an accelerator

Overhead is 1 - a / b. a: seconds of a step when compiled steps are dispatched back to back on one batch that lies on
the device; b: seconds of a step of `train`, logging included; evaluation, checkpoints and samples are not. Both are
measured in turns, in one process. The loss is the plain one, whose step is the shortest. Memory is the resident size
that two tiny runs of many steps record in their own metrics.jsonl: one that only takes steps, and one with twenty
evaluations, samples, checkpoints and frontiers.
Prints the figures and writes benchmarks/results/trainer_overhead_DATE.json.
"""

import contextlib
import dataclasses
import datetime
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config, LossConfig, load_config
from snlp_jax.io.files import atomic_write
from snlp_jax.io.metrics import FILE_NAME, read_metrics
from snlp_jax.io.provenance import circumstances
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.mesh import make_mesh, put_batch
from snlp_jax.train.loop import train
from snlp_jax.train.loss import Plan
from snlp_jax.train.step import make_init, make_step, optimizer_of
from snlp_jax.types import Batch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Args:
    config: Path = ROOT / "configs" / "demo.py"
    """Its model and batch."""
    source: str = ""
    """Text; empty: the config's."""
    steps: int = 100
    """Of each round."""
    rounds: int = 5
    memory_steps: int = 2000
    """0 leaves that part out."""
    out: Path = Path("")
    """Empty: benchmarks/results/trainer_overhead_DATE.json."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    config = load_config(args.config)
    if args.source:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=args.source))
    record: dict[str, Any] = circumstances() | {"config": config.name, "steps": args.steps}
    with tempfile.TemporaryDirectory() as folder:
        record |= overhead(dataclasses.replace(config, loss=LossConfig()), Path(folder), args.steps, args.rounds)
        print(
            f"step alone {1e3 * record['bare_s']:.1f} ms, in the loop {1e3 * record['loop_s']:.1f} ms: "
            f"overhead {record['overhead']:.1%} (of the fastest windows {record['overhead_of_the_fastest']:.1%})\n"
            f"waiting for data: {record['data_wait']:.2%} of the time, at worst {record['data_wait_max']:.2%}"
        )
        if args.memory_steps:
            # One that takes nothing but steps, and one that stops for everything twenty times.
            record["memory"] = [memory_of_a_run(config, Path(folder), args.memory_steps, each) for each in (0, 20)]
            for run in record["memory"]:
                points = ", ".join(f"{step}: {mib:.1f}" for step, mib in run["host_mib"].items())
                print(
                    f"resident MiB at steps of a run with {run['events']} evaluations, checkpoints, ...: {points}; "
                    f"slope {run['slope_kb_per_step']:.2f} kB a step"
                )
    out = args.out if args.out.name else ROOT / "benchmarks/results" / f"trainer_overhead_{datetime.date.today()}.json"
    atomic_write(out, json.dumps(record, indent=2) + "\n")
    print(f"wrote {out}")


def overhead(config: Config, folder: Path, num_steps: int, num_rounds: int) -> dict[str, Any]:
    """Seconds of a step alone and in the loop, in turns, and the share of the loop that waits for data. Medians over
    windows of a tenth of a round: a burst of other work on the machine spoils some of them."""
    window = max(num_steps // 10, 1)
    quiet = {"num_steps": num_steps, "log_every": window, "frontier_every": 0, "sample_every": 0}
    quiet |= {"eval_every": 0, "checkpoint_every": 0, "eval_batches": 1}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **quiet))
    tokens_per_step = config.train.batch_size * config.model.seq_len
    alone, bare, loop, waits = make_bare(config), [], [], []
    alone(3)
    for index in range(num_rounds):
        bare += [alone(window) for _ in range(num_steps // window)]
        records = run_quietly(dataclasses.replace(config, run_dir=str(folder / f"round{index}")))
        windows = [record for record in records if "tokens_per_s" in record]
        loop += [tokens_per_step / record["tokens_per_s"] for record in windows]
        waits += [record["data_wait"] for record in windows]
    return {
        "bare_s": statistics.median(bare),
        "loop_s": statistics.median(loop),
        "overhead": 1 - statistics.median(bare) / statistics.median(loop),
        "overhead_of_the_fastest": 1 - min(bare) / min(loop),
        "data_wait": statistics.mean(waits),
        "data_wait_max": max(waits),
        "windows": {"steps": window, "bare_s": bare, "loop_s": loop},
    }


def make_bare(config: Config) -> Callable[[int], float]:
    """``num_steps -> seconds of a step``, dispatched back to back on one batch."""
    mesh, model = make_mesh(config.mesh), LanguageModel(config.model)
    optimizer = optimizer_of(model, config, mesh)
    state = make_init(model, optimizer, config, mesh)()
    shape = (config.train.batch_size, config.model.seq_len + 1)
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    batch, step = put_batch(mesh, Batch(tokens), is_whole=True), make_step(model, optimizer, config, mesh)

    def run(num_steps: int) -> float:
        nonlocal state
        jax.block_until_ready(state)
        started = time.perf_counter()
        for _ in range(num_steps):
            state, _ = step(state, batch, plan=Plan())
        jax.block_until_ready(state)
        return (time.perf_counter() - started) / num_steps

    return run


def memory_of_a_run(config: Config, folder: Path, num_steps: int, num_events: int) -> dict[str, Any]:
    """Resident size over a run of tiny steps, and its slope by least squares from a quarter of the steps on.

    Args:
        num_events: evaluations, checkpoints, samples and frontiers on the way; 0 leaves all to the last step.
    """
    model = dataclasses.replace(
        config.model, num_layers=4, embed_dim=32, num_heads=2, num_kv_heads=2, seq_len=32, num_streams=0
    )
    every = max(num_steps // num_events, 1) if num_events else 0
    settings: dict[str, Any] = {"batch_size": 4, "num_microbatches": 1, "log_every": max(num_steps // 100, 1)}
    settings |= dict.fromkeys(("eval_every", "checkpoint_every", "sample_every", "frontier_every"), every)
    settings |= {"num_steps": num_steps, "eval_batches": 2, "tensorboard": True}
    tiny = dataclasses.replace(
        config,
        model=model,
        loss=LossConfig(),
        train=dataclasses.replace(config.train, **settings),
        eval=dataclasses.replace(config.eval, solvers=()),
        run_dir=str(folder / f"memory{num_events}"),
    )
    sizes = {int(record["step"]): record["host_mib"] for record in run_quietly(tiny) if "host_mib" in record}
    steps = np.array([step for step in sizes if step >= num_steps / 4])
    slope = np.polyfit(steps, [sizes[step] for step in steps], 1)[0] * 1024
    shown = [*list(sizes)[:: max(len(sizes) // 10, 1)], max(sizes)]
    table = {step: sizes[step] for step in shown}
    return {"steps": num_steps, "events": num_events, "slope_kb_per_step": float(slope), "host_mib": table}


def run_quietly(config: Config) -> list[dict[str, float]]:
    """Train without a word and give back what was recorded."""
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)
    return read_metrics(config.run_path / FILE_NAME)


if __name__ == "__main__":
    run_entry(main)
