"""Every solver method against equal-depth controls, on trained models: quality, cost, and what wins at equal depth.

    python benchmarks/study.py configs/study_demo.py --stage steps      # trains what is measured here
    python benchmarks/solver_study.py --seeds 0 1 2 --arms plain late mhc

Reads runs/study/study_demo/ARM-steps-SEED: ``plain`` is trained without any solver loss, ``late`` for one Identity
iteration, ``mhc`` has four residual streams and is trained for one HyperConnection iteration. Calibrations are fitted
to each run's own training text. Times (one token, the fair twin of eval.py) are taken on the first seed. Prints a
table for each arm, in markdown, sorted by depth, and writes benchmarks/results/solver_study_DATE.json after every run;
started again, it goes on from there.
"""

import dataclasses
import datetime
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from snlp_jax.cli.entry import run_entry
from snlp_jax.errors import InputError
from snlp_jax.eval import evaluate_run
from snlp_jax.io.files import atomic_write
from snlp_jax.io.provenance import git_commit
from snlp_jax.run import read_config

ROOT = Path(__file__).resolve().parents[1]

CALIBRATIONS = (
    "cal8:n=8,k=2,rank=48",
    "cal8_scalar:n=8,k=2,kind=scalar,init=h0",
    "cal8_h0:n=8,k=2,init=h0",
    "pre8:n=8,k=2,init=preheat",
)
CONTROLS = ("exit:5", "skip:4-11", "exit:6", "skip:5-11", "pairs:n=8", "pairs:n=12")
SOLVERS = (
    "{own}:n=4,k=1",
    "{own}:n=4,k=2",
    "{own}:n=8,k=1",
    "{own}:n=8,k=2",
    "{own}:n=8,k=4",
    "{own}:n=8,k=1,init=batch_forward",
    "{own}:n=8,tol=0.05",
    "{own}:n=8,k=1,stage=4xF2",
    "{own}:n=8,k=2,stage=4xF2",
    "{own}:n=8,k=1,stage=1xF8",
    "jac:n=8,k=2",
    "diag:n=8,k=1",
    "diag:n=8,k=2",
    "cal:n=8,k=1,init=cal,fit=cal8",
    "cal:n=8,k=2,init=cal,fit=cal8",
    "cal:n=8,k=2,fit=cal8_h0",
    "cal:n=8,k=2,fit=cal8_scalar",
    "{own}:n=8,k=2,init=cal,fit=cal8",
    "{own}:n=8,k=2,init=preheat,fit=pre8",
    "{own}:n=8,k=1,init=warm",
    "exact:n=8,k=1",
    *CONTROLS,
)
"""``{own}`` is the correction that fits the arm's residual path."""
ONLY: dict[str, tuple[str, ...]] = {
    "plain": ("idn:n=8,k=2,trust=0.1", "idn:n=8,k=2,damp=0.1"),
    "late": ("idn:n=8,k=2,trust=0.1", "idn:n=8,k=2,damp=0.1"),
    "mhc": ("idn:n=8,k=1", "idn:n=8,k=2", "idn:n=8,k=4"),
}


@dataclass(frozen=True)
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = ("plain", "late", "mhc")
    num_windows: int = 128
    """Held-out windows, the same for every run."""
    timing_repeats: int = 50
    """0 leaves out the times."""
    runs: str = "runs/study/study_demo/{arm}-steps-{seed}"
    """Where they are, from the root of the repository."""
    out: Path = Path("")
    """Empty: benchmarks/results/solver_study_DATE.json."""


def settings_of(arm: str) -> tuple[str, ...]:
    """Solver settings of one arm."""
    own = "hcn" if arm == "mhc" else "idn"
    return tuple(text.format(own=own) for text in SOLVERS) + ONLY[arm]


def measure(arm: str, seed: int, args: Args) -> dict:
    """Evaluate one run's last checkpoint under all settings."""
    run_dir = ROOT / args.runs.format(arm=arm, seed=seed)
    config = read_config(run_dir)
    is_timed = seed == args.seeds[0] and args.timing_repeats > 0 and arm != "plain"  # whose programs are those of late
    settings = dataclasses.replace(
        config.eval,
        solvers=settings_of(arm),
        calibrations=CALIBRATIONS,
        num_windows=args.num_windows,
        batch_size=32,
        greedy_tokens=0,
        timing_len=1,
        timing_repeats=args.timing_repeats if is_timed else 0,
    )
    started = time.time()
    report = evaluate_run(run_dir, dataclasses.replace(config, eval=settings), "last")
    columns = ("setting", "is_oracle", "depth", "mean_depth", "num_block_evals", "ppl", "ppl_change", "kl", "top1")
    rows = [{name: getattr(result, name) for name in (*columns, "state_error", "speedup")} for result in report.results]
    info = {name: report.info[name] for name in ("device", "jax", "corpus_hash", "date")}
    return {"arm": arm, "seed": seed, "seconds": time.time() - started, "results": rows, "info": info}


def table(arm: str, runs: list[dict]) -> str:
    """Mean over seeds and range of the PPL change, means of the rest; in markdown, by depth, best first."""
    mine = [run for run in runs if run["arm"] == arm]
    lines = [
        "| setting | depth | evals | change of PPL | KL | top-1 | state error | one token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for setting in [row["setting"] for row in mine[0]["results"]]:
        of_seeds = [next(row for row in run["results"] if row["setting"] == setting) for run in mine]
        mean = lambda name: statistics.mean(row[name] for row in of_seeds)  # noqa: B023, E731
        changes = [100 * row["ppl_change"] for row in of_seeds]
        spread = f" ({min(changes):+.2f} to {max(changes):+.2f})" if len(changes) > 1 else ""
        speedup = next((row["speedup"] for row in of_seeds if row["speedup"]), None)
        depth, first = mean("mean_depth"), of_seeds[0]
        cells = [
            f"`{setting}`" + (" (oracle)" if first["is_oracle"] else ""),
            f"{depth:.1f}".removesuffix(".0"),
            str(first["num_block_evals"]),
            f"{statistics.mean(changes):+.2f} %{spread}",
            f"{mean('kl'):.2g}",
            f"{100 * mean('top1'):.1f} %",
            f"{mean('state_error'):.2g}",
            "-" if speedup is None else f"{speedup:.2f}x",
        ]
        rows.append((depth, statistics.mean(changes), "| " + " | ".join(cells) + " |"))
    return "\n".join(lines + [line for *_, line in sorted(rows)])


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    for arm in args.arms:
        if arm not in ONLY:
            raise InputError(f"unknown arm {arm!r}; choose among {', '.join(ONLY)}.")
    out = args.out if args.out.name else ROOT / "benchmarks/results" / f"solver_study_{datetime.date.today()}.json"
    asked = {"num_windows": args.num_windows, "calibrations": list(CALIBRATIONS)}
    runs = []
    if out.is_file():
        record = json.loads(out.read_text())
        if {name: record[name] for name in asked} != asked:
            raise InputError(f"{str(out)!r} holds another study; remove it or name another file by --out.")
        runs = record["runs"]
    commit = git_commit()  # of the code that runs, whatever is committed meanwhile
    done = {(run["arm"], run["seed"]) for run in runs}
    for seed in args.seeds:
        for arm in args.arms:
            if (arm, seed) in done:
                continue
            runs.append(measure(arm, seed, args) | {"commit": commit})
            atomic_write(out, json.dumps(asked | {"runs": runs}, indent=2) + "\n")
            print(f"{arm}-{seed}: {runs[-1]['seconds']:.0f} s", flush=True)
    for arm in args.arms:
        sequential = [run["results"][0]["ppl"] for run in runs if run["arm"] == arm]
        print(f"\n{arm}: sequential PPL {', '.join(f'{ppl:.3f}' for ppl in sequential)}\n\n{table(arm, runs)}")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    run_entry(main)
