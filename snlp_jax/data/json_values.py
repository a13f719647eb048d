"""JSON values of a file one after another, however long it is: an object, an array, or a stream of them."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_CHARS = 1 << 20
"""That are read at once, and twice as many each time that one value wants more."""
_MARGIN = 16
"""A value that is cut off is found broken so many characters before its end, or less."""
_BLANKS = re.compile(r"[ \t\n\r]*")
_DECODE = json.JSONDecoder().raw_decode


class JsonValues:
    """Iterates over the values of a text, and over what its arrays hold; no more than one value is held at once.

    Raises ValueError or RecursionError where one is broken or too deep.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._place = file, "", 0

    def __iter__(self) -> Iterator[Any]:
        while start := self._peek():
            if start == "[":
                yield from self._items()
            else:
                yield self._value()

    def _items(self) -> Iterator[Any]:
        """Of an array."""
        self._place += 1
        if self._peek() == "]":
            self._place += 1
            return
        while True:
            yield self._value()
            end = self._peek()
            self._place += 1
            if end == "]":
                return
            if end != ",":
                raise ValueError("the array that it stands in is cut off or broken")
            self._peek()

    def _peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            self._place = _BLANKS.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more(_CHARS):
                return ""

    def _more(self, size: int) -> bool:
        more = self._file.read(size)
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)

    def _value(self) -> Any:
        size = _CHARS
        while True:
            try:
                value, self._place = _DECODE(self._text, self._place)
                return value
            except json.JSONDecodeError as error:
                # Only what breaks off at the end may go on in the file.
                may_go_on = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _MARGIN
                if not may_go_on or not self._more(size):
                    raise
                size *= 2
