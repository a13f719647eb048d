"""Twice the demo's depth: the model on which decoding is measured, trained for regions of 18 and of all 24 layers.

Command:   python train.py configs/deep.py && python benchmarks/decode.py runs/deep --draft-lens 0 1 2 3 4
Hardware:  two CPU cores, 3 GB of memory. Time: about half an hour of training on a quiet machine.
Expected:  sequential perplexity 2.6 a byte; speeds, and what its drafters are worth: docs/results.md, section 7.
"""

import dataclasses
from pathlib import Path

from snlp_jax.config import LayerSkipConfig, load_config

demo = load_config(Path(__file__).with_name("demo.py"))
config = dataclasses.replace(
    demo,
    name="deep",
    model=dataclasses.replace(demo.model, num_layers=24, embed_dim=192, num_heads=6, num_kv_heads=2),
    loss=dataclasses.replace(
        demo.loss,
        solver_ce=dataclasses.replace(
            demo.loss.solver_ce, weight=0.5, region_sizes=(18, 24), sample_region=True, start_fraction=0.5
        ),
        # For a drafter of five layers, skip:4-23: on a CPU, where a draft costs what it reads, the cheapest one.
        layer_skip=LayerSkipConfig(weight=1.0, region_sizes=(20,), start_fraction=0.3),
    ),
    train=dataclasses.replace(demo.train, num_steps=1000, sample_every=0),
    eval=dataclasses.replace(demo.eval, solvers=("idn:n=18,k=1", "idn:n=24,k=1", "idn:n=18,k=2", "idn:n=24,k=2")),
)
