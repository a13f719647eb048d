"""Peak host memory of an import, beside what stays: a random checkpoint in shards, read onto this host.

    python benchmarks/import_memory.py                     # 1.5 B parameters in bfloat16: 3 GB of disk, 8 GB of memory
    python benchmarks/import_memory.py --layers 4          # a small one

The checkpoint has the shape of Qwen2.5-1.5B. Two processes of their own import it, one the parameters alone, the other
by the whole command, which writes a run too; the resident size is sampled every 10 ms. Prints one JSON object; exits
with 1 where a peak is more than 1.3 times the larger of the largest shard and the largest stacked leaf above what the
process began with and the parameters, which stay.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
LIMIT = 1.3
SHARD_BYTES = 2**30


def make_checkpoint(folder: Path, num_layers: int) -> None:
    """Random bits of numbers near 1, tensor by tensor."""
    import tokenizers

    from snlp_jax.model.convert import family_config, family_rows
    from snlp_jax.model.convert.tensor_files import Tensor, write_files

    told = CONFIG | {"num_hidden_layers": num_layers}
    config = family_config(told)
    rng = np.random.default_rng(0)
    tensors = []
    for row in family_rows(config):
        shape = row.shape_in_torch
        make = lambda shape=shape: rng.random(shape, np.float32)  # noqa: E731
        tensors += [Tensor(name, shape, make) for name in row.names]
    write_files(folder, tensors, "bfloat16", SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(told))
    words = {"<s>": 0, **{f"w{i}": i for i in range(1, CONFIG["vocab_size"])}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    backend.add_special_tokens(["<s>"])
    backend.save(str(folder / "tokenizer.json"))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, target: Path | None) -> None:
    """Read the parameters, or import all into ``target``; print the resident size before, at its peak and after."""
    import jax

    from snlp_jax.cli.convert import import_run
    from snlp_jax.model import LanguageModel
    from snlp_jax.model.convert import TensorFiles, family_config, family_rows, read_params

    told = json.loads((folder / "config.json").read_text())
    config = family_config(told)
    rows = family_rows(config)
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before = peak = resident_bytes()
    is_done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_done.wait(0.01):
            peak = max(peak, resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    if target:
        import_run(str(folder), target)
    else:
        params = read_params(TensorFiles(folder), rows)  # noqa: F841  it stays while the size is read
    seconds = time.perf_counter() - start
    is_done.set()
    sampler.join()
    leaves = jax.tree.leaves(LanguageModel(config).abstract_params())
    found = {"before": before, "peak": peak, "after": resident_bytes(), "seconds": round(seconds, 1)}
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    print(json.dumps(found | {"parameter_bytes": sum(sizes), "largest_leaf": max(sizes)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made; by default a temporary folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.target)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name) / "source"
        folder.mkdir()
        make_checkpoint(folder, args.layers)
        command = [sys.executable, __file__, "--measure", str(folder)]
        flags = {"parameters": [], "command": ["--target", str(Path(name) / "run")]}
        texts = {
            what: subprocess.run(command + more, check=True, stdout=subprocess.PIPE, text=True).stdout
            for what, more in flags.items()
        }
        largest_shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    report: dict = {"largest_shard": largest_shard, "limit": LIMIT}
    for what, text in texts.items():
        found = json.loads(text.splitlines()[-1])
        above = found["peak"] - found["before"] - found["parameter_bytes"]
        ratio = above / max(largest_shard, found["largest_leaf"])
        report[what] = found | {"above": above, "ratio": round(ratio, 3)}
    print(json.dumps(report, indent=2))
    sys.exit(any(report[what]["ratio"] > LIMIT for what in texts))


if __name__ == "__main__":
    main()
