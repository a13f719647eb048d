"""Several processes: they refuse, end and resume together, and learn what one process learns."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from tiny_run import FAST_COMPILE, tiny, two_layers

from snlp_jax.cli import launch
from snlp_jax.cli.launch import Processes, add_flags, from_flags
from snlp_jax.config import Config, LossConfig, MeshConfig, OptimConfig
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.io.metrics import read_metrics
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.parallel.processes import Vote, all_or_none, tells_of_lost_peer
from snlp_jax.parallel.sharding import TRAINING, shardings_of, with_shardings
from snlp_jax.train.loop import _stop_on_signal, train

ROOT = Path(__file__).parent.parent
TIMEOUT = 10
"""Seconds after which the processes of a test take one another for dead."""
SMOOTH = OptimConfig(warmup_steps=2, x0_scale_lr=0.0, resid_scale_lr=0.0, scalar_lr=0.0, value_embed_lr=0.0)
"""At a fresh start some gradients are zero up to rounding, which Adam's first update turns into a full step of either
sign; without those parameters a run depends on the order of summation no more than its gradients do."""


# -- One process -------------------------------------------------------------------------------------------------------


def parse(*flags: str) -> Processes | None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(flags))


def test_flags() -> None:
    assert parse() is None
    assert parse("--process-timeout", "7") is None
    assert parse("--distributed") == Processes()
    explicit = ("--coordinator", "10.0.0.1:8476", "--num-processes", "4", "--process-id", "3")
    assert parse(*explicit, "--process-timeout", "7") == Processes("10.0.0.1:8476", 4, 3, 7)
    for flags, expected in [
        (("--num-processes", "4"), "all of --coordinator"),
        (("--distributed", *explicit), "--distributed alone"),
        ((*explicit, "--process-id", "4"), "it must be 0 to 3"),
        ((*explicit, "--coordinator", "10.0.0.1"), "is not HOST:PORT"),
        (("--distributed", "--process-timeout", "0"), "1 second or more"),
    ]:
        with pytest.raises(InputError, match=expected):
            parse(*flags)


def test_one_process_agrees_with_itself() -> None:
    vote = Vote()
    assert [vote(wish) for wish in (False, True, False)] == [False, True, False]
    with all_or_none():
        pass
    with pytest.raises(InputError, match="as it is"), all_or_none():
        raise InputError("as it is")


def test_a_signal_that_comes_twice_stops_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher and its supervisor may both pass one on; only a later one ends the run at once."""
    # Jobs that a shell starts in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), _stop_on_signal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGINT)


ABORT = b"""F1122 09:15:47.1 12527 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. This most likely indicates that another task died. absl::Status: UNAVAILABLE: tasks are unhealthy
*** Check failure stack trace: ***
    @     0x7f16fcc40634  absl::LogMessage::SendToLog()
"""


def test_the_abort_of_the_coordination_service_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stderr", shown)
    fatal = launch.pass_on(io.BytesIO(b"a warning\n" + ABORT))
    assert shown.buffer.getvalue() == b"a warning\n", "what came before stays, the stack does not"
    how = Processes(timeout=7)
    assert "died or cannot be reached (--process-timeout 7 s)" in launch.lost_sentence(how, fatal)
    assert "not all come together within 7 s" in launch.lost_sentence(how, "RPC: RegisterTask")


def test_errors_that_tell_of_a_lost_peer() -> None:
    for text in (
        "UNKNOWN: Gloo AllReduce failed: Connection closed by peer [127.0.0.1]:20689",
        "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or there was a network error",
        "DEADLINE_EXCEEDED: Barrier timed out.",
    ):
        assert tells_of_lost_peer(ValueError(text))
    for text in ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", "dot_general requires equal dimensions"):
        assert not tells_of_lost_peer(ValueError(text))


# -- Several processes -------------------------------------------------------------------------------------------------


def start(config: Config, folder: Path, process_id: int, address: str | None, *flags: str) -> subprocess.Popen:
    """One of two processes, through the real entry script, with one device; without an address as SLURM starts it."""
    file = folder / f"{Path(config.run_dir).name}.py"
    text = json.dumps(dataclasses.asdict(config))
    file.write_text(f"from snlp_jax.config import from_json\nconfig = from_json({text!r})\n")
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "xdg"), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = FAST_COMPILE
    where: tuple[str, ...] = ("--distributed",)
    if address is not None:
        where = ("--coordinator", address, "--num-processes", "2", "--process-id", str(process_id))
    else:
        env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        env |= {"SLURM_PROCID": str(process_id), "SLURM_LOCALID": str(process_id)}
    command = [sys.executable, "train.py", str(file), *where, "--process-timeout", str(TIMEOUT), *flags]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def two(config: Config, folder: Path, *flags: str, is_slurm: bool = False) -> Iterator[list[subprocess.Popen]]:
    address = None if is_slurm else free_address()
    both = [start(config, folder, process_id, address, *flags) for process_id in range(2)]
    try:
        yield both
    finally:
        for process in both:
            process.kill()  # its child ends with it
            process.communicate()


def end(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    output = process.communicate(timeout=timeout)[0]
    return process.returncode, output


def run_two(config: Config, folder: Path, *flags: str, is_slurm: bool = False) -> list[str]:
    with two(config, folder, *flags, is_slurm=is_slurm) as both:
        ends = [end(process) for process in both]
    assert [code for code, _ in ends] == [0, 0], ends
    return [output for _, output in ends]


def wait_for_step(config: Config, step: int, both: list[subprocess.Popen]) -> None:
    path, deadline = config.run_path / "metrics.jsonl", time.time() + 240
    while not (path.exists() and any(record["step"] >= step for record in read_metrics(path))):
        assert time.time() < deadline and all(process.poll() is None for process in both), [
            end(process, 60) for process in both
        ]
        time.sleep(0.02)


def losses(config: Config) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(config.run_path / "metrics.jsonl") if "loss" in r}


def params_on(config: Config, mesh: MeshConfig) -> dict:
    """The parameters of the last checkpoint on a mesh of this process."""
    devices, shapes = make_mesh(mesh), LanguageModel(config.model).abstract_params()
    wanted = with_shardings(shapes, shardings_of(shapes, config.model, devices, TRAINING))
    with Checkpointer(config.run_path / "checkpoints", read_only=True) as checkpoints:
        return jax.tree.map(np.asarray, checkpoints.restore_params(wanted, config.train.num_steps)[1])


@pytest.mark.slow
def test_a_process_whose_peer_never_comes_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TIMEOUT", 1)
    process = start(tiny(tmp_path / "run"), tmp_path, 1, free_address())
    try:
        code, output = end(process, 60)
    finally:
        process.kill()
    assert code == 1, output
    assert output.splitlines()[-1].startswith("error: the processes of this run have not all come together within 1 s")
    assert "Check failure" not in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_survive_a_kill_and_a_signal(tmp_path: Path) -> None:
    """Twenty steps by one process, by two, and by two of which one is killed, later the same one is told to stop, and
    then a file of the newest checkpoint is lost."""
    fields = {"num_steps": 20, "checkpoint_every": 3, "eval_every": 10}
    alone = dataclasses.replace(two_layers(tiny(tmp_path / "alone", **fields)), optim=SMOOTH, loss=LossConfig())
    unbroken = dataclasses.replace(alone, run_dir=str(tmp_path / "unbroken"), mesh=MeshConfig(data=2))
    broken = dataclasses.replace(unbroken, run_dir=str(tmp_path / "broken"))
    train(alone)
    first, other = run_two(unbroken, tmp_path)
    assert "2 x cpu" in first and "finished" in first
    assert "step" not in other, "the first process speaks for all"
    # The two halves of a batch are summed in another order, in float32.
    assert losses(unbroken) == pytest.approx(losses(alone), rel=1e-5)

    with two(broken, tmp_path) as (stays, dies):
        wait_for_step(broken, 8, [stays, dies])
        dies.kill()
        since = time.time()
        code, output = end(stays, timeout=60)
        assert time.time() - since < 2 * TIMEOUT
        assert code == 1, output
        assert output.splitlines()[-1].startswith("error: another process of this run died"), output
        assert "Traceback" not in output
    with two(broken, tmp_path, "--resume") as both:
        wait_for_step(broken, 13, both)
        both[1].send_signal(signal.SIGTERM)
        ends = [end(process) for process in both]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "continue with --resume" in ends[0][1]
    steps = sorted(int(path.name) for path in (broken.run_path / "checkpoints").glob("[0-9]*"))
    next((broken.run_path / "checkpoints" / str(steps[-1])).glob("params/ocdbt.process_1/d/*")).unlink()
    first, other = run_two(broken, tmp_path, "--resume")
    assert f"skipping checkpoint {steps[-1]}" in first and f"skipping checkpoint {steps[-1]}" in other
    assert f"resumed from the checkpoint of step {steps[-2]}" in first
    assert losses(broken) == losses(unbroken), "bit for bit, each step once"
    chex.assert_trees_all_equal(params_on(broken, MeshConfig()), params_on(unbroken, MeshConfig()))


@pytest.mark.slow
def test_a_run_moves_to_another_mesh_and_number_of_processes(tmp_path: Path) -> None:
    """Layers over two processes, restored by one: the same bits on any devices. A step of one process on four devices,
    the rest by two processes: what one process on one device learns."""
    alone = dataclasses.replace(two_layers(tiny(tmp_path / "alone", num_steps=4, eval_every=0)), optim=SMOOTH)
    train(alone)
    config = dataclasses.replace(alone, run_dir=str(tmp_path / "run"), mesh=MeshConfig(layer=2, ring_microbatches=2))
    output = run_two(config, tmp_path)[0]
    assert "ring with 2 microbatches" in " ".join(output.split())
    whole = params_on(config, MeshConfig())
    for mesh in (MeshConfig(layer=2, tensor=2), MeshConfig(data=8)):
        chex.assert_trees_all_equal(params_on(config, mesh), whole)

    moved = dataclasses.replace(alone, run_dir=str(tmp_path / "moved"), mesh=MeshConfig(data=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vote, "__call__", lambda vote, wish: True)  # as if a signal had come before the first step
        train(moved)
    moved = dataclasses.replace(moved, mesh=MeshConfig(layer=2))
    assert "resumed from the checkpoint of step 1" in run_two(moved, tmp_path, "--resume", is_slurm=True)[0]
    # Float32 sums in another order; the microbatches of the ring are one more.
    for other in (config, moved):
        assert losses(other) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_bad_input_of_one_process_ends_both(tmp_path: Path) -> None:
    """Two processes of different commands, and a run directory that only the first one looks at."""
    config = dataclasses.replace(tiny(tmp_path / "run"), mesh=MeshConfig(data=2))
    address = free_address()
    both = [start(config, tmp_path, i, address, "--data.seed", str(i)) for i in range(2)]
    for code, output in map(end, both):
        assert code == 2, output
        assert "process 1 has another config than process 0" in output
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with two(config, tmp_path) as both:
        ends = [end(process) for process in both]
    assert [code for code, _ in ends] == [2, 2], ends
    assert "holds metrics.jsonl of a run" in ends[0][1]
    assert "process 0 of this run cannot go on" in ends[1][1]
