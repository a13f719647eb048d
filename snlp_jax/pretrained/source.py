"""Where a model comes from: a folder, a file, or a repository of the hub, found and taken apart.

Whatever it is becomes the small files of a Hugging Face folder, by name, and tensors by Hugging Face's names. Nothing
that is read can run code: JSON, text, and tensors.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CONFIG_NAME
from snlp_jax.io.moved import TEMPLATE_NAME
from snlp_jax.io.optional import optional
from snlp_jax.model.convert.tensor_files import TensorFiles
from snlp_jax.pretrained.gguf_header import read_gguf_header
from snlp_jax.pretrained.gguf_model import GgufTensors, gguf_config
from snlp_jax.pretrained.gguf_tokenizer import gguf_ids, gguf_templates, gguf_tokenizer, gguf_tokenizer_config
from snlp_jax.run import TOKENIZER_NAME

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GENERATION_NAME = "generation_config.json"
KEPT = (CONFIG_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, "special_tokens_map.json", GENERATION_NAME, TEMPLATE_NAME)
"""Files of a Hugging Face folder, beside its weights, that an export gives back."""
TEMPLATES_FOLDER = "additional_chat_templates"
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja")


class Source(NamedTuple):
    """A model's files."""

    name: str
    files: Mapping[str, bytes]
    """Content of those of ``KEPT`` that there are."""
    tensors: TensorFiles

    def json_of(self, name: str) -> dict[str, Any]:
        """Content of a file; {} where there is none.

        Raises:
            InputError: it is no JSON object.
        """
        return parse_json(self.files[name], f"{self.name}/{name}") if name in self.files else {}


def find(source: str | Path) -> Path:
    """The local place of a source: itself, what a folder without a config holds (the newest nanochat checkpoint, a GGUF
    file), or where the hub's client has put it.

    Raises:
        InputError: there is no such place, or the hub cannot give it.
    """
    path = Path(source)
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        return _in_folder(path)
    if path.exists():
        return path
    name, _, revision = str(source).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or (revision and not re.fullmatch(r"[\w./-]+", revision)):
        raise InputError(
            f"source {str(source)!r} does not exist; name a folder, a file or a hub id such as 'org/model' or "
            "'org/model@revision'."
        )
    hub = optional("huggingface_hub", f"source {str(source)!r} does not exist here, and the hub", "snlp-jax[hf]")
    try:
        found = Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"source {str(source)!r} is no folder here and cannot be fetched from the hub ({reason})."
        ) from error
    return found


def _in_folder(path: Path) -> Path:
    if checkpoints := sorted(path.glob("model_*.pt")):
        return checkpoints[-1]  # nanochat pads the step with zeros
    models = sorted(path.glob("*.gguf"))
    if len(models) > 1:
        raise InputError(f"{str(path)!r} holds {len(models)} GGUF files; name one, such as {str(models[0])!r}.")
    return models[0] if models else path


def read_source(path: Path, tokenizer: str = "") -> Source:
    """A Hugging Face folder or a GGUF file; nothing of the tensors is read yet.

    Args:
        tokenizer: path of a tokenizer.json that takes the place of the model's own.

    Raises:
        InputError: a file is missing, damaged, or says what is not known.
    """
    files = {} if not tokenizer else {TOKENIZER_NAME: read_tokenizer_file(Path(tokenizer))}
    return _read_gguf(path, files) if path.suffix.lower() == ".gguf" else _read_folder(path, files)


def _read_folder(path: Path, files: dict[str, bytes]) -> Source:
    if not (path / CONFIG_NAME).is_file():
        raise InputError(f"there is no {str(path / CONFIG_NAME)!r}; give a folder that holds one, or a GGUF file.")
    files = {name: (path / name).read_bytes() for name in KEPT if (path / name).is_file()} | files
    more = {each.stem: read_template(each) for each in sorted((path / TEMPLATES_FOLDER).glob("*.jinja"))}
    if more and TEMPLATE_NAME in files:
        files = _with_templates(files, {"default": read_template(path / TEMPLATE_NAME)} | more, str(path))
    if TOKENIZER_NAME not in files:
        files[TOKENIZER_NAME] = read_tokenizer_file(path / TOKENIZER_NAME)
    return Source(str(path), files, TensorFiles(path))


def _read_gguf(path: Path, files: dict[str, bytes]) -> Source:
    header = read_gguf_header(path)
    config, ids = gguf_config(path, header), gguf_ids(header.fields)
    if TOKENIZER_NAME not in files:
        files = {TOKENIZER_NAME: _encode(gguf_tokenizer(header.fields))}
    files = files | {
        CONFIG_NAME: _encode(config | ids),
        TOKENIZER_CONFIG_NAME: _encode(gguf_tokenizer_config(header.fields)),
        GENERATION_NAME: _encode(ids),
    }
    templates = gguf_templates(path, header.fields)
    if list(templates) == ["default"]:
        files[TEMPLATE_NAME] = templates["default"].encode()
    elif templates:
        files = _with_templates(files, templates, str(path))
    return Source(str(path), files, GgufTensors(path, header, config))


def _with_templates(files: Mapping[str, bytes], templates: Mapping[str, str], name: str) -> dict[str, bytes]:
    """The files with several chat templates in the tokenizer's config, where every reader finds them."""
    config = parse_json(files.get(TOKENIZER_CONFIG_NAME, b"{}"), f"{name}/{TOKENIZER_CONFIG_NAME}")
    config["chat_template"] = [{"name": each, "template": text} for each, text in templates.items()]
    rest = {each: content for each, content in files.items() if each != TEMPLATE_NAME}
    return rest | {TOKENIZER_CONFIG_NAME: _encode(config)}


def read_template(path: Path) -> str:
    """Text of a file. Raises InputError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read as text ({error}); download it again.") from error


def read_tokenizer_file(path: Path) -> bytes:
    """Content of a tokenizer.json.

    Raises:
        InputError: there is none; says how to come by one where nanochat has left its pickle.
    """
    if path.is_file():
        return path.read_bytes()
    above = path.absolute().parents
    if any((folder / "tokenizer.pkl").is_file() for folder in (above[0], *(each / "tokenizer" for each in above[:3]))):
        raise InputError(
            f"there is no tokenizer {str(path)!r}, and nanochat's tokenizer.pkl is a pickle, which is never opened "
            "here; write a tokenizer.json from it as README.md says, and give it with --tokenizer."
        )
    raise InputError(f"there is no tokenizer {str(path)!r}; give --tokenizer, the path of a tokenizer.json.")


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """The object of a JSON file. Raises InputError."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name!r} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{name!r} holds no JSON object; download it again.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        InputError: it is missing, or no JSON object.
    """
    if not path.is_file():
        raise InputError(f"there is no {str(path)!r}; give a folder that holds one.")
    return parse_json(path.read_bytes(), str(path))


def _encode(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
