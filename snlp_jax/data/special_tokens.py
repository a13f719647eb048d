"""What stands before and after a text, by the files of a pretrained model: nothing is guessed that a file says, and
nothing is added to somebody's vocabulary."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from snlp_jax.data.tokenizer import BOS_NAMES, SpecialTokens
from snlp_jax.errors import InputError

TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end|>",
)
"""Tokens that end a turn of a conversation. They also end what the model says where its chat template names them."""
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")  # noqa: RUF001
"""Tokens that stand between documents, looked for where the files name none but ends of a turn."""


def read_special_tokens(
    tokenizer_json: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    chat_template: str = "",
) -> SpecialTokens:
    """The special tokens of a model, from the contents of the files that have these names; {} for one that is missing.

    Before a text stands what the tokenizer's post-processor puts there, which may be nothing; transformers 5 reads no
    more than that. A tokenizer without one gets ``bos_token`` of its config, else the token of the model's
    ``bos_token_id``, if ``add_bos_token`` says so. What is put behind a text is left out, since a prompt goes on.

    A text ends at ``eos_token_id`` of the generation config, else of the model's config, and at the tokenizer's
    ``eos_token``. Where those ids are several they are taken at their word. Where there is one or none, tokens of
    ``TURN_ENDS`` that the chat template names end a text too: many chat models name only the end of a document.

    Documents are separated by the token before a text, else by the end of a text that ends no turn, else by
    ``bos_token``. The separator ends a text as well, since it follows every text that the model is tuned on here.

    Ids that no token has, and names that no token has, are passed over: configs often carry those of another model.

    Args:
      chat_template: of a file of its own; without it, that of the tokenizer's config, or all of several by their names.

    Raises:
      InputError: a field has the wrong type, or no file names a token that could separate documents.
    """
    vocabulary = _vocabulary_of(tokenizer_json)
    template = chat_template or _template_of(tokenizer_config)
    bos = vocabulary.find(
        [_name_of(tokenizer_config, "bos_token"), *_ids_of(model_config, "bos_token_id", "config.json")]
    )
    adds_bos = tokenizer_config.get("add_bos_token")
    if not isinstance(adds_bos, bool | None):
        raise InputError(f"tokenizer_config.json: add_bos_token is {adds_bos!r}; give true, false or null.")
    processor = tokenizer_json.get("post_processor")
    prefix = vocabulary.find(_prefix_of(processor)) if processor else bos[: bool(adds_bos)]

    given = _ids_of(generation_config, "eos_token_id", "generation_config.json")
    given = given or _ids_of(model_config, "eos_token_id", "config.json")
    ends = vocabulary.find([*given, _name_of(tokenizer_config, "eos_token")])
    if len(given) < 2:
        ends = vocabulary.find(
            [*ends, *(name for name in TURN_ENDS if name in template and name in vocabulary.special)]
        )
    separator = _separator_of(vocabulary, prefix, ends, bos)
    return SpecialTokens(
        separator_id=separator,
        prefix_ids=tuple(prefix),
        end_ids=tuple(dict.fromkeys([*ends, separator])),
        opens_windows=bool(prefix),
        chat_template=template,
        bos_token=_name_of(tokenizer_config, "bos_token") or "",
        eos_token=_name_of(tokenizer_config, "eos_token") or "",
    )


class _Vocabulary(NamedTuple):
    ids: dict[str, int]
    known: frozenset[int]
    """All ids."""
    special: frozenset[str]
    """Names that text is never read as, unless it is asked for."""

    def find(self, tokens: Iterable[str | int | None]) -> list[int]:
        """Ids of names and ids, each once and in order; without those that no token has."""
        found = (self.ids.get(token) if isinstance(token, str) else token for token in tokens)
        return list(dict.fromkeys(token for token in found if token in self.known))


def _separator_of(vocabulary: _Vocabulary, prefix: list[int], ends: list[int], bos: list[int]) -> int:
    """What stands before a text, else an end that ends no turn, else what by its name ends or begins a text."""
    turn_ends = vocabulary.find(TURN_ENDS)
    candidates = [
        *prefix[:1],
        *(end for end in ends if end not in turn_ends),
        *vocabulary.find(name for name in TEXT_ENDS if name in vocabulary.special),
        *(*ends, *bos),
        *vocabulary.find(name for name in BOS_NAMES if name in vocabulary.special),
    ]
    if not candidates:
        raise InputError(
            "no file of the model names a token that begins or ends a text; set bos_token_id or eos_token_id in its "
            "config.json."
        )
    return candidates[0]


def _vocabulary_of(tokenizer_json: Mapping[str, Any]) -> _Vocabulary:
    try:
        entries = tokenizer_json["model"]["vocab"]
        if not isinstance(entries, Mapping):
            entries = {name: index for index, (name, _) in enumerate(entries)}  # of a Unigram: names and scores
        added = tokenizer_json.get("added_tokens") or []
        ids = {**entries, **{token["content"]: token["id"] for token in added}}
        special = frozenset(token["content"] for token in added if token["special"])
        return _Vocabulary(ids, frozenset(ids.values()), special)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"tokenizer.json holds no vocabulary in model.vocab and added_tokens ({type(error).__name__}: {error}); "
            "give a Hugging Face tokenizer.json."
        ) from error


def _prefix_of(processor: Any) -> list[int]:
    """Ids that a post-processor puts before a text."""
    kind = processor.get("type") if isinstance(processor, Mapping) else None
    try:
        if kind == "Sequence":
            parts = [_prefix_of(part) for part in processor["processors"]]
            return [token for part in reversed(parts) for token in part]  # a later one stands further out
        if kind in ("BertProcessing", "RobertaProcessing"):
            return [int(processor["cls"][1])]
        if kind != "TemplateProcessing":
            return []
        prefix: list[int] = []
        for piece in processor["single"]:
            if "SpecialToken" not in piece:
                break
            prefix += map(int, processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
        return prefix
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"tokenizer.json: post_processor of type {kind} is not as the tokenizers library writes it "
            f"({type(error).__name__}: {error}); save it again with that library."
        ) from error


def _name_of(tokenizer_config: Mapping[str, Any], field: str) -> str | None:
    """A token's name, written as a text or as an object with its content."""
    value = tokenizer_config.get(field)
    name = value.get("content") if isinstance(value, Mapping) else value
    if isinstance(name, str) or value is None:
        return name
    raise InputError(f"tokenizer_config.json: {field} is {value!r}; give a text, an object with content, or null.")


def _ids_of(config: Mapping[str, Any], field: str, file: str) -> list[int]:
    value = config.get(field)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if all(isinstance(token, int) and not isinstance(token, bool) for token in values):
        return values
    raise InputError(f"{file}: {field} is {value!r}; give a whole number, a list of them, or null.")


def _template_of(tokenizer_config: Mapping[str, Any]) -> str:
    value = tokenizer_config.get("chat_template")
    if isinstance(value, list):
        try:
            named = [{"name": each["name"], "template": each["template"]} for each in value]
            value = json.dumps(named, ensure_ascii=False) if named else ""
        except (KeyError, TypeError) as error:
            raise InputError(
                "tokenizer_config.json: chat_template is a list whose items are not all objects of name and template; "
                "mend it, or give a text."
            ) from error
    if isinstance(value, str | None):
        return value or ""
    raise InputError(f"tokenizer_config.json: chat_template is a {type(value).__name__}; give a text or a list.")
