"""What fine-tuning does to both passes: kinds of fine-tuning x sets of conversations, from one checkpoint.

    python benchmarks/sft.py
    python benchmarks/sft.py --sets gsm8k --arms sequential mixed --steps 100 --base runs/demo

``sequential`` trains the sequential pass alone, ``solver`` the pass of one iteration alone, ``mixed`` both, ``lora``
both through adapters of rank 8. Everything else is that of configs/sft_*.py: same batches in the same order, same
schedule. The runs go to runs/sft/SET-ARM and resume where they were stopped. Prints a table and writes
benchmarks/results/sft_cpu_DATE.json: cross entropy (nats a token) of the held-out responses before and after, by the
last checkpoint, for the sequential pass and each setting, with device, date and commit.
"""

import dataclasses
import datetime
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config, LoraConfig, load_config
from snlp_jax.data.chat import prepare_data
from snlp_jax.data.pipeline import held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval import evaluate
from snlp_jax.eval.report import Report
from snlp_jax.eval.run import evaluate_run
from snlp_jax.io.files import atomic_write
from snlp_jax.io.provenance import git_commit
from snlp_jax.model import LanguageModel
from snlp_jax.run import read_params
from snlp_jax.train.loop import train
from snlp_jax.train.start import data_config

ROOT = Path(__file__).resolve().parents[1]
SETS = {name: load_config(ROOT / "configs" / f"sft_{name}.py") for name in ("gsm8k", "dialogue")}
ARMS: dict[str, dict[str, Any]] = {
    "sequential": {"solver_weight": 0.0},
    "solver": {"sequential_weight": 0.0},
    "mixed": {},
    "lora": {"lora": LoraConfig(rank=8, lr=1e-2)},
}


@dataclass(frozen=True)
class Args:
    sets: tuple[str, ...] = tuple(SETS)
    arms: tuple[str, ...] = tuple(ARMS)
    base: str = "runs/demo"
    """The run that all start from."""
    steps: int = 0
    """0: as the config says."""
    runs: Path = Path("runs/sft")
    out: Path = Path("")
    """Empty: benchmarks/results/sft_cpu_DATE.json."""


def config_of(name: str, arm: str, args: Args) -> Config:
    config, how = SETS[name], ARMS[arm]
    loss = dataclasses.replace(
        config.loss,
        sequential_weight=how.get("sequential_weight", config.loss.sequential_weight),
        solver_ce=dataclasses.replace(
            config.loss.solver_ce, weight=how.get("solver_weight", config.loss.solver_ce.weight)
        ),
    )
    schedule = dataclasses.replace(
        config.train, init_from=args.base, init_checkpoint="last", num_steps=args.steps or config.train.num_steps
    )
    run_dir = str(args.runs / f"{name}-{arm}")
    lora = how.get("lora", config.lora)
    return dataclasses.replace(config, name=f"{name}-{arm}", run_dir=run_dir, loss=loss, train=schedule, lora=lora)


def losses(report: Report) -> dict[str, float]:
    return {result.setting: math.log(result.ppl) for result in report.results}


def measure_base(config: Config) -> Report:
    """The checkpoint that fine-tuning starts from, on the same held-out responses."""
    model = LanguageModel(config.model)
    _, params = read_params(Path(config.train.init_from), model, config.train.init_checkpoint)
    sizes = {"batch_size": config.eval.batch_size, "num_batches": config.eval.num_windows // config.eval.batch_size}
    batches = held_out_batches(prepare_data(data_config(config, False)), seq_len=config.model.seq_len, **sizes)
    tokens, weights = ([batch[name] for batch in batches] for name in ("tokens", "weight"))
    return evaluate(model, params, tokens, config.eval, target_weights=weights)


def measure(name: str, arm: str, args: Args) -> dict[str, Any]:
    """Train (or find trained) one arm and evaluate its last checkpoint."""
    config = config_of(name, arm, args)
    started = time.time()
    train(config, resume=True, started=started)
    seconds = time.time() - started
    report = evaluate_run(config.run_path, config, "last")
    info = {key: report.info[key] for key in ("device", "jax", "corpus_hash", "num_windows", "num_targets")}
    return {
        "set": name,
        "arm": arm,
        "steps": config.train.num_steps,
        "seconds": seconds,
        "losses": losses(report),
        "info": info,
        "config": dataclasses.asdict(config),
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    settings = list(rows[0]["losses"])
    table = Table(title="cross entropy of held-out responses, nats a token")
    for column in ("set", "fine-tuning", "steps", *settings, *(f"{setting} - seq" for setting in settings[1:])):
        table.add_column(column)
    for row in rows:
        values = row["losses"]
        gaps = [f"{values[setting] - values['seq']:+.4f}" for setting in settings[1:]]
        table.add_row(row["set"], row["arm"], str(row["steps"]), *(f"{values[s]:.4f}" for s in settings), *gaps)
    return table


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    for given, known in ((args.sets, SETS), (args.arms, ARMS)):
        for name in given:
            if name not in known:
                raise InputError(f"{name!r} is not one of {', '.join(known)}.")
    out = args.out if args.out.name else ROOT / "benchmarks/results" / f"sft_cpu_{datetime.date.today()}.json"
    commit = git_commit()  # of the code that runs, whatever is committed meanwhile
    rows: list[dict[str, Any]] = []
    for name in args.sets:
        before = measure_base(config_of(name, "mixed", args))
        rows.append({"set": name, "arm": "none", "steps": 0, "losses": losses(before)})
        for arm in args.arms:
            rows.append(measure(name, arm, args))
            record = {"commit": commit, "base": args.base, "unit": "nats a token of held-out responses", "rows": rows}
            atomic_write(out, json.dumps(record, indent=2) + "\n")
    Console(width=150).print(table_of(rows))
    print(f"wrote {out}")


if __name__ == "__main__":
    run_entry(main)
