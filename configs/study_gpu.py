"""The controlled study on one GPU: the arms of study_cpu.py on 32 layers of width 640 in bfloat16.

Command:   python benchmarks/study.py configs/study_gpu.py --source PATH
Hardware:  meant for one GPU with 80 GB. Not run here: time and memory are not measured. 1000 steps of 32,768 tokens
           are 3.3e7 tokens; the matrix products of a plain run, counted in the traced step with recomputation and
           optimizer, are 4.5e16 FLOPs, 130 s at 35 % of 989 TFLOP/s, those of the costliest arm 2.4 times that. All
           without compilation and evaluation.
Expected:  not run here. 20 MB of text are about 5e6 tokens of this vocabulary, six passes: give more with --source.
"""

import runpy
from pathlib import Path

from benchmarks.study_config import Study
from snlp_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

make_arms = runpy.run_path(str(Path(__file__).with_name("study_cpu.py")))["make_arms"]

study = Study(
    base=Config(
        name="study_gpu",
        model=ModelConfig(
            vocab_size=4096,
            num_layers=32,
            embed_dim=640,
            num_heads=5,
            num_kv_heads=5,
            seq_len=512,
            use_x0_resid=False,
        ),
        data=DataConfig(tokenizer="bpe", bpe_vocab_size=4096),
        optim=OptimConfig(batch_reference=2**19),
        train=TrainConfig(num_steps=1000, batch_size=64, eval_every=0, eval_batches=1, checkpoint_every=500),
        eval=EvalConfig(num_windows=256, batch_size=32, num_bootstrap=100, timing_repeats=0, greedy_tokens=0),
    ),
    arms=make_arms(32, 11),
    depths=(16, 11, 8),
    main_depth=11,
    text="../shared/data/enwiki-2021/train.txt",
    screen_steps=500,
    head_multiple=8,
    plot="docs/study_gpu.png",
)
