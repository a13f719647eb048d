"""d32s with four residual streams and static maps between them (mHC), plain: the control of d32s_mhc_hcn.

Command:   python train.py configs/d32s_mhc_base.py --data.source PATH
           (a file, folder or glob of .txt or .jsonl; the built-in corpus is far too small for 32,768 tokens)
Hardware:  meant for one GPU with 80 GB. Not run here: time and memory are not measured. 4800 steps of 1,048,576
           tokens are 5.0e9 tokens, and at 6 FLOPs a token and weight of the 178.3e6 in matrices
           and head, 5.4e18 FLOPs without attention, the maps and recomputation.
Expected:  not run here, and no published number to stand beside.
"""

from dataclasses import replace
from pathlib import Path

from snlp_jax.config import load_config

base = load_config(Path(__file__).with_name("d32s_base.py"))

config = replace(
    base,
    name="d32s_mhc_base",
    model=replace(base.model, use_x0_resid=False, num_streams=4),
    eval=replace(
        base.eval,
        solvers=("hcn:n=16,k=1", "hcn:n=16,k=2", "hcn:n=16,k=4", "idn:n=16,k=2", "hcn:n=8,k=4", "hcn:n=24,k=2"),
    ),
)
