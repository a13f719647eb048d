"""Conversations in the terminal: ``python -m snlp_jax.infer RUN --chat``."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

from snlp_jax.errors import InputError
from snlp_jax.infer.conversation import Conversation


def talk(conversation: Conversation, lines: Iterable[str], closing: Callable[[], str]) -> None:
    """Answer lines until they end. Ctrl-C ends an answer; pressed twice, it takes the line back."""
    for line in lines:
        try:
            if not sys.stdin.isatty():
                print(line)
            with _interruptible() as is_interrupted:
                done = conversation.say(line, lambda text: print(text, end="", flush=True) or is_interrupted())
            print()
            if conversation.is_full(done):
                print("note: the model's context is full, which cut the answer.", file=sys.stderr)
            kept = f", {conversation.num_reused} of {conversation.num_prompt} tokens before it kept]"
            print(closing().removesuffix("]") + kept, file=sys.stderr)
        except InputError as error:  # the conversation goes on
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nnote: the line was taken back.", file=sys.stderr)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; the second time it is a KeyboardInterrupt."""
    pressed = threading.Event()

    def press(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
