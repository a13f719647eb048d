"""Text to token ids and back: raw bytes, or any Hugging Face ``tokenizers`` file, including one trained here.

A tokenizer turns into JSON text and back (``to_json``, ``load_tokenizer_json``), so a run keeps its own copy and needs
no corpus to be evaluated.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from snlp_jax.errors import InputError

if TYPE_CHECKING:
    import tokenizers

BOS = "<|bos|>"
"""The token that stands before every document."""
BOS_NAMES = (BOS, "<s>", "<|endoftext|>", "<bos>", "<|begin_of_text|>")
"""Special tokens of other people's files that can stand before a document, best first."""


@dataclass(frozen=True)
class SpecialTokens:
    """What stands around a text, as ids of the vocabulary."""

    separator_id: int
    """Stands before every document of a training text."""
    prefix_ids: tuple[int, ...]
    """Before a prompt and before a text that is scored: the separator, or nothing where the model knows none."""
    end_ids: tuple[int, ...]
    """Any of these ends what the model says."""
    opens_windows: bool = False
    """Whether the model was trained with ``prefix_ids`` at the start of every window, wherever a text was cut."""
    chat_template: str = ""
    """A jinja template or several (:func:`snlp_jax.data.template.named_templates`), or "" for the plain-text one."""
    bos_token: str = ""
    """What a chat template's variable of this name says; "" where it has none."""
    eos_token: str = ""


class Encoded(NamedTuple):
    """Tokens and where they stand in their text. Tokens that share a character both stand there."""

    ids_T: np.ndarray
    """int32."""
    start_T: np.ndarray
    """First character."""
    end_T: np.ndarray
    """The one after the last."""


class ByteTokenizer:
    """One token a byte of UTF-8, ids 0 to 255, and the document separator 256."""

    name = "byte"
    """Short and stable across ``to_json``, for example 'byte' or 'bpe-4096'."""
    vocab_size = 257
    """One more than the largest id."""
    bos_id = 256
    """Id of the document separator. ``encode`` never gives it, whatever the text says."""
    special = SpecialTokens(256, (256,), (256,))

    def encode(self, text: str, *, with_special: bool = False) -> np.ndarray:
        """Ids of a text, int32 [T], without what stands before it. ``with_special`` reads the names of special tokens
        in the text as these tokens; else they are text like any other. Lone surrogates are read as '?'."""
        return np.frombuffer(_to_utf8(text), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str], *, with_special: bool = False) -> list[np.ndarray]:
        """``encode`` of each text, on several threads where there are any."""
        return [self.encode(text) for text in texts]

    def encode_spans(self, text: str, *, with_special: bool = False) -> Encoded:
        """``encode``, with the characters that each token stands for."""
        size_C = [len(_to_utf8(character)) for character in text]
        start_T = np.repeat(np.arange(len(text)), size_C)
        return Encoded(self.encode(text), start_T, start_T + 1)

    special_ids: Mapping[str, int] = {}
    """Special tokens by name."""

    def special_id(self, name: str) -> int | None:
        """Id of the special token of this name; None where there is none."""
        return None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids [T]; special tokens are left out and broken UTF-8 becomes U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """What ``load_tokenizer_json`` reads."""
        return json.dumps({"type": "byte"})

    def to_plain_json(self) -> str:
        """``to_json`` without what stands around a text: for other readers, who have it in files of its own."""
        return self.to_json()


class FileTokenizer:
    """A Hugging Face tokenizer, which does what :class:`ByteTokenizer` does. Its own truncation, padding and templates
    are not used.

    Args:
      backend: a ``tokenizers.Tokenizer``; it is changed: without ``special`` a ``<|bos|>`` is added where it has no
        token of ``BOS_NAMES``.
      special: what the model's own files say; by default the separator stands before a text and ends it.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", special: SpecialTokens | None = None) -> None:
        self._is_own = special is None
        if special is None:
            bos_id = _find_bos(backend)
            special = SpecialTokens(bos_id, (bos_id,), (bos_id,))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|bos|>" written in a document is text, not a separator
        self._backend = backend
        self.special = special
        self.bos_id: int = special.separator_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.name = f"{type(backend.model).__name__.lower()}-{self.vocab_size}"

    def encode(self, text: str, *, with_special: bool = False) -> np.ndarray:
        return self.encode_batch([text], with_special=with_special)[0]

    def encode_batch(self, texts: Sequence[str], *, with_special: bool = False) -> list[np.ndarray]:
        backend = self._reader_of_special if with_special else self._backend
        encodings = backend.encode_batch_fast([_without_surrogates(text) for text in texts], add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_spans(self, text: str, *, with_special: bool = False) -> Encoded:
        backend = self._reader_of_special if with_special else self._backend
        encoding = backend.encode(_without_surrogates(text), add_special_tokens=False)
        span_T2 = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        return Encoded(np.asarray(encoding.ids, dtype=np.int32), span_T2[:, 0], span_T2[:, 1])

    def special_id(self, name: str) -> int | None:
        return self.special_ids.get(name)

    @functools.cached_property
    def special_ids(self) -> Mapping[str, int]:
        added = self._backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @functools.cached_property
    def _reader_of_special(self) -> "tokenizers.Tokenizer":
        """A copy: the switch belongs to the whole tokenizer, which other threads use at the same time."""
        copy = type(self._backend).from_str(self._backend.to_str())
        copy.encode_special_tokens = False
        return copy

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=True)

    def to_plain_json(self) -> str:
        return self._backend.to_str()

    def to_json(self) -> str:
        if self._is_own:
            return self.to_plain_json()
        return json.dumps(
            {"tokenizer": json.loads(self._backend.to_str()), "special": dataclasses.asdict(self.special)}
        )


def _find_bos(backend: "tokenizers.Tokenizer") -> int:
    """Id of the first token of ``BOS_NAMES`` that there is; a new one where there is none."""
    special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    if not special.keys() & set(BOS_NAMES):
        backend.add_special_tokens([BOS])
        special[BOS] = backend.get_vocab(with_added_tokens=True)[BOS]
    return next(special[name] for name in BOS_NAMES if name in special)


Tokenizer = ByteTokenizer | FileTokenizer


def load_tokenizer_json(text: str) -> Tokenizer:
    """The tokenizer of ``to_json``, or of any Hugging Face tokenizer.json.

    Raises:
      InputError: the text is neither.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"the tokenizer is not valid JSON ({error}); give a Hugging Face tokenizer.json.") from error
    if content == {"type": "byte"}:
        return ByteTokenizer()

    import tokenizers

    try:
        special = None
        if isinstance(content, dict) and "special" in content:
            text, special = json.dumps(content["tokenizer"]), _special_of(content["special"])
        return FileTokenizer(tokenizers.Tokenizer.from_str(text), special)
    except Exception as error:  # the library raises bare Exception for every fault of a file
        raise InputError(f"the tokenizer cannot be loaded ({error}); give a Hugging Face tokenizer.json.") from error


def _special_of(saved: dict) -> SpecialTokens:
    return SpecialTokens(**saved | {name: tuple(saved[name]) for name in ("prefix_ids", "end_ids")})


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text can be encoded and comes back unchanged.

    Args:
      documents: read once, a few at a time.
      vocab_size: entries, counting 256 bytes and the separator; a small corpus may give fewer.
    """
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(map(_without_surrogates, documents), trainer=trainer)
    return FileTokenizer(backend)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises InputError unless a model of ``vocab_size`` entries fits the tokenizer exactly."""
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} entries but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size} or change the tokenizer."
        )


def _without_surrogates(text: str) -> str:
    return _to_utf8(text).decode("utf-8")


def _to_utf8(text: str) -> bytes:
    """UTF-8 with '?' for lone surrogates, which have none."""
    return text.encode("utf-8", errors="replace")
