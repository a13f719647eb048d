"""Compare layer-parallel passes of a trained model with its sequential pass: quality and cost.

    python eval.py runs/demo --solvers idn:n=8,k=1 idn:n=8,k=2

Writes eval.json, eval.csv and eval.png into RUN_DIR/eval. Settings are written as in snlp_jax/notation.py, or are
solver files; without any, a small grid is measured. With --diagnose, writes diagnose.json and diagnose.png instead: the
error of every layer after every iteration, and the norms of the layers' Jacobians. With --tasks, writes tasks.json and
tasks.csv instead: multiple choice, generated answers and bits per byte. With --search, finds the fastest setting within
a limit of perplexity instead and writes it to RUN_DIR/solver.json, beside search.json, search.csv and search.png. Flags
that are not given come from the run's saved config.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from snlp_jax.cli.flags import parse
from snlp_jax.config import Config, EvalConfig, MachineConfig, SearchConfig, TaskConfig
from snlp_jax.errors import InputError

if TYPE_CHECKING:
    from snlp_jax.eval.report import Record


@dataclass(frozen=True)
class Args:
    run_dir: tyro.conf.Positional[Path]
    """What training wrote."""
    checkpoint: Literal["best", "last"] = "best"
    """The one of the lowest validation loss, or the newest."""
    diagnose: bool = False
    """Instead of quality and cost: where each setting's regions err, and how strongly their layers amplify it."""
    task: Annotated[TaskConfig, tyro.conf.arg(name="")] = field(default_factory=TaskConfig)
    search: Annotated[SearchConfig, tyro.conf.arg(name="")] = field(default_factory=SearchConfig)
    eval: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    """Precision and kernels."""


def main() -> None:
    args = parse(Args, prog="eval.py", description=__doc__)

    from snlp_jax.eval.solver_file import with_settings  # after --help: it imports jax
    from snlp_jax.run import read_config

    config = read_config(args.run_dir)
    saved = dataclasses.replace(args, eval=config.eval, machine=config.machine)
    args = parse(Args, prog="eval.py", description=__doc__, default=saved)
    config = dataclasses.replace(config, machine=args.machine, eval=args.eval)
    if args.diagnose + bool(args.task.tasks) + args.search.search > 1:
        raise InputError("--diagnose, --tasks and --search are different evaluations; give one of them.")
    if not args.search.search:
        settings = with_settings(args.eval, config.model.num_layers, args.run_dir)
        config = dataclasses.replace(config, eval=settings)
    record = measure(args, config)
    record.print()
    paths, notice = record.write(args.run_dir)
    if record.stem == "eval" and (args.run_dir / "report.html").exists():  # of the training; it shows this too
        from snlp_jax.train.report import write_html

        paths.append(write_html(args.run_dir))
    print("\n".join(filter(None, ["wrote " + ", ".join(map(str, paths)), notice])))


def measure(args: Args, config: Config) -> "Record":
    """The evaluation that was asked for."""
    if args.search.search:
        from snlp_jax.eval.search import Search

        return Search(args.run_dir, config, args.search, args.checkpoint).run()
    if args.task.tasks:
        from snlp_jax.eval.tasks import tasks_of_run

        return tasks_of_run(args.run_dir, config, args.task, args.checkpoint)
    if args.diagnose:
        from snlp_jax.eval.diagnose import diagnose_run

        return diagnose_run(args.run_dir, config, args.checkpoint)
    from snlp_jax.eval import evaluate_run

    return evaluate_run(args.run_dir, config, args.checkpoint)
