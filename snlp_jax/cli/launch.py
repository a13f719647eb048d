"""How the processes of one run meet, and end together.

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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NoReturn

from snlp_jax.errors import InputError, report

_CHILD = "SNLP_JAX_SUPERVISED"
_EXIT_LOST = 75
"""How the child tells its supervisor that a collective failed because a peer is gone."""
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"


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
    about = "a process silent so long is taken for dead"
    group.add_argument("--process-timeout", type=int, default=100, metavar="SECONDS", help=about)


def from_flags(flags: argparse.Namespace) -> Processes | None:
    """None for a run of one process. Raises InputError for flags that do not fit together."""
    given = (flags.coordinator, flags.num_processes, flags.process_id)
    if not flags.distributed and given == (None, None, None):
        return None
    if flags.process_timeout < 1:
        raise InputError(f"--process-timeout is {flags.process_timeout}; give 1 second or more.")
    if given == (None, None, None):
        return Processes(timeout=flags.process_timeout)
    if flags.distributed or None in given:
        raise InputError(
            "give either --distributed alone, or all of --coordinator HOST:PORT, --num-processes and --process-id."
        )
    if not re.fullmatch(r".+:\d+", flags.coordinator):
        raise InputError(f"--coordinator {flags.coordinator!r} is not HOST:PORT, such as 10.0.0.1:8476.")
    if not 0 <= flags.process_id < flags.num_processes:
        raise InputError(f"--process-id is {flags.process_id}; it must be 0 to {flags.num_processes - 1}.")
    return Processes(*given, timeout=flags.process_timeout)


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
    assert child.stderr is not None
    fatal = pass_on(child.stderr)  # until the child ends
    code = child.wait()
    if code == _EXIT_LOST or (code == -signal.SIGABRT and fatal):
        print(f"error: {lost_sentence(processes, fatal)}", file=sys.stderr)
        return 1
    if code < 0:
        print(f"error: this process was ended by {signal.Signals(-code).name}.", file=sys.stderr)
        return 128 - code
    return code


def pass_on(stream: IO[bytes]) -> str:
    """Copy the child's stderr, up to the abort of jax's coordination service: return that and its stack instead."""
    fatal = b""
    for line in iter(stream.readline, b""):
        if fatal or _FATAL in line:
            fatal += line
        else:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
    return fatal.decode(errors="replace")


def lost_sentence(processes: Processes, fatal: str) -> str:
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
    import jax

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
        _leave(_explain(error))


def _connect(processes: Processes) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would hide the signal from us
    where, seconds = (processes.coordinator, processes.num_processes, processes.process_id), processes.timeout
    try:
        jax.distributed.initialize(
            *where,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
    except ValueError as error:
        if processes.coordinator is not None:
            raise
        raise InputError(f"no cluster was found ({error}); give --coordinator in place of --distributed.") from error
    if jax.process_index() > 0:
        logging.getLogger("snlp_jax").setLevel(logging.WARNING)


def _explain(error: BaseException) -> int:
    """Say what has happened, and return the exit code."""
    from snlp_jax.parallel.processes import tells_of_lost_peer

    code = report(error)
    if code is not None:
        return code
    if not tells_of_lost_peer(error):
        traceback.print_exc()
        return 1
    logging.getLogger(__name__).warning("%s", " ".join(str(error).split())[:200])
    return _EXIT_LOST if is_supervised() else 1


def _end_with_supervisor() -> None:
    os.read(0, 1)  # returns when the other end of the pipe is closed
    os._exit(1)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
