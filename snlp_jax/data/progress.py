"""How far a long pass over a corpus has come."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

LOG_SECONDS = 30.0
"""Between lines of progress where there is no terminal."""

_logger = logging.getLogger(__name__)

Report = Callable[[int], None]
"""Told of every so many characters that were read."""


class Progress:
    """A bar on a terminal, lines in the log elsewhere. Counts characters, which is close to bytes."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, max(total, 1), 0
        self._lock, self._began = threading.Lock(), time.monotonic()
        self._told, self._skipped = self._began, 0
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal:
            columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
            text = progress.TextColumn("{task.description}")
            self._bar = progress.Progress(
                text, *columns, progress.TimeRemainingColumn(), console=console, transient=True
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
                return
            now = time.monotonic()
            if now - self._told < LOG_SECONDS:
                return
            self._told = now
            rate = (self._done - self._skipped) / (now - self._began)
            _logger.info(
                "%s: %d %% of %.0f MB, %.1f MB/s, %.0f s left.",
                *(self._title, 100 * self._done // self._total, self._total / 1e6, rate / 1e6),
                (self._total - self._done) / max(rate, 1.0),
            )

    def skip(self, count: int) -> None:
        """What was done before tells nothing about the rate."""
        self._skipped += count
        self.advance(count)

    @contextlib.contextmanager
    def part(self, size: int) -> Iterator[Report]:
        """A report for one job, which counts as ``size`` in the end, whatever it reads."""
        told = 0

        def report(count: int) -> None:
            nonlocal told
            count = max(0, min(count, size - told))
            told += count
            self.advance(count)

        yield report
        self.advance(size - told)
