"""The files of a corpus, divided into shards, to a stream of documents: always in the same order, a few at a time."""

import glob
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from snlp_jax.config import DataConfig
from snlp_jax.config.data import SEVERAL
from snlp_jax.data.formats import KINDS, Format, Part, explained, format_of, parts_of, read_part
from snlp_jax.errors import InputError

BUILTIN_MAX_BYTES = 12_000_000
SHARD_BYTES = 1 << 26
"""About as much text is tokenized into one shard, whoever does it."""

_FORMAT = 3  # part of the name of what is made of a corpus: raise it when documents, splits or files change
_BUILTIN_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}

Shard = list[Part]
"""Consecutive parts of a corpus."""


@dataclass(frozen=True)
class Corpus:
    """Files as they were when first looked at, and how they are divided."""

    config: DataConfig
    states: list[tuple[str, int, int, int]]
    shards: list[Shard]

    @property
    def key(self) -> str:
        """Tells it from other corpora."""
        return hash_of(_FORMAT, self.config.source == "builtin", self.config.text_field, self.states, self.shards)

    @property
    def val_limit(self) -> int:
        """Documents with a key below it are held out, unless that leaves a side empty."""
        return int(self.config.val_fraction * 2**64)

    def training_documents(self, max_chars: int) -> Iterator[str]:
        """Documents that are not held out, thinned evenly to about ``max_chars``."""
        stride = -(-sum(part.size for shard in self.shards for part in shard) // max(max_chars, 1))
        for shard in self.shards:
            documents = documents_of(shard, self.config.text_field)
            training = (document for document in documents if key_of(digest_of(document)) >= self.val_limit)
            yield from itertools.islice(training, 0, None, max(stride, 1))
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raises InputError where a file is not what it was."""
        if [file_state(path) for path in corpus_files(self.config)] != self.states:
            raise InputError(
                f"data.source {self.config.source!r} changed while it was read; run again when it is at rest."
            )


def find_corpus(config: DataConfig) -> Corpus:
    """Look at the files of ``config.source``.

    Raises:
      InputError: there are none, or one cannot be read.
    """
    return Corpus(config, [file_state(path) for path in corpus_files(config)], plan_shards(config))


def documents_of(shard: Shard, text_field: str) -> Iterator[str]:
    """Documents of one shard in order; those of nothing but blanks are left out. What a document is depends on the file
    (``snlp_jax/data/formats.py``); a file of the builtin corpus is one.

    Raises:
      InputError: not UTF-8, or a bad record.
    """
    return itertools.chain.from_iterable(read_part(part, text_field) for part in shard)


def first_documents(config: DataConfig, count: int) -> list[str]:
    """At most the first ``count`` documents of a corpus. Raises InputError where it cannot be read."""
    shards = (documents_of(shard, config.text_field) for shard in find_corpus(config).shards)
    return list(itertools.islice(itertools.chain.from_iterable(shards), count))


def plan_shards(config: DataConfig) -> list[Shard]:
    """The corpus as shards of about ``SHARD_BYTES`` of text, which depend on its files alone.

    Raises:
      InputError: there are no files, or one cannot be read.
    """
    shards: list[Shard] = [[]]
    size = 0
    for path in corpus_files(config):
        form = Format("python") if config.source == "builtin" else format_of(path)
        for part in parts_of(path, form, SHARD_BYTES):
            if size >= SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(part)
            size += part.size
    return shards


def corpus_files(config: DataConfig) -> list[Path]:
    """Files of ``config.source`` in the order in which they are read, sorted by path, each once however many links lead
    to it.

    Raises:
      InputError: there are none, or a folder cannot be read.
    """
    if config.source == "builtin":
        return _builtin_files()
    found: dict[str, Path] = {}
    for source in config.source.split(SEVERAL):
        with explained(source):
            for file in _files_of(source):
                found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _files_of(source: str) -> list[Path]:
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in _walk(path, skip=set(), follows=True) if format_of(file).is_known]
        kinds = f"{', '.join(KINDS)} file (plain, .gz or .zst)"
        fault = f"folder {source!r} holds no {kinds}; add some or name another folder."
    elif path.exists():
        raise InputError(f"data.source {source!r} is neither a file nor a folder; write what comes from it to a file.")
    elif glob.has_magic(source):
        found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
        fault = f"data.source {source!r} matches no file; check the pattern (a bracket of a name is written [[])."
    else:
        found = []
        fault = f"data.source {source!r} does not exist; give 'builtin' or a file, folder or glob."
    if not found:
        raise InputError(fault)
    once: dict[str, Path] = {}
    for file in found:
        once.setdefault(os.path.realpath(file), file)
    return list(once.values())


def file_state(path: Path) -> tuple[str, int, int, int]:
    """Name, size and times of a file: while they stay the same, so does what is in it."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"file {str(path)!r} cannot be read ({error.strerror}); leave it out.") from error
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def hash_of(*parts: object) -> str:
    """Of anything that JSON can hold."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def digest_of(document: str) -> bytes:
    """16 bytes that tell a document from others."""
    return blake2b(document.encode("utf-8"), digest_size=16).digest()


def key_of(digest: bytes) -> int:
    """The number, below 2**64, that a digest begins with: by it a document is held out or not."""
    return int.from_bytes(digest[:8], "big")


def val_limit(config: DataConfig, min_key: int, max_key: int) -> int:
    """Documents with a key below it are held out: about ``val_fraction`` of them, and at least one on either side.

    Raises:
      InputError: all have one key.
    """
    if min_key == max_key:
        kind = "conversation" if config.format == "chat" else "document"
        raise InputError(
            f"data.source {config.source!r} holds only one {kind}, or copies of one, and two are needed to hold one "
            "out; give more."
        )
    return min(max(int(config.val_fraction * 2**64), min_key + 1), max_key)


def _builtin_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files, num_bytes = [], 0
    for path in _walk(root, _BUILTIN_SKIP, follows=False):
        if path.suffix == ".py" and num_bytes + path.stat().st_size <= BUILTIN_MAX_BYTES:
            num_bytes += path.stat().st_size
            files.append(path)
    if not files:
        raise InputError(f"this Python keeps no sources in {str(root)!r}; set data.source to text of your own.")
    return files


def _walk(root: Path, skip: set[str], *, follows: bool) -> list[Path]:
    """Files below a folder, sorted by their parts; hidden names and the folders of ``skip`` are left out. Links to
    folders are followed where that is asked for, but no folder is read twice. Raises OSError where one cannot be read.
    """
    found, seen = [], {os.path.realpath(root)}

    def refuse(error: OSError) -> None:
        raise error

    for folder, folder_names, file_names in os.walk(root, onerror=refuse, followlinks=follows):
        kept = []
        for name in sorted(folder_names):
            place = os.path.realpath(os.path.join(folder, name))
            if name not in skip and not name.startswith(".") and place not in seen:
                seen.add(place)
                kept.append(name)
        folder_names[:] = kept
        found += [Path(folder, name) for name in file_names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())
