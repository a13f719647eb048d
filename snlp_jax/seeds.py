"""Seeds of any size."""

from hashlib import blake2b


def folded(seed: int) -> int:
    """A seed as jax and numpy take it, of 32 bits: those of 32 bits stay what they are, others become their hash."""
    if 0 <= seed < 2**32:
        return seed
    return int.from_bytes(blake2b(hex(seed).encode(), digest_size=4).digest(), "big")
