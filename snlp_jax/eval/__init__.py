"""What a schedule costs and what it changes, always next to the sequential pass of the same weights."""

from snlp_jax.eval.evaluate import evaluate as evaluate
from snlp_jax.eval.run import evaluate_run as evaluate_run
