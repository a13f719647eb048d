"""d32, 3B parameters, with the published hidden-norm regularizer for Identity on the last 8 layers.

Width, weight and region are published; steps, batch and stride are assumed to be those of d32s_idn.

Command:   python train.py configs/d32_idn.py --data.source PATH
           (a file, folder or glob of .txt or .jsonl; the built-in corpus is far too small for 32,768 tokens)
Hardware:  meant for one GPU with 141 GB. Not run here: time and memory are not measured. 4800 steps of 1,048,576
           tokens are 5.0e9 tokens, and at 6 FLOPs a token and weight of the 1,677.7e6 in matrices
           and head, 5.1e19 FLOPs without attention, recomputation and the auxiliary loss.
Expected:  published: sequential PPL 10.07, n8 K1 10.46, n8 K4 10.09. Not run here.
           PPL compares only on the authors' corpus and tokenizer.
"""

from dataclasses import replace
from pathlib import Path

from snlp_jax.config import HiddenNormConfig, LossConfig, load_config

base = load_config(Path(__file__).with_name("d32_base.py"))

config = replace(
    base,
    name="d32_idn",
    loss=LossConfig(hidden_norm=HiddenNormConfig(weight=0.5, region_sizes=(8,), stride=3)),
)
