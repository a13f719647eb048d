"""What the entry scripts share: one sentence for a mistake of the user, and compiled programs kept between runs."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from snlp_jax.errors import DivergedError, InputError

MIN_COMPILE_SECONDS = 0.5
"""Programs that compile faster are not worth a file."""


def run_entry(main: Callable[[], None]) -> None:
    """Call ``main``; a known error becomes one line on stderr: exit code 2 for an InputError, 1 for divergence."""
    try:
        enable_compilation_cache()
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def enable_compilation_cache() -> None:
    """Keep compiled programs in $XDG_CACHE_HOME/snlp_jax/xla or ~/.cache/snlp_jax/xla.

    A cache that was chosen already ($JAX_COMPILATION_CACHE_DIR) stays; without a folder to write to there is none.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snlp_jax" / "xla"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            jax.config.update("jax_compilation_cache_dir", str(directory))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
