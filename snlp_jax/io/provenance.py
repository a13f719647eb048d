"""Which version of the code a number came from."""

import subprocess
from pathlib import Path


def git_commit() -> str | None:
    """Commit of the checkout that this file stands in, with "-dirty" for changed files; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
