"""Import other people's weights as a run, or export a run as .safetensors.

    python -m snlp_jax.model.convert SRC runs/llama       # a Hugging Face folder, a GGUF file, or org/model@revision
    python -m snlp_jax.model.convert base_checkpoints/d20 runs/d20 --tokenizer tokenizer.json     # nanochat
    python -m snlp_jax.model.convert runs/llama DST --export --dtype bfloat16

The run is as training leaves one, at step 0: eval.py, python -m snlp_jax.infer and --train.init-from read it. Beside it
lie the chat template (chat_template.jinja) and the files that an export gives back (source/).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from snlp_jax.cli.flags import parse
from snlp_jax.cli.made import check_free, write_run
from snlp_jax.config import Config, MeshConfig, ModelConfig
from snlp_jax.data.template import DEFAULT, named_templates
from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.data.turns import PlainFormat, chat_format
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CONFIG_NAME
from snlp_jax.io.files import explain_full_disk, write_files
from snlp_jax.io.moved import SOURCE_NAME, TEMPLATE_NAME, lost_origin, source_folder
from snlp_jax.io.progress import Progress
from snlp_jax.model import LanguageModel
from snlp_jax.model.convert import families, table
from snlp_jax.model.convert.nanochat import nanochat_rows
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.pretrained.load import import_model
from snlp_jax.pretrained.source import GENERATION_NAME, KEPT, read_json
from snlp_jax.run import TOKENIZER_NAME, read_config, read_params, read_tokenizer


@dataclass(frozen=True)
class Args:
    source: tyro.conf.Positional[str]
    """A folder as Hugging Face writes it; the hub's org/model or org/model@revision; a GGUF file; a nanochat checkpoint
    (.pt) or its folder; with --export a run directory."""
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


def import_run(source: str, target: Path, tokenizer: str = "", mesh: MeshConfig | None = None) -> None:
    """Make the run directory ``target`` of somebody's weights.

    Raises:
        InputError: ``target`` holds something already, or the source cannot be read; each with the reason.
    """
    check_free(target)
    is_spread = mesh is not None and mesh != MeshConfig()
    with Progress(f"reading {source}", 1):
        imported = import_model(source, tokenizer, make_mesh(mesh) if mesh is not None and is_spread else None)
    files: dict[str, str | bytes] = {TOKENIZER_NAME: imported.tokenizer.to_json()}
    files |= {f"{SOURCE_NAME}/{name}": content for name, content in imported.files.items()}
    if template := named_templates(imported.tokenizer.special.chat_template).get(DEFAULT):
        files[TEMPLATE_NAME] = template
    data = dataclasses.replace(Config().data, tokenizer=str(target.absolute() / TOKENIZER_NAME))
    run = Config(name=target.absolute().name, run_dir=str(target), model=imported.config, data=data)
    # Beside the parameters no more than one leaf, of which reading has held a copy too.
    leaves = jax.tree.leaves(imported.params)
    largest = -(-max(leaf.nbytes for leaf in leaves) // 10**9)
    with Progress(f"writing {target}", 1):
        write_run(target, run, imported.params, files, {}, concurrent_gb=largest)
    count = sum(leaf.size for leaf in leaves)
    name = imported.tokenizer.name
    print(f"imported {count:,} parameters in {imported.config.num_layers} layers, {name}; wrote {target}")


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
    config, tokenizer = read_config(run_dir), read_tokenizer(run_dir)
    source = source_folder(run_dir)
    rows = _nanochat_rows(run_dir, config.model) if source is None else families.family_rows(config.model)
    step, params = read_params(run_dir, LanguageModel(config.model), which)
    with explain_full_disk(target), Progress(f"writing {target}", 1):
        target.mkdir(parents=True, exist_ok=True)
        paths = table.write_params(params, rows, target, dtype, int(max_shard_gb * 2**30))
        files: dict[str, str | bytes] = {TOKENIZER_NAME: tokenizer.to_plain_json()}
        if source is None:
            files[CONFIG_NAME] = (run_dir / CONFIG_NAME).read_bytes()
        else:
            files |= _files_of(source, dtype)
            if config.train.init_from:
                files |= _tuned_files(files, tokenizer, is_chat=config.data.format == "chat")
        write_files(target, files)
    print(f"exported step {step} in {dtype}: {', '.join(path.name for path in paths)}; wrote {target}")


def _files_of(source: Path, dtype: str) -> dict[str, str | bytes]:
    """The kept files of an import."""
    files: dict[str, str | bytes] = {name: (source / name).read_bytes() for name in KEPT if (source / name).is_file()}
    config = read_json(source / CONFIG_NAME)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return files | {CONFIG_NAME: _write(config | {key: dtype})}


def _tuned_files(files: Mapping[str, str | bytes], tokenizer: Tokenizer, *, is_chat: bool) -> dict[str, str | bytes]:
    """Those of a run that was tuned: with the ends that it was taught, and how it was taught to converse."""
    generation = json.loads(files.get(GENERATION_NAME, "{}"))
    form = chat_format(tokenizer) if is_chat else PlainFormat(tokenizer)
    tuned: dict[str, str | bytes] = {GENERATION_NAME: _write(generation | {"eos_token_id": list(form.end_ids)})}
    return tuned | ({TEMPLATE_NAME: form.jinja()} if is_chat and isinstance(form, PlainFormat) else {})


def _write(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _nanochat_rows(run_dir: Path, config: ModelConfig) -> list[table.Row]:
    """Where tensors go that no import has names for.

    Raises:
        InputError: the model has parts that nanochat lacks; those that the run began from may be gone.
    """
    try:
        return nanochat_rows(config)
    except InputError as error:
        if (lost := lost_origin(run_dir)) is None:
            raise
        raise InputError(
            f"{str(run_dir)!r} began from {str(lost)!r}, which is not there, and what tells how its family is written "
            f"is gone with it; move that run back, or copy its folder {SOURCE_NAME!r} into {str(run_dir)!r}."
        ) from error
