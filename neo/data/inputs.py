"""Finding the input files that a user named: files, folders, globs and Hugging Face data sets."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Sequence

from neo.errors import InputError

KINDS = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
ACCEPTED = ".txt, .jsonl (both also .gz or .zst) and .parquet"
TEXT_PER_COMPRESSED_BYTE = 4  # ours: gzip and zstd make text 3 to 5 times smaller; only sizes of work depend on it


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One input. `name` is the path relative to what the user named; `rows` is known for hf only."""

    name: str
    path: str
    kind: str
    compression: str = ""
    size: int = 0
    modified: int = 0
    rows: int = 0

    @property
    def text_size(self) -> int:
        """Estimated bytes of text: the size of the work, the same on every machine."""
        return self.size * (TEXT_PER_COMPRESSED_BYTE if self.compression else 1)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All inputs, sorted by name (then as given); how many files were of other types; what could not be listed."""

    files: tuple[InputFile, ...]
    ignored: int
    unreadable: tuple[str, ...]

    @property
    def text_size(self) -> int:
        """Estimated bytes of text of all files."""
        return sum(file.text_size for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 over names and sizes, in order."""
        lines = "".join(f"{file.size} {file.name}\n" for file in self.files)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def find_inputs(arguments: Sequence[str]) -> Inputs:
    """Resolve what the user named. Raises InputError: nothing there, nothing matches, no readable type."""
    if not arguments:
        raise InputError("no input: name files, folders, globs or hf:NAME")
    files: list[InputFile] = []
    unreadable: list[str] = []
    ignored = 0
    for argument in arguments:
        if argument.startswith("hf:"):
            files.append(_hf(argument))
            continue
        if "://" in argument:
            raise InputError(f"{argument}: inputs are read from local files and hf:NAME; copy it here first")
        if os.path.isdir(argument):
            found, other = _walk(argument, unreadable)
            if not found and not unreadable:
                raise InputError(f"{argument}: no {ACCEPTED} files in this folder ({other} files of other types)")
            files += found
            ignored += other
        elif os.path.exists(argument):
            files.append(_file(os.path.basename(argument), argument, named=True))
        else:
            found, other = _glob(argument, unreadable)
            files += found
            ignored += other
    unique: dict[str, InputFile] = {}
    for file in files:
        unique.setdefault(file.path if file.kind == "hf" else os.path.realpath(file.path), file)
    # Sorting is stable: equal names stay in the order in which their inputs were given.
    return Inputs(tuple(sorted(unique.values(), key=lambda file: file.name)), ignored, tuple(sorted(unreadable)))


def file_kind(name: str) -> tuple[str, str] | None:
    """(kind, compression) by the file's name; None for types that are not read."""
    stem, ending = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(stem)[1]
    kind = KINDS.get(ending)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def _file(name: str, path: str, named: bool = False) -> InputFile | None:
    kind = file_kind(name)
    if kind is None:
        if named:
            raise InputError(f"{path}: this type is not read; known are {ACCEPTED}")
        return None
    try:
        status = os.stat(path)
    except OSError as error:
        # A dangling link: reading it later reports it with the other unreadable ones.
        if named:
            raise InputError(f"{path}: {error.strerror}") from error
        return InputFile(name, path, *kind)
    # File names that are not UTF-8 must still give ids that can be written.
    clean = name.replace(os.sep, "/").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return InputFile(clean, path, *kind, size=status.st_size, modified=status.st_mtime_ns)


def _walk(folder: str, unreadable: list[str], prefix: str = "") -> tuple[list[InputFile], int]:
    files: list[InputFile] = []
    ignored = 0

    def failed(error: OSError) -> None:
        unreadable.append(f"{os.path.relpath(error.filename, folder)}: {error.strerror}")

    for base, folders, names in os.walk(folder, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            path = os.path.join(base, name)
            file = _file(prefix + os.path.relpath(path, folder), path)
            if file is None:
                ignored += 1
            else:
                files.append(file)
    return files, ignored


def _glob(pattern: str, unreadable: list[str]) -> tuple[list[InputFile], int]:
    if not glob.has_magic(pattern):
        raise InputError(f"{pattern}: no such file or folder")
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise InputError(f"{pattern}: matches nothing")
    # Ids are relative to the part of the pattern before its first wildcard.
    fixed = pattern[:next(i for i in range(len(pattern)) if glob.has_magic(pattern[:i + 1]))]
    root = os.path.dirname(fixed) or "."
    files: list[InputFile] = []
    ignored = 0
    for match in matches:
        if os.path.isdir(match):
            if "**" not in pattern:  # ** lists what is inside on its own
                found, other = _walk(match, unreadable, os.path.relpath(match, root) + "/")
                files += found
                ignored += other
            continue
        file = _file(os.path.relpath(match, root), match)
        if file is None:
            ignored += 1
        else:
            files.append(file)
    if not files:
        raise InputError(f"{pattern}: matches {ignored} files, none of them {ACCEPTED}")
    return files, ignored


def _hf(argument: str) -> InputFile:
    from neo.data.documents import hf_dataset

    spec = argument.removeprefix("hf:")
    if not spec:
        raise InputError("hf: needs the name of a data set: hf:NAME[/SUBSET][:SPLIT]")
    dataset = hf_dataset(spec)
    name, _, split = spec.partition(":")
    if name.startswith((".", "/")):  # a local folder: where it lies must not be part of the ids
        name = os.path.basename(os.path.abspath(name))
    return InputFile(f"hf/{name}:{split or 'train'}", spec, "hf", size=int(dataset.data.nbytes), rows=len(dataset))
