"""Fine-tune the demo on a few hundred instructions and answers, for the sequential pass and the solver's at once.

Command:   python train.py configs/sft_dialogue.py
Needs:     runs/demo (make demo) and github.com/yizhongw/self-instruct as .jsonl of instruction, input and output, or
           --data.source PATH with --data.prompt-field and the like.
Hardware:  two CPU cores, 2 GB of memory. Time: a few minutes on a quiet machine.
Expected:  the loss on answers falls in both passes; so small a set is soon known by heart, so the best checkpoint is
           the one to use (it is what readers take).
"""

import dataclasses
from pathlib import Path

from snlp_jax.config import DataConfig, load_config

gsm8k = load_config(Path(__file__).with_name("sft_gsm8k.py"))
config = dataclasses.replace(
    gsm8k,
    name="sft_dialogue",
    data=DataConfig(
        source="../shared/data/self-instruct/*.jsonl",
        format="chat",
        prompt_field="instruction",
        response_field="output",
        val_fraction=0.15,
    ),
    train=dataclasses.replace(gsm8k.train, num_steps=150, eval_every=25, checkpoint_every=25),
)
