"""The errors that the command lines turn into one sentence: two exceptions, a disk that takes no more, and what else
an operating system refuses every day."""

import contextlib
import errno
import os
import sys
from types import TracebackType

_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "the disk is full; free some space or choose another directory")
_REMEDIES[errno.EFBIG] = "a file may not grow further; raise the limit (ulimit -f) or choose another directory"
_REMEDY_OF_TEXT = {os.strerror(number): remedy for number, remedy in _REMEDIES.items()}

_OTHER_PLACE = "choose another place"
_ACCESS = "change its permissions or choose another place"
_EVERYDAY = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ACCESS)
_EVERYDAY |= dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), _OTHER_PLACE)
_EVERYDAY[errno.ENOENT] = "check the path"
_INTERRUPTED, _NOBODY_READS = 130, 141
"""Exit codes as shells give them for SIGINT and SIGPIPE."""


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


def hush_interrupts() -> None:
    """Say one line, and no traceback, when Ctrl-C comes while a command is still being imported; Python then ends by
    the signal."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            report(error)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def report(error: BaseException) -> int | None:
    """Print a known error as one line on stderr and return its exit code: 2 for an InputError and for what the
    operating system refuses, 1 for divergence, 130 for Ctrl-C, 141 (and no line) where nobody reads the output any
    more. None for any other error."""
    if isinstance(error, BrokenPipeError):
        return _NOBODY_READS
    text = "interrupted." if isinstance(error, KeyboardInterrupt) else f"error: {_sentence(error)}"
    if text == "error: ":
        return None
    with contextlib.suppress(OSError):  # a log on a full disk
        print(text, file=sys.stderr)
    return {DivergedError: 1, KeyboardInterrupt: _INTERRUPTED}.get(type(error), 2)


def _sentence(error: BaseException) -> str:
    """ "" for an error that is not known."""
    if isinstance(error, InputError | DivergedError):
        return str(error)
    if remedy := full_disk(error):
        return f"{remedy} ({' '.join(str(error).split())[:200]})."
    remedy = _EVERYDAY.get(getattr(error, "errno", None) or 0, "")
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return f"{str(path)!r} cannot be used ({error.strerror}); {remedy}." if remedy and path else ""  # type: ignore[attr-defined]
