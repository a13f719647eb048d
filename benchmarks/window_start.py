"""Perplexity of a run on held-out windows with and without what the model was trained to see before each of them.

python benchmarks/window_start.py runs/gemma --data wikipedia.txt --seq-len 512 --num-windows 24
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from snlp_jax.cli.entry import run_entry
from snlp_jax.config import EvalConfig
from snlp_jax.data.pipeline import TokenData, WindowSource, held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.perplexity import perplexity
from snlp_jax.eval.run import open_run
from snlp_jax.eval.text_model import TextModel
from snlp_jax.notation import parse_schedule
from snlp_jax.run import read_config


@dataclass(frozen=True)
class Args:
    run_dir: tyro.conf.Positional[Path]
    data: tuple[str, ...]
    """Files, as in eval.py."""
    seq_len: int = 512
    num_windows: int = 24


@dataclass(frozen=True)
class AsCut(TokenData):
    """The same text in windows as they are cut."""

    def windows(self, split: Any, seq_len: int) -> WindowSource:
        return WindowSource(getattr(self, split), seq_len)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    config = read_config(args.run_dir)
    config = dataclasses.replace(
        config, eval=EvalConfig(solvers=(), data=args.data, seq_len=args.seq_len, num_windows=args.num_windows)
    )
    run = open_run(args.run_dir, config, "last")
    special = run.data.tokenizer.special
    if not special.opens_windows:
        raise InputError(f"the tokenizer of {str(args.run_dir)!r} puts nothing before a text; name another run.")
    model = TextModel(
        run.model, run.params, run.data.tokenizer, parse_schedule("seq", config.model.num_layers), batch_size=1
    )
    cut = AsCut(**{field.name: getattr(run.data, field.name) for field in dataclasses.fields(TokenData)})
    for title, data in (("as they are cut", cut), ("with what the model knows before a text", run.data)):
        batches = held_out_batches(data, seq_len=args.seq_len, batch_size=1, num_batches=args.num_windows)
        nll_WT = np.stack([model.token_fn(batch["tokens"])[0][0] for batch in batches])
        print(
            f"{len(batches)} windows of {args.seq_len} tokens {title}: perplexity {perplexity(nll_WT):.2f}", flush=True
        )


if __name__ == "__main__":
    run_entry(main)
