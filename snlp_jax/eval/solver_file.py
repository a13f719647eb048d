"""A solver file: the setting that a search has found, with what was measured of it.

Whatever takes a setting takes the path of such a file (it ends in .json), or ``auto`` for the one in the run directory.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from snlp_jax.config import EvalConfig, from_json, to_json
from snlp_jax.config.check import Checked, Count
from snlp_jax.errors import InputError
from snlp_jax.infer.rules import CacheRule
from snlp_jax.io.files import atomic_write
from snlp_jax.notation import parse_drafter, parse_schedule

SOLVER_NAME = "solver.json"
AUTO = "auto"


@dataclass(frozen=True)
class SolverFile(Checked):
    """A setting for one model. What the search measured is for the reader; programs use the first fields."""

    setting: str
    num_layers: int
    rule: CacheRule = "per_iteration"
    """What the cache keeps of a parallel region."""
    speculate: str = ""
    """The drafter, or mtp; the setting is then seq."""
    draft_len: Count = 0
    """Drafts a round; 0 adapts the number."""
    fingerprint: str = ""
    """Of the parameters that were searched."""
    measured: dict = field(default_factory=dict)
    """Objective, limit, PPL change with its interval, cost and speed-up with their spread, device, checkpoint."""
    format: Literal[1] = 1


def write_solver_file(path: Path, solver: SolverFile) -> Path:
    atomic_write(path, to_json(solver))
    return path


def is_solver_file(text: str) -> bool:
    """Whether a setting is the name of a file instead."""
    return text.strip() == AUTO or text.strip().endswith(".json")


def read_solver_file(text: str, num_layers: int, run_dir: Path) -> SolverFile:
    """The file that ``text`` names.

    Args:
        text: a path, or ``auto`` for the run's own.
        num_layers: of the model at hand.

    Raises:
        InputError: no such file, no solver file, one of a model of another depth, or a setting that cannot be read.
    """
    path = run_dir / SOLVER_NAME if text.strip() == AUTO else Path(text.strip()).expanduser()
    if not path.is_file():
        raise InputError(f"there is no solver file {str(path)!r}; make one with eval.py RUN_DIR --search.")
    try:
        solver: SolverFile = from_json(path.read_text(encoding="utf-8"), SolverFile)
    except (InputError, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} is no solver file of format 1; make one with eval.py RUN_DIR --search."
        ) from error
    if solver.num_layers != num_layers:
        raise InputError(
            f"solver file {str(path)!r} is for a model of {solver.num_layers} layers, but this one has {num_layers}; "
            "search again with eval.py RUN_DIR --search."
        )
    parse_schedule(solver.setting, num_layers)
    if solver.speculate:
        parse_drafter(solver.speculate, num_layers)
    return solver


def setting_of(text: str, num_layers: int, run_dir: Path) -> str:
    """``text``, or the setting in the file that it names. For errors see :func:`read_solver_file`."""
    return read_solver_file(text, num_layers, run_dir).setting if is_solver_file(text) else text


def with_settings(config: EvalConfig, num_layers: int, run_dir: Path) -> EvalConfig:
    """``config`` with the settings that its solver files hold. For errors see :func:`read_solver_file`."""
    return dataclasses.replace(config, solvers=tuple(setting_of(text, num_layers, run_dir) for text in config.solvers))
