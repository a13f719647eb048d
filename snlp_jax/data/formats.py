"""Files of text to documents, a part of a file at a time, so that a large file can be read in several places at once.

==========================  ==========================================================  ================
end of the file's name      documents                                                   is divided by
==========================  ==========================================================  ================
.jsonl .ndjson              a line's field ``text_field``                               bytes, at lines
.json                       that field of the object, of each object of an array, or    not at all
                            of each of several values one after another
.parquet                    a row's column ``text_field``                               row groups
.arrayrecord .array_record  a record's field ``text_field`` if the record is a JSON     records
                            object, else the record itself
.txt, anything else         the file, or pieces of it (:func:`read_part`)               bytes, at lines
==========================  ==========================================================  ================

Upper or lower case, and each also with .gz (gzip) or .zst (zstd) behind it, which is then not divided. A name that says
nothing is read as text unless the file begins with a JSON object, which is refused: records are nobody's text. Of a key
that stands twice in a JSON object the last counts; NaN and Infinity are numbers.

Nothing here, nor in what it imports, imports jax: the processes that tokenize have no use for it.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from snlp_jax.data.json_values import JsonValues
from snlp_jax.data.packing import FAULTS, PACKINGS, check_start, open_packed, plain_copy
from snlp_jax.errors import InputError
from snlp_jax.io.optional import optional

MIN_PIECE_CHARS = 4_096
MAX_PIECE_CHARS = 16_384
KINDS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}
"""End of a file's name, of those that are read from a folder, and how the file is read."""

_ROWS = 256  # of a parquet file or an array record that are held at once


class Format(NamedTuple):
    """How a file is read."""

    kind: str
    """A value of ``KINDS``, or "python" (a file of the builtin corpus)."""
    packing: str = ""
    """A value of ``PACKINGS``."""
    is_known: bool = True
    """Whether the name says so."""


class Part(NamedTuple):
    """A part of a file."""

    path: str
    kind: str
    packing: str
    start: int
    """Where it begins, and ``stop`` where it ends: a byte, a row group or a record. A packed file is one part, whatever
    they say."""
    stop: int
    size: int
    """About as many bytes of text, uncompressed where the file tells."""


def format_of(path: Path) -> Format:
    """How a file is read, by its name."""
    name = path.name.lower()
    end = next((end for end in PACKINGS if name.endswith(end)), "")
    name, packing = name.removesuffix(end), PACKINGS.get(end, "")
    kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), "")
    return Format(kind or "text", packing, bool(kind))


def parts_of(path: Path, form: Format, part_size: int) -> list[Part]:
    """The whole file as parts of about ``part_size`` bytes, which depend on nothing but the file.

    Raises:
      InputError: it cannot be read, is not what its name says, or a package is missing.
    """
    name, kind, packing = str(path), form.kind, form.packing
    with explained(name):
        size = path.stat().st_size
        is_lines = kind in ("text", "json", "jsonl")
        check_start(name, packing, is_lines=is_lines, may_be_records=form.is_known)
        if packing:
            return [Part(name, kind, packing, 0, size, size)]
        if kind == "parquet":
            return _row_groups(name, part_size)
        count, step = size, part_size if kind in ("text", "jsonl") else max(size, 1)  # of bytes
        if kind == "arrayrecord":
            with contextlib.closing(_open_records(name)) as reader:
                count = reader.num_records()
            step = max(1, count * part_size // max(size, 1))
        spans = ((start, min(start + step, count)) for start in range(0, max(count, 1), step))
        return [Part(name, kind, "", start, stop, size * (stop - start) // max(count, 1)) for start, stop in spans]


def read_part(part: Part, text_field: str) -> Iterator[str]:
    """Documents of the part in order, which in turn give those of the file; those of nothing but blanks are left out.

    A text file is one document up to ``MAX_PIECE_CHARS`` bytes; beyond, pieces that end at the first blank line after
    ``MIN_PIECE_CHARS`` characters and at ``MAX_PIECE_CHARS`` at the latest, which joined give the file back. A part of
    it, and of a .jsonl file, has the lines that begin in it.

    Raises:
      InputError: no text in the field, not UTF-8, a bad record, a missing package.
    """
    with explained(part.path):
        for document in _documents(part, text_field):
            if document and not document.isspace():
                yield document


def _documents(part: Part, text_field: str) -> Iterator[str]:
    if part.kind in _TEXTS:
        return _TEXTS[part.kind](part)
    may_be_text = part.kind == "arrayrecord"
    records = records_of(part, text_field)
    return (
        record if may_be_text and isinstance(record, str) else text_of(record, text_field, where)
        for where, record in records
    )


def records_of(part: Part, column: str = "") -> Iterator[tuple[str, Any]]:
    """Of each record of the part: where it stands, and what it holds. Not for text.

    Args:
      column: of parquet, the only one that is read.

    Raises:
      InputError: a record is broken, or the file; there is no such column.
    """
    with explained(part.path):
        yield from _RECORDS[part.kind](part, column)


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Faults in reading the file ``path`` become an InputError of one sentence."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"file {path!r} is not UTF-8 text ({error.reason}); convert it or leave it out.") from error
    except FAULTS as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"file {path!r} cannot be read ({reason}); mend it or leave it out.") from error
    except Exception as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"file {path!r} is not a whole parquet file ({reason}); mend it or leave it out.") from error


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
    if part.packing:
        return io.TextIOWrapper(open_packed(part.path, part.packing), encoding="utf-8-sig", newline=""), 0
    with open(part.path, "rb") as file:
        start, stop = _line_start(file, part.start), _line_start(file, part.stop)
    encoding = "utf-8" if part.start else "utf-8-sig"
    raw = io.BufferedReader(_Bytes(part.path, start, stop), 1 << 16)
    return io.TextIOWrapper(raw, encoding=encoding, newline=""), start


def _read_python(part: Part) -> Iterator[str]:
    with contextlib.suppress(UnicodeDecodeError):  # a few files of the standard library declare another encoding
        yield Path(part.path).read_text(encoding="utf-8-sig")


def _is_one_piece(part: Part) -> bool:
    if not part.packing:
        return os.path.getsize(part.path) <= MAX_PIECE_CHARS
    with open_packed(part.path, part.packing) as file:
        return len(file.read(MAX_PIECE_CHARS + 1)) <= MAX_PIECE_CHARS


def _read_text(part: Part) -> Iterator[str]:
    is_whole, piece = _is_one_piece(part), ""
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


# -- JSON --------------------------------------------------------------------------------------------------------------


def _read_jsonl(part: Part, _: str) -> Iterator[tuple[str, Any]]:
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


def _read_json(part: Part, _: str) -> Iterator[tuple[str, Any]]:
    number = 1
    with _open_text(part)[0] as file:
        try:
            for number, record in enumerate(JsonValues(file), start=2):
                yield f"{part.path}, record {number - 1},", record
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            where, reason = f"{part.path}, record {number},", getattr(error, "msg", error)
            raise InputError(f"{where} is not valid JSON ({reason}); mend or remove it.") from error


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
    return valid_text(text)


def valid_text(text: str) -> str:
    """A text with "?" for lone surrogates, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _open_parquet(path: str) -> Any:
    parquet = optional("pyarrow.parquet", f"file {path!r}", "snlp-jax[parquet]")
    return parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)


def _row_groups(path: str, part_size: int) -> list[Part]:
    with _open_parquet(path) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    parts: list[Part] = []
    start = size = 0
    for group, more in enumerate(sizes, start=1):
        size += more
        if size >= part_size or group == len(sizes):
            parts.append(Part(path, "parquet", "", start, group, size))
            start, size = group, 0
    return parts


def _read_parquet(part: Part, column: str) -> Iterator[tuple[str, Any]]:
    with plain_copy(part.path, part.packing) as path, _open_parquet(path) as file:
        if column and column not in file.schema_arrow.names:
            raise InputError(f"{part.path} has no column {column!r}; set data.text_field to that of the text.")
        groups = list(range(file.num_row_groups) if part.packing else range(part.start, part.stop))
        columns = [column] if column else None
        batches = file.iter_batches(_ROWS, row_groups=groups, columns=columns, use_threads=False)
        for row, record in enumerate((record for batch in batches for record in batch.to_pylist()), start=1):
            yield f"{part.path}, row {row} from row group {groups[0]} on,", record


# -- Array records -----------------------------------------------------------------------------------------------------


def _open_records(path: str) -> Any:
    module = optional("array_record.python.array_record_module", f"file {path!r}", "array_record")
    reader = module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        raise InputError(f"file {path!r} is not an array record; mend it or leave it out.")
    return reader


def _read_records(part: Part, _: str) -> Iterator[tuple[str, Any]]:
    """JSON objects; other records as texts."""
    with plain_copy(part.path, part.packing) as path, contextlib.closing(_open_records(path)) as reader:
        first, last = (0, reader.num_records()) if part.packing else (part.start, part.stop)
        for start in range(first, last, _ROWS):
            try:
                contents = reader.read(start, min(start + _ROWS, last))
            except RuntimeError as error:  # what the library calls a checksum that is wrong
                raise OSError(str(error)) from error
            for index, content in enumerate(contents, start=start):
                text, record = content.decode("utf-8"), None
                if text.startswith("{"):
                    with contextlib.suppress(ValueError, RecursionError):  # text that begins with a brace
                        record = json.loads(text)
                yield f"{part.path}, record {index},", text if record is None else record


_TEXTS: dict[str, Callable[[Part], Iterator[str]]] = {"python": _read_python, "text": _read_text}
_RECORDS: dict[str, Callable[[Part, str], Iterator[tuple[str, Any]]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "arrayrecord": _read_records,
}
"""Of every kind what reads it; a column may be named of a parquet file."""
