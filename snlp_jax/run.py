"""A run directory: the config, tokenizer, checkpoints and corpus that training, an import or a linearisation left."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from snlp_jax.config import Config, MachineConfig, WeightPrecision
from snlp_jax.config.data import SEVERAL
from snlp_jax.data.chat import prepare_data
from snlp_jax.data.corpus import first_documents, hash_of
from snlp_jax.data.formats import format_of
from snlp_jax.data.pipeline import TokenData, in_parts
from snlp_jax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer_json
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, Checkpointer
from snlp_jax.io.files import cache_folder, may_be_made
from snlp_jax.io.moved import read_run_text, read_saved
from snlp_jax.memory import check_room, rows_at_once
from snlp_jax.model import LanguageModel
from snlp_jax.quantize import input_squares, quantize
from snlp_jax.types import Params, PyTree

TOKENIZER_NAME = "tokenizer.json"
BATCH_SIZE = 32
"""Training windows at once, when a calibration is fitted."""
SEED = 0
"""Of the choice of training windows."""

Which = Literal["best", "last"]
"""A checkpoint: the one of the lowest validation loss, or the newest."""


class Run(NamedTuple):
    """What a run directory holds of its model."""

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    config: Config


def load_run(path: str | Path, which: Which = "best", machine: MachineConfig = MachineConfig()) -> Run:
    """Read a run directory.

    Args:
        path: the directory.
        which: the checkpoint of the lowest validation loss (with a notice the newest, where none is known), or the
            newest.
        machine: precision and kernels; under auto the dtype that the run was given.

    Raises:
        InputError: no run, no good checkpoint, or a tokenizer with more tokens than the model has.
    """
    path = Path(path)
    config, tokenizer = read_config(path), read_tokenizer(path)
    check_vocab(tokenizer, config.model.vocab_size)
    config = dataclasses.replace(config, machine=machine.for_run(config.machine))
    model = LanguageModel(config.model, config.machine)
    return Run(model, read_params(path, model, which)[1], tokenizer, config)


def read_config(run_dir: Path) -> Config:
    """The config that a run saved, with this machine's kernels in place of those it was trained with.

    Raises:
        InputError: the directory does not exist or holds no run.
    """
    config = read_saved(run_dir)
    return dataclasses.replace(config, machine=MachineConfig().for_run(config.machine))


def read_params(run_dir: Path, model: LanguageModel, which: Which, shardings: PyTree = None) -> tuple[int, Params]:
    """Step and parameters of a run's checkpoint; for ``which`` see :func:`load_run`.

    Args:
        shardings: a tree like the parameters; the first device where there is none.

    Raises:
        InputError: there is no good checkpoint, or it is of another model; or they take more memory than is free.
    """
    with Checkpointer(run_dir / CHECKPOINT_NAME, read_only=True) as checkpointer:
        if which == "best" and checkpointer.best_step is None:
            if checkpointer.latest_step is not None:
                note(f"no checkpoint in {str(run_dir)!r} has a validation loss; taking the last one.")
            which = "last"
        abstract = model.abstract_params()
        if shardings is not None:
            abstract = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                abstract,
                shardings,
            )
        else:
            needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
            check_room(f"the parameters of {str(run_dir)!r}", needed, "end other programs, or take a larger machine")
        return checkpointer.restore_params(abstract, which)


def read_tokenizer(run_dir: Path) -> Tokenizer:
    """The tokenizer that a run saved.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    return load_tokenizer_json(read_run_text(run_dir, TOKENIZER_NAME))


def read_data(run_dir: Path, config: Config) -> TokenData:
    """The corpus in the tokens of the run, whatever tokenizer its config names.

    Raises:
        InputError: the corpus cannot be read, or its tokens are not the model's.
    """
    wanted = dataclasses.replace(config.data, tokenizer=str(run_dir / TOKENIZER_NAME))
    if wanted.cache_dir and not may_be_made(Path(os.path.expanduser(wanted.cache_dir))):
        note(f"the run's token cache {wanted.cache_dir!r} may not be written to; taking {str(cache_folder())!r}.")
        wanted = dataclasses.replace(wanted, cache_dir="")
    data = prepare_data(wanted)
    check_vocab(data.tokenizer, config.model.vocab_size)
    return data


def with_sources(run_dir: Path, config: Config, sources: Sequence[str]) -> Config:
    """The config with other text than the run's own, one corpus of files, folders or globs, in the tokens of the run.
    A run on conversations reads files of records as such, and others as text."""
    is_chat = config.data.format == "chat" and all(format_of(Path(name)).kind != "text" for name in sources)
    data = dataclasses.replace(
        config.data,
        source=SEVERAL.join(sources),
        mixture=(),
        format="chat" if is_chat else "text",
        tokenizer=str(run_dir / TOKENIZER_NAME),
    )
    return dataclasses.replace(config, data=data)


def read_given_text(run_dir: Path, config: Config, sources: Sequence[str], *, has_fits: bool) -> TokenData:
    """Text that is no training text of the run: all of it is held out, or where ``has_fits`` the half of its documents
    that comes first by a hash of their content; ``train`` is then the other half, for fits.

    Raises:
        InputError: it cannot be read, or is one document that fits and measurements would have to share.
    """
    config = with_sources(run_dir, config, sources)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, val_fraction=0.5))
    if has_fits:
        return read_data(run_dir, config)
    if config.data.format == "text" and len(documents := first_documents(config.data, 2)) == 1:
        tokenizer = read_tokenizer(run_dir)
        check_vocab(tokenizer, config.model.vocab_size)
        tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(documents[0])]).astype(np.int32)
        masks = config.data.mask_documents
        return TokenData(tokenizer, tokens[:0], tokens, hash_of(documents), mask_documents=masks)
    return read_data(run_dir, config).all_held_out()


def num_training_windows(data: TokenData, seq_len: int, num_tokens: int) -> int:
    """Windows of training text that hold about ``num_tokens`` tokens, whole batches of them.

    Raises:
        InputError: there is no text for one batch, or fewer tokens were asked for.
    """
    available = len(data.windows("train", seq_len))
    wanted = min(-(-num_tokens // seq_len), available) // BATCH_SIZE * BATCH_SIZE
    if wanted == 0:
        raise InputError(
            f"calibration takes batches of {BATCH_SIZE} windows of {seq_len} tokens, but there are only {available} "
            f"windows and tokens={num_tokens} was asked for; raise tokens= or give more text."
        )
    return wanted


def training_windows(data: TokenData, seq_len: int, num_tokens: int) -> dict[str, np.ndarray]:
    """Drawn without replacement: ``tokens`` [n, T + 1] and, where they are masked, ``document``."""
    source = data.windows("train", seq_len)
    chosen = np.random.default_rng(SEED).permutation(len(source))[: num_training_windows(data, seq_len, num_tokens)]
    rows = [source[int(index)] for index in chosen]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def quantized_params(
    model: LanguageModel,
    params: Params,
    weights: WeightPrecision,
    calibration: int,
    data: TokenData | None,
    seq_len: int = 0,
) -> Params:
    """:func:`snlp_jax.quantize.quantize`, clipped by about ``calibration`` tokens of the training text in ``data``,
    in windows of ``seq_len`` (by default the model's).

    Raises:
        InputError: too little text for one batch.
    """
    squares = None
    if calibration:
        assert data is not None
        seq_len = seq_len or model.config.seq_len
        windows = training_windows(data, seq_len, calibration)
        size = rows_at_once(model.config, seq_len, BATCH_SIZE, backend=model.backend)
        squares = input_squares(model, params, in_parts([windows], size))
    return quantize(params, weights, squares)


def note(text: str) -> None:
    """One line on stderr."""
    print(f"note: {text}", file=sys.stderr)
