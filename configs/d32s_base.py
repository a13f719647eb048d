"""d32s, 0.5B parameters, plain: the control of d32s_idn.

Command:   python train.py configs/d32s_base.py --data.source PATH
           (a file, folder or glob of .txt or .jsonl; the built-in corpus is far too small for 32,768 tokens)
Hardware:  meant for one GPU with 80 GB. Not run here: time and memory are not measured. 4800 steps of 1,048,576
           tokens are 5.0e9 tokens, and at 6 FLOPs a token and weight of the 178.3e6 in matrices
           and head, 5.4e18 FLOPs without attention and recomputation.
Expected:  published: sequential PPL 15.21, n8 K4 15.42. Not run here.
           PPL compares only on the authors' corpus and tokenizer.
"""

from snlp_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    name="d32s_base",
    model=ModelConfig(
        vocab_size=32_768,
        num_layers=32,
        embed_dim=640,
        num_heads=5,
        num_kv_heads=5,
        seq_len=2048,
        window_pattern="SSSL",
    ),
    data=DataConfig(tokenizer="bpe", bpe_vocab_size=32_768),
    # The published rates hold at 524,288 tokens a step; this batch, twice that, multiplies them by sqrt(2).
    optim=OptimConfig(batch_reference=2**19),
    # 512 sequences of 2048 tokens are 1,048,576 tokens a step, in microbatches of 8 sequences.
    train=TrainConfig(
        num_steps=4800,
        batch_size=512,
        num_microbatches=64,
        log_every=10,
        eval_every=250,
        eval_batches=16,
        checkpoint_every=250,
    ),
    eval=EvalConfig(
        solvers=(
            "idn:n=24,k=1",
            "idn:n=24,k=2",
            "idn:n=24,k=4",
            "sid:n=24,k=2",
            "idn:n=12,k=2,init=batch_forward",
            "idn:n=8,k=4",
        ),
        batch_size=8,
    ),
)
