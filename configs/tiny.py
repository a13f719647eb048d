"""The smallest run that exercises everything: for tests and for a first look at what a run writes.

Command:   python train.py configs/tiny.py
Hardware:  any CPU. Time: 20 steps of 128 tokens, seconds, nearly all of them compilation.
Expected:  a falling training loss and nothing else; 20 steps teach no language.
"""

from snlp_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SolverCEConfig,
    TrainConfig,
)

config = Config(
    name="tiny",
    model=ModelConfig(vocab_size=257, num_layers=4, embed_dim=32, num_heads=2, num_kv_heads=2, seq_len=32),
    data=DataConfig(tokenizer="byte"),
    optim=OptimConfig(warmup_steps=2),
    loss=LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(2,), start_fraction=0.5)),
    train=TrainConfig(
        num_steps=20, batch_size=4, log_every=5, eval_every=10, eval_batches=2, checkpoint_every=10, sample_tokens=16
    ),
    eval=EvalConfig(
        solvers=("idn:n=2,k=1", "sid:n=2,k=2"),
        num_windows=4,
        batch_size=2,
        num_bootstrap=100,
        greedy_prompts=2,
        greedy_prompt_len=8,
        greedy_tokens=8,
        timing_repeats=2,
    ),
)
