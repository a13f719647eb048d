"""Compare layer-parallel passes of a trained model with its sequential pass: see snlp_jax/cli/evaluate.py.

python eval.py runs/demo --solvers idn:n=8,k=1 idn:n=8,k=2
"""

from snlp_jax.cli.entry import run_entry
from snlp_jax.cli.evaluate import main

if __name__ == "__main__":
    run_entry(main)
