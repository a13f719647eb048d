"""The tokenizer in a GGUF file, as the contents of tokenizer.json and of its companions.

Two kinds are known: byte-level BPE with merges ("gpt2"), whose way of cutting a text into words is a name that
llama.cpp knows, and SentencePiece's BPE ("llama"), whose merges follow from the scores of its pieces.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snlp_jax.errors import InputError

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
"""Kinds of entries, beside ordinary ones (1) and bytes (6)."""
REMEDY = "give the model's tokenizer.json with --tokenizer"
SPACE = "▁"

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    """Words by a pattern, their bytes as characters."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(False)]


_GPT2 = [_byte_level(True)]
_DIGITS = [{"type": "Digits", "individual_digits": True}, _byte_level(True)]
_QWEN2 = _split(LLAMA3.replace("{1,3}", ""))
WORDS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _split(LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    "tekken": _split(TEKKEN),
}
"""``tokenizer.ggml.pre`` -> pre-tokenizers."""
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Those whose words are looked up whole before anything is merged, and which begin a text by default."""
NORMALIZED = ("qwen2", "deepseek-r1-qwen")
"""Those that compose characters (NFC)."""


def gguf_tokenizer(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json, from the fields of a GGUF file.

    Raises:
        InputError: names a kind of tokenizer that is not known, or what is missing.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), str(fields.get("tokenizer.ggml.pre", ""))
    tokens, types = _list_of(fields, "tokens", str), _list_of(fields, "token_type", int)
    if kind not in ("gpt2", "llama") or not tokens:
        raise InputError(f"the GGUF file has a tokenizer of the kind {kind!r}; known are gpt2 and llama, so {REMEDY}.")
    types = types or [1] * len(tokens)
    if len(types) != len(tokens):
        raise InputError(f"the GGUF file has {len(types)} types of {len(tokens)} tokens; download it again.")
    # Rows of the model that no token has are called [PAD7] in a GGUF file.
    used = [i for i, token in enumerate(tokens) if types[i] != UNUSED or not re.fullmatch(r"\[PAD\d+\]", token)]
    names = {i: tokens[i] for i in used}
    if kind == "llama":  # spaces in what users defined are spaces there, and SPACE in a tokenizer.json
        names |= {i: tokens[i].replace(" ", SPACE) for i in used if types[i] == USER_DEFINED}
    made = _sentencepiece(names, types, fields) if kind == "llama" else _byte_bpe(names, pre, fields)
    special = (CONTROL, UNKNOWN) if kind == "llama" else (CONTROL,)
    added = [
        _added(i, names[i], types[i] in special)
        for i in used
        if types[i] in special or (types[i] == USER_DEFINED and " " not in tokens[i])
    ]
    made["model"]["vocab"] = {name: i for i, name in names.items()}
    processor = _begin(names, fields) if adds_bos(fields) else None
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return whole | made | {"post_processor": processor}


def gguf_tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer_config.json."""
    tokens = _list_of(fields, "tokens", str)
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _id_of(fields, key, len(tokens)) for name, key in keys.items()}
    config: dict[str, Any] = {name: tokens[index] for name, index in ids.items() if index is not None}
    return config | {"add_bos_token": adds_bos(fields), "tokenizer_class": "PreTrainedTokenizerFast"}


def gguf_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Ids for a config.json and a generation_config.json: what begins a text, and what ends one, a turn or a message
    (eos, eot, eom)."""
    count = len(_list_of(fields, "tokens", str))
    ends = [_id_of(fields, key, count) for key in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(index for index in ends if index is not None))
    ids: dict[str, Any] = {
        "bos_token_id": _id_of(fields, "bos", count),
        "pad_token_id": _id_of(fields, "padding", count),
    }
    ids["eos_token_id"] = distinct if len(distinct) > 1 else next(iter(distinct), None)
    return {name: value for name, value in ids.items() if value is not None}


def adds_bos(fields: Mapping[str, Any]) -> bool:
    """Whether a text begins with a token, by the file or as llama.cpp does without a word on it."""
    given = fields.get("tokenizer.ggml.add_bos_token")
    usual = fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") in WHOLE_WORDS_FIRST
    return usual if given is None else bool(given)


def _byte_bpe(names: Mapping[int, str], pre: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    if pre not in WORDS:
        raise InputError(
            f"the GGUF file cuts texts into words as {pre or 'no name'!r} does; known are {', '.join(WORDS)}, "
            f"so {REMEDY}."
        )
    merges = [_pair(merge) for merge in _list_of(fields, "merges", str)]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    return {
        "normalizer": {"type": "NFC"} if pre in NORMALIZED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(WORDS[pre])},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model | {"ignore_merges": pre in WHOLE_WORDS_FIRST, "merges": merges},
    }


def _pair(merge: str) -> list[str]:
    space = merge.find(" ", 1)
    return [merge[:space], merge[space + 1 :]]


def _sentencepiece(names: Mapping[int, str], types: Sequence[int], fields: Mapping[str, Any]) -> dict[str, Any]:
    scores = _list_of(fields, "scores", float)
    if not scores or len(scores) != len(types):
        raise InputError(f"the GGUF file has no scores for its {len(types)} tokens; {REMEDY}.")
    if fields.get("tokenizer.ggml.remove_extra_whitespaces") or fields.get("tokenizer.ggml.precompiled_charsmap"):
        raise InputError(f"the GGUF file changes characters of a text before it is cut, which is not known; {REMEDY}.")
    best = max(scores) + 1
    ranks = {name: best if types[i] == USER_DEFINED else scores[i] for i, name in names.items()}
    unknown = _id_of(fields, "unknown", len(types))
    adds_space = fields.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prepend = {"type": "Prepend", "prepend": SPACE}
    spaced = {"type": "Sequence", "normalizers": [prepend, replace]}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    model = {"type": "BPE", "dropout": None, "unk_token": None if unknown is None else names.get(unknown)}
    return {
        "normalizer": spaced if adds_space else replace,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model | {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "merges": _merges(ranks)},
    }


def _merges(scores: Mapping[str, float]) -> list[list[str]]:
    """Every way to make a piece of two others: pieces of the highest score first, each with its longest left part
    first."""
    best_first = sorted(scores, key=lambda piece: -scores[piece])
    return [
        [piece[:cut], piece[cut:]]
        for piece in best_first
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _begin(names: Mapping[int, str], fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The post-processor that puts a token before a text."""
    index = _id_of(fields, "bos", len(_list_of(fields, "tokens", str)))
    if index is None or index not in names:
        return None
    token = {"SpecialToken": {"id": names[index], "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB")]
    special = {names[index]: {"id": names[index], "ids": [index], "tokens": [names[index]]}}
    single = [token, texts[0]]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, texts[1]], "special_tokens": special}


def _id_of(fields: Mapping[str, Any], name: str, count: int) -> int | None:
    index = fields.get(f"tokenizer.ggml.{name}_token_id")
    return index if isinstance(index, int) and 0 <= index < count else None


def _list_of(fields: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """A field that is a list; [] where there is none. Raises InputError."""
    value = fields.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        raise InputError(f"the GGUF file's field 'tokenizer.ggml.{name}' is no list of {kind.__name__}; {REMEDY}.")
    return value


def _added(index: int, name: str, is_special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": name, **flags, "special": is_special}


def gguf_templates(path: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, the usual one being "default".

    Raises:
        InputError: one is no text.
    """
    field = "tokenizer.chat_template"
    found = {key: value for key, value in fields.items() if key == field or key.startswith(f"{field}.")}
    for key, value in found.items():
        if not isinstance(value, str):
            raise InputError(f"{str(path)!r}: the field {key!r} is no text; download it again.")
    return {key[len(field) + 1 :] or "default": value for key, value in found.items() if value}
