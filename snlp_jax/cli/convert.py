"""Import other people's weights as a run, or export a run as .safetensors.

    python -m snlp_jax.model.convert SRC runs/llama                 # a Hugging Face folder or hub id
    python -m snlp_jax.model.convert base_checkpoints/d20 runs/d20 --tokenizer tokenizer.json     # nanochat
    python -m snlp_jax.model.convert runs/llama DST --export --dtype bfloat16

The run is as training leaves one, at step 0: eval.py, python -m snlp_jax.infer and --train.init-from read it. Beside it
lie the chat template (chat_template.jinja) and the files that an export gives back (source/).
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from snlp_jax.cli.flags import parse
from snlp_jax.cli.made import check_free, write_files, write_run
from snlp_jax.config import Config, MeshConfig, ModelConfig
from snlp_jax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer_json
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CONFIG_NAME
from snlp_jax.io.files import explain_full_disk
from snlp_jax.io.optional import optional
from snlp_jax.model import LanguageModel
from snlp_jax.model.convert import families, table
from snlp_jax.model.convert.nanochat import from_nanochat, nanochat_config, nanochat_rows
from snlp_jax.model.convert.tensor_files import TensorFiles
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.parallel.sharding import TRAINING, shardings_of
from snlp_jax.run import TEMPLATE_NAME, TOKENIZER_NAME, read_config, read_params
from snlp_jax.types import Params

SOURCE_NAME = "source"
KEPT = (TOKENIZER_NAME, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", TEMPLATE_NAME)
"""Files of a Hugging Face folder, beside its config and weights, that an export gives back."""
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja")


@dataclass(frozen=True)
class Args:
    source: tyro.conf.Positional[str]
    """A folder as Hugging Face writes it, or a hub id; a nanochat checkpoint (.pt) or its folder; with --export a run
    directory."""
    target: tyro.conf.Positional[Path]
    """The run directory that is made; with --export the folder of .safetensors."""
    tokenizer: str = ""
    """A tokenizer.json; by default the source's."""
    export: bool = False
    checkpoint: Literal["best", "last"] = "best"
    """Of an exported run: the one of the lowest validation loss, or the newest."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of exported tensors."""
    max_shard_gb: float = 5.0
    """Of an exported file."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices onto which the parameters are read, each of which then writes its part."""


def main() -> None:
    args = parse(Args, prog="python -m snlp_jax.model.convert", description=__doc__)
    if args.export:
        export_run(Path(args.source), args.target, args.checkpoint, args.dtype, args.max_shard_gb)
        return
    import_run(args.source, args.target, args.tokenizer, args.mesh)


# -- Import ------------------------------------------------------------------------------------------------------------


def import_run(source: str, target: Path, tokenizer_path: str = "", mesh: MeshConfig | None = None) -> None:
    """Make the run directory ``target`` of somebody's weights.

    Raises:
        InputError: ``target`` holds something already, or the source cannot be read; each with the reason.
    """
    check_free(target)
    path = _find(source)
    if path.suffix == ".pt":
        config, params, tokenizer = _read_nanochat(path, tokenizer_path)
        source_config: dict[str, Any] | None = None
    else:
        source_config = _read_json(path / CONFIG_NAME)
        config, params, tokenizer = _read_family(path, source_config, tokenizer_path, mesh or MeshConfig())
    files: dict[str, str | bytes] = {TOKENIZER_NAME: tokenizer.to_json()}
    if source_config is not None:
        files |= {f"{SOURCE_NAME}/{name}": content for name, content in _kept(path, source_config).items()}
        if template := _chat_template(path):
            files[TEMPLATE_NAME] = template
    data = dataclasses.replace(Config().data, tokenizer=str(target.absolute() / TOKENIZER_NAME))
    run = Config(name=target.absolute().name, run_dir=str(target), model=config, data=data)
    # Beside the parameters no more than one leaf, of which reading has held a copy too.
    largest = -(-max(leaf.nbytes for leaf in jax.tree.leaves(params)) // 10**9)
    write_run(target, run, params, files, {}, concurrent_gb=largest)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"imported {count:,} parameters in {config.num_layers} layers, {tokenizer.name}; wrote {target}")


def _read_family(
    path: Path, source_config: Mapping[str, Any], tokenizer_path: str, mesh: MeshConfig
) -> tuple[ModelConfig, Params, Tokenizer]:
    whole = families.family_config(source_config)
    file = Path(tokenizer_path) if tokenizer_path else path / TOKENIZER_NAME
    tokenizer = _read_tokenizer(file, whole.padded_vocab_size)
    config = families.family_config(source_config, vocab_size=tokenizer.vocab_size)
    check_vocab(tokenizer, config.vocab_size)
    shardings = None
    if mesh != MeshConfig():
        shapes = LanguageModel(config).abstract_params()
        shardings = shardings_of(shapes, config, make_mesh(mesh), TRAINING)
    unused = families.UNUSED_TIED if config.use_tied_head else families.UNUSED_TENSORS
    rows = families.family_rows(config)
    return config, table.read_params(TensorFiles(path), rows, unused, shardings), tokenizer


def _read_nanochat(path: Path, tokenizer_path: str) -> tuple[ModelConfig, Params, Tokenizer]:
    """A checkpoint ``model_STEP.pt`` with its ``meta_STEP.json``."""
    torch = optional("torch", "a nanochat checkpoint", "snlp-jax[hf]")
    meta = path.with_name(path.name.replace("model_", "meta_", 1)).with_suffix(".json")
    fields = _read_json(meta).get("model_config")
    if not isinstance(fields, dict):
        raise InputError(f"{str(meta)!r} holds no object 'model_config'; give a checkpoint that nanochat has written.")
    try:  # tensors alone: whatever else a pickle would run is refused
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{str(path)!r} is not a checkpoint of tensors alone ({reason}).") from error
    if not isinstance(state, dict):
        raise InputError(f"{str(path)!r} holds no state dict; give a checkpoint that nanochat has written.")
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        arrays[name.removeprefix("_orig_mod.")] = tensor.to(torch.float32).numpy()
    config = nanochat_config(fields)
    config = dataclasses.replace(
        config, use_smear="smear_gate.weight" in arrays, use_mid_subtract="backout_lambda" in arrays
    )
    tokenizer = _read_tokenizer(Path(tokenizer_path) if tokenizer_path else path.with_name(TOKENIZER_NAME))
    check_vocab(tokenizer, config.vocab_size)
    return config, from_nanochat(arrays, config), tokenizer


def _read_tokenizer(path: Path, num_rows: int | None = None) -> Tokenizer:
    """The tokenizer of a file, without added tokens that the model has no row for (Gemma 3's image token).

    Raises:
        InputError: there is none, or it has more entries than the model has rows.
    """
    if not path.is_file():
        raise InputError(f"there is no tokenizer {str(path)!r}; give --tokenizer, the path of a tokenizer.json.")
    content = _read_json(path)
    if num_rows is None:
        return load_tokenizer_json(json.dumps(content))
    if content.get("added_tokens"):
        content["added_tokens"] = [token for token in content["added_tokens"] if token.get("id", 0) < num_rows]
    tokenizer = load_tokenizer_json(json.dumps(content))
    if tokenizer.vocab_size > num_rows:
        raise InputError(
            f"tokenizer {str(path)!r} has {tokenizer.vocab_size} entries, but the model has {num_rows}; "
            "give the model's own with --tokenizer."
        )
    return tokenizer


def _find(source: str) -> Path:
    """The local place of a source: itself, the newest checkpoint of a nanochat folder, or where the hub's client has
    put it."""
    path = Path(source)
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        checkpoints = sorted(path.glob("model_*.pt"))
        return checkpoints[-1] if checkpoints else path  # nanochat pads the step with zeros
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(f"source {source!r} does not exist; name a folder, a file or a hub id such as 'org/model'.")
    hub = optional("huggingface_hub", f"source {source!r} does not exist here, and the hub", "snlp-jax[hf]")
    try:
        return Path(hub.snapshot_download(source, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"source {source!r} is no folder here and cannot be fetched from the hub ({reason})."
        ) from error


def _kept(path: Path, source_config: Mapping[str, Any]) -> dict[str, str | bytes]:
    """The files of a Hugging Face folder that are kept and given back, by name."""
    kept = {name: (path / name).read_bytes() for name in KEPT if (path / name).is_file()}
    return {CONFIG_NAME: json.dumps(source_config, indent=2) + "\n"} | kept


def _chat_template(path: Path) -> str:
    """Text of the chat template, from either of the two places where it may be; "" where there is none."""
    if (path / TEMPLATE_NAME).is_file():
        return (path / TEMPLATE_NAME).read_text(encoding="utf-8")
    if not (path / "tokenizer_config.json").is_file():
        return ""
    template = _read_json(path / "tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = next((each["template"] for each in template if each.get("name") == "default"), "")
    return str(template)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no {str(path)!r}; give a folder that holds one.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not valid JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} holds no JSON object; download it again.")
    return content


# -- Export ------------------------------------------------------------------------------------------------------------


def export_run(run_dir: Path, target: Path, which: Literal["best", "last"], dtype: str, max_shard_gb: float) -> None:
    """Write a run's parameters as .safetensors, with the files that Hugging Face's readers need.

    A run that was imported, or began from one that was, gets its family's names; others get nanochat's.

    Raises:
        InputError: ``target`` holds something already, or the model has a part that the format lacks.
    """
    check_free(target)
    if not max_shard_gb > 0:
        raise InputError(f"--max-shard-gb is {max_shard_gb}; it must be positive.")
    config = read_config(run_dir)
    source = _source_of(run_dir)
    source_config = _read_json(source / CONFIG_NAME) if source else None
    rows = nanochat_rows(config.model) if source_config is None else families.family_rows(config.model)
    step, params = read_params(run_dir, LanguageModel(config.model), which)
    with explain_full_disk(target):
        target.mkdir(parents=True, exist_ok=True)
        paths = table.write_params(params, rows, target, dtype, int(max_shard_gb * 2**30))
        if source is None or source_config is None:
            files: dict[str, str | bytes] = {
                name: (run_dir / name).read_bytes() for name in (TOKENIZER_NAME, CONFIG_NAME)
            }
        else:
            key = "torch_dtype" if "torch_dtype" in source_config else "dtype"
            files = _kept(source, source_config | {key: dtype})
        write_files(target, files)
    print(f"exported step {step} in {dtype}: {', '.join(path.name for path in paths)}; wrote {target}")


def _source_of(run_dir: Path) -> Path | None:
    """The kept files of the import that a run, or the first of those that it began from, was made by."""
    seen: set[Path] = set()
    while run_dir.is_dir() and run_dir.resolve() not in seen:
        if (run_dir / SOURCE_NAME / CONFIG_NAME).is_file():
            return run_dir / SOURCE_NAME
        seen.add(run_dir.resolve())
        origin = read_config(run_dir).train.init_from
        if not origin:
            return None
        run_dir = Path(origin)
    return None
