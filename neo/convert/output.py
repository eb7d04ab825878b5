"""What a conversion writes, so that it can be interrupted anywhere: OUT.partial, then one rename.

OUT.partial and OUT hold `neo_conversion.json` with what they were made from and how. Started again, the same command goes on in
OUT.partial, or says that OUT is finished; anything else that stands at OUT is refused unless --overwrite.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from neo.errors import InputError, StoppedForPerson

FACTS_FILE = "neo_conversion.json"
SMALL = 1 << 20
# Any of these says that a folder is a model somebody exported, which --overwrite may replace as a whole.
_MODEL_FILES = (FACTS_FILE, "config.json", "model.safetensors", "model.safetensors.index.json", "params")


def partial_of(out: Path) -> Path:
    """Where OUT is written until it is complete."""
    return out.with_name(out.name + ".partial")


def check_place(out: str, sources: Sequence[str]) -> Path:
    """OUT as a local path. InputError: an object store, or in the way of what is to be read (checkpoints, folders)."""
    if "://" in out:
        raise InputError(f"{out}: the output is a local path; copy it to the object store from there")
    path = Path(os.path.abspath(out))
    for source in (Path(os.path.abspath(one)) for one in sources if "://" not in one):
        kept = source.parent if source.parent.name == "checkpoints" else source   # of a run, which would take it for its own
        if path == kept or kept in path.parents or path in kept.parents:
            raise InputError(f"{out} is the same as, or lies in, or holds what is to be read ({kept}); give another output")
    return path


def is_finished(out: Path, facts: Mapping[str, Any], overwrite: bool, check: Callable[[Path], object]) -> bool:
    """Whether OUT was made by this very conversion and is still whole.

    Args:
        check: raises InputError when OUT is damaged.

    Raises InputError when something else is there, or a damaged output, and may not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    found = read_facts(out / FACTS_FILE) if out.is_dir() else {}
    if found == dict(facts):
        try:
            check(out)
        except InputError as error:
            if overwrite:
                return False
            raise InputError(f"{out} was finished, and is damaged since ({error}); --overwrite writes it again") from None
        return True
    if not overwrite:
        why = _difference(found, facts) if out.is_dir() else "it is a file"
        raise InputError(f"{out} is not empty ({why}); choose another output, or replace it with --overwrite")
    if out.is_dir() and not any((out / name).exists() for name in _MODEL_FILES):
        raise InputError(f"{out} does not look like an exported model; --overwrite replaces only those, remove it yourself")
    return False


def open_partial(out: Path, facts: Mapping[str, Any], overwrite: bool = False) -> tuple[Path, bool]:
    """OUT.partial, ready to be written, and whether it goes on with an earlier start of the same conversion.

    Raises InputError: OUT.partial is of another conversion (then --overwrite), or cannot be made.
    """
    partial = partial_of(out)
    resumed = False
    try:
        if partial.exists():
            found = read_facts(partial / FACTS_FILE)
            resumed = found == dict(facts)
            if not resumed:
                if not (overwrite or found or not any(partial.iterdir())):
                    raise InputError(f"{partial} is in the way, and not an unfinished conversion; remove it yourself")
                shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        if not resumed:
            write_file(partial / FACTS_FILE, json.dumps(facts, indent=1).encode() + b"\n")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{partial} cannot be written: {error.strerror}") from None
    return partial, resumed


def discard(partial: Path) -> None:
    """Remove an OUT.partial that can never be finished."""
    shutil.rmtree(partial, ignore_errors=True)


def finish(partial: Path, out: Path) -> None:
    """Put the complete OUT.partial in OUT's place; what was there before is removed only afterwards."""
    before = out.with_name(f"{out.name}.before-{os.getpid()}")
    if out.exists():
        os.replace(out, before)
    os.replace(partial, out)
    sync_folder(out.parent)
    if before.is_dir():
        shutil.rmtree(before)
    elif before.exists():
        before.unlink()


def write_file(path: Path, content: bytes) -> None:
    """A small file, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    with contextlib.suppress(OSError):   # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_room(out: Path, num_bytes: int, there: int = 0) -> None:
    """StoppedForPerson when the disk has less than is still to be written."""
    parent = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if num_bytes - there > free:
        raise StoppedForPerson(f"{out} needs {(num_bytes - there) / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB left; "
                               "nothing was written")


def read_facts(path: Path) -> dict[str, Any]:
    """neo_conversion.json, or what else holds the facts; empty when there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _difference(found: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    if not found:
        return "not an output of this command"
    names = [name for name in facts if found.get(name) != facts[name]]
    return "made before with another " + ", ".join(names or sorted(set(found) - set(facts)) or ["neo"])


def content_digest(folder: str | epath.Path) -> str:
    """What tells one folder of weights from another without reading the weights.

    Names and sizes of all files, and what small JSON files say. The data files of a checkpoint have random names; those of a
    Hugging Face folder do not, so there the times of change count too.
    """
    digest, folder = hashlib.sha256(), epath.Path(folder)
    for path in sorted(_files_of(folder)):
        facts, status = [path.relative_to(folder).as_posix()], path.stat()
        if path.suffix == ".json" and status.length < SMALL:
            facts.append(hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            facts += [status.length, status.mtime if path.suffix == ".safetensors" else 0]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def short_digest(text: str) -> str:
    """16 hex digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _files_of(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):   # caches of downloads, version control
            continue
        if path.is_dir():
            yield from _files_of(path)
        else:
            yield path
