"""demo"""
from snlp_jax.config import *
config = Config(
    name="demo",
    model=ModelConfig(num_layers=12, embed_dim=128, num_heads=4, num_kv_heads=4, seq_len=128, use_x0_resid=False),
    train=TrainConfig(num_steps=500, batch_size=16),
    loss=LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(8,), start_fraction=0.6)),
)
