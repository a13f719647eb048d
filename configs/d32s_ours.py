"""d32s, 0.5B parameters, with the loss that won our controlled study: cross entropy through one iteration, weakly.

Command:   python train.py configs/d32s_ours.py --data.source PATH
           (a file, folder or glob of .txt or .jsonl; the built-in corpus is far too small for 32,768 tokens)
Hardware:  meant for one GPU with 80 GB. Not run here: time and memory are not measured. 4800 steps of 1,048,576
           tokens are 5.0e9 tokens, and at 6 FLOPs a token and weight of the 178.3e6 in matrices and head, 5.4e18 FLOPs
           without attention and recomputation; the loss adds about two thirds.
Expected:  Not run here. On 12 small layers, at a third of their depth, +0.5 % of perplexity against the plain twin's
           sequential pass by four iterations over all layers, and no loss in its own: docs/results.md, section 1.
           Identity is the exact derivative of the skip path here, since there are no residual scalars.
"""

from dataclasses import replace
from pathlib import Path

from snlp_jax.config import LossConfig, SolverCEConfig, load_config

base = load_config(Path(__file__).with_name("d32s_base.py"))

config = replace(
    base,
    name="d32s_ours",
    model=replace(base.model, use_x0_resid=False),
    # 22 layers in one iteration: 11 dependent layers, a third of 32.
    loss=LossConfig(solver_ce=SolverCEConfig(weight=0.25, region_sizes=(22,), ramp_fraction=0.0)),
    eval=replace(
        base.eval,
        solvers=("idn:n=22,k=1", "idn:n=23,k=2", "idn:n=24,k=3", "idn:n=25,k=4", "idn:n=32,k=11", "pairs:n=32"),
    ),
)
