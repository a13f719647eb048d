"""Conversations as texts, for evaluation that hands over texts and has the model's chat template applied first."""

from collections.abc import Sequence
from typing import Any

from snlp_jax.data.template import Task, render_texts
from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.data.turns import ROLES
from snlp_jax.errors import InputError


def chat_text(tokenizer: Tokenizer, template: str, messages: Sequence[dict[str, Any]], *, opens_answer: bool) -> str:
    """A conversation so far, with names of special tokens in it, which are to be read as these tokens.

    Args:
      template: the model's own, or "" for the plain-text one of :mod:`snlp_jax.data.turns`.
      messages: ``{"role", "content"}``, both texts.
      opens_answer: end with what an answer follows; else the last message is the beginning of an answer, and nothing
        stands behind it.

    Raises:
      InputError: the template refuses the conversation.
    """
    pairs = [(message["role"], message["content"]) for message in messages]
    if not template:
        return _plain_text(tokenizer, pairs, opens_answer=opens_answer)
    special = tokenizer.special
    (found,) = render_texts(template, [Task(pairs, opens_answer, special.bos_token, special.eos_token)])
    if opens_answer:
        return found.text
    words = pairs[-1][1].strip()
    begin = found.text.rfind(words)
    if begin < 0:
        raise InputError("the chat template does not write the answer's beginning as it is; give another template.")
    text = found.text[: begin + len(words)]
    spaces = pairs[-1][1][len(pairs[-1][1].rstrip()) :]
    return text + spaces if found.text.startswith(text + spaces) else text


def _plain_text(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, opens_answer: bool) -> str:
    separator_id = tokenizer.special.separator_id
    separator = next((name for name, index in tokenizer.special_ids.items() if index == separator_id), "")
    text = separator
    for number, (role, content) in enumerate(pairs):
        is_last = number == len(pairs) - 1
        if role != "assistant":
            text += f"{ROLES[role]}{content}\n"
        elif is_last and not opens_answer:
            return f"{text}{ROLES[role]} {content}"
        elif not separator:
            raise InputError(
                f"a tokenizer without special tokens ({tokenizer.name}) has no text for the end of an answer, which "
                "examples in turns need; give no examples, or no chat template."
            )
        else:
            text += f"{ROLES[role]} {content}{separator}"
    return text + ROLES["assistant"]
