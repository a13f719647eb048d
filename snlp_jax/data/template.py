"""Chat templates of other people's models: jinja2, rendered as the transformers library renders them.

A template is a program by a stranger. What is guaranteed, on Linux for certain:

- jinja2's immutable sandbox keeps it from attributes that lead out of the conversation (``().__class__``).
- It runs in a process of its own, which is killed after ``SECONDS``, whatever it is busy with: loops within loops,
  powers of numbers, patterns, one product of texts. No time limit inside of a process stops all of these.
- That process has half a gigabyte of memory, writes no file, and no text longer than ``sandbox.MAX_CHARS``.
- Every fault becomes one InputError with one sentence.

macOS may not enforce the limit of memory; the time holds everywhere. A process renders any number of conversations,
so that starting it is paid for once.
"""

import atexit
import contextlib
import datetime
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snlp_jax.errors import InputError

SECONDS = 10.0
"""For all conversations of one call."""
DEFAULT = "default"
"""The name of a template that is the only one, or the one to take of several."""
MAX_ANSWER = 2**28
"""Characters of JSON that are read of the process."""
_FREE = frozenset(map(chr, range(0xFDD0, 0xFDF0)))
"""Characters that Unicode keeps out of every text: for marks."""


@dataclass(frozen=True)
class Task:
    """A conversation to be rendered."""

    messages: Sequence[tuple[str, str]]
    """Pairs (role, content)."""
    opens_answer: bool = False
    """``add_generation_prompt``: end with what an answer of the assistant follows."""
    bos_token: str = ""
    eos_token: str = ""
    date: str = ""
    """What ``strftime_now`` writes, in ISO format; now by default."""


@dataclass(frozen=True)
class RenderedText:
    """What a template makes of a conversation."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    """First character and the one after the last of each ``{% generation %}`` block."""


def render_texts(template: str, tasks: Sequence[Task]) -> list[RenderedText]:
    """Render conversations.

    Raises:
      InputError: the template has a mistake, refuses a conversation, reaches for what it may not, or takes too much
        time, memory or text.
    """
    found = try_texts(template, tasks)
    for each in found:
        if isinstance(each, InputError):
            raise each
    return [each for each in found if isinstance(each, RenderedText)]


def try_texts(template: str, tasks: Sequence[Task]) -> list[RenderedText | InputError]:
    """:func:`render_texts` with the errors of conversations in their places."""
    (mark,) = free_characters(1, (template, *(content for task in tasks for _, content in task.messages)))
    answers = _PROCESS.ask(template, [_request(task, mark) for task in tasks])
    return [_without_marks(each["text"], mark) if "text" in each else InputError(each["fault"]) for each in answers]


def free_characters(count: int, texts: Iterable[str]) -> tuple[str, ...]:
    """So many characters that none of the texts holds.

    Raises:
      InputError: there are not so many left of those that no text should hold.
    """
    used: set[str] = set().union(*(_FREE.intersection(text) for text in texts))
    free = sorted(_FREE - used)
    if len(free) < count:
        raise InputError("the conversation holds all of U+FDD0 to U+FDEF, which are no characters; leave them out.")
    return tuple(free[:count])


def named_templates(text: str) -> dict[str, str]:
    """Templates by name, from the text of one or from a JSON list of ``{"name", "template"}``, as tokenizer configs
    hold them. The only one is named "default"."""
    try:
        return {each["name"]: each["template"] for each in json.loads(text)}
    except (ValueError, TypeError, KeyError):
        return {DEFAULT: text} if text else {}


def choose_template(text: str, choice: str = "") -> str:
    """The template that a file's path or a name asks for; by default the default one, "" where there is none.

    Args:
      text: what :func:`named_templates` reads, the model's own.

    Raises:
      InputError: the choice is neither, the file cannot be read, or none of several is the default.
    """
    named = named_templates(text)
    if not choice:
        if named and DEFAULT not in named:
            raise InputError(f"the model has the chat templates {', '.join(named)}; choose one with --chat-template.")
        return named.get(DEFAULT, "")
    if choice in named:
        return named[choice]
    if not Path(choice).is_file():
        known = ", ".join(named) or "it has none"
        raise InputError(
            f"chat template {choice!r} is no file and not the model's own ({known}); give the path of a file."
        )
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"chat template {choice!r} cannot be read ({error}); give another file.") from error


def _request(task: Task, mark: str) -> dict[str, Any]:
    tokens = {"bos_token": task.bos_token, "eos_token": task.eos_token}
    variables = {
        "messages": [{"role": role, "content": content} for role, content in task.messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": task.opens_answer,
        **{name: text for name, text in tokens.items() if text},
    }
    return {"variables": variables, "mark": mark, "date": task.date or datetime.datetime.now().isoformat()}


def _without_marks(text: str, mark: str) -> RenderedText:
    """Marks stand before and after each span."""
    pieces = text.split(mark)
    ends = list(itertools.accumulate(map(len, pieces)))
    return RenderedText("".join(pieces), tuple(zip(ends[:-1:2], ends[1::2], strict=False)))


class _Process:
    """Renders, and is started when it is first needed, after it was killed, and in a forked process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._parent = 0

    def ask(self, template: str, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """A text or a fault for each task."""
        request = json.dumps({"template": template, "tasks": tasks, "seconds": SECONDS})
        with self._lock:
            return self._ask(request)

    def _ask(self, request: str) -> list[dict[str, str]]:
        child = self._started()
        assert child.stdin is not None and child.stdout is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            child.kill()

        timer = threading.Timer(SECONDS, end)
        timer.start()
        try:
            child.stdin.write(request + "\n")
            child.stdin.flush()
            line = child.stdout.readline(MAX_ANSWER)
            return json.loads(line)
        except (OSError, ValueError):
            self.close()
            fault = f"takes longer than {SECONDS:g} seconds" if is_late.is_set() else "ends the process that renders it"
            raise InputError(f"the chat template {fault}; mend it or give another one.") from None
        except BaseException:  # an interrupt: the answer would be taken for the next one's
            self.close()
            raise
        finally:
            timer.cancel()

    def _started(self) -> "subprocess.Popen[str]":
        if self._child is not None and self._parent == os.getpid() and self._child.poll() is None:
            return self._child
        # The child is to find what this process finds, and nothing else of its environment.
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
        environment |= {name: os.environ[name] for name in ("TZ", "SYSTEMROOT") if name in os.environ}
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "snlp_jax.data.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the terminal's process
            )
        except OSError as error:
            raise InputError(f"no process can be started to render the chat template ({error}); free some.") from error
        self._parent = os.getpid()
        return self._child

    def close(self) -> None:
        """End the process, if this one has started it."""
        if self._child is not None and self._parent == os.getpid():
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        self._child = None


_PROCESS = _Process()
atexit.register(_PROCESS.close)
