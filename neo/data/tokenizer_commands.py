"""The verbs of `python -m neo.data.tokenizer`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from neo.cli import Namespace
from neo.data import tokenizer_training as training
from neo.data.documents import ReadOptions
from neo.data.progress import Waiting, amount
from neo.data.store_writer import write_json
from neo.data.tokenizer import JSON_FILE, META_FILE, MODEL_FILE, AnyTokenizer, Tokenizer, from_model, read_file
from neo.data.tokenizer_hf import KEPT, from_hf_folder
from neo.data.workers import Workers
from neo.errors import InputError, StoppedForPerson

TRAINING_FILE = "training.json"


def train_into(folder: str, corpus: training.Corpus, vocab_size: int, preset: str, *,
               overwrite: bool = False) -> tuple[Tokenizer, list[str], bool]:
    """Train a tokenizer into `folder`; returns it, what could not be read, and whether it was there already.

    An existing tokenizer trained with the same settings on inputs of the same names and sizes is left as it is;
    any other raises InputError unless `overwrite`.
    """
    if preset not in training.PRESETS:
        raise InputError(f"--preset={preset}: choose one of {', '.join(training.PRESETS)}")
    if vocab_size < 1:
        raise InputError(f"--vocab_size={vocab_size}: give a positive number")
    if not 0 <= corpus.validation < 1:
        raise InputError(f"--validation={corpus.validation}: give a share of the documents, 0 <= share < 1")
    groups = corpus.find()
    facts = {"vocab_size": vocab_size, "preset": preset, "validation": corpus.validation,
             "sample_bytes": corpus.sample_bytes, "text_field": corpus.options.text_field,
             "id_field": corpus.options.id_field, "on_bad_text": corpus.options.on_bad_text,
             "inputs": [group.digest for group in groups]}
    record = os.path.join(folder, TRAINING_FILE)
    if _is_there(folder):
        existing, before = Tokenizer.load(folder), _record(record)
        if before.get("arguments") == facts and not before.get("unreadable") and (
                before.get("tokenizer_sha256") == existing.sha256):
            return existing, [], True
        if not overwrite and before.get("arguments") != facts:
            raise InputError(f"{folder}: there is another tokenizer already; choose another --out, or replace it with "
                             "--overwrite")
    size = sum(group.text_size for group in groups)
    if 0 < corpus.sample_bytes < size:
        size = corpus.sample_bytes
    with Waiting(f"training a tokenizer of {vocab_size} pieces on about {amount(size)} of text"):
        # In a process of its own: Ctrl-C works while the C++ trainer runs, and its memory is given back.
        with Workers(1, corpus, own_process=True) as workers:
            [(_, (tokenizer, unreadable))] = workers.map(training.train_on, [(vocab_size, preset)])
    os.makedirs(folder, exist_ok=True)
    _clear(folder)
    write_json(record, {"arguments": facts, "tokenizer_sha256": tokenizer.sha256, "unreadable": unreadable})
    tokenizer.save(folder)
    return tokenizer, unreadable, False


def run_train(args: Namespace) -> None:
    """Train, print what was made."""
    corpus = training.Corpus(args.input, ReadOptions(args.text_field, args.id_field, args.on_bad_text), args.validation,
                             args.sample_bytes)
    tokenizer, unreadable, there = train_into(args.out, corpus, args.vocab_size, args.preset, overwrite=args.overwrite)
    print(f"{args.out} is finished already: nothing to do" if there else f"Wrote {args.out}")
    _describe(tokenizer)
    print(f"Next: python -m neo.data.tokenizer report {shlex.join((args.out, *args.input))}")
    if unreadable:
        raise StoppedForPerson(f"{len(unreadable)} inputs could not be read, the others were used: "
                               f"{'; '.join(unreadable[:5])}")


def run_import(args: Namespace) -> None:
    """Check and copy a SentencePiece model or the tokenizer of a Hugging Face folder."""
    tokenizer = _imported(args.file, args.eod_id if "eod_id" in args.given else None, args.extra_token)
    there = _is_there(args.out)
    if there:
        there = Tokenizer.load(args.out).sha256 == tokenizer.sha256
        if not there and not args.overwrite:
            raise InputError(f"{args.out}: there is another tokenizer already; choose another --out, or replace it "
                             "with --overwrite")
    if not there:
        _clear(args.out)
        tokenizer.save(args.out)
    print(f"{args.out} is finished already: nothing to do" if there else f"Wrote {args.out}")
    _describe(tokenizer)
    print(f"Next: python -m neo.data.prepare INPUT... --tokenizer={args.out} --out=DIR --source=NAME")


def _imported(path: str, eod_id: int | None, extra_tokens: Sequence[str]) -> AnyTokenizer:
    """The tokenizer of a file or folder, with another end of documents and more tokens where they are given."""
    if eod_id is not None and eod_id < 0:
        raise InputError(f"--eod_id={eod_id}: a token id is 0 or more")
    if os.path.isfile(path) and os.path.basename(path) != JSON_FILE:
        return from_model(read_file(path), path, eod_id=eod_id, extra_tokens=extra_tokens)
    folder = path[:-len(JSON_FILE)] or "." if os.path.isfile(path) else path
    # The id goes along, because without it a folder that does not tell its end of documents is refused.
    tokenizer = (from_hf_folder(folder, eod_id=eod_id) if os.path.isfile(os.path.join(folder, JSON_FILE)) else
                 Tokenizer.load(folder))
    if isinstance(tokenizer, Tokenizer):
        return from_model(tokenizer.model, path, eod_id=tokenizer.eod_id if eod_id is None else eod_id,
                          bos_id=tokenizer.bos_id, extra_tokens=extra_tokens or tokenizer.extra_tokens,
                          add_bos=tokenizer.add_bos)
    if extra_tokens:
        raise InputError(f"--extra_token={extra_tokens[0]}: a tokenizer.json has its own added tokens; add it there, or "
                         f"give {MODEL_FILE} as the file")
    return tokenizer


def run_report(args: Namespace) -> None:
    """Measure a tokenizer on a corpus."""
    tokenizer = Tokenizer.load(args.tokenizer)
    corpus = training.Corpus(args.input, ReadOptions(args.text_field, args.id_field, args.on_bad_text), 0.0)
    with Waiting("reading and tokenizing"):
        result = training.report(tokenizer, corpus)
    if args.json:
        json.dump(result, sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        failures = f"{result['round_trip_failures']:,} of {result['documents']:,} documents"
        if result["first_round_trip_failure"]:
            failures += f" (first: {result['first_round_trip_failure']})"
        print(f"vocabulary           {result['vocab_size']:,} ids, {result['vocabulary_used']:.1%} of them used")
        print(f"text                 {result['documents']:,} documents, {amount(result['bytes'])}")
        print(f"tokens               {result['tokens']:,}")
        print(f"bytes per token      {result['bytes_per_token']:.3f}")
        print(f"byte pieces          {result['byte_share']:.2%} of all tokens")
        print(f"round trip fails     {failures}")
    if result["unreadable"]:
        raise StoppedForPerson(f"{len(result['unreadable'])} inputs could not be read: "
                               f"{'; '.join(result['unreadable'][:5])}")


def _describe(tokenizer: AnyTokenizer) -> None:
    print(f"    vocabulary {tokenizer.vocab_size}, end of document is id {tokenizer.eod_id} "
          f"({tokenizer.piece(tokenizer.eod_id)}), sha256 {tokenizer.sha256}")


def _is_there(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in (MODEL_FILE, JSON_FILE))


def _clear(folder: str) -> None:
    """Remove the files of another tokenizer; those without which the folder is none go first."""
    for name in (MODEL_FILE, JSON_FILE, META_FILE, *KEPT):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def _record(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
