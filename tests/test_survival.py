"""A run that is stopped or killed at any moment, whose checkpoints are damaged or whose disk is full: it loses nothing
that was saved, and ends with the parameters of an unbroken run, bit for bit."""

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import ROOT, tiny, two_layers

from benchmarks import kills
from snlp_jax.config import Config
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.io.metrics import read_metrics
from snlp_jax.model import LanguageModel
from snlp_jax.train.loop import train


def saved_params(config: Config, step: int) -> list[bytes]:
    """Bits of a checkpoint's parameters."""
    with Checkpointer(config.run_path / "checkpoints", read_only=True) as checkpoints:
        params = checkpoints.restore_params(LanguageModel(config.model).abstract_params(), step)[1]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.mark.slow
def test_a_run_killed_in_every_phase_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    """Tokenization, evaluation, a checkpoint in the making, steps: the run of benchmarks/kills.py made small. Arrays,
    optimizer included, tokens and metrics are equal."""
    words = [f"w{i}{chr(97 + i % 26)}" for i in range(300)]
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(rng.choice(words, 60)) for _ in range(1000)))
    source = str(tmp_path / "text.txt")
    sizes = {"steps": 36, "layers": 2, "width": 32, "shard_bytes": 20_000, "vocab_size": 300}
    record = kills.run(kills.Args(kills=4, source=source, **sizes), tmp_path)
    assert record["differences"] == []
    rows = {row["phase"]: row for row in record["rows"]}
    assert list(sorted(rows)) == ["checkpoint", "evaluation", "steps", "tokenization"]
    assert {row["signal"] for row in rows.values()} == {"SIGKILL", "SIGTERM"}
    assert "shards done" in rows["tokenization"]["state"] and "writing" in rows["checkpoint"]["state"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_damaged_checkpoints_cost_their_steps_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped bit in the newest, a truncated file in the one before, every second file of the third deleted."""
    unbroken = two_layers(tiny(tmp_path / "unbroken", num_steps=8, checkpoint_every=2, eval_every=4, keep_last=9))
    train(unbroken)
    config = dataclasses.replace(unbroken, run_dir=str(tmp_path / "run"))
    subprocess.run(["cp", "-r", str(unbroken.run_path), str(config.run_path)], check=True)
    files = lambda step: sorted(p for p in (config.run_path / "checkpoints" / step).rglob("*") if p.is_file())  # noqa: E731
    largest = max((p for p in files("8") if "params" in p.parts), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    largest = max((p for p in files("6") if "state" in p.parts), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    for path in files("4")[::2]:
        path.unlink()
    with caplog.at_level(logging.WARNING, "snlp_jax"):
        train(config, resume=True)
    told = [record.getMessage() for record in caplog.records if "skipping checkpoint" in record.getMessage()]
    assert [text.split()[2] for text in told] == ["8", "6", "4"]
    for step in (2, 4, 6, 8):
        assert saved_params(config, step) == saved_params(unbroken, step)
    losses = [
        [r["loss"] for r in read_metrics(c.run_path / "metrics.jsonl") if "loss" in r] for c in (config, unbroken)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_a_sentence(tmp_path: Path) -> None:
    """On a small file system of its own, in a namespace, so that nothing has to be unmounted."""
    (tmp_path / "disk").mkdir()
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")]
    try:
        subprocess.run([*space, *probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    script = Path(__file__).parent / "full_disk.py"
    done = subprocess.run(
        [*space, sys.executable, str(script), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
