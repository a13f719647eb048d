"""Fine-tune the demo on grade-school arithmetic, for the sequential pass and the solver's at once.

Command:   python train.py configs/sft_gsm8k.py && python -m snlp_jax.infer runs/sft_gsm8k --chat --prompt "1 + 2?"
Needs:     runs/demo (make demo) and the problems of github.com/openai/grade-school-math, or --data.source PATH.
Hardware:  two CPU cores, 2 GB of memory. Time: a few minutes on a quiet machine.
Expected:  the loss on answers falls in both passes and the gap between them stays small; a model of 2.7 M parameters
           learns the form of an answer and no arithmetic. Figures of all kinds of fine-tuning: benchmarks/sft.py.
"""

import dataclasses
from pathlib import Path

from snlp_jax.config import DataConfig, LossConfig, OptimConfig, TrainConfig, load_config

demo = load_config(Path(__file__).with_name("demo.py"))
config = dataclasses.replace(
    demo,
    name="sft_gsm8k",
    # Half of the problems with their answers fit into 512 bytes; the others are cut there.
    model=dataclasses.replace(demo.model, seq_len=512),
    data=DataConfig(
        source="../shared/data/gsm8k/train.jsonl", format="chat", prompt_field="question", response_field="answer"
    ),
    optim=OptimConfig(warmup_steps=10),  # at full rates: the demo has read Python, and English is new to it
    loss=LossConfig(solver_ce=dataclasses.replace(demo.loss.solver_ce, weight=1.0)),
    train=TrainConfig(
        num_steps=300, batch_size=4, eval_every=100, eval_batches=16, checkpoint_every=100, init_from="runs/demo"
    ),
    eval=dataclasses.replace(
        demo.eval,
        solvers=("idn:n=9,k=1", "idn:n=10,k=2"),
        num_windows=64,
        batch_size=4,
        greedy_tokens=0,
        timing_repeats=0,
    ),
)
