"""Turns over one cache: answers are those of the whole conversation, whatever the template writes again."""

import dataclasses
import signal
from types import SimpleNamespace

import pytest
from decoding import SIMPLE
from problems import random_params
from test_turns import TEMPLATES, tokenizer_of

from snlp_jax.cli.chat import talk
from snlp_jax.data.turns import chat_format
from snlp_jax.errors import InputError
from snlp_jax.infer import Engine, Request
from snlp_jax.infer.conversation import Conversation
from snlp_jax.infer.prefix import PrefixCache
from snlp_jax.model import LanguageModel

LAST_TWO = """{% for message in messages[-2:] %}{{ '<|im_start|>' + message.role + message.content + '<|im_end|>' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"""
"""Not even the beginning stays as it was."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    config = dataclasses.replace(SIMPLE, seq_len=32, rotary_multiple=8, vocab_size=tokenizer.vocab_size)
    model = LanguageModel(config)
    return Engine(model, random_params(model), tokenizer=tokenizer)


def fresh(engine: Engine, form, messages, new: int) -> list[int]:
    request = Request(form.prompt(messages).tolist(), new, stop_tokens=form.end_ids)
    (done,) = engine.generate([request], kept=PrefixCache())  # the programs of the conversation, with nothing kept
    return done.tokens


def test_answers_are_those_of_the_whole_conversation(engine: Engine) -> None:
    form = chat_format(engine.tokenizer)
    conversation, pieces = Conversation(engine, form, "Be short.", Request((), 12)), []
    for number, text in enumerate(("1+1?", "And <|im_end|> 2+2?")):
        messages = [*conversation.messages, ("user", text)]
        done = conversation.say(text, pieces.append)
        assert done.tokens == fresh(engine, form, messages, 12)
        assert conversation.messages == [*messages, ("assistant", done.text)]
        assert "".join(pieces) == done.text and not conversation.is_full(done)
        assert conversation.num_reused >= 20 * number
        pieces.clear()


def test_an_answer_that_is_ended_stays_as_far_as_it_came_and_an_error_changes_nothing(engine: Engine) -> None:
    conversation = Conversation(engine, chat_format(engine.tokenizer), "Be short.", Request((), 200))
    done = conversation.say("1+1?", lambda _: True)
    assert 0 < len(done.tokens) < 30 and conversation.messages[-1] == ("assistant", done.text)
    before = list(conversation.messages)
    with pytest.raises(InputError, match="tokens and the model's context ends at 256; say less, or begin a new one"):
        conversation.say("x" * 300)
    assert conversation.messages == before


@pytest.mark.slow
def test_a_template_that_writes_all_anew_is_read_anew(engine: Engine) -> None:
    tokenizer = tokenizer_of(LAST_TWO)
    form = chat_format(tokenizer)
    conversation = Conversation(engine, form, like=Request((), 12))
    for text in ("1+1?", "And 2+2?", "Yes"):
        messages = [*conversation.messages, ("user", text)]
        assert conversation.say(text).tokens == fresh(engine, form, messages, 12)


def test_a_space_that_the_template_writes_is_not_written_twice_and_a_full_context_is_known() -> None:
    """Of an answer in plain text, which begins with a space."""

    class Parrot:
        model = SimpleNamespace(config=SimpleNamespace(max_context=60))

        def generate(self, requests, listen, kept):
            (request,) = requests
            tokens = (tokenizer.encode(" yes").tolist() * 60)[: request.max_new_tokens]
            finish = "length" if len(tokens) == request.max_new_tokens else "stop"
            return [SimpleNamespace(text=tokenizer.decode(tokens), tokens=tokens, finish=finish)]

    tokenizer = tokenizer_of()
    yes = len(tokenizer.encode(" yes"))
    conversation = Conversation(Parrot(), chat_format(tokenizer), like=Request((), yes))
    conversation.say("a")
    assert conversation.messages[-1] == ("assistant", "yes")
    chatml = Conversation(Parrot(), chat_format(tokenizer_of(TEMPLATES["chatml"])), like=Request((), yes))
    chatml.say("a")
    assert chatml.messages[-1] == ("assistant", " yes")
    filling = Conversation(Parrot(), chat_format(tokenizer), like=Request((), 99))
    assert not conversation.is_full(conversation.say("b")) and filling.is_full(filling.say("b"))


def test_talking_goes_on_after_ctrl_c_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    ended = []

    class Fake:
        num_reused = num_prompt = 3

        def say(self, text, on_text):
            if text == "full":
                raise InputError("the context is full.")
            signal.raise_signal(signal.SIGINT)
            ended.append(on_text(f"<{text}>"))
            if text == "twice":
                signal.raise_signal(signal.SIGINT)

        def is_full(self, done):
            return ended == [True, True, True]

    handler = signal.getsignal(signal.SIGINT)
    talk(Fake(), ["once", "full", "twice", "last"], lambda: "[3 tokens]")
    out, err = capsys.readouterr()
    assert ended == [True, True, True] and signal.getsignal(signal.SIGINT) is handler
    assert out == "once\n<once>\nfull\ntwice\n<twice>last\n<last>\n"
    assert err.splitlines() == [
        "[3 tokens, 3 of 3 tokens before it kept]",
        "error: the context is full.",
        "",
        "note: the line was taken back.",
        "note: the model's context is full, which cut the answer.",
        "[3 tokens, 3 of 3 tokens before it kept]",
    ]
