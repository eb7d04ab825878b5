"""What a token store holds: its sources, read from their manifests and indexes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from neo.data import store, store_files
from neo.data.inspect_text import columns, count
from neo.data.progress import Waiting
from neo.errors import InputError

SAMPLE_LENGTH = 512  # ours: tokens of a sample window, where nothing says how the store will be cut


def open_store(path: str) -> tuple[dict[str, Any], str]:
    """(the sources of a store or the one source that `path` is, the folder with the tokenizer).

    Raises InputError where there is neither, and as `open_source`.
    """
    if store.read_manifest(path) is not None:
        parent = path.rstrip("/").rpartition("/")[0]
        source = store.open_source(path)
        return {source.name: source}, parent or (os.curdir if not path.startswith("/") else "/")
    if not store_files.is_url(path) and os.path.isfile(path):
        cure = f"a plan is inspected with --config={path}" if path.endswith(".py") else "give a folder"
        raise InputError(f"{path}: a file, and no token store; {cure}")
    names = store.list_sources(path) if store_files.list_sizes(path) is not None else []
    if not names:
        store.open_source(path)  # says what is wrong
        raise InputError(f"{path}: not a token store")
    return {name: store.open_source(store_files.join(path, name)) for name in names}, path


def describe(source: Any) -> dict[str, Any]:
    """One source as plain values. `bytes_per_token` counts no end-of-document tokens, for they stand for no text."""
    train, held = source.split("train"), source.split("validation")
    tokens = train.num_tokens + held.num_tokens
    # The index of a packed source counts pieces and padding.
    documents = source.prepare.get("packing", {}).get("documents", train.num_documents)
    text_tokens = tokens - documents - held.num_documents
    record = {kind: {reason: entry["documents"] for reason, entry in source.prepare.get(kind, {}).items()}
              for kind in ("skipped", "repaired")}
    return {"path": source.path, "documents": documents, "tokens": train.num_tokens, "bytes": train.num_bytes,
            "bytes_per_token": (train.num_bytes + held.num_bytes) / max(text_tokens, 1), "shards": len(train.shards),
            "tokens_per_document": train.num_tokens / max(documents, 1),
            "held_out": {"documents": held.num_documents, "tokens": held.num_tokens, "share": held.num_tokens / max(tokens, 1)},
            "vocab_size": source.vocab_size, "eod_id": source.eod_id, "dtype": source.dtype, "layout": source.layout,
            "tokenizer_sha256": source.tokenizer_sha256, "packing": dict(source.packing) if source.packing else None,
            **record, "unreadable": list(source.prepare.get("unreadable", ()))}


def store_lines(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sources that `describe` gave, one line each, and what is odd about them."""
    rows = [("source", "documents", "tokens", "a document", "bytes/token", "held out", "vocabulary", "tokenizer", "packing",
             "skipped", "repaired")]
    for name, one in sources.items():
        packing, held = one["packing"], one["held_out"]
        rows.append((name, f"{one['documents']:,}", count(one["tokens"]), f"{one['tokens_per_document']:,.0f}",
                     f"{one['bytes_per_token']:.2f}", f"{held['documents']:,} ({held['share']:.2%})", f"{one['vocab_size']:,}",
                     one["tokenizer_sha256"][:12], f"{packing['kind']}, T = {packing['seq_len']:,}" if packing else "none",
                     f"{sum(one['skipped'].values()):,}", f"{sum(one['repaired'].values()):,}"))
    lines = columns(rows, left=(0, 7, 8))
    for name, one in sources.items():
        lines += [f"{name}: {kind} {documents:,}: {reason}" for kind in ("skipped", "repaired")
                  for reason, documents in one[kind].items()]
        if one["unreadable"]:
            lines.append(f"{name}: {len(one['unreadable'])} inputs could not be read: {'; '.join(one['unreadable'][:3])}")
    if len({one["tokenizer_sha256"] for one in sources.values()}) > 1:
        lines.append("the sources were prepared with different tokenizers: no run can mix them")
    return lines


def verify_all(sources: Mapping[str, Any]) -> None:
    """Read every file of the sources and compare its SHA-256; InputError naming the first that differs in each source."""
    wrong = []
    for name, source in sources.items():
        try:
            with Waiting(f"reading every file of {name}"):
                store.verify(source)
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("; ".join(wrong))
