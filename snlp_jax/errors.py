"""The errors that the command lines turn into one sentence: two exceptions, and a disk that takes no more."""

import contextlib
import errno
import os
import sys

_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "the disk is full; free some space or choose another directory")
_REMEDIES[errno.EFBIG] = "a file may not grow further; raise the limit (ulimit -f) or choose another directory"
_REMEDY_OF_TEXT = {os.strerror(number): remedy for number, remedy in _REMEDIES.items()}


class InputError(Exception):
    """Bad input: a config value, a path, a solver setting, a corpus, a checkpoint.

    The message is one sentence that names the value and the remedy. The command lines print it and exit with code 2.
    """


class DivergedError(RuntimeError):
    """Training met a number that is not finite. The command lines print the message and exit with code 1."""


def full_disk(error: BaseException) -> str:
    """What to do about an error if it means that the disk takes no more; "" if it means something else.

    Libraries wrap the operating system's error in their own, so its text counts as much as its number.
    """
    remedy = _REMEDIES.get(getattr(error, "errno", None) or 0, "")
    return remedy or next((remedy for text, remedy in _REMEDY_OF_TEXT.items() if text in str(error)), "")


def report(error: BaseException) -> int | None:
    """Print a known error as one line on stderr and return its exit code; None for any other error."""
    text, remedy = str(error), full_disk(error)
    if not isinstance(error, InputError | DivergedError):
        if not remedy:
            return None
        text = f"{remedy} ({' '.join(text.split())[:200]})."
    with contextlib.suppress(OSError):  # a log on a full disk
        print(f"error: {text}", file=sys.stderr)
    return 1 if isinstance(error, DivergedError) else 2
