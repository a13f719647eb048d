"""d32, 3B parameters, plain: the control of d32_idn.

Command:   python train.py configs/d32_base.py --data.source PATH
           (a file, folder or glob of .txt or .jsonl; the built-in corpus is far too small for 32,768 tokens)
Hardware:  meant for one GPU with 141 GB. Not run here: time and memory are not measured. 4800 steps of 1,048,576
           tokens are 5.0e9 tokens, and at 6 FLOPs a token and weight of the 1,677.7e6 in matrices
           and head, 5.1e19 FLOPs without attention and recomputation.
Expected:  not run here, and no published number to stand beside.
"""

from dataclasses import replace
from pathlib import Path

from snlp_jax.config import load_config

base = load_config(Path(__file__).with_name("d32s_base.py"))

config = replace(
    base,
    name="d32_base",
    model=replace(base.model, embed_dim=2048, num_heads=16, num_kv_heads=16),
    train=replace(base.train, num_microbatches=256),  # of 2 sequences
    eval=replace(base.eval, solvers=("idn:n=8,k=1", "idn:n=8,k=4"), batch_size=2),
)
