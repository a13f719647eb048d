"""Manners at the terminal: flags given twice, streams that are closed or know no more than ascii, and what an operating
system refuses every day."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import tyro
from tiny_run import ROOT

from snlp_jax.cli.entry import _tell_of_unraisable, mend_streams, run_entry
from snlp_jax.cli.evaluate import Args as EvalArgs
from snlp_jax.cli.flags import gathered, kinds_of, parse
from snlp_jax.cli.made import check_free
from snlp_jax.config import Config, DataConfig, LinearizeConfig, LossConfig, SolverCEConfig, TrainConfig
from snlp_jax.errors import InputError
from snlp_jax.infer.sampling import Sampling, rows_of
from snlp_jax.seeds import folded
from snlp_jax.train.loss import make_plan


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] = ("saved",)
    is_on: bool = False


@dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[str]
    stop: tuple[str, ...] = ()
    count: int = 1
    chat: bool = False
    open: Annotated[Inner, tyro.conf.arg(name="")] = field(default_factory=Inner)
    deep: Inner = field(default_factory=Inner)
    other: Annotated[tuple[int, ...], tyro.conf.arg(name="mesh.data")] = ()


def read(text: str) -> Args:
    return parse(Args, prog="x", args=text.split())


def test_flags_of_lists_add_up() -> None:
    assert read("r --stop a b --count 2 --stop c").stop == ("a", "b", "c")
    assert read("--stop=-a --count 2 --stop b r") == Args("r", ("-a", "b"), 2)
    assert read("r --names a --names b --deep.names c --deep.names=d").open.names == ("a", "b")
    assert read("r --deep.names c --deep.names=d").deep.names == ("c", "d")
    assert read("r --mesh.data 1 --mesh.data 2 3").other == (1, 2, 3)
    assert read("r --deep.is_on --deep.is-on").deep.is_on
    assert read("--stop a --stop b --count 3 --count=3 -- r") == Args("r", ("a", "b"), 3)
    # Once is as tyro has it.
    assert read("r --stop") == Args("r") and read("r --count -3").count == -3 and read("r").open.names == ("saved",)


def test_other_flags_must_say_the_same() -> None:
    for flags, sentence in (
        ("--count 2 --count 3", "--count is given twice, as '--count 2' and as '--count 3'; give it once"),
        ("--chat --no-chat", "--chat is given twice, as '--chat' and as '--no-chat'"),
        ("--deep.is-on --deep.no-is_on", "--deep.is-on is given twice"),
    ):
        with pytest.raises(InputError, match=sentence):
            read(f"r {flags}")


def test_kinds_of_flags() -> None:
    kinds = kinds_of(Config)
    assert kinds["--loss.solver-ce.region-sizes"] == kinds["--data.mixture"] == "list"
    assert kinds["--data.mask-documents"] == "switch" and "--train.num-steps" not in kinds
    assert kinds_of(EvalArgs)["--solvers"] == kinds_of(EvalArgs)["--tasks"] == "list"
    flags = ["c.py", "--resume", "--data.mixture", "a@1", "--data.mixture", "b@2", "--resume"]
    assert gathered(flags, kinds | {"--resume": "switch"})[1:-1] == ["--resume", "--data.mixture=a@1", "b@2"]


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """``(what main raises) -> (exit code, stderr)``."""
    monkeypatch.setattr("snlp_jax.cli.entry.enable_compilation_cache", lambda: None)

    def call(error: BaseException) -> tuple[int, str]:
        def main() -> None:
            raise error

        with pytest.raises(SystemExit) as stopped:
            run_entry(main)
        return stopped.value.code, capsys.readouterr().err  # type: ignore[return-value]

    return call


def test_everyday_errors_are_one_line(entry) -> None:
    refused = [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG]
    for number in refused:
        code, said = entry(OSError(number, os.strerror(number), "runs/a"))
        assert code == 2 and said.startswith(f"error: 'runs/a' cannot be used ({os.strerror(number)}); ")
        assert said.count("\n") == 1
    assert entry(KeyboardInterrupt()) == (130, "interrupted.\n")
    assert entry(BrokenPipeError(errno.EPIPE, "Broken pipe")) == (141, "")
    ended = SystemExit(1)
    ended.__context__ = BrokenPipeError()  # as rich ends
    assert entry(ended) == (141, "")
    with pytest.raises(FileNotFoundError):  # of nothing that a user has named
        run_entry(lambda: (_ for _ in ()).throw(FileNotFoundError(errno.ENOENT, "No such file")))


def test_ascii_and_closed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", None)
    mend_streams()
    print("größer \ud800")
    sys.stdout.flush()
    with sys.stdin as stdin:
        assert raw.getvalue() == b"gr??er ?\n" and stdin.read() == ""


def test_a_place_that_cannot_be_made_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file' is a file; name another directory with --out"):
        check_free(tmp_path / "file" / "a" / "b", " with --out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="may not be written to"):
        check_free(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty' may not be written to"):
        check_free(tmp_path / "empty")


def test_a_pipe_that_is_closed_ends_the_command_quietly() -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "eval.py", "--help"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # type: ignore[union-attr]
        said = process.stderr.read()  # type: ignore[union-attr]
    assert (process.returncode, said) == (141, b"")


def test_seeds_of_any_size() -> None:
    assert [folded(seed) for seed in (0, 7, 2**32 - 1)] == [0, 7, 2**32 - 1]
    others = [folded(seed) for seed in (-1, -7, 2**32, 2**63, 2**64, 2**70, 10**5000)]
    assert len(set(others)) == len(others) and all(0 <= seed < 2**32 for seed in others)
    assert folded(2**70) == 4000639791  # the same on every machine
    assert int(rows_of([Sampling(seed=-1)])[0].seed[0]) == folded(-1)
    loss = LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(1, 2), sample_region=True))
    assert make_plan(loss, 5, 10, 2**70) == make_plan(loss, 5, 10, folded(2**70))
    assert Config(train=TrainConfig(seed=-(2**70)), data=DataConfig(seed=2**63))
    assert LinearizeConfig(attention=1, seed=-1).seed == -1


def test_ctrl_c_while_a_command_is_imported_is_one_line() -> None:
    """``-m`` is what Python puts first while it looks for a module of the package."""
    program = "import sys; sys.argv[0] = '-m'; import snlp_jax; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted.\n")


def test_ctrl_c_in_a_callback_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the garbage collector, such as jax has one."""
    monkeypatch.setattr(sys, "unraisablehook", _tell_of_unraisable)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            sys.unraisablehook(SimpleNamespace(exc_value=KeyboardInterrupt()))  # type: ignore[arg-type]
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)
