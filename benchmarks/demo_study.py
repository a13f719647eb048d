"""Which loss makes the demo model layer-parallel at what price: arms x seeds of configs/demo.py at equal steps.

    python benchmarks/demo_study.py --seeds 0 1 2 --arms plain demo
    python benchmarks/demo_study.py --seeds 0 --arms plain demo ce_from_start hidden_norm late_hidden_norm
    python benchmarks/demo_study.py --seeds 0 1 2 --arms mhc --solvers hcn:n=8,k=1 hcn:n=8,k=2

Every arm sees the same batches of a seed in the same order and starts from the same parameters; ``plain`` is the twin
without any auxiliary loss. The runs go to runs/study/ARM-SEED and resume where they were stopped. Prints a table and
writes benchmarks/results/demo_study_DATE.json: the perplexity of the sequential pass and of each setting on the same
held-out windows, with device, date and commit.
"""

import dataclasses
import datetime
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from snlp_jax.config import HiddenNormConfig, LossConfig, SolverCEConfig, load_config
from snlp_jax.entry import run_entry
from snlp_jax.errors import InputError
from snlp_jax.eval import evaluate_run
from snlp_jax.io.files import atomic_write
from snlp_jax.io.provenance import git_commit
from snlp_jax.train.loop import train

ROOT = Path(__file__).resolve().parents[1]
DEMO, DEMO_MHC = (load_config(ROOT / "configs" / name) for name in ("demo.py", "demo_mhc.py"))
TERM = DEMO.loss.solver_ce

ARMS: dict[str, LossConfig] = {
    "plain": LossConfig(),
    "demo": DEMO.loss,
    "mhc": DEMO_MHC.loss,
    "mhc_plain": LossConfig(),
    "ce_from_start": LossConfig(solver_ce=dataclasses.replace(TERM, start_fraction=0.0)),
    "ce_late_20": LossConfig(solver_ce=dataclasses.replace(TERM, start_fraction=0.8)),
    "ce_two_iters": LossConfig(solver_ce=dataclasses.replace(TERM, num_iters=2)),
    "hidden_norm": LossConfig(hidden_norm=HiddenNormConfig(weight=0.5, region_sizes=TERM.region_sizes)),
    "late_hidden_norm": LossConfig(
        hidden_norm=HiddenNormConfig(
            weight=0.5, region_sizes=TERM.region_sizes, start_fraction=TERM.start_fraction, ramp_fraction=0.0
        )
    ),
    "late_hidden_norm_and_ce": LossConfig(
        hidden_norm=HiddenNormConfig(
            weight=0.1, region_sizes=TERM.region_sizes, start_fraction=TERM.start_fraction, ramp_fraction=0.0
        ),
        solver_ce=SolverCEConfig(
            weight=1.0, region_sizes=TERM.region_sizes, start_fraction=TERM.start_fraction, ramp_fraction=0.0
        ),
    ),
}


@dataclass(frozen=True)
class Args:
    seeds: tuple[int, ...] = (0,)
    arms: tuple[str, ...] = ("plain", "demo")
    solvers: tuple[str, ...] = ("idn:n=8,k=1", "idn:n=8,k=2")
    num_windows: int = 256
    """Held-out windows, the same for every run."""
    out: Path = Path("")
    """Empty: benchmarks/results/demo_study_DATE.json."""


def measure(arm: str, seed: int, args: Args) -> dict:
    """Train (or find trained) one arm and evaluate its last checkpoint."""
    base = DEMO_MHC if arm.startswith("mhc") else DEMO
    config = dataclasses.replace(
        base,
        name=f"{arm}-{seed}",
        run_dir=f"runs/study/{arm}-{seed}",
        loss=ARMS[arm],
        data=dataclasses.replace(base.data, seed=seed),
        train=dataclasses.replace(base.train, seed=seed),
        eval=dataclasses.replace(
            base.eval, solvers=args.solvers, num_windows=args.num_windows, timing_repeats=0, greedy_tokens=0
        ),
    )
    started = time.time()
    train(config, resume=True, started=started)
    seconds = time.time() - started
    report = evaluate_run(config.run_path, config, "last")
    return {
        "arm": arm,
        "seed": seed,
        "steps": config.train.num_steps,
        "seconds": seconds,
        "ppl": {result.setting: result.ppl for result in report.results},
        "info": {name: report.info[name] for name in ("device", "jax", "corpus_hash")},
    }


def summarise(rows: list[dict], args: Args) -> Table:
    """Means over seeds, with the spread where there are several seeds; changes are taken seed by seed."""
    plain = {row["seed"]: row["ppl"]["seq"] for row in rows if row["arm"] == "plain"}
    table = Table(title=f"{DEMO.train.num_steps} steps, {args.num_windows} held-out windows, seeds {args.seeds}")
    for column in ("arm", "seq PPL", "seq vs plain", *args.solvers):
        table.add_column(column)

    def cell(values: list[float], form: str) -> str:
        spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}" if values else "-"

    for arm in args.arms:
        mine = [row for row in rows if row["arm"] == arm]
        versus = [100 * (row["ppl"]["seq"] / plain[row["seed"]] - 1) for row in mine if row["seed"] in plain]
        cells = [cell([row["ppl"]["seq"] for row in mine], ".3f"), cell(versus, "+.2f") + " %"]
        for solver in args.solvers:
            cells.append(cell([100 * (row["ppl"][solver] / row["ppl"]["seq"] - 1) for row in mine], "+.2f") + " %")
        table.add_row(arm, *cells)
    return table


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    for arm in args.arms:
        if arm not in ARMS:
            raise InputError(f"unknown arm {arm!r}; choose among {', '.join(ARMS)}.")
    out = args.out if args.out.name else ROOT / "benchmarks/results" / f"demo_study_{datetime.date.today()}.json"
    commit = git_commit()  # of the code that runs, whatever is committed meanwhile
    rows = []
    for seed in args.seeds:
        for arm in args.arms:
            rows.append(measure(arm, seed, args))
            record = {"commit": commit, "steps": DEMO.train.num_steps, "solvers": args.solvers, "rows": rows}
            record["num_windows"] = args.num_windows
            atomic_write(out, json.dumps(record, indent=2) + "\n")
    Console(width=150).print(summarise(rows, args))
    print(f"wrote {out}")


if __name__ == "__main__":
    run_entry(main)
