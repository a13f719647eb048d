"""The command ``python -m snlp_jax.linearize``, which is snlp_jax/cli/linearize.py."""

from snlp_jax.cli.entry import run_entry
from snlp_jax.cli.linearize import main

run_entry(main)
