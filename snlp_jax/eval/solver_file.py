"""A solver file: the setting that a search has found, with what was measured of it.

Whatever takes a setting takes the path of such a file (it ends in .json), or ``auto`` for the one in the run directory.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from snlp_jax.config import EvalConfig
from snlp_jax.config.check import Checked, Count
from snlp_jax.errors import InputError
from snlp_jax.infer.rules import CacheRule
from snlp_jax.io.files import atomic_write
from snlp_jax.notation import parse_drafter, parse_schedule

SOLVER_NAME = "solver.json"
AUTO = "auto"
FORMAT = 1


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

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=2) + "\n"


def write_solver_file(path: Path, solver: SolverFile) -> Path:
    atomic_write(path, solver.to_json())
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
    is_own = text.strip() == AUTO
    path = run_dir / SOLVER_NAME if is_own else Path(text.strip()).expanduser()
    if not path.is_file():
        if is_own:
            raise InputError(
                f"run directory {str(run_dir)!r} holds no {SOLVER_NAME}; make one with eval.py {run_dir} --search."
            )
        raise InputError(f"solver file {text.strip()!r} does not exist; make one with eval.py RUN_DIR --search.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT:
            raise ValueError
        solver = SolverFile(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, InputError) as error:
        raise InputError(
            f"{str(path)!r} is no solver file of format {FORMAT}; make one with eval.py RUN_DIR --search."
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
