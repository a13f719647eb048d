"""d32s with four residual streams (mHC) and the published hidden-norm regularizer for HyperConnection.

Command:   python train.py configs/d32s_mhc_hcn.py --data.source PATH
           (a file, folder or glob of .txt or .jsonl; the built-in corpus is far too small for 32,768 tokens)
Hardware:  meant for one GPU with 80 GB. Not run here: time and memory are not measured. 4800 steps of 1,048,576
           tokens are 5.0e9 tokens, and at 6 FLOPs a token and weight of the 178.3e6 in matrices
           and head, 5.4e18 FLOPs without attention, the maps, recomputation and the auxiliary loss.
Expected:  published: sequential PPL 15.52, n16 K1 16.93, n16 K4 15.71, n8 K4 15.60. Not run here.
           PPL compares only on the authors' corpus and tokenizer.
"""

from dataclasses import replace
from pathlib import Path

from snlp_jax.config import HiddenNormConfig, LossConfig, load_config

base = load_config(Path(__file__).with_name("d32s_mhc_base.py"))

config = replace(
    base,
    name="d32s_mhc_hcn",
    loss=LossConfig(
        hidden_norm=HiddenNormConfig(
            correction="hcn", weight=0.5, region_sizes=(8, 16, 24), stride=3, detach_target=True
        )
    ),
)
