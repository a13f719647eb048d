"""Work on the shards of a corpus, in worker processes: each result is a few files that are whole or not there.

A job writes its files aside and renames them, the record last. The record (``.json``) holds the length and the checksum
of every other file, and what the job found out; so a job that was done before an interruption is not done again, and
processes that do the same one at the same time write the same bytes. Workers are plain subprocesses that read jobs from
a pipe: they need no ``__main__`` of yours, import no jax, and end when the pipe does.
"""

import contextlib
import functools
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from snlp_jax.data.corpus import digest_of, documents_of, key_of
from snlp_jax.data.formats import Part
from snlp_jax.data.progress import Progress, Report
from snlp_jax.data.tokenizer import Tokenizer, load_tokenizer_json
from snlp_jax.errors import InputError
from snlp_jax.io import files

MAX_AUTO_WORKERS = 8

_BATCH_CHARS = 1 << 20  # text that is encoded, and between reports, at once
_WRITING = ".writing-"

Job = dict[str, Any]
"""A JSON object: ``kind``, a key of ``_JOBS``; ``parts`` and ``text_field``, what to read; ``out``, the path that its
files' names begin with; ``size``, the share of the progress it stands for; and what the kind needs."""
Record = dict[str, Any]


# -- The kinds ---------------------------------------------------------------------------------------------------------


def _scan(job: Job, folder: Path, report: Report) -> Record:
    """Digests of the shard's documents, 16 bytes each, in ``digests``."""
    num_documents, num_chars, min_key, max_key = 0, 0, 2**64, -1
    with (folder / "digests").open("wb") as file:
        for documents, digests in _batches(job, report):
            file.write(b"".join(digests))
            num_documents += len(documents)
            num_chars += sum(map(len, documents))
            keys = [key_of(digest) for digest in digests]
            min_key, max_key = min(min_key, *keys), max(max_key, *keys)
    return {"num_documents": num_documents, "num_chars": num_chars, "min_key": min_key, "max_key": max_key}


def _sample(job: Job, folder: Path, report: Report) -> Record:
    """Every ``stride``-th training document of the shard, in ``documents``."""
    chosen, count = [], 0
    for documents, digests in _batches(job, report):
        for document, digest in zip(documents, digests, strict=True):
            if key_of(digest) >= job["val_limit"]:
                if count % job["stride"] == 0:
                    chosen.append(document)
                count += 1
    (folder / "documents").write_text(json.dumps(chosen), encoding="utf-8")
    return {}


def _encode(job: Job, folder: Path, report: Report) -> Record:
    """Tokens of the shard's documents, the separator before each, in ``train`` and ``val``."""
    tokenizer, dtype = _load_tokenizer(job["tokenizer"]), np.dtype(job["dtype"])
    num_tokens = [0, 0]
    with (folder / "train").open("wb") as train, (folder / "val").open("wb") as val:
        for documents, digests in _batches(job, report):
            for digest, ids in zip(digests, tokenizer.encode_batch(documents), strict=True):
                is_val = key_of(digest) < job["val_limit"]
                file: BinaryIO = val if is_val else train
                file.write(np.concatenate(([tokenizer.bos_id], ids)).astype(dtype).tobytes())
                num_tokens[is_val] += len(ids) + 1
    return {"train": num_tokens[0], "val": num_tokens[1]}


_JOBS: dict[str, Callable[[Job, Path, Report], Record]] = {"scan": _scan, "sample": _sample, "encode": _encode}


def _batches(job: Job, report: Report) -> Iterator[tuple[list[str], list[bytes]]]:
    """Documents and their digests, each time ``_BATCH_CHARS`` of text or what the last document makes more.

    Raises:
      InputError: after the last, if they were not those that the scan has seen.
    """
    total = blake2b(digest_size=16)
    batch: list[str] = []
    size = 0

    def finish() -> tuple[list[str], list[bytes]]:
        digests = [digest_of(document) for document in batch]
        total.update(b"".join(digests))
        return batch, digests

    for document in documents_of([Part(*part) for part in job["parts"]], job["text_field"]):
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARS:
            yield finish()
            report(size)
            batch, size = [], 0
    if batch:
        yield finish()
        report(size)
    if job.setdefault("documents_hash", total.hexdigest()) != total.hexdigest():
        raise InputError(f"data.source {job['source']!r} changed while it was read; run again when it is at rest.")


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: str) -> Tokenizer:
    return load_tokenizer_json(Path(path).read_text(encoding="utf-8"))


# -- One job -----------------------------------------------------------------------------------------------------------


def run_job(job: Job, report: Report) -> Record:
    """Do the job and publish its files; returns the record."""
    job, out = dict(job), Path(job["out"])
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=_WRITING, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            record = _JOBS[job["kind"]](job, folder, report) | {"documents_hash": job["documents_hash"]}
            record["files"] = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(folder.iterdir())}
            (folder / "json").write_text(json.dumps(record), encoding="utf-8")
            for suffix in (*record["files"], "json"):
                (folder / suffix).replace(f"{out}.{suffix}")
    except FileNotFoundError:  # another process had done it before, and has tidied up
        found = finished(out)
        if found is None:
            raise
        return found
    return record


def finished(out: Path, *, is_thorough: bool = True) -> Record | None:
    """The record of a job that is done and whose files are whole; None otherwise. Thorough: as their checksums say."""
    try:
        record: Record = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
        for suffix, (size, checksum) in record["files"].items():
            path = Path(f"{out}.{suffix}")
            if path.stat().st_size != size or (is_thorough and _checksum(path) != checksum):
                return None
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove_leftovers(folder: Path) -> None:
    """What killed jobs have left. A running one, which loses its folder by it, finds its work done by another."""
    files.remove_leftovers(folder)
    for path in folder.glob(f"{_WRITING}*"):
        with contextlib.suppress(OSError):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


# -- Many jobs ---------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], num_workers: int, title: str) -> list[Record]:
    """Records of all jobs in order; those that are done are not done again.

    They are taken up from a random place on, so that hosts that share a folder share the work too.

    Args:
      num_workers: processes; 0 does the jobs in this one, -1 is :func:`auto_workers`.
      title: of the progress bar, or of a line every ``LOG_SECONDS`` where there is no terminal.

    Raises:
      InputError: a job's, or a worker was killed.
      OSError: a file cannot be written.
    """
    records: list[Record | None] = [None] * len(jobs)
    with Progress(title, sum(job["size"] for job in jobs)) as progress:

        def find(index: int) -> bool:
            """Whether a job is done."""
            job = jobs[index]
            record = finished(Path(job["out"]))
            if record is None or record.get("documents_hash") != job.get(
                "documents_hash", record.get("documents_hash")
            ):
                return False
            records[index] = record
            progress.skip(job["size"])
            return True

        missing = [index for index in range(len(jobs)) if not find(index)]
        first = random.randrange(len(missing)) if missing else 0
        missing = missing[first:] + missing[:first]
        num_workers = min(auto_workers(len(missing)) if num_workers < 0 else num_workers, len(missing))

        def do(index: int, run: Callable[[Job, Report], Record]) -> None:
            if not find(index):  # another process may have been here since
                with progress.part(jobs[index]["size"]) as report:
                    records[index] = run(jobs[index], report)

        if num_workers == 0:
            for index in missing:
                do(index, run_job)
        else:
            _run_in_workers(missing, num_workers, do)
    return [record for record in records if record is not None]


def auto_workers(num_jobs: int) -> int:
    """One process for each core but one, at most ``MAX_AUTO_WORKERS``; none for a single job."""
    return min(MAX_AUTO_WORKERS, max(_num_cores() - 1, 1), num_jobs) if num_jobs > 1 else 0


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_in_workers(indices: list[int], num_workers: int, do: Callable[[int, Any], None]) -> None:
    workers = [_Worker(max(_num_cores() // num_workers, 1)) for _ in range(num_workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def take(index: int) -> None:
        worker = idle.get()
        try:
            do(index, worker.run)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(num_workers)
    try:
        futures = [pool.submit(take, index) for index in indices]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.stop()
        pool.shutdown()


_SERVE = "import sys; sys.path.insert(0, sys.argv[1]); from snlp_jax.data.jobs import serve; serve()"


class _Worker:
    """A process that does one job after another. ``num_threads`` is for the tokenizer's own."""

    def __init__(self, num_threads: int) -> None:
        root = str(Path(__file__).parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"RAYON_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "true"},
            text=True,
            encoding="utf-8",
        )

    def run(self, job: Job, report: Report) -> Record:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job), file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                message = json.loads(line)
                if "read" in message:
                    report(message["read"])
                elif "record" in message:
                    return message["record"]
                else:
                    raise _error_of(message)
        raise InputError(
            f"a process that reads the corpus ended (exit code {self._process.wait()}); is memory short? Lower "
            "data.num_workers and run again: what is done stays done."
        )

    def stop(self) -> None:
        """At once: what it has begun is lost."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def serve() -> None:
    """A worker's life: jobs come as lines of JSON, and so do progress, records and errors leave."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed does not get between them
    parent = os.getppid()

    def reply(**message: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody waits any more
        print(json.dumps(message), file=replies, flush=True)

    for line in sys.stdin:
        try:
            reply(record=run_job(json.loads(line), lambda count: reply(read=count)))
        except InputError as error:
            reply(input_error=str(error))
        except OSError as error:
            reply(os_error=[error.errno, error.strerror or str(error)])
        except Exception:
            reply(error=traceback.format_exc())


def _error_of(message: dict[str, Any]) -> Exception:
    if "input_error" in message:
        return InputError(message["input_error"])
    return OSError(*message["os_error"]) if "os_error" in message else RuntimeError(message["error"])
