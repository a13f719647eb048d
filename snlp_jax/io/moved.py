"""Runs that move: what a run needs lies in its folder, and paths in its config are hints of where the rest stood.

A run keeps its tokenizer, its parameters and, where it came from other people's weights, the files that tell how these
are written; so do the runs that begin from it. Its text lies elsewhere, and may be found again where it stands to the
run's folder as it did. Its origin is read when the run begins, and never again.
"""

import dataclasses
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from snlp_jax.config import Config, from_json
from snlp_jax.config.data import SEVERAL
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CONFIG_NAME
from snlp_jax.io.written import tell_of_changes

TEMPLATE_NAME = "chat_template.jinja"
SOURCE_NAME = "source"
"""A folder of what was imported, but for its weights: an export gives it back."""


def read_run_text(run_dir: Path, name: str) -> str:
    """A file that every run has.

    Raises:
        InputError: the directory does not exist, holds no run, or the file cannot be read.
    """
    if not run_dir.is_dir():
        raise InputError(f"run directory {str(run_dir)!r} does not exist; train first or name another.")
    path = run_dir / name
    if not path.is_file():
        raise InputError(f"run directory {str(run_dir)!r} holds no {name}; name one that training has written.")
    try:
        content = path.read_bytes()
        tell_of_changes(run_dir, name, content)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is damaged ({error.reason}); restore it from a copy.") from error
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}); change its permissions.") from error


def read_saved(run_dir: Path) -> Config:
    """The config of a run, with its text and its origin where they are found now.

    Raises:
        InputError: see :func:`read_run_text`; or it is no config.
    """
    try:
        config: Config = from_json(read_run_text(run_dir, CONFIG_NAME))
    except InputError as error:
        if str(run_dir) in str(error):
            raise
        raise InputError(f"{str(run_dir / CONFIG_NAME)!r}: {error}") from error
    data, train = config.data, config.train
    find = lambda path: _found(path, config.run_path, run_dir)  # noqa: E731
    mixture = tuple("@".join((find(entry.rpartition("@")[0]), entry.rpartition("@")[2])) for entry in data.mixture)
    source = SEVERAL.join(each if each == "builtin" else find(each) for each in data.source.split(SEVERAL))
    origin = find(train.init_from) if train.init_from else ""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, source=source, mixture=mixture),
        train=dataclasses.replace(train, init_from=origin),
    )


def _found(path: str, saved_run: Path, run_dir: Path) -> str:
    """A path of a config: from the run's folder as it stood to it when it was saved, or as it is written; as it is
    written too where there is neither."""
    written = os.path.expanduser(path)
    if os.path.isabs(written) != saved_run.is_absolute():
        return path  # relative to a folder that nobody has noted
    beside = os.path.normpath(os.path.join(run_dir.absolute(), os.path.relpath(written, saved_run)))
    places = (written, beside) if os.path.isabs(written) else (beside, written)
    found = next(filter(_is_there, places), written)
    return path if found == written or os.path.realpath(found) == os.path.realpath(written) else found


def _is_there(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None)


def lineage(run_dir: Path) -> Iterator[Path]:
    """A run, the one that it began from, and so on; the last may be gone."""
    seen: set[Path] = set()
    while run_dir.resolve() not in seen:
        yield run_dir
        seen.add(run_dir.resolve())
        origin = read_saved(run_dir).train.init_from if run_dir.is_dir() else ""
        if not origin:
            return
        run_dir = Path(origin)


def source_folder(run_dir: Path) -> Path | None:
    """The kept files of the import that a run, or the first of those that it began from, was made by."""
    folders = (each / SOURCE_NAME for each in lineage(run_dir))
    folder = next((folder for folder in folders if (folder / CONFIG_NAME).is_file()), None)
    for path in folder.glob("*") if folder is not None else ():
        tell_of_changes(path.parents[1], f"{SOURCE_NAME}/{path.name}", path.read_bytes())
    return folder


def kept_files(run_dir: Path) -> dict[str, str | bytes]:
    """What a run that is made of this one keeps of an import: names in its directory, and contents."""
    for each in lineage(run_dir):
        paths = [each / TEMPLATE_NAME, *sorted((each / SOURCE_NAME).glob("*"))]
        if found := {str(path.relative_to(each)): path.read_bytes() for path in paths if path.is_file()}:
            return dict(found)
    return {}


def lost_origin(run_dir: Path) -> Path | None:
    """The first of those that a run began from which is not where it was."""
    return next((each for each in lineage(run_dir) if not each.is_dir()), None)
