"""Compare layer-parallel passes of a trained model with its sequential pass: quality and cost.

    python eval.py runs/demo --solvers idn:n=8,k=1 idn:n=8,k=2

Writes eval.json, eval.csv and eval.png into RUN_DIR/eval. Settings are written as in snlp_jax/notation.py; without any,
a small grid is measured. With --diagnose, writes diagnose.json and diagnose.png instead: the error of every layer after
every iteration, and the norms of the layers' Jacobians. Flags that are not given come from the run's saved config.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from snlp_jax.config import EvalConfig
from snlp_jax.entry import run_entry


@dataclass(frozen=True)
class Args:
    run_dir: tyro.conf.Positional[Path]
    """What training wrote."""
    checkpoint: Literal["best", "last"] = "best"
    """The one of the lowest validation loss, or the newest."""
    diagnose: bool = False
    """Instead of quality and cost: where each setting's regions err, and how strongly their layers amplify it."""
    eval: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)

    from snlp_jax.eval import evaluate_run, print_report, read_config, write_report  # after --help: they import jax

    config = read_config(args.run_dir)
    args = tyro.cli(Args, description=__doc__, default=dataclasses.replace(args, eval=config.eval))
    if args.diagnose:
        from snlp_jax.eval.diagnose import diagnose_run, print_diagnosis, write_diagnosis

        diagnosis = diagnose_run(args.run_dir, dataclasses.replace(config, eval=args.eval), args.checkpoint)
        print_diagnosis(diagnosis)
        paths, notice = write_diagnosis(diagnosis, args.run_dir)
        print("\n".join(filter(None, ["wrote " + ", ".join(map(str, paths)), notice])))
        return
    report = evaluate_run(args.run_dir, dataclasses.replace(config, eval=args.eval), args.checkpoint)
    print_report(report)
    paths, notice = write_report(report, args.run_dir)
    print("\n".join(filter(None, ["wrote " + ", ".join(map(str, paths)), notice])))


if __name__ == "__main__":
    run_entry(main)
