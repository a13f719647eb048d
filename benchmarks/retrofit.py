"""Making a pretrained model layer-parallel by fine-tuning: how far a weak solver term comes, and at what price.

    python benchmarks/retrofit.py runs/real/smollm2 --text 'wikipedia/*.txt' --steps 300

Arms, from one imported run, on the same batches in the same order:

    plain     the sequential pass alone, the twin that says what the text itself changes
    weak      and cross entropy through two iterations of Identity on the last layers, weight 0.1
    strong    the same with weight 1
    norm      the published hidden norm of one iteration, weight 0.5
    lora      weak, through adapters of rank 16

Embeddings and head stay as they are; matrices are trained by Muon. Each arm is a run that resumes where it was stopped.
Of the base and of every arm: perplexity on held-out text in order and of the solver at one, two and four iterations,
with its change from the base's pass in order, and lossless speculation with the solver as drafter: the share of its
drafts that are accepted and tokens a second beside the plain engine of the same weights. Prints a table and writes
benchmarks/results/retrofit_NAME_DEVICE_DATE.json after every arm.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.machine import header, out_path
from benchmarks.pretrained_methods import say
from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config, LoraConfig, LossConfig
from snlp_jax.config.lora import Target
from snlp_jax.config.loss import HiddenNormConfig, SolverCEConfig
from snlp_jax.data.pipeline import held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.run import evaluate_run
from snlp_jax.infer import Engine, Request
from snlp_jax.io.files import atomic_write
from snlp_jax.notation import parse_schedule
from snlp_jax.run import load_run, read_config, read_data
from snlp_jax.train.loop import train

MATRICES: tuple[Target, ...] = ("query", "key", "value", "out", "up", "down")
ADAPTER_LR = 1e-3
ARMS = ("plain", "weak", "strong", "norm", "lora")


@dataclass(frozen=True)
class Args:
    """Fine-tune an imported model with and without solver terms."""

    base: tyro.conf.Positional[Path]
    """An imported run."""
    text: str = ""
    """Files to train and evaluate on; empty: the run's own."""
    arms: tuple[str, ...] = ("plain", "weak", "lora")
    region: int = 8
    """Layers at the end that are solved."""
    steps: int = 300
    batch_size: int = 1
    seq_len: int = 256
    lr_scale: float = 0.02
    """Of the published rates from scratch."""
    num_windows: int = 32
    runs: Path = Path("runs/retrofit")
    out: str = ""

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm not in ARMS:
                raise InputError(f"--arms has {arm!r}; known are {', '.join(ARMS)}.")


def main(args: Args) -> dict[str, Any]:
    """Train and measure all arms; what the JSON file holds."""
    began, base = time.perf_counter(), read_config(args.base)
    report = header(base.model, dataclasses.asdict(args) | {"base": str(args.base), "runs": str(args.runs)})
    report = {key: value for key, value in report.items() if key not in ("limits", "cells", "skipped", "failed")}
    out = out_path(args.out, f"retrofit_{base.name}", report)
    report["arms"] = []
    for arm in ("base", *args.arms):
        config = config_of(arm, base, args)
        seconds = 0.0
        if arm != "base":
            say(f"training {arm}: {args.steps} steps of {args.batch_size * args.seq_len} tokens")
            started = time.time()
            train(config, resume=True, started=started)
            seconds = time.time() - started
        run_dir = args.base if arm == "base" else config.run_path
        say(f"measuring {arm}")
        report["arms"].append({"arm": arm, "seconds": round(seconds, 1), **measure(run_dir, config, args)})
        report["elapsed_s"] = round(time.perf_counter() - began, 1)
        atomic_write(out, json.dumps(report, indent=1) + "\n")
    Console().print(table_of(report["arms"]))
    print(f"{report['elapsed_s']} s; wrote {out}")
    return report


def config_of(arm: str, base: Config, args: Args) -> Config:
    """The base's config on the text of ``args``, with the losses of an arm."""
    weight = {"weak": 0.1, "lora": 0.1, "strong": 1.0}.get(arm, 0.0)
    term = SolverCEConfig(weight=weight, region_sizes=(args.region,), num_iters=2, ramp_fraction=0.1)
    norm = HiddenNormConfig(weight=0.5 * (arm == "norm"), region_sizes=(args.region,))
    every = max(args.steps // 4, 1)
    targets = MATRICES if base.model.mlp == "relu2" else (*MATRICES, "gate")
    return dataclasses.replace(
        base,
        name=arm,
        run_dir=str(args.runs / base.name / arm),
        model=dataclasses.replace(base.model, seq_len=args.seq_len),
        data=dataclasses.replace(base.data, source=args.text or base.data.source),
        loss=LossConfig(solver_ce=term, hidden_norm=norm),
        lora=LoraConfig(rank=16, targets=targets, lr=ADAPTER_LR / args.lr_scale) if arm == "lora" else base.lora,
        optim=dataclasses.replace(base.optim, lr_scale=args.lr_scale, max_grad_norm=1.0),
        train=dataclasses.replace(
            base.train,
            init_from=str(args.base),
            init_checkpoint="last",
            trainable="" if arm == "lora" else "blocks/.*",
            num_steps=args.steps,
            batch_size=args.batch_size,
            eval_every=every,
            eval_batches=4,
            checkpoint_every=every,
            keep_last=1,
            sample_every=0,
        ),
        eval=dataclasses.replace(
            base.eval,
            solvers=tuple(f"idn:n={args.region},k={k}" for k in (1, 2, 4)),
            num_windows=args.num_windows,
            batch_size=4,
            greedy_prompts=0,
            timing_repeats=0,
        ),
    )


def measure(run_dir: Path, config: Config, args: Args) -> dict[str, Any]:
    """Perplexities of the last checkpoint, and speculation with the solver as drafter."""
    quality = evaluate_run(run_dir, config, "last")
    run = load_run(run_dir, "last")
    (windows,) = held_out_batches(read_data(run_dir, config), seq_len=128, batch_size=4, num_batches=1)
    requests = [[Request(row[:64].tolist(), 48)] for row in np.asarray(windows["tokens"])]
    drafts: dict[str, Any] = {}
    plain = Engine(run.model, run.params)
    for k in (1, 2):
        setting = f"idn:n={args.region},k={k}"
        engine = Engine(run.model, run.params, draft=parse_schedule(setting, config.model.num_layers))
        ratios, tested, accepted = [], 0, 0
        for index, request in enumerate(requests):
            speeds = []
            for each in (plain, engine):
                each.generate(request)
                assert each.statistics is not None
                speeds.append(each.statistics.tokens_per_second)
            assert engine.statistics is not None
            tested += engine.statistics.tested
            accepted += engine.statistics.accepted
            if index:  # the first compiles
                ratios.append(speeds[1] / speeds[0])
        share = accepted / tested if tested else math.nan
        drafts[setting] = {"acceptance": share, "speed_ratio": float(np.median(ratios))}
    rows = {each.setting: {"ppl": each.ppl, "depth": each.depth} for each in quality.results}
    return {"settings": rows, "drafts": drafts}


def table_of(arms: list[dict[str, Any]]) -> Table:
    """Perplexity of every setting with its change from the base's pass in order; acceptance of the solver's drafts."""
    settings, drafts = list(arms[0]["settings"]), list(arms[0]["drafts"])
    first = arms[0]["settings"]["seq"]["ppl"]
    table = Table(
        "arm", *(Column(name, justify="right") for name in (*settings, *(f"drafts {each}" for each in drafts)))
    )
    for arm in arms:
        cells = [
            f"{arm['settings'][name]['ppl']:.4g} ({arm['settings'][name]['ppl'] / first - 1:+.1%})" for name in settings
        ]
        cells += [
            f"{arm['drafts'][name]['acceptance']:.0%}, {arm['drafts'][name]['speed_ratio']:.2f}x" for name in drafts
        ]
        table.add_row(arm["arm"], *cells)
    return table


if __name__ == "__main__":
    run_entry(lambda: main(tyro.cli(Args, description=__doc__)))
