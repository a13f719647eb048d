"""Text files to a stream of documents, always in the same order and a few at a time."""

import contextlib
import dataclasses
import glob
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from snlp_jax.config import DataConfig
from snlp_jax.errors import InputError

BUILTIN_MAX_BYTES = 12_000_000
MIN_PIECE_CHARS = 4_096
MAX_PIECE_CHARS = 16_384

_FORMAT = 1  # part of the name of every record: raise it when the documents of a file change
_BUILTIN_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def iter_documents(config: DataConfig) -> Iterator[str]:
    """Documents of the corpus, sorted by path; those of nothing but blanks are left out.

    A file of the builtin corpus is one document, and so is a line of a .jsonl file. Any other file is text: one
    document up to ``MAX_PIECE_CHARS`` bytes; beyond, pieces that end at the first blank line after ``MIN_PIECE_CHARS``
    characters and at ``MAX_PIECE_CHARS`` at the latest, which joined give the file back.

    Raises:
      InputError: nothing there, no text in it, not UTF-8, a bad .jsonl line.
    """
    num_documents = 0
    for path in corpus_files(config):
        try:
            for document in _read_file(path, config):
                if document and not document.isspace():
                    num_documents += 1
                    yield document
        except UnicodeDecodeError as error:
            raise InputError(
                f"file {str(path)!r} is not UTF-8 text ({error.reason}); convert it to UTF-8 or leave it out."
            ) from error
        except OSError as error:
            raise InputError(
                f"file {str(path)!r} cannot be read ({error.strerror}); mend it or leave it out."
            ) from error
    if num_documents == 0:
        raise InputError(f"data.source {config.source!r} holds no text; give files that are not empty.")


def corpus_files(config: DataConfig) -> list[Path]:
    """Files of ``config.source`` in the order in which they are read. Raises InputError if there are none."""
    if config.source == "builtin":
        return _builtin_files()
    path = Path(config.source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in _walk(path, skip=set()) if p.suffix.lower() in (".txt", ".jsonl")]
        if not found:
            raise InputError(f"folder {config.source!r} holds no .txt or .jsonl file; add some or name another folder.")
        return found
    if glob.has_magic(config.source):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise InputError(f"data.source {config.source!r} matches no file; check the pattern.")
        return found
    raise InputError(f"data.source {config.source!r} does not exist; give 'builtin' or a file, folder or glob.")


@dataclass(frozen=True)
class CorpusSummary:
    """What one pass over a corpus tells. A document's key is the number, below 2**64, that its hash begins with."""

    content_hash: str
    """Of all documents in their order."""
    num_documents: int
    num_chars: int
    min_key: int
    max_key: int

    def val_limit(self, val_fraction: float) -> int:
        """Documents with a key below it are held out: about that share of them, and at least one on either side."""
        return min(max(int(val_fraction * 2**64), self.min_key + 1), self.max_key)


def summarize(config: DataConfig, record_dir: Path) -> CorpusSummary:
    """Read the whole corpus once, or the record of an earlier call if names, sizes and times of its files are the same.

    Args:
      record_dir: where records are kept.

    Raises:
      InputError: as ``iter_documents``, or fewer than two different documents, which cannot be split.
      OSError: the record cannot be written.
    """
    states = [_file_state(path) for path in corpus_files(config)]
    state_json = json.dumps([_FORMAT, config.source == "builtin", config.text_field, states])
    record = record_dir / f"{_digest(state_json).hex()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return CorpusSummary(**json.loads(record.read_text(encoding="utf-8")))
    total = blake2b(digest_size=16)
    num_documents, num_chars, min_key, max_key = 0, 0, 2**64, -1
    for document in iter_documents(config):
        digest = _digest(document)
        total.update(digest)
        num_documents += 1
        num_chars += len(document)
        min_key = min(min_key, _key(digest))
        max_key = max(max_key, _key(digest))
    if min_key == max_key:
        raise InputError(
            f"data.source {config.source!r} holds only one document, or copies of one, and two are needed to hold one "
            "out; give more text."
        )
    summary = CorpusSummary(total.hexdigest(), num_documents, num_chars, min_key, max_key)
    record_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=record_dir, prefix=".building-", ignore_cleanup_errors=True) as folder:
        written = Path(folder, "summary.json")
        written.write_text(json.dumps(dataclasses.asdict(summary)), encoding="utf-8")
        written.replace(record)
    return summary


def split_documents(config: DataConfig, summary: CorpusSummary) -> Iterator[tuple[str, str]]:
    """Pairs ('train' or 'val', document) in the order of ``iter_documents``, chosen by each document's hash.

    Raises:
      InputError: as ``iter_documents``, or at the end if the corpus is no longer the one that ``summary`` describes.
    """
    total = blake2b(digest_size=16)
    val_limit = summary.val_limit(config.val_fraction)
    for document in iter_documents(config):
        digest = _digest(document)
        total.update(digest)
        yield "val" if _key(digest) < val_limit else "train", document
    if total.hexdigest() != summary.content_hash:
        raise InputError(f"data.source {config.source!r} changed while it was read; run again when it is at rest.")


def _file_state(path: Path) -> tuple[str, int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"file {str(path)!r} cannot be read ({error.strerror}); leave it out.") from error
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _digest(document: str) -> bytes:
    return blake2b(document.encode("utf-8"), digest_size=16).digest()


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _builtin_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files, num_bytes = [], 0
    for path in _walk(root, _BUILTIN_SKIP):
        if path.suffix == ".py" and num_bytes + path.stat().st_size <= BUILTIN_MAX_BYTES:
            num_bytes += path.stat().st_size
            files.append(path)
    if not files:
        raise InputError(f"this Python keeps no sources in {str(root)!r}; set data.source to text of your own.")
    return files


def _walk(root: Path, skip: set[str]) -> list[Path]:
    """Files below a folder, sorted by their parts; hidden names and the folders of ``skip`` are left out."""
    found = []
    for folder, folder_names, file_names in os.walk(root):
        folder_names[:] = [name for name in folder_names if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in file_names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _read_file(path: Path, config: DataConfig) -> Iterator[str]:
    if config.source == "builtin":
        try:
            yield path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:  # a few library files declare another encoding
            return
    elif path.suffix.lower() == ".jsonl":
        yield from _read_jsonl(path, config.text_field)
    else:
        yield from _read_text(path)


def _read_text(path: Path) -> Iterator[str]:
    is_whole = path.stat().st_size <= MAX_PIECE_CHARS
    lines: list[str] = []
    size = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        while line := file.readline(MAX_PIECE_CHARS):  # a longer line comes in parts, so memory stays bounded
            if "\0" in line:
                raise InputError(f"file {str(path)!r} is binary, not text; leave it out or convert it to UTF-8.")
            if size + len(line) > MAX_PIECE_CHARS:
                yield "".join(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
            if line.isspace() and size >= MIN_PIECE_CHARS and not is_whole:
                yield "".join(lines)
                lines, size = [], 0
    yield "".join(lines)


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                text = _parse_record(line, text_field, where=f"{path}:{number}")
                yield text.encode("utf-8", errors="replace").decode("utf-8")  # JSON may hold lone surrogates


def _parse_record(line: str, text_field: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error}); mend or remove the line.") from error
    if not isinstance(record, dict) or text_field not in record:
        raise InputError(f"{where} has no field {text_field!r}; set data.text_field to the field that holds the text.")
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(f"{where} holds {type(text).__name__} in field {text_field!r}; the field must be a string.")
    return text
