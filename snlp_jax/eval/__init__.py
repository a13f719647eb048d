"""What a schedule costs and what it changes, always next to the sequential pass of the same weights."""

from snlp_jax.eval.evaluate import default_solvers, evaluate
from snlp_jax.eval.report import Report, SettingResult, print_report, write_report
from snlp_jax.eval.run import evaluate_run
