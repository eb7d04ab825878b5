"""The demo's corpus: the interpreter's own standard library, as two sources, `code` and `prose`.

`code` are the .py files; `prose` the docstrings and comments of the same files, one document per file, under the same
id, so that both fall on the same side of the held-out split; the language reference that `help()` prints; and the text
files among them. Tests, generated tables and foreign packages are left out. The text (PSF licence) stays on this
machine.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from typing import Any

from neo.data import held_out, tokenizer_commands
from neo.data.documents import ReadOptions
from neo.data.preparation import Request, prepare
from neo.data.prepare import DEMO_VOCAB_SIZE
from neo.data.progress import amount, say
from neo.data.store_writer import write_json
from neo.data.tokenizer_training import Corpus
from neo.errors import InputError

FORMAT_VERSION = 1
VOCAB_SIZE = DEMO_VOCAB_SIZE
VALIDATION = 0.03  # ours: the corpus is small, 0.1 % would be a handful of documents
CAPS = {"code": 8_000_000, "prose": 4_000_000}  # ours: bytes; enough for the demo's few million tokens of training
SMALLEST_CORPUS = 1_000_000  # ours: some systems ship the library zipped or in part
SMALLEST_DOCUMENT = 200  # ours: characters
# Tests would be half of the corpus; encodings are near-identical tables; the others are not the library.
LEFT_OUT = {"test", "tests", "idle_test", "testdata", "site-packages", "dist-packages", "__pycache__", "encodings",
            "_bundled", "pydoc_data", "__phello__"}
TOPICS = "pydoc_data/topics.py"


def library_files(root: str, ending: str) -> Iterator[tuple[str, str]]:
    """(id, text) of the library's files of one type, in sorted order; the id is the path with slashes."""
    for base, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT and not name.startswith("config-"))
        for name in sorted(names):
            if not name.endswith(ending) or name.startswith("_sysconfigdata"):
                continue
            path = os.path.join(base, name)
            try:
                with open(path, encoding="utf-8", newline="") as file:
                    text = file.read()
            except (OSError, UnicodeDecodeError):
                continue
            yield os.path.relpath(path, root).replace(os.sep, "/"), text.replace("\r\n", "\n")


def prose_of(name: str, source: str) -> str:
    """The readable part of a Python file: its docstrings and blocks of comments, in order, under the module's name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""  # templates of lib2to3 and the like are not Python 3
    parts: list[tuple[int, str]] = []
    in_strings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.end_lineno > node.lineno:
            in_strings.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and isinstance(node, ast.Module):
                parts.append((0, text))
            elif text:
                parts.append((node.lineno, f"{node.name}\n\n{text}"))
    parts += _comment_blocks(source, in_strings)
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return "\n\n".join([module, *(text for _, text in sorted(parts))]) + "\n"


def _comment_blocks(source: str, in_strings: set[int]) -> Iterator[tuple[int, str]]:
    """(line, text) of runs of three or more comment lines, without their number signs."""
    lines: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""], 1):
        line = line.strip()
        if line.startswith("#") and number not in in_strings:
            lines.append(line.lstrip("#").removeprefix(" "))
            continue
        if len(lines) >= 3:
            yield number - len(lines), _tidy(lines)
        lines = []


def _tidy(lines: list[str]) -> str:
    text = "\n".join("" if re.fullmatch(r"[-=#*~_ ]*", line) else line for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def topics() -> Iterator[tuple[str, str]]:
    """(id, text) of the language reference behind `help('assert')` and the like; nothing where it is missing."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError:
        return
    for name in sorted(found):
        yield f"{TOPICS}#{name}", found[name].strip() + "\n"


def collect(root: str) -> dict[str, list[tuple[str, str]]]:
    """Source -> documents (id, text), capped and sorted by id. Raises InputError where too little is found."""
    code = [(name, text) for name, text in library_files(root, ".py") if len(text) >= SMALLEST_DOCUMENT]
    prose = [*((name, prose_of(name, text)) for name, text in code), *library_files(root, ".txt"), *topics()]
    prose = [(name, text) for name, text in prose if len(text) >= SMALLEST_DOCUMENT]
    found = {"code": _cap(code, CAPS["code"]), "prose": _cap(prose, CAPS["prose"])}
    size = sum(len(text.encode()) for documents in found.values() for _, text in documents)
    if size < SMALLEST_CORPUS or not all(found.values()):
        raise InputError(f"{root}: only {amount(size)} of the standard library found there (at least "
                         f"{amount(SMALLEST_CORPUS)} needed; zipped or minimal installation?); use another python3, or "
                         "your own text: python -m neo.data.prepare INPUT...")
    return found


def _cap(documents: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """As many documents as fit into `limit` bytes, chosen by a hash of their ids; in order of their ids."""
    kept: list[tuple[str, str]] = []
    for name, text in sorted(documents, key=lambda item: held_out.shuffle_key(0, item[0])):
        limit -= len(text.encode())
        if limit < 0:
            break
        kept.append((name, text))
    return sorted(kept)


def write_corpus(folder: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Write `<folder>/corpus/<source>.jsonl` and `<folder>/corpus.json` (versions, sizes, SHA-256), unless they exist.

    A corpus that another Python version made is kept: the store beside it was made from it.
    """
    record_path = os.path.join(folder, "corpus.json")
    record = _read_record(record_path)
    paths = {source: os.path.join(folder, "corpus", f"{source}.jsonl") for source in CAPS}
    if record and not overwrite and all(_size(path) == record["sources"][source]["file_bytes"]
                                        for source, path in paths.items()):
        if record["python"] != platform.python_version():
            say(f"{folder}: made from the standard library of Python {record['python']}; remove the folder to make it "
                f"from Python {platform.python_version()}")
        return record
    root = sysconfig.get_paths()["stdlib"]
    say(f"collecting the demo's text from {root}")
    found = collect(root)
    os.makedirs(os.path.join(folder, "corpus"), exist_ok=True)
    record = {"version": FORMAT_VERSION, "python": platform.python_version(),
              "implementation": sys.implementation.name, "sources": {}}
    whole = hashlib.sha256()
    for source, documents in found.items():
        content = "".join(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n"
                          for name, text in documents).encode()
        digest = hashlib.sha256(content)
        whole.update(digest.digest())
        temporary = f"{paths[source]}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, paths[source])
        record["sources"][source] = {"documents": len(documents), "file_bytes": len(content),
                                     "text_bytes": sum(len(text.encode()) for _, text in documents),
                                     "sha256": digest.hexdigest()}
    record["sha256"] = whole.hexdigest()
    write_json(record_path, record)
    return record


def prepare_demo(store: str, *, workers: int = 0, overwrite: bool = False) -> list[tuple[dict[str, Any], bool]]:
    """Corpus, tokenizer and both sources of the demo under `store`; (manifest, was there already) of each source.

    Can be interrupted anywhere and called again; when all is there it takes a second.
    """
    record = write_corpus(store, overwrite=overwrite)
    say(f"demo corpus: Python {record['python']}, sha256 {record['sha256']}")
    paths = tuple(os.path.join(store, "corpus", f"{source}.jsonl") for source in CAPS)
    options = ReadOptions(id_field="id")
    corpus = Corpus(paths, options, VALIDATION)
    tokenizer, _, there = tokenizer_commands.train_into(
        os.path.join(store, "tokenizer"), corpus, VOCAB_SIZE, "default", overwrite=overwrite)
    return [prepare(Request((path,), store, source, tokenizer, options, VALIDATION, workers=workers,
                            overwrite=overwrite or not there))
            for source, path in zip(CAPS, paths, strict=True)]


def _read_record(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        return record if record["version"] == FORMAT_VERSION and set(record["sources"]) == set(CAPS) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else -1
