"""A text as a model reads it: what stands before it, special tokens in it, what ends its continuation."""

from collections.abc import Sequence

import numpy as np

from snlp_jax.data.tokenizer import Tokenizer


def prompt_ids(tokenizer: Tokenizer, text: str, *, with_special: bool = False) -> list[int]:
    """A text to go on from: what the model knows before a text, then the text.

    Args:
      with_special: read names of special tokens as these tokens. A text that begins with what stands before a text
        does not get it twice.

    Returns:
      At least one token: an empty text of a model that knows nothing before a text is the separator.
    """
    ids_T = tokenizer.encode(text, with_special=with_special)
    return with_prefix(tokenizer, ids_T, needs_one=not len(ids_T)).tolist()


def with_prefix(tokenizer: Tokenizer, ids_T: np.ndarray, *, needs_one: bool) -> np.ndarray:
    """Tokens [T] of a text behind what stands before it, once, int32.

    Args:
      needs_one: of a model that knows nothing before a text the separator stands there: for an empty text, and for one
        whose first token is scored.
    """
    special = tokenizer.special
    prefix_P = np.asarray(special.prefix_ids or (special.separator_id,) * needs_one, np.int32)
    if len(ids_T) and np.array_equal(ids_T[: len(prefix_P)], prefix_P):
        return np.asarray(ids_T, np.int32)
    return np.concatenate([prefix_P, ids_T]).astype(np.int32)


def last_tokens(tokenizer: Tokenizer, ids_T: np.ndarray, size: int) -> np.ndarray:
    """At most ``size`` tokens: the end of a text [T] and, where it is there, what stands before the text."""
    prefix_P = tokenizer.special.prefix_ids[: len(ids_T)]
    num_kept = len(prefix_P) if len(prefix_P) < size and tuple(ids_T[: len(prefix_P)]) == prefix_P else 0
    return ids_T if len(ids_T) <= size else np.concatenate([ids_T[:num_kept], ids_T[len(ids_T) - size + num_kept :]])


def split_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop tokens and stop strings: decoded text leaves special tokens out, so that their names stop as tokens.

    What ends a text of the model is among the stop tokens always.
    """
    ids = {stop: tokenizer.special_id(stop) for stop in stops}
    tokens = dict.fromkeys([*tokenizer.special.end_ids, *(index for index in ids.values() if index is not None)])
    return tuple(tokens), tuple(stop for stop in stops if ids[stop] is None)
