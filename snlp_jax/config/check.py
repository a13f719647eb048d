"""How a config refuses a value."""

from snlp_jax.errors import InputError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
