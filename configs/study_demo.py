"""The demo's model, plain and trained late for one iteration, three seeds: what benchmarks/solver_study.py reads.

Command:   python benchmarks/study.py configs/study_demo.py --stage steps --source builtin
Hardware:  two CPU cores, 2 GB of memory. Time: three to nine minutes a run, twelve runs.
Expected:  docs/results.md, sections 1 and 3.
"""

import dataclasses
from pathlib import Path

from benchmarks.study_config import Study
from snlp_jax.config import LossConfig, load_config

demo, mhc = (load_config(Path(__file__).with_name(name)) for name in ("demo.py", "demo_mhc.py"))
streams = {"num_streams": mhc.model.num_streams}
late = dataclasses.replace(mhc.loss.solver_ce, correction="idn")

study = Study(
    base=dataclasses.replace(
        demo,
        name="study_demo",
        loss=LossConfig(),
        train=dataclasses.replace(demo.train, sample_every=0),
        eval=dataclasses.replace(demo.eval, timing_repeats=0, greedy_tokens=0),
    ),
    arms={
        "plain": {},
        "late": {"loss": {"solver_ce": dataclasses.asdict(late)}},
        "mhc_plain": {"model": streams},
        "mhc": {"model": streams, "loss": {"solver_ce": dataclasses.asdict(mhc.loss.solver_ce)}},
    },
    depths=(9, 6, 5, 4),
    main_depth=5,
    iterations=(1, 2),
    finalists=("late", "mhc"),
    has_shallow=False,
    plot="docs/study_demo.png",
)
