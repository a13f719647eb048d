"""Conversations in tokens: in the model's own template, or in one of plain text for models that have none.

The plain text:

    <bos>System: ...\n
    User: ...\n
    Assistant: ...<bos>

A role's name opens a turn; what others than the assistant say ends with a newline, and an answer with the document
separator, at which generation stops anyway. No token is added to any vocabulary, so that every pretrained model can
read it. The price: it is text, and a user who writes a newline and "Assistant:" opens a turn.

In a model's own template special tokens are those that the template writes. Names of special tokens in what is said
stay text: a mark between their characters, which no text holds, keeps them apart while the template runs and is taken
out afterwards. A conversation without such names has the tokens that transformers' ``apply_chat_template`` gives it.

Of a conversation to learn from, the answers and the tokens that end them are learned. Where an answer stands is said by
the template's ``{% generation %}`` blocks. Else it begins where the same conversation up to it, rendered with
``add_generation_prompt``, ends, since the model is to go on from there. Where that opens no answer, or is no beginning
of the whole, as with templates that put the system's message into the last turn, it begins at its first word. It ends
with the first token that ends a turn.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from snlp_jax.data.template import RenderedText, Task, choose_template, free_characters, render_texts, try_texts
from snlp_jax.data.tokenizer import Encoded, Tokenizer
from snlp_jax.errors import InputError

ROLES = {"system": "System: ", "user": "User: ", "tool": "Tool: ", "assistant": "Assistant:"}
"""What opens a turn of plain text. An answer begins with a space, which most tokenizers join to its first word."""
PLAIN_JINJA = (
    "{% set roles = ROLES %}{{ END }}{% for message in messages %}{{ roles[message.role] }}"
    "{{ ' ' + message.content + END if message.role == 'assistant' else message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ roles.assistant }}{% endif %}"
)
TRAINING_DATE = "2024-07-26"
"""What templates that write a date read in training, so that a run is the same on every day."""

Messages = Sequence[tuple[str, str]]
"""Pairs (role, content)."""


class Rendered(NamedTuple):
    """A conversation to learn from, in tokens. The last is a separator, which others may take the place of where it is
    not part of an answer."""

    ids_T: np.ndarray
    """int32."""
    is_response_T: np.ndarray
    """bool: of the tokens of answers and those that end them."""


class PlainFormat:
    """Conversations as text; see the module."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end_ids: tuple[int, ...] = tokenizer.special.end_ids
        """Any of these ends an answer."""

    def prompt(self, messages: Messages) -> np.ndarray:
        """The tokens that an answer to the conversation so far continues, int32 [T]."""
        pairs, rest = _pairs(messages)
        opened = self.tokenizer.encode(rest + ROLES["assistant"])
        return np.concatenate([self._join(pairs).ids_T, opened])

    def learned(self, messages: Messages) -> Rendered:
        """A conversation to learn from. What is said after the last answer is left out: nothing answers it."""
        return self._join(_pairs(messages)[0])

    def jinja(self) -> str:
        """A chat template that writes the same, for other libraries."""
        names = {index: name for name, index in self.tokenizer.special_ids.items()}
        roles, end = (json.dumps(value) for value in (ROLES, names.get(self.tokenizer.bos_id, "")))
        return PLAIN_JINJA.replace("ROLES", roles).replace("END", end)

    def _join(self, pairs: Sequence[tuple[str, str]]) -> Rendered:
        separator = self.tokenizer.bos_id
        ids, is_response = [np.array([separator])], [np.array([False])]
        for prompt, answer in pairs:
            encoded = self.tokenizer.encode_spans(prompt + answer)  # at once: no tokenizer adds a space between them
            ids += [encoded.ids_T, np.array([separator])]
            is_response += [encoded.end_T > len(prompt), np.array([True])]
        return Rendered(np.concatenate(ids).astype(np.int32), np.concatenate(is_response))


def _pairs(messages: Messages) -> tuple[list[tuple[str, str]], str]:
    """Pairs (everything since the last answer, answer), and what follows the last one."""
    pairs, prompt = [], ""
    for role, content in messages:
        if role == "assistant":
            pairs.append((prompt + ROLES[role], " " + content))
            prompt = ""
        else:
            prompt += f"{ROLES[role]}{content}\n"
    return pairs, prompt


@dataclass(frozen=True)
class TemplateFormat:
    """Conversations in a model's own template, which does what :class:`PlainFormat` does."""

    tokenizer: Tokenizer
    template: str

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Those of the model, and the special token that follows an answer in the template."""
        found = try_texts(self.template, [self._task([("user", "?"), ("assistant", PROBE)])])[0]
        behind = found.text.rpartition(PROBE)[2] if isinstance(found, RenderedText) else ""
        ids = self.tokenizer.encode(behind, with_special=True)
        after = [int(index) for index in ids if int(index) in self._special]
        return tuple(dict.fromkeys([*self.tokenizer.special.end_ids, *after[:1]]))

    def prompt(self, messages: Messages) -> np.ndarray:
        """The tokens that an answer to the conversation so far continues, int32 [T].

        Raises:
          InputError: see :func:`snlp_jax.data.template.render_texts`.
        """
        messages, mark = self._escaped(messages)
        (found,) = render_texts(self.template, [self._task(messages, opens_answer=True, date="")])
        return self._encode(found.text, mark).ids_T

    def learned(self, messages: Messages) -> Rendered:
        """A conversation to learn from. What is said after the last answer is left out: nothing answers it.

        Raises:
          InputError: see :func:`snlp_jax.data.template.render_texts`; or an answer cannot be found in what the template
            writes, or has no end there.
        """
        last = max(index for index, (role, _) in enumerate(messages) if role == "assistant")
        messages, mark = self._escaped(messages[: last + 1])
        answers = [index for index, (role, _) in enumerate(messages) if role == "assistant"]
        tasks = [self._task(messages[:index], opens_answer=True) for index in answers]
        whole, closed, *opened = try_texts(
            self.template, [self._task(messages), self._task(messages[: answers[0]]), *tasks]
        )
        if isinstance(whole, InputError):
            raise whole
        encoded = self._encode(whole.text, mark)
        position = lambda index: index - whole.text.count(mark, 0, index)  # noqa: E731
        if whole.spans:
            starts = [position(start) for start, _ in whole.spans]
            stops = [position(end) + 1 for _, end in whole.spans]  # what ends the turn may stand behind the block
        else:
            prompts = ["" if isinstance(each, InputError) else each.text for each in opened]
            is_opened = isinstance(closed, InputError) or closed.text != prompts[0]
            found = self._starts(messages, whole.text, prompts, mark, is_opened=is_opened)
            starts = [position(start) for start in found]
            stops = [*starts[1:], len(whole.text) + 1]
        return self._rendered(encoded, starts, stops)

    def _starts(
        self, messages: Messages, whole: str, prompts: Sequence[str], mark: str, *, is_opened: bool
    ) -> list[int]:
        """Where answers begin in the whole text. ``is_opened``: prompts hold what opens an answer."""
        is_prefix = [prompt != "" and whole.startswith(prompt) for prompt in prompts]
        if is_opened and all(is_prefix):
            return [len(prompt) for prompt in prompts]
        words = self._first_words(messages, whole, mark)
        each = zip(is_prefix, prompts, words, strict=True)
        return [
            len(prompt) if is_opened and goes_on else _opened(whole, word, prompt) for goes_on, prompt, word in each
        ]

    def _first_words(self, messages: Messages, whole: str, mark: str) -> list[int]:
        """Where the first words of answers stand in the whole text, by a sign before each of them."""
        (sign,) = free_characters(1, (mark, self.template, *(content for _, content in messages)))
        parts = [_without_thought(content) for role, content in messages if role == "assistant"]
        signed = iter([before + sign + words for before, words in parts])
        again = [(role, next(signed) if role == "assistant" else content) for role, content in messages]
        (found,) = render_texts(self.template, [self._task(again)])
        starts = np.cumsum([len(text) for text in found.text.split(sign)[:-1]]).tolist()
        is_whole = found.text.replace(sign, "") == whole and len(starts) == len(parts)
        if not is_whole or not all(
            whole.startswith(words.rstrip(), start) for start, (_, words) in zip(starts, parts, strict=True)
        ):
            raise InputError(
                "the chat template writes an answer so that it cannot be found again; give one that puts "
                "{% generation %} and {% endgeneration %} round what the assistant says."
            )
        return starts

    def _rendered(self, encoded: Encoded, starts: Sequence[int], stops: Sequence[int]) -> Rendered:
        """With answers from each of ``starts`` to the first token that ends a turn, which begins before its stop."""
        is_end_T = np.isin(encoded.ids_T, self.end_ids)
        is_response_T = np.zeros(len(encoded.ids_T), bool)
        size = 0
        for start, stop in zip(starts, stops, strict=True):
            is_next_T = is_end_T & (encoded.start_T >= start) & (encoded.start_T < stop)
            if not is_next_T.any():
                raise InputError(
                    "the chat template ends an answer with no token that ends a text of the model, so that nothing "
                    "could teach it to stop; give another template."
                )
            size = int(is_next_T.argmax()) + 1
            is_response_T[:size] |= encoded.end_T[:size] > start
        ids = np.append(encoded.ids_T[:size], self.tokenizer.bos_id)
        return Rendered(ids.astype(np.int32), np.append(is_response_T[:size], False))

    # -- Special tokens ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        return {index: name for name, index in self.tokenizer.special_ids.items()}

    def _task(self, messages: Messages, *, opens_answer: bool = False, date: str = TRAINING_DATE) -> Task:
        special = self.tokenizer.special
        return Task(messages, opens_answer, special.bos_token, special.eos_token, date)

    def _escaped(self, messages: Messages) -> tuple[Messages, str]:
        """What is said, with marks between the characters of special tokens' names, and the mark."""
        (mark,) = free_characters(1, (self.template, *(content for _, content in messages)))
        names = sorted((name for name in self.tokenizer.special_ids if len(name) > 1), key=len, reverse=True)
        if not names:
            return messages, mark
        pattern = re.compile("|".join(map(re.escape, names)))

        def escape(text: str) -> str:
            while pattern.search(text):
                text = pattern.sub(lambda found: mark.join(found[0]), text)
            return text

        return [(role, escape(content)) for role, content in messages], mark

    def _encode(self, text: str, mark: str) -> Encoded:
        """The tokens of a rendered text without its marks. Between two special tokens of the template a text that holds
        marks is encoded by itself, with its special tokens as text."""
        whole = self.tokenizer.encode_spans(text, with_special=True)
        if mark not in text:
            return whole
        spans = zip(*(leaf.tolist() for leaf in whole), strict=True)
        # A token of its own for what a tokenizer does not know has a name too, but not in the text.
        cuts = [
            t
            for t, (index, start, end) in enumerate(spans)
            if index in self._special and self._special[index] in text[start:end]
        ]
        pieces = []
        for first, last in zip([-1, *cuts], [*cuts, len(whole.ids_T)], strict=True):
            start = 0 if first < 0 else int(whole.end_T[first])
            stop = len(text) if last == len(whole.ids_T) else int(whole.start_T[last])
            between = Encoded(*(leaf[first + 1 : last] for leaf in whole))
            if mark in text[start:stop]:
                plain = self._encode_plain(text[start:stop].replace(mark, ""), is_first=first < 0)
                between = Encoded(plain.ids_T, plain.start_T + start, plain.end_T + start)
            pieces.append((between, text.count(mark, 0, start)))
            if last < len(whole.ids_T):
                pieces.append((Encoded(*(leaf[last : last + 1] for leaf in whole)), text.count(mark, 0, stop)))
        ids_T = np.concatenate([piece.ids_T for piece, _ in pieces])
        start_T = np.concatenate([piece.start_T - before for piece, before in pieces])
        return Encoded(ids_T, start_T, np.concatenate([piece.end_T - before for piece, before in pieces]))

    def _encode_plain(self, text: str, *, is_first: bool) -> Encoded:
        """Text that follows on a special token, unless it is the first: some tokenizers put a space before the first
        text alone."""
        head = self.tokenizer.encode("\n")
        encoded = self.tokenizer.encode_spans("\n" + text)
        if is_first or self._begins_anew or not np.array_equal(encoded.ids_T[: len(head)], head):
            return self.tokenizer.encode_spans(text)
        return Encoded(encoded.ids_T[len(head) :], *(leaf[len(head) :] - 1 for leaf in encoded[1:]))

    @functools.cached_property
    def _begins_anew(self) -> bool:
        """Whether a text behind a special token has the tokens that it has by itself."""
        name = next(iter(self.tokenizer.special_ids))
        ids = self.tokenizer.encode(name + PROBE, with_special=True)
        return np.array_equal(ids[1:], self.tokenizer.encode(PROBE))


PROBE = "Yes."
"""An answer, to see what follows it."""
THOUGHT_END = "</think>"
OPENING = 8
"""Characters by which what stands before an answer is known again."""

ChatFormat = PlainFormat | TemplateFormat


def chat_format(tokenizer: Tokenizer, choice: str = "") -> ChatFormat:
    """How conversations are written for a model.

    Args:
      choice: name of one of the model's own templates, or the path of a jinja file; by default the model's own, or
        plain text where it has none.

    Raises:
      InputError: see :func:`snlp_jax.data.template.choose_template`.
    """
    template = choose_template(tokenizer.special.chat_template, choice)
    return TemplateFormat(tokenizer, template) if template else PlainFormat(tokenizer)


def _without_thought(content: str) -> tuple[str, str]:
    """What is said up to the first word that is no thought, and the rest."""
    start = content.rfind(THOUGHT_END) + len(THOUGHT_END) if THOUGHT_END in content else 0
    start += len(content[start:]) - len(content[start:].lstrip())
    return content[:start], content[start:]


def _opened(whole: str, word: int, prompt: str) -> int:
    """The character at which an answer begins whose first word is at ``word``: earlier, if the space before the word is
    not part of what an answer follows."""
    earlier = len(whole[:word].rstrip())
    fits = (start for start in range(earlier, word) if prompt.endswith(whole[max(0, start - OPENING) : start]))
    return next(fits, word)
