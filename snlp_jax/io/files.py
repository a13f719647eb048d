"""Files that are either whole or not there."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snlp_jax.errors import InputError

_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
_FULL_TEXTS = tuple(os.strerror(number) for number in _FULL_ERRNOS)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part.

    Raises InputError when the disk is full; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # threads, and hosts, may write the same file
    data = content.encode() if isinstance(content, str) else content
    try:
        with explain_full_disk(path.parent), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(directory: str | Path) -> Iterator[None]:
    """Turn any exception that means "no space left" or "quota exceeded" into an InputError naming the directory.

    Libraries wrap the operating system's error in their own, so its text counts as much as its number.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in _FULL_ERRNOS or any(text in str(error) for text in _FULL_TEXTS):
            raise InputError(
                f"the disk that holds {str(directory)!r} is full; free some space or choose another directory."
            ) from error
        raise
