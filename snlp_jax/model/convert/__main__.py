"""The command ``python -m snlp_jax.model.convert``, which is snlp_jax/cli/convert.py."""

from snlp_jax.cli.convert import main
from snlp_jax.cli.entry import run_entry

run_entry(main)
