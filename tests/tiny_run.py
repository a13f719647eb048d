"""A whole run of seconds, for the tests of training and evaluation."""

from pathlib import Path

import numpy as np

from snlp_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, SolverCEConfig, TrainConfig

MODEL = ModelConfig(num_layers=4, embed_dim=32, num_heads=2, num_kv_heads=1, seq_len=16, short_window=3)


def tiny(run_dir: Path, **train_fields) -> Config:
    """A run of seconds on a small text file beside the run directory."""
    text = run_dir.parent / "text.txt"
    if not text.exists():
        rng = np.random.default_rng(0)
        words = ["layer", "parallel", "newton", "trace", "scan", "depth", "token", "state"]
        text.write_text("\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(400)))
    fields = {"num_steps": 12, "batch_size": 4, "log_every": 1, "eval_every": 6, "checkpoint_every": 3}
    return Config(
        name="tiny",
        run_dir=str(run_dir),
        model=MODEL,
        data=DataConfig(source=str(text), cache_dir=str(run_dir.parent / "cache")),
        optim=OptimConfig(warmup_steps=2),
        loss=LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(3,), start_fraction=0.5)),
        train=TrainConfig(**{"eval_batches": 2, **fields, **train_fields}),
    )
