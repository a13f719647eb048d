"""Shards of a corpus to tokens, in worker processes: each result is a few files that are whole or not there.

A job writes its files aside and renames them, the record last. The record (``.json``) holds the length and the checksum
of every other file, and what the job found out; so a job that was done before an interruption is not done again, and
processes that do the same one at the same time write the same bytes. Nothing here imports jax: workers have no use for
it.
"""

import contextlib
import functools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snlp_jax.data.corpus import digest_of, documents_of, key_of
from snlp_jax.data.formats import Part
from snlp_jax.data.tokenizer import Tokenizer, load_tokenizer_json
from snlp_jax.errors import InputError
from snlp_jax.io import files as io_files

MAX_AUTO_WORKERS = 8
LOG_SECONDS = 30.0
"""Between lines of progress where there is no terminal."""

_BATCH_CHARS = 1 << 20  # text that is encoded at once
_WRITING = ".writing-"
_logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""``num_documents``, ``min_key`` and ``max_key``; ``train`` and ``val``, numbers of tokens; ``val_limit``; ``files``,
suffix -> [size, checksum]."""


class Job(NamedTuple):
    """A shard to be tokenized."""

    parts: list[Part]
    text_field: str
    out: str
    """Path that the names of its files begin with."""
    tokenizer: str
    """Path of a tokenizer.json."""
    dtype: str
    """Of the tokens."""
    val_limit: int
    """Documents with a key below it are held out."""

    @property
    def size(self) -> int:
        """About as many bytes of text: its share of the progress."""
        return sum(part.size for part in self.parts)


# -- One job -----------------------------------------------------------------------------------------------------------


def run_job(job: Job) -> None:
    """Tokenize the shard: tokens of its documents, the separator before each, in ``train`` and ``val``, and digests of
    all documents, 16 bytes each, in ``digests``. Nothing if another process has done it already.

    Raises:
      InputError: a bad document.
    """
    if finished(job) is not None:
        return
    out = Path(job.out)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=_WRITING, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            record = _tokenize(job, folder) | {"val_limit": job.val_limit}
            record["files"] = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(folder.iterdir())}
            (folder / "json").write_text(json.dumps(record), encoding="utf-8")
            for suffix in (*record["files"], "json"):
                (folder / suffix).replace(f"{out}.{suffix}")
    except FileNotFoundError:  # another process had done it before, and has tidied up
        if finished(job) is None:
            raise


def _tokenize(job: Job, folder: Path) -> Record:
    tokenizer = _load_tokenizer(job.tokenizer)
    record: Record = {"num_documents": 0, "min_key": 2**64, "max_key": -1, "train": 0, "val": 0}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in ("train", "val", "digests")}
        for documents in _batches(job):
            for document, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
                digest = digest_of(document)
                key = key_of(digest)
                split = "val" if key < job.val_limit else "train"
                files["digests"].write(digest)
                files[split].write(np.concatenate(([tokenizer.bos_id], ids)).astype(job.dtype).tobytes())
                record["num_documents"] += 1
                record["min_key"], record["max_key"] = min(record["min_key"], key), max(record["max_key"], key)
                record[split] += len(ids) + 1
    return record


def _batches(job: Job) -> Iterator[list[str]]:
    """Documents, each time ``_BATCH_CHARS`` of text or what the last document makes more."""
    batch: list[str] = []
    size = 0
    for document in documents_of(job.parts, job.text_field):
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: str) -> Tokenizer:
    return load_tokenizer_json(Path(path).read_text(encoding="utf-8"))


def finished(job: Job, *, is_thorough: bool = True) -> Record | None:
    """The record of a job that is done and whose files are whole; None otherwise. Thorough: as checksums say."""
    try:
        record: Record = json.loads(Path(f"{job.out}.json").read_text(encoding="utf-8"))
        if record["val_limit"] != job.val_limit:
            return None
        for suffix, (size, checksum) in record["files"].items():
            path = Path(f"{job.out}.{suffix}")
            if path.stat().st_size != size or (is_thorough and _checksum(path) != checksum):
                return None
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove_leftovers(folder: Path) -> None:
    """What killed jobs have left. A running one, which loses its folder by it, finds its work done by another."""
    io_files.remove_leftovers(folder)
    for path in folder.glob(f"{_WRITING}*"):
        shutil.rmtree(path, ignore_errors=True)


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


# -- Many jobs ---------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], num_workers: int) -> list[Record]:
    """Records of all jobs in order; those that are done are not done again.

    They are taken up from a random place on, so that hosts that share a folder share the work too.

    Args:
      num_workers: processes; 0 does the jobs in this one, -1 is :func:`auto_workers`.

    Raises:
      InputError: a job's, or a worker was killed.
      OSError: a file cannot be written.
    """
    missing = [job for job in jobs if finished(job) is None]
    first = random.randrange(len(missing)) if missing else 0
    missing = missing[first:] + missing[:first]
    num_workers = min(auto_workers(len(missing)) if num_workers < 0 else num_workers, len(missing))
    total = sum(job.size for job in jobs)
    with _progress(total, total - sum(job.size for job in missing)) as advance:
        if num_workers:
            _run_in_workers(missing, num_workers, advance)
        else:
            for job in missing:
                run_job(job)
                advance(job.size)
    records = [finished(job, is_thorough=False) for job in jobs]
    if None in records:
        raise FileNotFoundError(f"a file of {jobs[records.index(None)].out} has gone")
    return [record for record in records if record is not None]


def auto_workers(num_jobs: int) -> int:
    """One process for each core but one, at most ``MAX_AUTO_WORKERS``; none for a single job."""
    return min(MAX_AUTO_WORKERS, max(_num_cores() - 1, 1), num_jobs) if num_jobs > 1 else 0


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line in the log every ``LOG_SECONDS`` elsewhere; to be told of every so many bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console, last_line = Console(stderr=True), time.monotonic()
    columns = ("Tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def advance(count: int) -> None:
            nonlocal last_line
            bar.advance(task, count)
            if not console.is_terminal and time.monotonic() > last_line + LOG_SECONDS:
                last_line = time.monotonic()
                _logger.info("Tokenizing: %.0f of %.0f MB.", bar.tasks[0].completed / 1e6, total / 1e6)

        yield advance


def _run_in_workers(jobs: list[Job], num_workers: int, advance: Callable[[int], None]) -> None:
    """As soon as one fails the others end with the job that they are at."""
    context = multiprocessing.get_context("spawn")
    num_threads = max(_num_cores() // num_workers, 1)
    with ProcessPoolExecutor(num_workers, context, initializer=_begin_worker, initargs=(num_threads,)) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                advance(futures[future].size)
        except BrokenProcessPool as error:
            raise InputError(
                "a process that reads the corpus ended; is memory short? Lower data.num_workers and run again: what is "
                'done stays done. (A script that trains must do so under `if __name__ == "__main__":`.)'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker(num_threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The tokenizer's own threads.
    os.environ.update(RAYON_NUM_THREADS=str(num_threads), TOKENIZERS_PARALLELISM="true")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
