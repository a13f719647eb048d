"""A model of any depth from one number: width, batch, steps and rates follow (snlp_jax/config/dial.py).

Command:   python train.py configs/dial.py --depth 20 --data.source PATH
           (--plan in front of --data.source says what it costs and whether it fits, and does not run)
Hardware:  by depth; `--plan` measures memory and counts FLOPs. Not run here.
Expected:  not run here.
"""

from snlp_jax.config import Config, DataConfig, Dial, LossConfig, ModelConfig, SolverCEConfig, TrainConfig

dial = Dial(
    Config(
        name="dial",
        model=ModelConfig(
            vocab_size=32_768,
            num_layers=12,
            seq_len=2048,
            window_pattern="SSSL",
            use_x0_resid=False,
        ),
        data=DataConfig(tokenizer="bpe", bpe_vocab_size=32_768),
        # The demo's: cross entropy through one iteration that leaves a third of the depth.
        loss=LossConfig(solver_ce=SolverCEConfig(weight=0.25, region_sizes=(9,), num_iters=1, ramp_fraction=0.0)),
        train=TrainConfig(log_every=10, eval_every=250, eval_batches=16, checkpoint_every=250, frontier_every=250),
    )
)

config = dial.at(12)
