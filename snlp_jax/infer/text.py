"""Text that appears while its tokens are still being made."""

import functools
from collections.abc import Sequence

from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.errors import InputError

BROKEN = "\ufffd"
"""What decoders write for a UTF-8 character that is wrong, or not complete yet."""
CONTEXT = 4
"""Tokens decoded again before a new one. Each has a byte at least and a UTF-8 character four at most, so that a decoder
that starts here and one that started earlier agree on where the last character begins."""


class TextStream:
    """Joined pushes and ``finish`` = ``tokenizer.decode(all tokens)``, cut before the first stop string; with a prompt,
    what all tokens add to its text.

    The first stop string is the one complete first, and the longest of those complete at the same character. A token is
    decoded together with a few before it, since leading spaces and split characters depend on them: O(1) decoder work
    a token, amortised. The equality needs a decoder that changes only the end of its text when a token comes:
    the last, incomplete character (bytes, byte-level BPE), or a run of byte tokens (byte fallback, where one wrong byte
    spoils its whole run; such a run is held back until it ends).

    Args:
      stop_strings: the text ends before any of them.
      prompt: tokens before the text. Many decoders drop a space at the start of a text, which one that goes on needs.
        Behind a special token a text starts anew.

    Raises:
      InputError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise InputError(f"stop strings {stop_strings!r} must be a list of texts, none of them empty.")
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._window = self._last_texts(prompt)  # the tokens still decoded,
        self._counts = [0] * len(self._window)  # how many had come with each of them,
        shown = tokenizer.decode(self._window)
        self._num_final = len(shown) - shown.endswith(BROKEN)  # and how many characters of their text are final
        self._tail = ""  # final text that may be the start of a stop string
        self._is_finished = False
        self.text = ""
        """All text given out so far."""
        self.num_tokens = 0
        """Tokens that the text needs: all, or those up to and including the one that completed the stop string."""
        self.is_stopped = False
        """Whether a stop string was found; tokens pushed later are ignored."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make final: no half characters, no possible start of a stop string."""
        if self._is_finished:
            raise ValueError("the text is finished; start a new TextStream")
        start = len(self.text)
        for token in tokens:
            if not self.is_stopped:
                self._push_one(int(token))
        return self.text[start:]

    def finish(self) -> str:
        """What was held back, incomplete characters as U+FFFD; the last call."""
        start = len(self.text)
        if not (self._is_finished or self.is_stopped):
            text = self._tokenizer.decode(self._window)
            self._advance(text, len(text))
            if not self.is_stopped:
                self.text += self._tail
        self._is_finished = True
        return self.text[start:]

    def _last_texts(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, as far as each has text."""
        tokens = [int(token) for token in prompt[-CONTEXT:]]
        has_text = [_has_text(self._tokenizer, token) for token in tokens]  # type: ignore[arg-type]
        return tokens[len(tokens) - has_text[::-1].index(False) :] if False in has_text else tokens

    def _push_one(self, token: int) -> None:
        self.num_tokens += 1
        if not _has_text(self._tokenizer, token):  # type: ignore[arg-type]  # a Protocol does not say that it hashes
            return
        self._window.append(token)
        self._counts.append(self.num_tokens)
        if _is_open(self._tokenizer, token):  # type: ignore[arg-type]
            return
        text = self._tokenizer.decode(self._window)
        num_held = text.endswith(BROKEN)
        self._advance(text, len(text) - num_held)
        if len(self._window) >= 2 * CONTEXT:
            del self._window[:-CONTEXT], self._counts[:-CONTEXT]
            self._num_final = len(self._tokenizer.decode(self._window)) - num_held

    def _advance(self, text: str, num_final: int) -> None:
        """Gives out the window's ``text`` up to ``num_final`` as far as stop strings allow."""
        start = self._num_final - len(self._tail)  # of the tail, in the window's text; it may lie before it
        self._tail += text[self._num_final : num_final]
        self._num_final = max(self._num_final, num_final)
        found = [(begin + len(stop), begin) for stop in self._stop_strings if (begin := self._tail.find(stop)) >= 0]
        if found:
            end, num_given = min(found)
            self.is_stopped = True
            self.num_tokens = self._count_at(text[: start + end])
        else:
            num_given = len(self._tail) - self._num_undecided()
        self.text += self._tail[:num_given]
        self._tail = self._tail[num_given:]

    def _num_undecided(self) -> int:
        """Length of the longest end of the tail with which a stop string begins."""
        return max(
            (n for stop in self._stop_strings for n in range(1, len(stop)) if self._tail.endswith(stop[:n])), default=0
        )

    def _count_at(self, text: str) -> int:
        """Number of tokens with which the window's text first begins with ``text``."""
        whole = (self._tokenizer.decode(self._window[: i + 1]).startswith(text) for i in range(len(self._window)))
        return next((count for count, is_whole in zip(self._counts, whole, strict=True) if is_whole), self.num_tokens)


# What a token does to the text around it is found out once, by decoding it twice in a row: many decoders drop a space
# at the start of a text.


@functools.lru_cache(maxsize=2**20)
def _has_text(tokenizer: Tokenizer, token: int) -> bool:
    """False for special tokens and for ids that the tokenizer does not know."""
    return tokenizer.decode([token, token]) != ""


@functools.lru_cache(maxsize=2**20)
def _is_open(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a byte that follows can change this token's own text: a byte token of byte fallback."""
    byte = _spoiling_byte(tokenizer)  # type: ignore[arg-type]
    if byte is None:
        return False
    text = tokenizer.decode([token, token])
    return text.endswith(BROKEN) or not tokenizer.decode([token, token, byte]).startswith(text)


@functools.lru_cache(maxsize=4)
def _spoiling_byte(tokenizer: Tokenizer) -> int | None:
    """A token that undoes the text before it: a UTF-8 continuation byte where the tokenizer has byte fallback."""
    rare = "\U0010ffff"  # a noncharacter, in nobody's vocabulary
    try:
        ids = tokenizer.encode(rare).tolist()
    except Exception:  # the library raises bare Exception for a text without tokens: then there are no bytes
        return None
    text = tokenizer.decode(ids)
    if rare not in text or tokenizer.decode([*ids, ids[-1]]).startswith(text):
        return None
    return ids[-1]
