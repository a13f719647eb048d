"""Turns of a user and a model, in the model's chat template and over one cache."""

import dataclasses
from collections.abc import Callable

from snlp_jax.data.turns import ChatFormat
from snlp_jax.errors import InputError
from snlp_jax.infer.engine import Engine
from snlp_jax.infer.prefix import PrefixCache
from snlp_jax.infer.requests import Completion, Request

OnText = Callable[[str], bool | None]
"""Called with the new text of an answer, some characters at a time. True ends the answer."""


class Conversation:
    """What was said so far. A turn evaluates its new tokens alone, as far as the template writes the turns before again
    as they were; the answers are those of the whole conversation either way.

    Args:
      engine: with a tokenizer.
      form: how the conversation is written.
      system: what the system says first; "" for nothing.
      like: how long an answer may be, how it is drawn, and what ends it besides the tokens of ``form``. Answers are
        shorter where the model's context ends before. Its own tokens say nothing.
    """

    def __init__(self, engine: Engine, form: ChatFormat, system: str = "", like: Request | None = None) -> None:
        like = like or Request(())
        self._engine, self._form = engine, form
        self._like = dataclasses.replace(like, stop_tokens=tuple(dict.fromkeys([*form.end_ids, *like.stop_tokens])))
        self._kept = PrefixCache()
        self.messages: list[tuple[str, str]] = [("system", system)] if system else []
        """Pairs (role, content)."""
        self.num_prompt = 0
        """Tokens of the conversation before the last answer."""

    @property
    def num_reused(self) -> int:
        """Those of them that were in the cache."""
        return self._kept.num_reused

    def say(self, text: str, on_text: OnText | None = None) -> Completion:
        """The answer to what the user says; both are part of the conversation from then on.

        An error or an interrupt leaves the conversation as it was before. An answer that ``on_text`` ends is part of it
        as far as it came.

        Raises:
          InputError: the context is full, or the template refuses the conversation.
        """
        said = [*self.messages, ("user", text)]
        prompt = self._form.prompt(said).tolist()
        longest = self._engine.model.config.max_context
        room = longest - len(prompt)
        if room < 1:
            raise InputError(
                f"the conversation has {len(prompt)} tokens and the model's context ends at {longest}; say less, or "
                "begin a new one."
            )
        new = min(self._like.max_new_tokens, room)
        request = dataclasses.replace(self._like, tokens=prompt, max_new_tokens=new)
        listen = None if on_text is None else lambda _row, _tokens, new: on_text(new)
        (done,) = self._engine.generate([request], listen, self._kept)
        self.num_prompt = len(prompt)
        self.messages = [*said, ("assistant", self._written(said, prompt, done))]
        return done

    def is_full(self, done: Completion) -> bool:
        """Whether the last answer was cut since the context ended."""
        return done.finish == "length" and self.num_prompt + len(done.tokens) == self._engine.model.config.max_context

    def _written(self, said: list[tuple[str, str]], prompt: list[int], done: Completion) -> str:
        """The answer's text, without the space before it where the template writes one itself."""
        text, tokens = done.text or "", [*prompt, *done.tokens]
        if text.startswith(" "):
            again = self._form.prompt([*said, ("assistant", text[1:]), ("user", "")]).tolist()
            if again[: len(tokens)] == tokens:
                return text[1:]
        return text
