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

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from snlp_jax.errors import InputError

MIN_PIECE_CHARS = 4_096
MAX_PIECE_CHARS = 16_384
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet", ".arrayrecord", ".array_record")
"""Of the files that are read from a folder."""

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
    name = path.name.lower()
    if name.endswith(".jsonl.gz"):
        return "jsonl.gz"
    kinds = {".jsonl": "jsonl", ".parquet": "parquet", ".arrayrecord": "arrayrecord", ".array_record": "arrayrecord"}
    return kinds.get(path.suffix.lower(), "text")


def parts_of(path: Path, kind: str, part_size: int) -> list[Part]:
    """The whole file as parts of about ``part_size`` bytes, which depend on nothing but the file.

    Raises:
      InputError: it cannot be read, or a package is missing.
    """
    name = str(path)
    with _explained(name):
        size = path.stat().st_size
        if kind == "parquet":
            return _row_groups(name, part_size)
        if kind == "arrayrecord":
            reader = _open_records(name)
            count = reader.num_records()
            reader.close()
            step = max(1, count * part_size // max(size, 1))
            starts = range(0, count, step)
            return [Part(name, kind, i, min(i + step, count), size * min(step, count - i) // count) for i in starts]
        if kind not in ("text", "jsonl") or size <= part_size:
            return [Part(name, kind, 0, size, size)]
        starts = range(0, size, part_size)
        return [Part(name, kind, i, min(i + part_size, size), min(part_size, size - i)) for i in starts]


def read_part(part: Part, text_field: str) -> Iterator[str]:
    """Documents of the part in order, which in turn give those of the file; those of nothing but blanks are left out.

    A text file is one document up to ``MAX_PIECE_CHARS`` bytes; beyond, pieces that end at the first blank line after
    ``MIN_PIECE_CHARS`` characters and at ``MAX_PIECE_CHARS`` at the latest, which joined give the file back. A part of
    it, and of a .jsonl file, has the lines that begin in it.

    Raises:
      InputError: no text in the field, not UTF-8, a bad record, a missing package.
    """
    with _explained(part.path):
        for document in _READERS[part.kind](part, text_field):
            if document and not document.isspace():
                yield document


class _explained:  # noqa: N801
    """Faults of a file in one sentence."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UnicodeDecodeError):
            raise InputError(
                f"file {self._path!r} is not UTF-8 text ({error.reason}); convert it to UTF-8 or leave it out."
            ) from error
        if isinstance(error, EOFError | gzip.BadGzipFile):
            raise InputError(f"file {self._path!r} is not whole ({error}); mend it or leave it out.") from error
        if isinstance(error, OSError):
            raise InputError(
                f"file {self._path!r} cannot be read ({error.strerror or error}); mend it or leave it out."
            ) from error


class _Slice(io.RawIOBase):
    """The lines of a file that begin at bytes ``start`` to ``stop - 1``."""

    def __init__(self, path: str, start: int, stop: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._left = _line_start(self._file, stop)
        self.begins_at = _line_start(self._file, start)
        self._left -= self.begins_at
        self._file.seek(self.begins_at)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(memoryview(buffer)[: min(len(buffer), self._left)])
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _line_start(file: io.BufferedReader, place: int) -> int:
    """The first byte from ``place`` on that begins a line; the end of the file where none does."""
    if place == 0:
        return 0
    file.seek(place - 1)
    while chunk := file.readline(1 << 20):
        if chunk.endswith(b"\n"):
            break
    return file.tell()


def _open_text(part: Part, newline: str | None) -> tuple[TextIO, int]:
    """The part as text, and the byte at which it begins."""
    raw = _Slice(part.path, part.start, part.stop)
    encoding = "utf-8" if part.start else "utf-8-sig"
    return io.TextIOWrapper(io.BufferedReader(raw, 1 << 16), encoding=encoding, newline=newline), raw.begins_at


def _read_python(part: Part, _: str) -> Iterator[str]:
    try:
        yield Path(part.path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:  # a few files of the standard library declare another encoding
        return


def _read_text(part: Part, text_field: str) -> Iterator[str]:
    is_whole = os.path.getsize(part.path) <= MAX_PIECE_CHARS
    lines: list[str] = []
    size = 0
    with _open_text(part, newline="")[0] as file:
        while line := file.readline(MAX_PIECE_CHARS):  # a longer line comes in parts, so memory stays bounded
            if "\0" in line:
                raise InputError(f"file {part.path!r} is binary, not text; leave it out or convert it to UTF-8.")
            if size + len(line) > MAX_PIECE_CHARS:
                yield "".join(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
            if line.isspace() and size >= MIN_PIECE_CHARS and not is_whole:
                yield "".join(lines)
                lines, size = [], 0
    yield "".join(lines)


def _read_jsonl(part: Part, text_field: str) -> Iterator[str]:
    file, first_byte = _open_text(part, newline=None)
    where = f"{part.path}:" if first_byte == 0 else f"{part.path}, after byte {first_byte}, line "
    with file:
        yield from _read_lines(file, text_field, where)


def _read_jsonl_gz(part: Part, text_field: str) -> Iterator[str]:
    with gzip.open(part.path, "rt", encoding="utf-8-sig") as file:
        yield from _read_lines(file, text_field, f"{part.path}:")


def _read_lines(file: TextIO, text_field: str, where: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}{number} is not valid JSON ({error}); mend or remove the line.") from error
            yield text_of(record, text_field, f"{where}{number}")


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


def _open_parquet(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"file {path!r} needs the package pyarrow; run `pip install 'snlp-jax[parquet]'`, or leave the file out."
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"file {path!r} is not a parquet file ({error}); mend it or leave it out.") from error


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
    import pyarrow

    with _open_parquet(part.path) as file:
        if text_field not in file.schema_arrow.names:
            raise InputError(
                f"{part.path} has no column {text_field!r}; set data.text_field to the column that holds the text."
            )
        row = 0
        try:
            groups = range(part.start, part.stop)
            for batch in file.iter_batches(_ROWS, row_groups=list(groups), columns=[text_field], use_threads=False):
                for text in batch.column(0).to_pylist():
                    row += 1
                    where = f"{part.path}, row {row} from row group {part.start} on,"
                    yield text_of({text_field: text}, text_field, where)
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"file {part.path!r} is damaged ({error}); mend it or leave it out.") from error


def _open_records(path: str) -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise InputError(
            f"file {path!r} needs the package array_record; run `pip install array_record`, or leave the file out."
        ) from error
    reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        raise InputError(f"file {path!r} is not an array record; mend it or leave it out.")
    return reader


def _read_records(part: Part, text_field: str) -> Iterator[str]:
    reader = _open_records(part.path)
    try:
        for start in range(part.start, part.stop, _ROWS):
            stop = min(start + _ROWS, part.stop)
            for index, content in enumerate(reader.read(start, stop), start=start):
                text = content.decode("utf-8")
                record = None
                if text.startswith("{"):
                    try:
                        record = json.loads(text)
                    except (ValueError, RecursionError):
                        record = None  # text that begins with a brace
                is_object = isinstance(record, dict)
                yield text_of(record, text_field, f"{part.path}, record {index},") if is_object else text
    finally:
        reader.close()


_READERS: dict[str, Callable[[Part, str], Iterator[str]]] = {
    "python": _read_python,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "jsonl.gz": _read_jsonl_gz,
    "parquet": _read_parquet,
    "arrayrecord": _read_records,
}
