"""The demo with hyper-connections: four residual streams, trained for the HyperConnection correction.

Command:   python train.py configs/demo_mhc.py && python eval.py runs/demo_mhc
Hardware:  two CPU cores, 2 GB of memory. Time: a step takes 1.2 times as long as one of the plain demo, 1.8 times in
           the last 40 % of the steps; five to six minutes of training on a quiet machine.
Expected:  docs/results.md, with three seeds and the demo beside it.
"""

import dataclasses
from pathlib import Path

from snlp_jax.config import LossConfig, SolverCEConfig, load_config

demo = load_config(Path(__file__).with_name("demo.py"))
config = dataclasses.replace(
    demo,
    name="demo_mhc",
    model=dataclasses.replace(demo.model, num_streams=4),
    loss=LossConfig(
        solver_ce=SolverCEConfig(weight=1.0, region_sizes=(8,), start_fraction=0.6, ramp_fraction=0.0, correction="hcn")
    ),
    eval=dataclasses.replace(
        demo.eval,
        solvers=(
            "hcn:n=4,k=1",
            "hcn:n=4,k=2",
            "hcn:n=8,k=1",
            "hcn:n=8,k=2",
            "idn:n=8,k=2",
            "hcn:n=8,k=1,init=batch_forward",
            "hcn:n=8,k=1,stage=4xF2",
            "skip:4-11",
        ),
    ),
)
