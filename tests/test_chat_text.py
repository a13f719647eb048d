"""Conversations as texts: what lm_eval is handed for a chat template."""

import pytest
import tokenizers

from snlp_jax.data.tokenizer import ByteTokenizer, FileTokenizer, SpecialTokens, train_bpe
from snlp_jax.errors import InputError
from snlp_jax.eval.chat_text import chat_text

TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So. "}, {"role": "user", "content": "?"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> FileTokenizer:
    backend = tokenizers.Tokenizer.from_str(train_bpe(["a layer"], 270).to_json())
    backend.add_special_tokens(["<s>", "</s>"])
    end = backend.get_vocab(with_added_tokens=True)["</s>"]
    return FileTokenizer(backend, SpecialTokens(end, (), (end,), bos_token="<s>", eos_token="</s>"))


def test_a_models_template(tokenizer: FileTokenizer) -> None:
    text = chat_text(tokenizer, TEMPLATE, TALK, opens_answer=True)
    assert text == "<s>[user]Why?</s>[assistant]So. </s>[user]?</s>[assistant]"
    assert chat_text(tokenizer, TEMPLATE, TALK[:2], opens_answer=False) == "<s>[user]Why?</s>[assistant]So. "
    trimming = TEMPLATE.replace("m.content", "m.content|trim")
    assert chat_text(tokenizer, trimming, TALK[:2], opens_answer=False) == "<s>[user]Why?</s>[assistant]So."
    with pytest.raises(InputError, match="does not write the answer's beginning"):
        chat_text(tokenizer, "{{ bos_token }}", TALK[:2], opens_answer=False)


def test_plain_text_is_what_a_tune_has_learned(tokenizer: FileTokenizer) -> None:
    text = chat_text(tokenizer, "", TALK, opens_answer=True)
    assert text == "</s>User: Why?\nAssistant: So. </s>User: ?\nAssistant:"
    assert chat_text(tokenizer, "", TALK[:2], opens_answer=False) == "</s>User: Why?\nAssistant: So. "
    assert chat_text(ByteTokenizer(), "", TALK[:1], opens_answer=True) == "User: Why?\nAssistant:"
    with pytest.raises(InputError, match="no text for the end of an answer"):
        chat_text(ByteTokenizer(), "", TALK, opens_answer=True)
