"""What the command lines share: one sentence for a mistake of the user, and compiled programs kept between runs."""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from snlp_jax.errors import hush_interrupts, report
from snlp_jax.io.files import cache_folder

MIN_COMPILE_SECONDS = 0.5
"""Programs that compile faster are not worth a file."""


def run_entry(main: Callable[[], object]) -> None:
    """Set up the streams and logging, and call ``main``.

    A known error becomes one line on stderr, with the exit code of :func:`snlp_jax.errors.report`.
    """
    mend_streams()
    logging.basicConfig(format="%(message)s", force=True)  # absl may have put a handler of its own there
    logging.getLogger("snlp_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells of every file, and of errors that it raises too
    sys.unraisablehook = _tell_of_unraisable
    try:
        _run(main)
    except (Exception, KeyboardInterrupt) as error:
        code = report(error)
        if code is None:
            raise
        _give_up_stdout()
        sys.exit(code)


def mend_streams() -> None:
    """Open what was closed before the process began, and write "?" for what a terminal's encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  as long as the process
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if name == "stderr" else "replace")


def _run(main: Callable[[], object]) -> None:
    """Call ``main`` and write what it has left for stdout. Raises BrokenPipeError where nobody reads it any more."""
    try:
        enable_compilation_cache()
        main()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # rich ends the process by itself
            raise ended.__context__ from None
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _tell_of_unraisable(unraisable: Any) -> None:
    """As Python does, but for what tensorstore's threads say of the other files when one could not be written, and for
    a Ctrl-C that came in a callback which swallows it: that comes again."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _give_up_stdout() -> None:
    """Where what is left for stdout cannot be written, drop it: Python would end with an exit code of its own."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


hush_interrupts()  # from the first line of a script on


def enable_compilation_cache() -> None:
    """Keep compiled programs in $XDG_CACHE_HOME/snlp_jax/xla or ~/.cache/snlp_jax/xla.

    A cache that was chosen already ($JAX_COMPILATION_CACHE_DIR) stays; without a folder to write to there is none.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    directory = cache_folder() / "xla"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            jax.config.update("jax_compilation_cache_dir", str(directory))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
