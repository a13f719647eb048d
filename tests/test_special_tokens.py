"""What stands before and after a text, by the files of a pretrained model."""

from typing import Any

import pytest

from snlp_jax.data.special_tokens import read_special_tokens
from snlp_jax.data.template import choose_template
from snlp_jax.data.tokenizer import SpecialTokens
from snlp_jax.errors import InputError

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|bos|>", "<｜begin▁of▁sentence｜>")  # noqa: RUF001
PAD, S, END, IM_START, IM_END, END_OF_TEXT, BOS, BEGIN = range(2, 10)
CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def template_of(*names: str) -> dict:
    """A post-processor that puts these before a text, and the end behind it."""
    special = {name: {"id": name, "ids": [2 + SPECIAL.index(name)], "tokens": [name]} for name in (*names, "</s>")}
    before = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [*before, text, end], "pair": [], "special_tokens": special}


def read(
    config: dict | None = None,
    generation: dict | None = None,
    model: dict | None = None,
    template: str = "",
    bpe: Any = None,
    **json: Any,
) -> SpecialTokens:
    added = [{"id": 2 + i, "content": name, "special": True} for i, name in enumerate(SPECIAL)]
    tokenizer = {"type": "BPE", "vocab": {"a": 0, "b": 1}} if bpe is None else bpe
    tokenizer_json = {"model": tokenizer, "added_tokens": added} | json
    return read_special_tokens(tokenizer_json, config or {}, generation or {}, model or {}, template)


BYTE_LEVEL = {"type": "ByteLevel"}


@pytest.mark.parametrize(
    "config, model, processor, prefix",
    (
        # add_bos_token decides where the tokenizer itself does nothing,
        ({"bos_token": "<s>", "add_bos_token": True}, {}, None, (S,)),
        ({"bos_token": "<s>", "add_bos_token": False}, {}, None, ()),
        ({"bos_token": "<s>", "add_bos_token": None}, {}, None, ()),
        ({"bos_token": {"content": "<｜begin▁of▁sentence｜>"}, "add_bos_token": True}, {}, None, (BEGIN,)),  # noqa: RUF001
        ({"bos_token": "<｜begin▁of▁sentence｜>", "add_bos_token": True}, {"bos_token_id": S}, None, (BEGIN,)),  # noqa: RUF001
        ({"add_bos_token": True}, {"bos_token_id": S}, None, (S,)),
        ({"bos_token": None, "add_bos_token": True}, {"bos_token_id": None}, None, ()),
        ({"bos_token": "<nobody>", "add_bos_token": True}, {"bos_token_id": 99}, None, ()),
        # else what it does, as in transformers 5.24, whatever the flag says.
        ({"bos_token": "<s>", "add_bos_token": False}, {}, template_of("<s>"), (S,)),
        ({"bos_token": "<s>", "add_bos_token": True}, {}, template_of("<|im_start|>", "<s>"), (IM_START, S)),
        ({"bos_token": "<s>", "add_bos_token": True}, {}, BYTE_LEVEL, ()),
        ({"bos_token": "<s>"}, {"bos_token_id": S}, None, ()),
        ({"bos_token": "<s>"}, {}, BYTE_LEVEL, ()),
        ({}, {}, template_of("<|im_start|>", "<s>"), (IM_START, S)),
        ({}, {}, {"type": "Sequence", "processors": [BYTE_LEVEL, template_of("<|bos|>")]}, (BOS,)),
        ({}, {}, {"type": "RobertaProcessing", "sep": ["</s>", END], "cls": ["<s>", S]}, (S,)),
        ({}, {}, {"type": "BertProcessing", "sep": ["</s>", END], "cls": ["<nobody>", 99]}, ()),
    ),
)
def test_what_stands_before_a_text(config: dict, model: dict, processor: dict | None, prefix: tuple) -> None:
    found = read(config | {"eos_token": "</s>"}, model=model, post_processor=processor)
    assert found.prefix_ids == prefix
    assert found.opens_windows == bool(prefix)
    assert found.separator_id == (prefix[0] if prefix else END)
    assert found.end_ids == (END, *prefix[:1])


@pytest.mark.parametrize(
    "config, generation, model, template, ends, separator",
    (
        # the generation config goes before the model's, and the tokenizer's own end is always one,
        ({"eos_token": "</s>"}, {"eos_token_id": PAD}, {"eos_token_id": S}, "", (PAD, END), PAD),
        ({"eos_token": "</s>"}, {}, {"eos_token_id": [S, END]}, "", (S, END), S),
        ({"eos_token": {"content": "</s>"}}, {"eos_token_id": None}, {}, "", (END,), END),
        # ids of another vocabulary are passed over,
        ({"eos_token": "</s>"}, {"eos_token_id": [-1, 5000]}, {}, "", (END,), END),
        ({"eos_token": "<nobody>"}, {}, {"eos_token_id": END}, "", (END,), END),
        # a chat model that names one end of text also ends where its template ends a turn,
        ({"eos_token": "<|endoftext|>"}, {}, {}, CHATML, (END_OF_TEXT, IM_END), END_OF_TEXT),
        ({"eos_token": "<|endoftext|>", "chat_template": CHATML}, {}, {}, "", (END_OF_TEXT, IM_END), END_OF_TEXT),
        (
            {"eos_token": "<|endoftext|>"},
            {"eos_token_id": [END_OF_TEXT, END]},
            {},
            CHATML,
            (END_OF_TEXT, END),
            END_OF_TEXT,
        ),
        # and the end of a turn does not separate documents where there is another.
        ({"eos_token": "<|im_end|>"}, {"eos_token_id": IM_END}, {}, CHATML, (IM_END, END_OF_TEXT), END_OF_TEXT),
        ({"bos_token": "<|bos|>"}, {}, {}, "", (END_OF_TEXT,), END_OF_TEXT),
    ),
)
def test_what_ends_a_text(
    config: dict, generation: dict, model: dict, template: str, ends: tuple, separator: int
) -> None:
    found = read(config, generation, model, template)
    assert (found.end_ids, found.separator_id, found.prefix_ids) == (ends, separator, ())


def test_a_vocabulary_of_scores() -> None:
    unigram = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["<bos>", 0.0], ["a", -1.0]]}
    found = read({"bos_token": "<bos>", "add_bos_token": True}, model={"eos_token_id": 7}, bpe=unigram, added_tokens=[])
    assert found == SpecialTokens(1, (1,), (1,), opens_windows=True, bos_token="<bos>")


@pytest.mark.parametrize("given", ("", "from a file"))
def test_chat_templates(given: str) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for value, expected in ((None, ""), ("plain", "plain"), (several, "plain"), ([], "")):
        found = read({"eos_token": "</s>", "chat_template": value}, template=given)
        assert choose_template(found.chat_template) == (given or expected)
        assert (found.bos_token, found.eos_token) == ("", "</s>")
    assert (
        given
        or choose_template(read({"eos_token": "</s>", "chat_template": several}).chat_template, "tool_use") == "tools"
    )


@pytest.mark.parametrize(
    "fields, sentence",
    (
        (
            {"config": {"add_bos_token": "yes"}},
            "tokenizer_config.json: add_bos_token is 'yes'; give true, false or null",
        ),
        ({"config": {"bos_token": 3}}, "tokenizer_config.json: bos_token is 3; give a text"),
        (
            {"config": {"eos_token": {"text": "</s>"}}},
            "eos_token is {'text': '</s>'}; give a text, an object with content",
        ),
        ({"config": {"chat_template": {"default": "x"}}}, "chat_template is a dict; give a text or a list"),
        ({"config": {"chat_template": ["x"]}}, "chat_template is a list whose items are not all objects"),
        ({"generation": {"eos_token_id": "2"}}, "generation_config.json: eos_token_id is '2'; give a whole number"),
        ({"generation": {"eos_token_id": [2, None]}}, "generation_config.json: eos_token_id is .2, None."),
        ({"model": {"bos_token_id": 2.0}}, "config.json: bos_token_id is 2.0; give a whole number"),
        ({"model": {"eos_token_id": True}}, "config.json: eos_token_id is True"),
        ({"bpe": {}}, "tokenizer.json holds no vocabulary"),
        ({"added_tokens": [{"content": "x"}]}, "tokenizer.json holds no vocabulary"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "post_processor of type TemplateProcessing is not"),
        ({"added_tokens": []}, "no file of the model names a token .* set bos_token_id or eos_token_id"),
    ),
)
def test_wrong_types_are_named(fields: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read(**fields)
