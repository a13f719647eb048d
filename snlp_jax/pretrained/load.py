"""One call that reads a model, whatever wrote it: a run, a Hugging Face folder, a GGUF file, a nanochat checkpoint."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from snlp_jax.config import MachineConfig, ModelConfig
from snlp_jax.data.special_tokens import read_special_tokens
from snlp_jax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer_json
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, CONFIG_NAME
from snlp_jax.io.moved import TEMPLATE_NAME
from snlp_jax.model import LanguageModel
from snlp_jax.model.convert import families, table
from snlp_jax.parallel.sharding import TRAINING, shardings_of
from snlp_jax.pretrained.nanochat import read_nanochat
from snlp_jax.pretrained.source import GENERATION_NAME, TOKENIZER_CONFIG_NAME, Source, find, read_source
from snlp_jax.run import TOKENIZER_NAME, Which, read_config, read_params, read_tokenizer
from snlp_jax.types import Params, PyTree


class Pretrained(NamedTuple):
    """A model that is ready to use."""

    model: LanguageModel
    params: Params
    """Float32, as training has them."""
    tokenizer: Tokenizer
    """With what stands before and after a text, and the chat template, in ``tokenizer.special``."""


class Imported(NamedTuple):
    """Somebody's model, in this library's terms."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    files: Mapping[str, bytes]
    """Of a Hugging Face folder, beside the weights; none of nanochat's."""


def from_pretrained(
    source: str | Path,
    *,
    tokenizer: str = "",
    which: Which = "best",
    mesh: jax.sharding.Mesh | None = None,
    machine: MachineConfig = MachineConfig(),
) -> Pretrained:
    """Read a model, its parameters and its tokenizer.

    Args:
        source: a folder as Hugging Face writes it; the hub's 'org/model' or 'org/model@revision'; a GGUF file; a
            nanochat checkpoint or its folder; a run directory.
        tokenizer: path of a tokenizer.json that takes the place of the source's.
        which: of a run's checkpoints the one of the lowest validation loss, or the newest.
        mesh: devices onto which parameters are read leaf by leaf, as training places them.
        machine: precision and kernels.

    Raises:
        InputError: the source cannot be found, is damaged, or has a part that is not known; each with the reason.
    """
    path = find(source)
    if not (path / CHECKPOINT_NAME).is_dir():
        config, params, read, _ = import_model(path, tokenizer, mesh)
        return Pretrained(LanguageModel(config, machine), params, read)
    if tokenizer:
        raise InputError(f"{str(path)!r} is a run, which has a tokenizer; leave out tokenizer={tokenizer!r}.")
    run, read = read_config(path), read_tokenizer(path)
    check_vocab(read, run.model.vocab_size)
    model = LanguageModel(run.model, machine.for_run(run.machine))
    return Pretrained(model, read_params(path, model, which, _shardings(run.model, mesh))[1], read)


def import_model(source: str | Path, tokenizer: str = "", mesh: jax.sharding.Mesh | None = None) -> Imported:
    """Read somebody's model, leaf by leaf; arguments and errors as in :func:`from_pretrained`, but for runs."""
    path = find(source)
    if path.suffix == ".pt":
        config, params, read = read_nanochat(path, tokenizer, lambda made: _shardings(made, mesh))
        return Imported(config, params, read, {})
    files = read_source(path, tokenizer)
    config, read = _config_and_tokenizer(files)
    unused = families.UNUSED_TIED if config.use_tied_head else families.UNUSED_TENSORS
    params = table.read_params(files.tensors, families.family_rows(config), unused, _shardings(config, mesh))
    return Imported(config, params, read, files.files)


def _config_and_tokenizer(source: Source) -> tuple[ModelConfig, Tokenizer]:
    """The tokenizer without added tokens that the model has no row for (Gemma 3's image token)."""
    model_config, content = source.json_of(CONFIG_NAME), source.json_of(TOKENIZER_NAME)
    num_rows = families.family_config(model_config).padded_vocab_size
    if isinstance(content.get("added_tokens"), list):
        content["added_tokens"] = [token for token in content["added_tokens"] if not _is_beyond(token, num_rows)]
    template = source.files.get(TEMPLATE_NAME, b"").decode("utf-8", errors="replace")
    special = read_special_tokens(
        content, source.json_of(TOKENIZER_CONFIG_NAME), source.json_of(GENERATION_NAME), model_config, template
    )
    tokenizer = load_tokenizer_json(json.dumps({"tokenizer": content, "special": dataclasses.asdict(special)}))
    if tokenizer.vocab_size > num_rows:
        raise InputError(
            f"the tokenizer of {source.name!r} has {tokenizer.vocab_size} entries, but the model has {num_rows}; "
            "give the model's own with --tokenizer."
        )
    return families.family_config(model_config, vocab_size=tokenizer.vocab_size), tokenizer


def _is_beyond(token: Any, num_rows: int) -> bool:
    index = token.get("id") if isinstance(token, dict) else None
    return isinstance(index, int) and index >= num_rows


def _shardings(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> PyTree:
    """Of the parameters, as training places them; None for the first device."""
    if mesh is None:
        return None
    return shardings_of(LanguageModel(config).abstract_params(), config, mesh, TRAINING)
