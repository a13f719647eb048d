"""Sixteen layers trained for the sequential pass alone: what linearization and solvers without training start from.

Command:   python train.py configs/plain16.py && python benchmarks/pretrained.py runs/plain16
Hardware:  two CPU cores, 3 GB of memory. Time: ten to fifteen minutes of training on a quiet machine.
Expected:  docs/results.md.

The text is English Wikipedia where that lies beside the repository, and otherwise the built-in corpus.
"""

from pathlib import Path

from snlp_jax.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig

TEXT = "../shared/data/enwiki-2021/train.txt"

config = Config(
    name="plain16",
    model=ModelConfig(vocab_size=257, num_layers=16, embed_dim=128, num_heads=4, num_kv_heads=4, seq_len=256),
    data=DataConfig(source=TEXT if Path(TEXT).is_file() else "builtin", tokenizer="byte"),
    train=TrainConfig(num_steps=1500, batch_size=8, eval_every=250, eval_batches=8, checkpoint_every=250),
    eval=EvalConfig(
        solvers=("idn:n=8,k=1", "idn:n=8,k=2", "sid:n=8,k=1", "sid:n=8,k=2", "pairs:n=8"),
        num_windows=256,
        batch_size=32,
        timing_len=1,
        timing_repeats=50,
    ),
)
