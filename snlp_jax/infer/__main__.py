"""The command ``python -m snlp_jax.infer``, which is snlp_jax/cli/infer.py."""

from snlp_jax.cli.entry import run_entry
from snlp_jax.cli.infer import main

run_entry(main)
