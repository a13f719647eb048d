"""What the processes of one run agree on. How they meet and end is snlp_jax/cli/launch.py's."""

import contextlib
import re
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.errors import InputError

_LOST_PEER = re.compile(
    r"gloo|nccl|coordination.?service|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|barrier|connection (closed|reset|refused)"
    r"|socket closed",
    re.IGNORECASE,
)
"""Words of errors that come of another process's end."""


def is_first() -> bool:
    """Whether this is the one process that writes logs."""
    return jax.process_index() == 0


def tells_of_lost_peer(error: BaseException) -> bool:
    """Whether an error comes of another process's end; jax raises several types, so its text decides."""
    return not isinstance(error, InputError) and _LOST_PEER.search(str(error)) is not None


@contextlib.contextmanager
def all_or_none(kind: type[Exception] = InputError) -> Iterator[None]:
    """An error of a kind on any process, inside the block, becomes one on all, which would otherwise part ways and wait
    for one another. All processes enter it together."""
    error: Exception | None = None
    try:
        yield
    except kind as caught:
        error = caught
    if jax.process_count() > 1:
        is_bad = multihost_utils.process_allgather(np.asarray(error is not None)).reshape(-1)
        if error is None and is_bad.any():
            error = kind(f"process {int(is_bad.argmax())} of this run cannot go on; it says why.")
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
        first = {device.process_index: device for device in reversed(jax.devices())}
        mesh = Mesh(np.asarray([first[i] for i in sorted(first)]), ("process",))
        self._sharding = NamedSharding(mesh, PartitionSpec("process"))
        self._any = jax.jit(lambda wishes: wishes.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def __call__(self, wish: bool) -> bool:
        if jax.process_count() == 1:
            return wish
        wishes = jax.make_array_from_process_local_data(self._sharding, np.asarray([wish], np.int32))
        last, self._last = self._last, self._any(wishes)
        return last is not None and bool(last)
