"""The demo: a small layer-parallel Transformer on real text, the Python sources of the standard library.

Command:   make demo, or: python train.py configs/demo.py && python eval.py runs/demo
Hardware:  two CPU cores, 2 GB of memory. Time: about five minutes of training on a quiet machine.
Expected:  sequential PPL within 1 % of a twin without the solver loss at equal steps; with 4 dependent layers instead
           of 12 half a percent more by four iterations over all layers, a few percent by one over the last nine. Why
           the loss is cross entropy through one iteration, weak and from the start: docs/results.md, section 1.
"""

from snlp_jax.config import Config, DataConfig, EvalConfig, LossConfig, ModelConfig, SolverCEConfig, TrainConfig

config = Config(
    name="demo",
    model=ModelConfig(
        vocab_size=257,
        num_layers=12,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=4,
        seq_len=128,
        use_x0_resid=False,
    ),
    data=DataConfig(source="builtin", tokenizer="byte"),
    loss=LossConfig(
        solver_ce=SolverCEConfig(weight=0.25, region_sizes=(9,), num_iters=1, start_fraction=0.0, ramp_fraction=0.0)
    ),
    train=TrainConfig(
        num_steps=500, batch_size=16, eval_every=100, eval_batches=8, checkpoint_every=100, sample_every=250
    ),
    eval=EvalConfig(
        solvers=(
            "idn:n=4,k=1",
            "idn:n=8,k=1",
            "idn:n=8,k=2",
            "idn:n=9,k=1",
            "idn:n=9,k=3",
            "idn:n=10,k=2",
            "idn:n=12,k=4",
            "idn:4-8,k=1+idn:8-12,k=1",
            "jac:n=8,k=2",
        ),
        num_windows=256,
        batch_size=32,
        timing_len=1,  # the latency of one token, where depth counts; benchmarks/speed.py times longer sequences
        timing_repeats=100,
    ),
)
