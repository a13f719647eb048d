"""d32s, 0.5B parameters, with the published hidden-norm regularizer for Identity.

Command:   python train.py configs/d32s_idn.py --data.source PATH
           (a file, folder or glob of .txt or .jsonl; the built-in corpus is far too small for 32,768 tokens)
Hardware:  meant for one GPU with 80 GB. Not run here: time and memory are not measured. 4800 steps of 1,048,576
           tokens are 5.0e9 tokens, and at 6 FLOPs a token and weight of the 178.3e6 in matrices
           and head, 5.4e18 FLOPs without attention, recomputation and the auxiliary loss.
Expected:  published: sequential PPL 15.36, n24 K2 18.09, n24 K4 16.42, n12 K2 batch_forward 15.59. Not run here.
           PPL compares only on the authors' corpus and tokenizer.
"""

from dataclasses import replace
from pathlib import Path

from snlp_jax.config import HiddenNormConfig, LossConfig, load_config

base = load_config(Path(__file__).with_name("d32s_base.py"))

config = replace(
    base,
    name="d32s_idn",
    loss=LossConfig(hidden_norm=HiddenNormConfig(weight=0.0625, region_sizes=(8, 16, 24), stride=3)),
)
