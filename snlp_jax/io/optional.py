"""Packages that are not always installed."""

import importlib
from typing import Any

from snlp_jax.errors import InputError


def optional(module: str, use: str, requirement: str) -> Any:
    """A module of such a package.

    Raises:
        InputError: it is not installed; says what has a use for it, and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f'{use} needs {module.partition(".")[0]}; pip install "{requirement}".') from error
