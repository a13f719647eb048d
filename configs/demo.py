"""The demo: a small layer-parallel Transformer on the standard library's own source code.

Command:   make demo, or: python train.py configs/demo.py && python eval.py runs/demo
"""

from snlp_jax.config import Config, DataConfig, EvalConfig, LossConfig, ModelConfig, SolverCEConfig, TrainConfig

config = Config(
    name="demo",
    model=ModelConfig(
        vocab_size=257, num_layers=12, embed_dim=128, num_heads=4, num_kv_heads=4, seq_len=128, use_x0_resid=False
    ),
    data=DataConfig(source="builtin", tokenizer="byte"),
    loss=LossConfig(
        solver_ce=SolverCEConfig(weight=1.0, region_sizes=(8,), num_iters=1, start_fraction=0.6, ramp_fraction=0.0)
    ),
    train=TrainConfig(num_steps=600, batch_size=16, eval_every=100, eval_batches=16, checkpoint_every=120),
    eval=EvalConfig(solvers=("idn:n=8,k=1", "idn:n=8,k=2")),
)
