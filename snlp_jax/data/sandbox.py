"""The process that renders chat templates: a request of JSON a line in, an answer of JSON a line out.

It is started by snlp_jax/data/template.py, which says what is guaranteed. What a template may reach for is bounded by
jinja2's sandbox, memory and files by limits of the operating system.
"""

import contextlib
import datetime
import functools
import json
import sys
import time
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MEMORY = 512 * 2**20
"""Bytes of address space."""
MAX_CHARS = 2**24
"""Of a rendered text."""
MAX_MESSAGE = 200


class TooLong(Exception):
    """A rendered text exceeds ``MAX_CHARS``."""


class Generation(Extension):
    """``{% generation %}`` ... ``{% endgeneration %}`` round what the assistant says: a mark before and after it."""

    tags = {"generation"}
    mark = ""
    """A character that the conversation and the template hold nowhere else."""

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{Generation.mark}{caller()}{Generation.mark}"


class Environment(ImmutableSandboxedEnvironment):
    """Refuses at once what jinja2's own would leave undefined and print as nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")


class Refusal(jinja2.TemplateError):
    """What ``raise_exception`` raises: the template does not write this conversation."""


def _raise(message: object) -> None:
    raise Refusal(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _render(template: str, task: dict[str, Any]) -> str:
    date = datetime.datetime.fromisoformat(task["date"])
    pieces, size = [], 0
    Generation.mark = task["mark"]
    for piece in _compiled(template).generate(strftime_now=date.strftime, **task["variables"]):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_CHARS:
            raise TooLong
    return "".join(pieces)


def _fault_of(error: Exception) -> str:
    """A sentence."""
    message = " ".join(str(error).split())[:MAX_MESSAGE].rstrip(".;")
    if isinstance(error, Refusal):
        return f"the chat template refuses the conversation ({message}); change it, or give another template."
    if isinstance(error, jinja2.TemplateSyntaxError):
        fault = f"has a mistake in line {error.lineno} ({message})"
    elif isinstance(error, SecurityError):
        fault = f"reaches for what it may not ({message})"
    elif isinstance(error, TooLong):
        fault = f"writes more than {MAX_CHARS:,} characters"
    elif isinstance(error, MemoryError):
        fault = f"takes more than {MEMORY >> 20} MB"
    elif isinstance(error, RecursionError):
        fault = "calls itself without an end"
    else:
        fault = f"fails with {type(error).__name__} ({message})"
    return f"the chat template {fault}; mend it or give another one."


def answer(template: str, task: dict[str, Any]) -> dict[str, str]:
    """A text, or the fault for which there is none."""
    try:
        return {"text": _render(template, task)}
    except Exception as error:  # whatever a stranger's template raises
        return {"fault": _fault_of(error)}


def _limit(seconds: float) -> None:
    """Memory, files that can be written, and the time until the process ends even if nobody is left to end it."""
    with contextlib.suppress(ImportError):
        import resource

        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with contextlib.suppress(ValueError, OSError):
            used = time.process_time()
            resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 2, resource.RLIM_INFINITY))


def main() -> None:
    time.localtime()  # reads the zone's file
    for line in sys.stdin:
        request = json.loads(line)
        _limit(request["seconds"])
        answers = [answer(request["template"], task) for task in request["tasks"]]
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
