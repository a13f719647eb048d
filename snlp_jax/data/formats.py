"""Files of text to documents, a part of a file at a time, so that a large file can be read in several places at once.

========================  ==========================================================  ==================
file                      documents                                                   is divided by
========================  ==========================================================  ==================
.jsonl                    a line's field ``text_field``                               bytes, at lines
.jsonl.gz                 the same                                                    not at all
.parquet                  a row's column ``text_field``                               row groups
.arrayrecord              a record's field ``text_field`` if the record is a JSON     records
                          object, else the record itself
anything else             the file, or pieces of it (:func:`read_part`)               bytes, at lines
========================  ==========================================================  ==================

Nothing here, nor in what it imports, imports jax: the processes that tokenize have no use for it.
"""

import contextlib
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from snlp_jax.errors import InputError
from snlp_jax.io.optional import optional

MIN_PIECE_CHARS = 4_096
MAX_PIECE_CHARS = 16_384
KINDS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}
"""End of a file's name, of those that are read from a folder, and how the file is read."""

_ROWS = 256  # of a parquet file or an array record that are held at once


class Part(NamedTuple):
    """A part of a file."""

    path: str
    kind: str
    """A key of ``_READERS``."""
    start: int
    """Where it begins, and ``stop`` where it ends: a byte, a row group or a record."""
    stop: int
    size: int
    """About as many bytes of text, uncompressed where the file tells."""


def kind_of(path: Path) -> str:
    """How a file is read, by its name."""
    return next((kind for end, kind in KINDS.items() if path.name.lower().endswith(end)), "text")


def parts_of(path: Path, kind: str, part_size: int) -> list[Part]:
    """The whole file as parts of about ``part_size`` bytes, which depend on nothing but the file.

    Raises:
      InputError: it cannot be read, or a package is missing.
    """
    name = str(path)
    with explained(name):
        size = path.stat().st_size
        if kind == "parquet":
            return _row_groups(name, part_size)
        count, step = size, part_size if kind in ("text", "jsonl") else max(size, 1)  # of bytes
        if kind == "arrayrecord":
            with contextlib.closing(_open_records(name)) as reader:
                count = reader.num_records()
            step = max(1, count * part_size // max(size, 1))
        spans = ((start, min(start + step, count)) for start in range(0, max(count, 1), step))
        return [Part(name, kind, start, stop, size * (stop - start) // max(count, 1)) for start, stop in spans]


def read_part(part: Part, text_field: str) -> Iterator[str]:
    """Documents of the part in order, which in turn give those of the file; those of nothing but blanks are left out.

    A text file is one document up to ``MAX_PIECE_CHARS`` bytes; beyond, pieces that end at the first blank line after
    ``MIN_PIECE_CHARS`` characters and at ``MAX_PIECE_CHARS`` at the latest, which joined give the file back. A part of
    it, and of a .jsonl file, has the lines that begin in it.

    Raises:
      InputError: no text in the field, not UTF-8, a bad record, a missing package.
    """
    with explained(part.path):
        for document in _READERS[part.kind](part, text_field):
            if document and not document.isspace():
                yield document


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Faults in reading the file ``path`` become an InputError of one sentence."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"file {path!r} is not UTF-8 text ({error.reason}); convert it or leave it out.") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"file {path!r} cannot be read ({reason}); mend it or leave it out.") from error
    except ValueError as error:
        if type(error).__name__ != "ArrowInvalid":  # pyarrow's, which is a ValueError
            raise
        raise InputError(f"file {path!r} is not a whole parquet file ({error}); mend it or leave it out.") from error


# -- Lines -------------------------------------------------------------------------------------------------------------


class _Bytes(io.FileIO):
    """A file up to byte ``stop``, from byte ``start`` on."""

    def __init__(self, path: str, start: int, stop: int) -> None:
        super().__init__(path)
        self.seek(start)
        self._stop = stop

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[: max(self._stop - self.tell(), 0)])


def _line_start(file: BinaryIO, place: int) -> int:
    """The first byte from ``place`` on that begins a line; the end of the file where none does."""
    file.seek(max(place - 1, 0))
    chunk = b"\n" if place == 0 else b""
    while not chunk.endswith(b"\n") and (chunk := file.readline(1 << 20)):
        pass
    return file.tell()


def _open_text(part: Part) -> tuple[TextIO, int]:
    """The lines that begin in the part, and the byte at which the first does."""
    if part.kind == "jsonl.gz":
        return gzip.open(part.path, "rt", encoding="utf-8-sig"), 0
    with open(part.path, "rb") as file:
        start, stop = _line_start(file, part.start), _line_start(file, part.stop)
    encoding = "utf-8" if part.start else "utf-8-sig"
    raw = io.BufferedReader(_Bytes(part.path, start, stop), 1 << 16)
    return io.TextIOWrapper(raw, encoding=encoding, newline=""), start


def _read_python(part: Part, _: str) -> Iterator[str]:
    with contextlib.suppress(UnicodeDecodeError):  # a few files of the standard library declare another encoding
        yield Path(part.path).read_text(encoding="utf-8-sig")


def _read_text(part: Part, _: str) -> Iterator[str]:
    is_whole = os.path.getsize(part.path) <= MAX_PIECE_CHARS
    piece = ""
    with _open_text(part)[0] as file:
        while line := file.readline(MAX_PIECE_CHARS):  # a longer line comes in parts, so memory stays bounded
            if "\0" in line:
                raise InputError(f"file {part.path!r} is binary, not text; leave it out or convert it to UTF-8.")
            if len(piece) + len(line) > MAX_PIECE_CHARS:
                yield piece
                piece = ""
            piece += line
            if line.isspace() and len(piece) >= MIN_PIECE_CHARS and not is_whole:
                yield piece
                piece = ""
    yield piece


def records_of(part: Part) -> Iterator[tuple[str, Any]]:
    """Of each line of a .jsonl file that is not blank: where it stands, and what it holds.

    Raises:
      InputError: it is not JSON.
    """
    file, first_byte = _open_text(part)
    where = f"{part.path}:" if first_byte == 0 else f"{part.path}, after byte {first_byte}, line "
    with file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where}{number} is not valid JSON ({error}); mend or remove it.") from error
                yield f"{where}{number}", record


def _read_jsonl(part: Part, text_field: str) -> Iterator[str]:
    return (text_of(record, text_field, where) for where, record in records_of(part))


def text_of(record: Any, text_field: str, where: str) -> str:
    """The text of a record.

    Raises:
      InputError: it has none; ``where`` says which it is.
    """
    if not isinstance(record, dict) or text_field not in record:
        raise InputError(f"{where} has no field {text_field!r}; set data.text_field to the field that holds the text.")
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(f"{where} holds {type(text).__name__} in field {text_field!r}; the field must be a string.")
    return text.encode("utf-8", errors="replace").decode("utf-8")  # JSON may hold lone surrogates


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _open_parquet(path: str) -> Any:
    return optional("pyarrow.parquet", f"file {path!r}", "snlp-jax[parquet]").ParquetFile(path, memory_map=True)


def _row_groups(path: str, part_size: int) -> list[Part]:
    with _open_parquet(path) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    parts: list[Part] = []
    start = size = 0
    for group, more in enumerate(sizes, start=1):
        size += more
        if size >= part_size or group == len(sizes):
            parts.append(Part(path, "parquet", start, group, size))
            start, size = group, 0
    return parts


def _read_parquet(part: Part, text_field: str) -> Iterator[str]:
    with _open_parquet(part.path) as file:
        if text_field not in file.schema_arrow.names:
            raise InputError(f"{part.path} has no column {text_field!r}; set data.text_field to that of the text.")
        groups = list(range(part.start, part.stop))
        batches = file.iter_batches(_ROWS, row_groups=groups, columns=[text_field], use_threads=False)
        for row, record in enumerate((record for batch in batches for record in batch.to_pylist()), start=1):
            yield text_of(record, text_field, f"{part.path}, row {row} from row group {part.start} on,")


# -- Array records -----------------------------------------------------------------------------------------------------


def _open_records(path: str) -> Any:
    module = optional("array_record.python.array_record_module", f"file {path!r}", "array_record")
    reader = module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        raise InputError(f"file {path!r} is not an array record; mend it or leave it out.")
    return reader


def _read_records(part: Part, text_field: str) -> Iterator[str]:
    with contextlib.closing(_open_records(part.path)) as reader:
        for start in range(part.start, part.stop, _ROWS):
            for index, content in enumerate(reader.read(start, min(start + _ROWS, part.stop)), start=start):
                text, record = content.decode("utf-8"), None
                if text.startswith("{"):
                    with contextlib.suppress(ValueError, RecursionError):  # text that begins with a brace
                        record = json.loads(text)
                yield text_of(record, text_field, f"{part.path}, record {index},") if record is not None else text


_READERS: dict[str, Callable[[Part, str], Iterator[str]]] = {
    "python": _read_python,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "jsonl.gz": _read_jsonl,
    "parquet": _read_parquet,
    "arrayrecord": _read_records,
}
