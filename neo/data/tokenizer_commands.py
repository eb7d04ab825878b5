"""The verbs of `python -m neo.data.tokenizer`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from neo.cli import Namespace
from neo.data import tokenizer_report
from neo.data import tokenizer_training as training
from neo.data.documents import ReadOptions
from neo.data.progress import Waiting, amount
from neo.data.store_writer import write_json
from neo.data.tokenizer import JSON_FILE, META_FILE, MODEL_FILE, AnyTokenizer, Tokenizer, from_model, read_file, with_padding
from neo.data.tokenizer_hf import KEPT, from_hf_folder
from neo.data.workers import Workers
from neo.errors import InputError, StoppedForPerson

TRAINING_FILE = "training.json"


def train_into(folder: str, corpus: training.Corpus, vocab_size: int, preset: str, *, pad_vocab_to: int = 0,
               overwrite: bool = False) -> tuple[Tokenizer, list[str], bool]:
    """Train a tokenizer into `folder`; returns it, what could not be read, and whether it was there already.

    An existing tokenizer trained with the same settings on inputs of the same names and sizes is left as it is;
    any other raises InputError unless `overwrite`.
    """
    if preset not in training.PRESETS:
        raise InputError(f"--preset={preset}: choose one of {', '.join(training.PRESETS)}")
    if vocab_size < 1:
        raise InputError(f"--vocab_size={vocab_size}: give a positive number")
    corpus.check()
    groups = corpus.find()
    facts = {"vocab_size": vocab_size, "preset": preset, "validation": corpus.validation,
             "sample_bytes": corpus.sample_bytes, "text_field": corpus.options.text_field,
             "id_field": corpus.options.id_field, "on_bad_text": corpus.options.on_bad_text,
             "inputs": [group.digest for group in groups],
             # Later arguments only where they are used: records made before them stay good.
             **({"weights": list(corpus.weights)} if corpus.weights else {}),
             **({"pad_vocab_to": pad_vocab_to} if pad_vocab_to else {})}
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
            [(_, (tokenizer, unreadable, used))] = workers.map(training.train_on, [(vocab_size, preset, pad_vocab_to)])
    os.makedirs(folder, exist_ok=True)
    _clear(folder)
    total = sum(used)
    sample = [{"input": name, "bytes": size, "share": round(size / total, 6)}
              for name, size in zip(corpus.inputs, used, strict=True)]
    write_json(record, {"arguments": facts, "tokenizer_sha256": tokenizer.sha256, "unreadable": unreadable,
                        "sample": sample})
    tokenizer.save(folder)
    return tokenizer, unreadable, False


def run_train(args: Namespace) -> None:
    """Train, print what was made."""
    corpus = training.Corpus(args.input, ReadOptions(args.text_field, args.id_field, args.on_bad_text), args.validation,
                             args.sample_bytes, args.weights)
    tokenizer, unreadable, there = train_into(args.out, corpus, args.vocab_size, args.preset,
                                              pad_vocab_to=_padding(args), overwrite=args.overwrite)
    print(f"{args.out} is finished already: nothing to do" if there else f"Wrote {args.out}")
    _describe(tokenizer)
    for line in _sample_lines(corpus, _record(os.path.join(args.out, TRAINING_FILE)).get("sample") or []):
        print(line)
    print(f"Next: python -m neo.data.tokenizer report {shlex.join((args.out, *args.input))}")
    if unreadable:
        raise StoppedForPerson(f"{len(unreadable)} inputs could not be read, the others were used: "
                               f"{'; '.join(unreadable[:5])}")


def _sample_lines(corpus: training.Corpus, sample: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the sample consisted of, where it was weighted, and which inputs were too small for their weights."""
    if not corpus.weights or not sum(part["bytes"] for part in sample):
        return []
    shares = [weight / sum(corpus.weights) for weight in corpus.weights]
    lines = [f"    sample: {part['input']} {amount(part['bytes'])}, {part['share']:.1%} of the text (weight {share:.1%})"
             for part, share in zip(sample, shares, strict=True)]
    sizes = [group.text_size for group in corpus.find()]
    taken = training.quotas(sizes, corpus.weights, corpus.sample_bytes)
    fitting = training.largest_sample(sizes, corpus.weights)
    if sum(taken) > fitting * 1.001:
        small = [name for name, size, part, share in zip(corpus.inputs, sizes, taken, shares, strict=True)
                 if part >= size and part < share * sum(taken) * 0.999]
        lines.append(f"    {', '.join(small)}: all of it is less than its weight asks for; nothing is used twice, so the "
                     f"others make up for it. The weights hold with --sample_bytes={fitting} or less")
    return lines


def run_import(args: Namespace) -> None:
    """Check and copy a SentencePiece model or the tokenizer of a Hugging Face folder."""
    padding = _padding(args)
    tokenizer = _imported(args.file, args.eod_id if "eod_id" in args.given else None, args.extra_token)
    tokenizer = dataclasses.replace(tokenizer, add_bos=False) if args.no_bos else tokenizer
    tokenizer = with_padding(tokenizer, padding) if padding else tokenizer
    there = _is_there(args.out)
    if there:
        existing = Tokenizer.load(args.out)
        if existing.sha256 != tokenizer.sha256 and not args.overwrite:
            raise InputError(f"{args.out}: there is another tokenizer already; choose another --out, or replace it "
                             "with --overwrite")
        there = existing.files() == tokenizer.files()  # else it differs in its padding alone
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
                          add_bos=tokenizer.add_bos, padded_size=0 if extra_tokens else tokenizer.padded_size)
    if extra_tokens:
        raise InputError(f"--extra_token={extra_tokens[0]}: a tokenizer.json has its own added tokens; add it there, or "
                         f"give {MODEL_FILE} as the file")
    return tokenizer


def run_report(args: Namespace) -> None:
    """Measure a tokenizer on a corpus."""
    tokenizer = Tokenizer.load(args.tokenizer)
    options = ReadOptions(args.text_field, args.id_field, args.on_bad_text, group_field=args.language_field)
    corpus = training.Corpus(args.input, options, 0.0)
    with Waiting("reading and tokenizing"):
        result = tokenizer_report.report(tokenizer, corpus)
    if args.json:
        json.dump(result, sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        print("\n".join(tokenizer_report.lines(result)))
    if result["unreadable"]:
        raise StoppedForPerson(f"{len(result['unreadable'])} inputs could not be read: "
                               f"{'; '.join(result['unreadable'][:5])}")


def _padding(args: Namespace) -> int:
    """--pad_vocab_to, 0 where it is not given."""
    if "pad_vocab_to" in args.given and args.pad_vocab_to < 1:
        raise InputError(f"--pad_vocab_to={args.pad_vocab_to}: give 1 or more; the rows are the next multiple of it")
    return args.pad_vocab_to


def _describe(tokenizer: AnyTokenizer) -> None:
    begin = f", texts begin with {tokenizer.piece(tokenizer.bos_id)}" if tokenizer.add_bos else ""
    print(f"    vocabulary {tokenizer.vocab_size}, rows of the model {tokenizer.padded_vocab_size}, end of document is id "
          f"{tokenizer.eod_id} ({tokenizer.piece(tokenizer.eod_id)}){begin}, "
          f"sha256 {tokenizer.sha256}")


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
