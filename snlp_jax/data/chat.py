"""Conversations to windows: weights on the responses alone, packing. How they are written: snlp_jax/data/turns.py.

A record of a file (``snlp_jax/data/formats.py``) is ``{"messages": [{"role", "content"}, ...]}``, or one question and
answer in the fields that ``data.prompt_field``, ``data.input_field`` and ``data.response_field`` name.
"""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from snlp_jax.config import DataConfig
from snlp_jax.data.corpus import corpus_files, digest_of, key_of, val_limit
from snlp_jax.data.formats import format_of, parts_of, records_of, valid_text
from snlp_jax.data.pipeline import TokenData
from snlp_jax.data.shards import find_tokenizer, prepare_tokens
from snlp_jax.data.tokenizer import train_bpe
from snlp_jax.data.turns import ROLES, Rendered, chat_format
from snlp_jax.errors import InputError
from snlp_jax.seeds import folded

MAX_TOKENS = 200_000_000
"""Conversations are held in memory, nine bytes a token: two gigabytes."""
OPEN_WINDOWS = 64
"""Windows that packing looks at for a place; more leave a little less room empty, and take longer."""

_logger = logging.getLogger(__name__)

# -- Packing -----------------------------------------------------------------------------------------------------------


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of items by window, so that no window's sizes add up to more than ``capacity``.

    Each item in its turn goes into the first open window with room for it, or opens one; where ``OPEN_WINDOWS`` are
    open, the fullest is closed first. An item of more than ``capacity`` counts as that.
    """
    windows: list[list[int]] = []
    room: dict[int, int] = {}
    for item, size in enumerate(sizes):
        size = min(size, capacity)
        place = next((index for index, left in room.items() if left >= size), None)
        if place is None:
            if len(room) == OPEN_WINDOWS:
                del room[min(room, key=lambda index: room[index])]
            place = len(windows)
            windows.append([])
            room[place] = capacity
        windows[place].append(item)
        room[place] -= size
        if room[place] == 0:
            del room[place]
    return windows


class ChatWindows:
    """Random access to packed windows: item i is ``{'tokens': int32 [T + 1], 'weight': float32 [T]}`` and, where
    documents are masked, ``'document': int32 [T + 1]``.

    A conversation's last token is a separator, in whose place the next one begins: one of n tokens has n - 1 targets,
    and the targets of a window are those of its conversations. A weight is 1 where the target is part of a response and
    0 elsewhere, in the padding of separators too. One longer than a window is cut at its end.
    """

    def __init__(self, split: Sequence[Rendered], seq_len: int, *, bos_id: int, seed: int, with_document: bool) -> None:
        self._split, self._seq_len, self._bos_id, self._with_document = split, seq_len, bos_id, with_document
        lengths = np.array([len(one.ids_T) for one in split], np.int64)
        usable = np.array([one.is_response_T.argmax() <= seq_len for one in split], bool)
        order = np.random.default_rng(folded(seed)).permutation(len(lengths))
        order = order[usable[order]]
        self._windows = [order[window] for window in pack((lengths[order] - 1).tolist(), seq_len)]
        self.num_dropped = int((~usable).sum())
        self.num_cut = int((lengths - 1 > seq_len).sum()) - self.num_dropped

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = range(len(self))[index]
        tokens = np.full(self._seq_len + 1, self._bos_id, np.int32)
        weight = np.zeros(self._seq_len, np.float32)
        document = np.full(self._seq_len + 1, len(self._windows[index]), np.int32)
        start = 0
        for number, conversation in enumerate(self._windows[index]):
            ids, is_response = self._split[conversation]
            num_targets = min(len(ids) - 1, self._seq_len)
            tokens[start : start + num_targets + 1] = ids[: num_targets + 1]
            weight[start : start + num_targets] = is_response[1 : num_targets + 1]
            document[start : start + num_targets] = number  # the last token's place is that of what comes next
            start += num_targets
        window = {"tokens": tokens, "weight": weight}
        return window | {"document": document} if self._with_document else window


# -- Reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatData(TokenData):
    """A tokenized set of conversations. ``train`` and ``val`` are their tokens one after another, for those who read
    text; :meth:`windows` packs them and says what counts."""

    splits: dict[str, list[Rendered]]
    seed: int

    def all_held_out(self) -> "ChatData":
        """See :meth:`TokenData.all_held_out`."""
        splits: dict[str, list[Rendered]] = {"train": [], "val": self.splits["train"] + self.splits["val"]}
        return replace(self, train=self.train[:0], val=np.concatenate([self.train, self.val]), splits=splits)

    def windows(self, split: Literal["train", "val"], seq_len: int) -> ChatWindows:
        """Pack a split; says how many conversations are too long.

        Raises:
          InputError: no conversation of the split reaches a response within ``seq_len`` tokens.
        """
        conversations, total = self.splits[split], len(self.splits[split])
        bos_id, masks = self.tokenizer.bos_id, self.mask_documents
        windows = ChatWindows(conversations, seq_len, bos_id=bos_id, seed=self.seed, with_document=masks)
        if windows.num_cut + windows.num_dropped:
            _logger.warning(
                "Of %d conversations (%s) %d are longer than model.seq_len %d and are cut there, and %d more have no "
                "response before it and are left out.",
                *(total, split, windows.num_cut, seq_len, windows.num_dropped),
            )
        if len(windows) == 0:
            raise InputError(
                f"none of the {total} conversations of the {split} split reaches a response within model.seq_len "
                f"{seq_len} tokens; raise it."
            )
        return windows


def prepare_chat(config: DataConfig) -> ChatData:
    """Read and tokenize all conversations, at every call: such sets are small, and are held in memory.

    The split is by a hash of each conversation's content, as that of documents is.

    Raises:
      InputError: a bad file, record, tokenizer or chat template, fewer than two different conversations, or more than
        ``MAX_TOKENS``.
    """
    conversations = list(read_conversations(config))
    digests = [digest_of(json.dumps(messages)) for messages in conversations]
    keys = [key_of(digest) for digest in digests]
    limit = val_limit(config, min(keys, default=0), max(keys, default=0))
    if (found := find_tokenizer(config)) is not None:
        tokenizer = found[1]
    else:
        learned = (messages for messages, key in zip(conversations, keys, strict=True) if key >= limit)
        tokenizer = train_bpe((text for messages in learned for _, text in messages), config.bpe_vocab_size)
    form = chat_format(tokenizer)
    splits: dict[str, list[Rendered]] = {"train": [], "val": []}
    num_tokens = 0
    for number, (messages, key) in enumerate(zip(conversations, keys, strict=True), 1):
        try:
            rendered = form.learned(messages)
        except InputError as error:
            raise InputError(f"conversation {number} of {config.source!r}: {error}") from error
        num_tokens += len(rendered.ids_T)
        if num_tokens > MAX_TOKENS:
            raise InputError(
                f"data.source {config.source!r} holds more than {MAX_TOKENS:,} tokens of conversations, which are kept "
                "in memory; give fewer files, or train on them as text."
            )
        splits["val" if key < limit else "train"].append(rendered)
    content_hash = blake2b(b"chat" + b"".join(digests), digest_size=16).hexdigest()
    train, val = (np.concatenate([one.ids_T for one in split]) for split in splits.values())
    return ChatData(tokenizer, train, val, content_hash, splits, config.seed, mask_documents=config.mask_documents)


def read_conversations(config: DataConfig) -> Iterator[list[tuple[str, str]]]:
    """The conversations of all files in their order; those without a response are refused like any bad record.

    Raises:
      InputError: names the file and line, the fault and its remedy.
    """
    for path in corpus_files(config):
        form = format_of(path)
        if form.kind == "text":
            raise InputError(
                f"data.format is 'chat', but {str(path)!r} is no file of records, such as .jsonl; leave it out."
            )
        for part in parts_of(path, form, sys.maxsize):
            for where, record in records_of(part):
                parsed = _parse(record, config, where)
                yield [(role, valid_text(text)) for role, text in parsed]


def _parse(record: Any, config: DataConfig, where: str) -> list[tuple[str, str]]:
    if not isinstance(record, dict):
        raise InputError(f"{where} holds {type(record).__name__} and no object; mend or remove the line.")
    if "messages" in record:
        return _parse_messages(record["messages"], where)
    for option in ("prompt_field", "response_field"):
        name = getattr(config, option)
        if not isinstance(record.get(name), str):
            raise InputError(f"{where} has neither messages nor a text in field {name!r}; set data.{option} to it.")
    prompt, response = record[config.prompt_field], record[config.response_field]
    follows = record.get(config.input_field)
    is_other = config.input_field not in (config.prompt_field, config.response_field)
    if isinstance(follows, str) and follows and is_other:
        prompt = f"{prompt}\n\n{follows}"
    return [("user", prompt), ("assistant", response)]


def _parse_messages(messages: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise InputError(f"{where}: messages must be a list of objects with role and content; mend the line.")
    conversation = []
    for message in messages:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise InputError(
                f"{where}: message {message!r:.80} needs a role of {', '.join(ROLES)} and a text as content."
            )
        conversation.append((role, content))
    if not any(role == "assistant" for role, _ in conversation):
        raise InputError(f"{where} holds no message of the assistant, so that nothing is to be learned; remove it.")
    return conversation


def prepare_data(config: DataConfig) -> TokenData:
    """:func:`prepare_chat` or ``prepare_tokens``, as ``data.format`` says."""
    return prepare_chat(config) if config.format == "chat" else prepare_tokens(config)
