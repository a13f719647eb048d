"""Other people's chat templates: what transformers writes, and what strangers' programs may not do."""

import json
import time
from pathlib import Path

import pytest

from snlp_jax.data import template
from snlp_jax.data.template import RenderedText, Task, choose_template, named_templates, render_texts
from snlp_jax.errors import InputError

GOLDEN = json.loads((Path(__file__).parent / "data" / "chat_templates.json").read_text(encoding="utf-8"))
"""Made by tests/data/make_chat_templates.py with transformers 5.24."""
TALK = [("user", "Hi"), ("assistant", "Ho")]


def rendered(text: str, messages=TALK, **settings) -> RenderedText:
    return render_texts(text, [Task(messages, **settings)])[0]


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_templates_write_what_transformers_writes(name: str) -> None:
    for key, expected in GOLDEN["texts"].items():
        which, conversation, opens_answer = key.split("/")
        if which != name:
            continue
        messages = [tuple(pair) for pair in GOLDEN["conversations"][conversation]]
        task = Task(messages, opens_answer == "1", bos_token="<s>", eos_token="</s>")
        if expected is None:
            with pytest.raises(InputError, match="the chat template (refuses|fails)"):
                render_texts(GOLDEN["templates"][name], [task])
        else:
            assert render_texts(GOLDEN["templates"][name], [task])[0].text == expected, key


def test_generation_blocks_say_where_answers_stand() -> None:
    talk = [*TALK, ("user", "\ufdd0"), ("assistant", "\ufdd1")]
    text, spans = rendered(GOLDEN["templates"]["generation"], talk).text, None
    found = rendered(GOLDEN["templates"]["generation"], talk)
    spans = [text[start:end] for start, end in found.spans]
    assert spans == ["Ho<|im_end|>", "\ufdd1<|im_end|>"]
    assert rendered("{{ messages | length }}").spans == ()


def test_the_date_can_be_chosen() -> None:
    text = "{{ strftime_now('%d %b %Y') }}"
    assert rendered(text, date="2024-07-26").text == "26 Jul 2024"
    assert rendered(text).text == time.strftime("%d %b %Y")


HOSTILE = {
    "{{ ().__class__ }}": "reaches for what it may not (attribute '__class__' of a tuple); mend it",
    "{{ 'x' | attr('__class__') }}": "reaches for",
    "{{ messages | map(attribute='__class__') | list }}": "reaches for",
    "{{ '{0.__class__}'.format(1) }}": "reaches for",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "reaches for",
    "{{ messages.append(1) }}": "reaches for",
    "{{ raise_exception('roles\nmust alternate.') }}": "refuses the conversation (roles must alternate); change it",
    "{% if %}": "has a mistake in line 1",
    "{{ messages[9].content }}": "fails with UndefinedError",
    "{% include '/etc/passwd' %}": "fails with TypeError",
    "{% for i in range(10**6) %}{% endfor %}": "fails with OverflowError",
    "{{ 'a' * 10**9 }}": "takes more than 512 MB",
    "{{ 'a' * 10**7 }}{{ 'a' * 10**7 }}": "writes more than 16,777,216 characters",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without an end",
}


def test_templates_of_strangers_are_refused_in_a_sentence() -> None:
    for text, sentence in HOSTILE.items():
        with pytest.raises(InputError) as refused:
            rendered(text)
        message = str(refused.value)
        assert message.startswith("the chat template ") and sentence in message and "\n" not in message, text
    assert rendered("{{ messages[1].content }}").text == "Ho"  # the next one is none the worse


@pytest.mark.parametrize(
    "text",
    (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" * 9,
        "{{ 10 ** (10 ** (9 + messages | length)) }}",  # one operation, which no signal would interrupt
    ),
)
def test_time_is_limited(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered("x")
    monkeypatch.setattr(template, "SECONDS", 0.5)
    began = time.perf_counter()
    with pytest.raises(InputError, match="takes longer than 0.5 seconds|takes more than 512 MB"):
        rendered(text)
    assert time.perf_counter() - began < 5
    monkeypatch.undo()
    assert rendered("{{ messages[0].role }}").text == "user"


def test_templates_by_name_and_from_files(tmp_path: Path) -> None:
    several = json.dumps([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}])
    assert named_templates(several) == {"default": "a", "tool_use": "b"} and named_templates("[{") == {"default": "[{"}
    assert choose_template(several) == "a" and choose_template(several, "tool_use") == "b"
    assert choose_template("") == "" and choose_template("x", "default") == "x"
    (tmp_path / "mine.jinja").write_text("m")
    assert choose_template(several, str(tmp_path / "mine.jinja")) == "m"
    with pytest.raises(InputError, match=r"'rag' is no file and not the model's own \(default, tool_use\)"):
        choose_template(several, "rag")
    with pytest.raises(InputError, match="the model has the chat templates tool_use; choose one"):
        choose_template('[{"name": "tool_use", "template": "b"}]')
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot be read"):
        choose_template("", str(tmp_path / "bad"))
