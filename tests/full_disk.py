"""Fill the disk under each writer of a run in turn. Run by test_survival.py, as root of a namespace, with a folder that
holds a folder ``disk`` to mount on."""

import contextlib
import dataclasses
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tiny_run import ROOT, tiny, two_layers, write_config

import snlp_jax.train.loop as loop
from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.io.metrics import read_metrics
from snlp_jax.model import LanguageModel

FOLDER = Path(sys.argv[1])
DISK = FOLDER / "disk"
BALLAST = DISK / "ballast"


def leave(room: int) -> None:
    """Fill the disk but for ``room`` bytes."""
    BALLAST.unlink(missing_ok=True)
    status = os.statvfs(DISK)
    size = status.f_bavail * status.f_frsize - room
    with BALLAST.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def run(config: Config, resume: bool = True) -> tuple[int, str]:
    """As train.py does: the exit code and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            run_entry(lambda: loop.train(config, resume=resume))
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()
    return 0, said.getvalue()


def refused(config: Config, *expected: str) -> None:
    """The run ends with exit code 2 and one sentence, that holds ``expected``."""
    code, said = run(config)
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert (code, len(lines)) == (2, 1) and "Traceback" not in said, (code, said[-1500:])
    assert all(text in lines[0] for text in expected), lines
    print("ok:", lines[0], flush=True)


@contextlib.contextmanager
def full_at(step: int) -> Iterator[None]:
    """Fill the disk when ``step`` steps are made."""
    make_plan = loop.make_plan

    def fill(config, now, *rest):
        if now == step:
            leave(0)
        return make_plan(config, now, *rest)

    loop.make_plan = fill
    try:
        yield
    finally:
        loop.make_plan = make_plan


def bits(config: Config, step: int) -> list[bytes]:
    with Checkpointer(config.run_path / "checkpoints", read_only=True) as checkpoints:
        params = checkpoints.restore_params(LanguageModel(config.model).abstract_params(), step)[1]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def saved(config: Config) -> list[int]:
    return sorted(int(path.name) for path in (config.run_path / "checkpoints").iterdir() if path.name.isdecimal())


def losses(config: Config) -> list[float]:
    return [record["loss"] for record in read_metrics(config.run_path / "metrics.jsonl") if "loss" in record]


def blocks(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))


def main() -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(DISK)], check=True)
    os.environ["XDG_CACHE_HOME"] = str(FOLDER / "xdg")
    steps = {"num_steps": 100, "eval_every": 50, "checkpoint_every": 25, "keep_last": 9}
    unbroken = two_layers(tiny(FOLDER / "unbroken", **steps))
    assert run(unbroken)[0] == 0
    size = blocks(unbroken.run_path / "checkpoints" / "25")

    def on_disk(name: str, **fields: object) -> Config:
        train = dataclasses.replace(unbroken.train, **fields)
        return dataclasses.replace(unbroken, run_dir=str(DISK / name), train=train)

    def goes_on(config: Config, *steps: int) -> None:
        """What was saved is whole; with room again the run ends as the unbroken one."""
        assert saved(config) == list(steps), saved(config)
        code, said = run(config)
        assert code == 2 and "full" in said, said  # as long as it is full
        assert saved(config) == list(steps)
        assert [bits(config, step) for step in steps] == [bits(unbroken, step) for step in steps]
        BALLAST.unlink()
        code, said = run(config)
        assert code == 0 and f"resumed from the checkpoint of step {steps[-1]}" in said, said
        assert bits(config, 100) == bits(unbroken, 100) and losses(config) == losses(unbroken)

    # The token cache, and the claim of a run directory, before anything is compiled.
    leave(0)
    cached_there = dataclasses.replace(unbroken.data, cache_dir=str(DISK / "cache"))
    refused(dataclasses.replace(on_disk("cold"), data=cached_there), str(DISK / "cache"))
    refused(on_disk("cold"), "full", str(DISK / "cold"))

    # A checkpoint: the third finds no room.
    leave(int(2.5 * size) + 65536)
    config = on_disk("checkpoint")
    refused(config, "full", str(config.run_path / "checkpoints"))
    goes_on(config, 25, 50)

    # Metrics, and TensorBoard's events, which grow faster.
    for name in ("metrics", "tensorboard"):
        config = on_disk(name, checkpoint_every=50, eval_every=0, tensorboard=name == "tensorboard")
        with full_at(52):
            refused(config, "full", str(config.run_path))
        assert 50 <= len(losses(config)) < 100
        goes_on(config, 50)

    # The report of a run that has finished.
    (config.run_path / "report.html").unlink()
    leave(4096)
    refused(config, "full", str(config.run_path))
    BALLAST.unlink()
    assert run(config)[0] == 0 and (config.run_path / "report.html").exists()

    # What it prints goes to a file on the full disk.
    leave(0)
    command = [sys.executable, "train.py", str(write_config(config, FOLDER)), "--resume"]
    with (DISK / "log").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "full" in done.stderr and "Traceback" not in done.stderr, done
    BALLAST.unlink()

    # No full disk, but a limit on the size of files.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    config = on_disk("limited", checkpoint_every=25)
    refused(config, "ulimit -f", str(config.run_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run(config)[0] == 0 and bits(config, 100) == bits(unbroken, 100)


if __name__ == "__main__":
    main()
