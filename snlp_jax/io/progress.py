"""How far a long computation is, on stderr: a bar on a terminal, and elsewhere a line now and then."""

import sys
import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

FIRST_SECONDS = 5.0
"""Nothing is said before, where there is no terminal."""
MOST_SECONDS = 60.0
"""Between two lines there."""


class Progress:
    """Steps of a computation, for a ``with`` statement.

    Args:
        what: is being done, such as ``"evaluating"``.
        total: number of steps, or of any other unit.
    """

    def __init__(self, what: str, total: float) -> None:
        self.what, self.total, self.done, self.step = what, max(total, 1e-9), 0.0, ""
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(what, total=self.total)
        self._has_begun, self._ended, self._started = False, threading.Event(), time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        if not self._console.is_terminal:
            threading.Thread(target=self._tell, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._bar.stop()

    def begin(self, step: str) -> None:
        """The step before is done, and this one begins."""
        self.advance(1.0 if self._has_begun else 0.0)
        self._has_begun, self.step = True, step
        self._bar.update(self._task, description=f"{self.what}: {step}")

    def advance(self, amount: float = 1.0) -> None:
        """So much more is done."""
        self.done += amount
        self._bar.update(self._task, completed=self.done)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def line(self, seconds: float) -> str:
        """What is said where there is no terminal, so long after the start."""
        share = min(self.done / self.total, 1.0)
        left = f", {duration(seconds / share * (1 - share))} left" if share > 0 else ""
        step = f": {self.step}" if self.step else ""
        return f"{self.what}{step} ({share:.0%} after {duration(seconds)}{left})"

    def _tell(self) -> None:
        seconds = FIRST_SECONDS
        while not self._ended.wait(seconds):
            past = time.monotonic() - self._started
            print(self.line(past), file=sys.stderr, flush=True)
            seconds = min(max(past, FIRST_SECONDS), MOST_SECONDS)


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
