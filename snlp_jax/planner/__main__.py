"""The command ``python -m snlp_jax.planner``, which is snlp_jax/cli/plan.py."""

from snlp_jax.cli.entry import run_entry
from snlp_jax.cli.plan import main

run_entry(main)
