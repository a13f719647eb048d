"""Where a run starts from, other than chance: the parameters and the tokenizer of another run."""

import dataclasses
from pathlib import Path

from snlp_jax.config import Config, DataConfig
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, CONFIG_NAME, Checkpointer
from snlp_jax.run import TOKENIZER_NAME, note, read_config, read_tokenizer
from snlp_jax.types import Params

MAY_DIFFER = ("seq_len", "rotary_multiple", "remat")
"""Fields of the model that the new run may set otherwise: no parameter depends on them. Windows follow ``seq_len``."""


def data_config(config: Config, resume: bool) -> DataConfig:
    """``config.data``, with the tokenizer of the run: the copy that it keeps, where it has begun, whatever has become
    of the file that it was copied from; the one of ``train.init_from``, where it starts from another run.

    Raises:
        InputError: see :func:`check_origin`.
    """
    tokenizer = config.run_path / TOKENIZER_NAME
    if resume and tokenizer.is_file() and (config.run_path / CONFIG_NAME).is_file():
        return dataclasses.replace(config.data, tokenizer=str(tokenizer))
    if not config.train.init_from:
        return config.data
    check_origin(config)
    return dataclasses.replace(config.data, tokenizer=str(Path(config.train.init_from) / TOKENIZER_NAME))


def with_origin_model(config: Config, file: Config) -> Config:
    """The config with the model of the run that a flag has named in ``train.init_from``, where the config file
    describes another and no flag does: recipes fit any model. Windows of training stay as long as they are.

    Raises:
        InputError: there is no such run.
    """
    origin = config.train.init_from
    if origin == file.train.init_from or not origin or _essence(config) != _essence(file):
        return config
    found = read_config(Path(origin))
    if _essence(found) == _essence(config):
        return config
    model = dataclasses.replace(found.model, seq_len=config.model.seq_len, remat=config.model.remat)
    note(f"the model is that of {origin!r}, in windows of {model.seq_len} tokens.")
    return dataclasses.replace(config, model=model)


def _essence(config: Config) -> dict[str, object]:
    return {name: value for name, value in dataclasses.asdict(config.model).items() if name not in MAY_DIFFER}


def check_origin(config: Config) -> None:
    """Refuse to start from a run of another model.

    Raises:
        InputError: names the first field of the model that differs; or there is no run, or none with a tokenizer and
            a checkpoint.
    """
    origin = Path(config.train.init_from)
    fields, origin_fields = dataclasses.asdict(config.model), dataclasses.asdict(read_config(origin).model)
    read_tokenizer(origin)
    with Checkpointer(origin / CHECKPOINT_NAME, read_only=True) as checkpoints:
        if not checkpoints.steps():
            raise InputError(f"train.init_from {str(origin)!r} holds no checkpoint; train it first.")
    for name, value in fields.items():
        if name not in MAY_DIFFER and origin_fields[name] != value:
            raise InputError(
                f"train.init_from {str(origin)!r} holds a model with model.{name} {origin_fields[name]!r}, and here it "
                f"is {value!r}; set it to the same."
            )


def read_origin(config: Config, abstract_params: Params) -> tuple[int, Params]:
    """Step and parameters of ``train.init_checkpoint``, or of the newest one where no loss is known; each leaf comes on
    the sharding that ``abstract_params`` gives it.

    Raises:
        InputError: see :func:`check_origin`; or there is no good checkpoint.
    """
    check_origin(config)
    with Checkpointer(Path(config.train.init_from) / CHECKPOINT_NAME, read_only=True) as checkpoints:
        which = "last" if checkpoints.best_step is None else config.train.init_checkpoint
        return checkpoints.restore_params(abstract_params, which)
