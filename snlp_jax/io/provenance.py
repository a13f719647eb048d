"""Which version of the code, and which machine, a number came from."""

import datetime
import functools
import subprocess
from pathlib import Path

import jax


def circumstances() -> dict[str, str]:
    """Date, commit, jax and device: what every record of a measurement opens with."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "jax": jax.__version__,
        "device": device.device_kind,
        "platform": device.platform,
    }


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that this file stands in, with "-dirty" for changed files; None outside of one.

    As it was when first asked: what is committed while a program runs is not what it runs.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
