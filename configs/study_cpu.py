"""The controlled study at a size for two CPU cores: which loss, how strong, on which regions, from when on.

Command:   python benchmarks/study.py configs/study_cpu.py
Hardware:  two CPU cores, 2 GB of memory. Time: about two hours on a quiet machine; it may be stopped and goes on.
Expected:  docs/results.md.

12 layers. Region sizes are those whose first iterations give depth 4, a third of the layers: n=9 with k=1, n=10 with
k=2. Every arm changes one thing; hidden-norm losses have the published weight and ramp, cross entropies act fully from
their first step. CE through one iteration beside the sequential CE (``ce_k1``) is the mix of both passes; ``ce_only``
leaves the sequential one out and ``ce_idn`` adds the hidden norm.
"""

from typing import Any

from benchmarks.study_config import Study
from snlp_jax.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig


def make_arms(num_layers: int, depth: int) -> dict[str, dict[str, Any]]:
    """The arms, for a model of ``num_layers`` layers that is to run at ``depth``."""
    one, two = num_layers - depth + 1, num_layers - depth + 2
    both = (num_layers // 2, one)
    norm = {"weight": 0.5, "region_sizes": (one,)}
    entropy = {"weight": 1.0, "region_sizes": (one,), "ramp_fraction": 0.0}
    x0, streams = {"use_x0_resid": True}, {"num_streams": 4}
    return {
        "none": {},
        "none_x0": {"model": x0},
        "none_mhc": {"model": streams},
        # Hidden norm: the correction it trains for, its target, its sizes, its strength.
        "idn": {"loss": {"hidden_norm": norm}},
        "sid": {"model": x0, "loss": {"hidden_norm": norm | {"correction": "sid"}}},
        "hcn": {"model": streams, "loss": {"hidden_norm": norm | {"correction": "hcn"}}},
        "jac": {"loss": {"hidden_norm": norm | {"correction": "jac"}}},
        "idn_detached": {"loss": {"hidden_norm": norm | {"detach_target": True}}},
        "idn_summed": {"loss": {"hidden_norm": norm | {"region_sizes": both}}},
        "idn_sampled": {"loss": {"hidden_norm": norm | {"region_sizes": both, "sample_region": True}}},
        "idn_weak": {"loss": {"hidden_norm": norm | {"weight": 0.125}}},
        "idn_strong": {"loss": {"hidden_norm": norm | {"weight": 2.0}}},
        # Cross entropy through the solver: iterations, mixture, start, strength.
        "ce_k1": {"loss": {"solver_ce": entropy}},
        "ce_k2": {"loss": {"solver_ce": entropy | {"num_iters": 2, "region_sizes": (two,)}}},
        "ce_only": {"loss": {"sequential_weight": 0.0, "solver_ce": entropy}},
        "ce_idn": {"loss": {"hidden_norm": norm, "solver_ce": entropy}},
        "ce_late_40": {"loss": {"solver_ce": entropy | {"start_fraction": 0.6}}},
        "ce_late_20": {"loss": {"solver_ce": entropy | {"start_fraction": 0.8}}},
        "ce_annealed": {"loss": {"solver_ce": entropy | {"ramp_fraction": 1.0}}},
        "ce_weak": {"loss": {"solver_ce": entropy | {"weight": 0.25}}},
        "ce_strong": {"loss": {"solver_ce": entropy | {"weight": 4.0}}},
        "skip": {"loss": {"layer_skip": {"weight": 0.5, "region_sizes": (one,)}}},
    }


study = Study(
    base=Config(
        name="study_cpu",
        model=ModelConfig(num_layers=12, embed_dim=96, num_heads=3, num_kv_heads=3, seq_len=128, use_x0_resid=False),
        data=DataConfig(tokenizer="byte"),
        train=TrainConfig(num_steps=300, batch_size=16, eval_every=0, eval_batches=1, checkpoint_every=250),
        eval=EvalConfig(num_windows=256, batch_size=32, num_bootstrap=100, timing_repeats=0, greedy_tokens=0),
    ),
    arms=make_arms(12, 4),
    depths=(6, 4, 3),
    main_depth=4,
    text="../shared/data/enwiki-2021/train.txt",
    workers=1,  # on both cores: 1.2 times the steps of two runs on one core each, in turns on a busy machine
)
