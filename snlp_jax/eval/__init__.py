"""What a schedule costs and what it changes, always next to the sequential pass of the same weights."""

from snlp_jax.eval.evaluate import default_solvers, evaluate, evaluate_run, read_config
from snlp_jax.eval.report import Report, SettingResult

__all__ = ["Report", "SettingResult", "default_solvers", "evaluate", "evaluate_run", "read_config"]
