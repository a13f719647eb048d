"""One run of several processes: how they meet, agree, and end together.

Each process of a run is two: a supervisor and the child that trains. When a peer dies, jax's coordination service
aborts the child from C++, or a collective fails in it; the supervisor turns every such end into one sentence.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.errors import InputError, report

_CHILD = "SNLP_JAX_SUPERVISED"
_EXIT_LOST = 75
"""How the child tells its supervisor that a collective failed because a peer is gone."""
_FATAL = "Terminating process because the JAX distributed service detected fatal errors"
_LOSS = re.compile(
    r"gloo|nccl|coordination.?service|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|barrier|connection (closed|reset|refused)"
    r"|socket closed",
    re.IGNORECASE,
)
"""Words of errors that come of a peer's end."""


@dataclass(frozen=True)
class Processes:
    """Where the processes of a run meet. ``coordinator`` None: the cluster says (SLURM, GKE, Cloud TPU, Open MPI)."""

    coordinator: str | None = None
    """``HOST:PORT`` of process 0, which listens there; the same for all."""
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 100
    """Seconds after which a process that never came, or that was silent so long, is taken for dead."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes", "start the same command once for each of them")
    group.add_argument("--distributed", action="store_true", help="let the cluster tell who meets where")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, where there is no cluster")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
    group.add_argument(
        "--process-timeout", type=int, default=100, metavar="SECONDS", help="a process silent so long is taken for dead"
    )


def from_flags(flags: argparse.Namespace) -> Processes | None:
    """None for a run of one process. Raises InputError for flags that do not fit together."""
    explicit = (flags.coordinator, flags.num_processes, flags.process_id)
    if not flags.distributed and explicit == (None, None, None):
        return None
    if flags.process_timeout < 1:
        raise InputError(f"--process-timeout is {flags.process_timeout}; give 1 second or more.")
    if explicit == (None, None, None):
        return Processes(timeout=flags.process_timeout)
    if flags.distributed or None in explicit:
        raise InputError(
            "give either --distributed alone, or all of --coordinator HOST:PORT, --num-processes and --process-id."
        )
    host, _, port = flags.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--coordinator {flags.coordinator!r} is not HOST:PORT, such as 10.0.0.1:8476.")
    if not 0 <= flags.process_id < flags.num_processes:
        raise InputError(
            f"--process-id is {flags.process_id}; with --num-processes {flags.num_processes} "
            f"it must be 0 to {flags.num_processes - 1}."
        )
    return Processes(*explicit, timeout=flags.process_timeout)


# -- The supervisor ----------------------------------------------------------------------------------------------------


def is_supervised() -> bool:
    return _CHILD in os.environ


def supervise(processes: Processes) -> int:
    """Run this very command as a child, pass on SIGTERM and Ctrl-C, and return the exit code.

    The child's 0, 1 and 2 stay; the end of a peer is one sentence and 1; a signal that ended the child is 128 + number.
    Should the supervisor itself be killed, the child's standard input ends and so does the child.
    """
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env={**os.environ, _CHILD: "1"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # else Ctrl-C reaches the child twice
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: child.send_signal(number))
    fatal: list[str] = []
    reader = threading.Thread(target=_pass_on, args=(child.stderr, fatal), daemon=True)
    reader.start()
    code = child.wait()
    reader.join(timeout=5)
    is_lost = code == _EXIT_LOST or (code == -signal.SIGABRT and bool(fatal))
    if is_lost:
        print(f"error: {_lost_sentence(processes, ' '.join(fatal))}", file=sys.stderr)
        return 1
    if code < 0:
        print(f"error: this process was ended by {signal.Signals(-code).name}.", file=sys.stderr)
        return 128 - code
    return code


def _pass_on(stream: Any, fatal: list[str]) -> None:
    """Copy the child's stderr, up to the abort of jax's coordination service: that and its stack are kept instead."""
    for line in iter(stream.readline, b""):
        if fatal or _FATAL.encode() in line:
            fatal.append(line.decode(errors="replace"))
        else:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()


def _lost_sentence(processes: Processes, fatal: str) -> str:
    if "RegisterTask" in fatal:
        return (
            f"the processes of this run have not all come together within {processes.timeout} s; start every one of "
            "them, with the same coordinator and number of processes, or raise --process-timeout."
        )
    return (
        f"another process of this run died or cannot be reached (--process-timeout {processes.timeout} s); "
        "start all of them again with --resume."
    )


# -- The child ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(processes: Processes | None) -> Iterator[None]:
    """Meet the other processes, before any device is used, and leave together with them.

    An error ends this process at once, without waiting for peers that wait for it in a collective.

    Raises:
        InputError: no cluster was found.
    """
    if processes is None:
        yield
        return
    if is_supervised():
        threading.Thread(target=_end_with_supervisor, daemon=True).start()
    try:
        _connect(processes)
        yield
        sys.stdout.flush()
        jax.distributed.shutdown()
    except SystemExit as error:
        _leave(error.code if isinstance(error.code, int) else int(error.code is not None))
    except BaseException as error:
        code = report(error)
        if code is None:
            is_lost = tells_of_lost_peer(error)
            if is_lost:
                logging.getLogger(__name__).warning("%s", " ".join(str(error).split())[:200])
            else:
                traceback.print_exc()
            code = _EXIT_LOST if is_lost and is_supervised() else 1
        _leave(code)


def _connect(processes: Processes) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would hide the signal from us
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.num_processes,
            processes.process_id,
            initialization_timeout=processes.timeout,
            heartbeat_timeout_seconds=processes.timeout,
            shutdown_timeout_seconds=processes.timeout,
        )
    except ValueError as error:
        if processes.coordinator is not None:
            raise
        raise InputError(
            f"no cluster was found ({str(error).rstrip('.')}); give --coordinator HOST:PORT, --num-processes and "
            "--process-id instead of --distributed."
        ) from error
    if jax.process_index() > 0:
        logging.getLogger("snlp_jax").setLevel(logging.WARNING)


def _end_with_supervisor() -> None:
    os.read(0, 1)  # returns when the other end of the pipe is closed
    os._exit(1)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tells_of_lost_peer(error: BaseException) -> bool:
    """Whether an error comes of another process's end; jax raises several types, so its text decides."""
    return not isinstance(error, InputError) and _LOSS.search(str(error)) is not None


# -- Agreement ---------------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is the one process that writes logs."""
    return jax.process_index() == 0


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """An InputError on any process, inside the block, becomes one on all. All processes enter it together."""
    error = None
    try:
        yield
    except InputError as caught:
        error = caught
    if jax.process_count() > 1:
        is_bad = multihost_utils.process_allgather(np.asarray(error is not None)).reshape(-1)
        if error is None and is_bad.any():
            error = InputError(f"process {int(is_bad.argmax())} of this run cannot go on; it says why.")
    if error is not None:
        raise error


def check_same(what: str, text: str) -> None:
    """Refuse a run whose processes were given different things. All processes call it together.

    Raises:
        InputError: on all of them, if ``text`` is not the same everywhere.
    """
    if jax.process_count() == 1:
        return
    sums = multihost_utils.process_allgather(np.asarray(zlib.crc32(text.encode()), np.uint32)).reshape(-1)
    if (sums != sums[0]).any():
        raise InputError(
            f"process {int((sums != sums[0]).argmax())} has another {what} than process 0; "
            "start all processes with the same command, on the same files."
        )


class Vote:
    """``vote(wish)``, once a step on every process: whether any of them wished it, the same answer on all.

    With several processes the answer is that of the call before, so that no process waits for this step's.
    """

    def __init__(self) -> None:
        if jax.process_count() == 1:
            return
        first: dict[int, jax.Device] = {}
        for device in jax.devices():
            first.setdefault(device.process_index, device)
        mesh = Mesh(np.asarray([first[i] for i in sorted(first)]), ("process",))
        self._sharding = NamedSharding(mesh, PartitionSpec("process"))
        self._any = jax.jit(lambda wishes: wishes.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def __call__(self, wish: bool) -> bool:
        if jax.process_count() == 1:
            return wish
        here = np.asarray([wish], np.int32)
        last, self._last = self._last, self._any(jax.make_array_from_process_local_data(self._sharding, here))
        return last is not None and bool(last)
