"""`neo.convert to-gguf`: a GGUF file for llama.cpp from any checkpoint; the writer is neo/convert/gguf.py."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import neo
from neo.cli import Namespace
from neo.convert import endings
from neo.convert.gguf import write_gguf
from neo.convert.output import check_place, short_digest
from neo.convert.source import Source, open_source
from neo.data.progress import Progress, say
from neo.errors import InputError
from neo.extras import need


def run(args: Namespace) -> None:
    """Write the file, unless this very conversion is there already."""
    if not args.out.endswith(".gguf"):
        raise InputError(f"{args.out}: the output is a file whose name ends in .gguf")
    source = open_source(args.checkpoint)
    out = check_place(args.out, [source.path])
    identity = f"{short_digest(source.digest)} as {args.type} {args.gguf_arch} by neo {neo.__version__}"
    if out.is_file() and source_of_file(out) == identity:
        say(f"{out} is finished already: nothing to do")
    else:
        write(source, out, args.type, args.gguf_arch, identity, args.overwrite)
    print(endings.after_gguf(out, args.checkpoint))


def write(source: Source, out: Path, kind: str, arch: str, identity: str, overwrite: bool = False) -> None:
    """Write the file and say what its readers should know."""
    if source.tokenizer is None:
        raise InputError(f"{source.path} has no tokenizer, and a GGUF file holds one; put its files into the folder")
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        seen = 0

        def progress(done: int, total: int) -> None:
            nonlocal bar, seen
            bar = bar or stack.enter_context(Progress(f"{source.name} as {kind}", total))
            bar.advance(done - seen)
            seen = done

        written = write_gguf(source.weights, source.tokenizer, out, type=kind, arch=arch, name=source.name, source=identity,
                             chat_template=chat_template(source), overwrite=overwrite, progress=progress)
    say(f"architecture {written.arch}, {written.type}, context {written.context_length}")
    for note in written.notes:
        say(note)


def source_of_file(path: Path) -> str:
    """What `write_gguf` was told the file is made of; empty for another program's file."""
    gguf = need("gguf", extra="gguf")
    try:
        field = gguf.GGUFReader(path).fields.get("neo.source")
        return bytes(field.parts[field.data[0]]).decode() if field is not None else ""
    except (ValueError, KeyError, IndexError, OSError):   # not a GGUF file, or one that was cut short
        return ""


def chat_template(source: Source) -> str:
    """The chat template that came with the tokenizer; empty when there is none."""
    files: dict[str, Any] = {**source.tokenizer.files(), **source.passed_on} if source.tokenizer is not None else {}
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    try:
        found = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    except (ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""
