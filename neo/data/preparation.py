"""Preparing one source: inputs to a shuffled, tokenized source folder with a held-out split.

The work goes on in `<store>/<source>/.work` and can be killed at any moment: finished pieces and buckets are found
again by names and digests, and the manifest, written last, makes the source complete.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from neo.data import held_out, shuffle, spill, store, store_writer
from neo.data.documents import Part, Unreadable, count_lines, group_parts, split_file
from neo.data.inputs import Inputs, find_inputs
from neo.data.progress import Progress, say
from neo.data.records import BAD_TEXT, ReadOptions, Tally
from neo.data.tokenizer import JSON_FILE, MODEL_FILE, AnyTokenizer, Tokenizer
from neo.data.transforms import Transforms
from neo.data.workers import Workers
from neo.errors import InputError, StoppedForPerson

WORK = ".work"
BUCKET_BYTES = 256 << 20  # ours: text per bucket; a worker holds one bucket's tokens in memory (about 150 MB)
SMALLEST_PIECE, LARGEST_PIECE = 1 << 20, 64 << 20  # ours: text per piece of work, 64 pieces where that fits
ONE_PROCESS_BYTES = 4 << 20  # ours: below this, starting processes takes longer than the work
SOURCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
SHARD_NAME = re.compile(r"(train|validation)-\d+-of-\d+\.(tokens|documents|extras|array_record)")
PACKINGS = ("concatenate", *store.PACKINGS)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to prepare. `workers` 0 means all cores; `piece_bytes` and `bucket_bytes` are sizes of work, 0 = default.

    Of these only `bucket_bytes` (through the order of documents) and what `arguments` lists change the output.
    `seq_len` is the length in tokens that `packing` best_fit packs documents for, 0 with the other packing.
    """

    inputs: tuple[str, ...]
    store: str
    source: str
    tokenizer: AnyTokenizer
    options: ReadOptions = ReadOptions()
    validation: float = 0.001
    seed: int = 0
    workers: int = 0
    layout: str = "flat"
    transforms: Transforms = Transforms()
    packing: str = "concatenate"
    seq_len: int = 0
    overwrite: bool = False
    piece_bytes: int = 0
    bucket_bytes: int = BUCKET_BYTES

    @property
    def folder(self) -> str:
        """Folder of the source."""
        return os.path.join(self.store, self.source)

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the content, besides the inputs: an existing output must have the same."""
        return {**self.options.arguments(), "validation": self.validation, "seed": self.seed,
                "layout": self.layout, "tokenizer_sha256": self.tokenizer.sha256, "bucket_bytes": self.bucket_bytes,
                **self.transforms.arguments(), **({"packing": self.pack} if self.pack else {})}

    @property
    def pack(self) -> dict[str, Any] | None:
        """The manifest's words for how documents are packed; None where they follow one another."""
        return None if self.packing == "concatenate" else {"kind": self.packing, "seq_len": self.seq_len}

    def check(self) -> None:
        """Raises InputError for values that make no sense."""
        if not SOURCE_NAME.fullmatch(self.source) or self.source == "tokenizer":
            raise InputError(f"--source={self.source}: use letters, digits, _ and -, and not the word tokenizer")
        if not 0 <= self.validation < 1:
            raise InputError(f"--validation={self.validation}: give a share of the documents, 0 <= share < 1")
        if self.options.on_bad_text not in BAD_TEXT:
            raise InputError(f"--on_bad_text={self.options.on_bad_text}: choose one of {', '.join(BAD_TEXT)}")
        if self.layout not in store.LAYOUTS:
            raise InputError(f"--layout={self.layout}: choose one of {', '.join(store.LAYOUTS)}")
        if not 0 <= self.seed < held_out.RANGE:
            raise InputError(f"--seed={self.seed}: give a whole number from 0 to 2**64 - 1")
        if self.workers < 0:
            raise InputError(f"--workers={self.workers}: give a number of processes, or leave it out for all cores")
        if self.packing not in PACKINGS:
            raise InputError(f"--packing={self.packing}: choose one of {', '.join(PACKINGS)}")
        if self.pack and self.seq_len < 2:
            raise InputError(f"--packing={self.packing}: needs the sequence length of the phases that will read it: "
                             "--seq_len=T, at least 2")
        if self.seq_len and not self.pack:
            raise InputError(f"--seq_len={self.seq_len}: only a packed store has a sequence length; add --packing=best_fit, "
                             "or leave it out")
        if self.options.bytes_field and not self.options.tokens_field:
            raise InputError(f"--bytes_field={self.options.bytes_field}: only records of token ids need it; add "
                             "--tokens_field=NAME, or leave it out")
        self.transforms.check(self.options, self.tokenizer)
        if "://" in self.store:
            raise InputError(f"--out={self.store}: prepare writes to a local folder; copy the finished store")


def all_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(request: Request) -> tuple[dict[str, Any], bool]:
    """Prepare a source; returns its manifest, and whether it was there already.

    Raises InputError (bad arguments, nothing to read, an output that is somebody else's) before anything is changed,
    StoppedForPerson for a full disk, RestartSafe for a killed worker.
    """
    request.check()
    inputs = find_inputs(request.inputs)
    manifest = _existing(request, inputs)
    if manifest is not None:
        return manifest, True
    _has_tokenizer(request)
    work = os.path.join(request.folder, WORK)
    os.makedirs(work, exist_ok=True)
    try:
        with _lock(work):
            _remove_temporary(request.folder, work)
            store_writer.write_json(os.path.join(work, "arguments.json"), request.arguments)
            return _run(request, inputs, work), False
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoppedForPerson(f"{request.folder}: the disk is full; make room and run the same command again: "
                               "finished work is kept") from error


def _run(request: Request, inputs: Inputs, work: str) -> dict[str, Any]:
    total = inputs.text_size
    piece_bytes = request.piece_bytes or min(max(total // 64, SMALLEST_PIECE), LARGEST_PIECE)
    settings = shuffle.Settings(request.folder, work, request.tokenizer, request.options, request.seed,
                                max(1, -(-total // request.bucket_bytes)), request.layout, request.validation,
                                request.transforms, request.seq_len)
    limit = request.workers or (all_cores() if total > ONE_PROCESS_BYTES else 1)
    with Workers(limit, settings) as workers:
        parts, unreadable = _parts(inputs, piece_bytes, work, workers)
        pieces = [shuffle.Piece(group, tuple(inputs.files[part.file] for part in group))
                  for group in group_parts(parts, piece_bytes)]
        paths = _first_stage(settings, pieces, workers, request.source)
        facts = shuffle.PieceFacts(unreadable=[*inputs.unreadable, *unreadable])
        for path in paths:
            facts.merge(shuffle.PieceFacts.from_json(spill.read_summary(path)))
        facts.unreadable.sort()
        if not facts.documents:
            shutil.rmtree(request.folder)
            with contextlib.suppress(OSError):
                os.rmdir(request.store)  # only if there is nothing else in it
            raise InputError(_empty(request, facts))
        written = _second_stage(settings, facts, paths, workers, request)
    splits = {"train": store_writer.split_entry(written.shards, written.num_bytes),
              "validation": store_writer.split_entry(*shuffle.write_validation(settings, written.buckets))}
    prepared = {"arguments": request.arguments,
                "inputs": {"files": len(inputs.files), "bytes": sum(file.size for file in inputs.files),
                           "sha256": inputs.digest, "ignored": inputs.ignored},
                **{kind: {reason: {"documents": count, "first": place[2]}
                          for reason, (count, place) in sorted(reasons.items())}
                   for kind, reasons in facts.tally.counts.items()},
                **written.facts, "unreadable": facts.unreadable}
    _remove_stale(request.folder, splits)
    if not _has_tokenizer(request):
        request.tokenizer.save(os.path.join(request.store, "tokenizer"))
    manifest = store_writer.write_manifest(
        request.folder, source=request.source, vocab_size=request.tokenizer.vocab_size,
        eod_id=request.tokenizer.eod_id, tokenizer_sha256=request.tokenizer.sha256, layout=request.layout,
        splits=splits, prepare=prepared, packing=request.pack)
    if not facts.unreadable:  # else the finished pieces save the work when the rest can be read
        shutil.rmtree(work)
    return manifest


def _parts(inputs: Inputs, piece_bytes: int, work: str, workers: Workers) -> tuple[list[Part], list[str]]:
    """All inputs as parts, lines numbered; and what cannot even be opened."""
    parts: list[Part] = []
    unreadable: list[str] = []
    for number, file in enumerate(inputs.files):
        try:
            parts += split_file(number, file, piece_bytes)
        except Unreadable as error:
            unreadable.append(str(error))
    # Parts of a large .jsonl need the number of the lines before them, for the documents' ids.
    split = [i for i, part in enumerate(parts) if part.stop >= 0 and inputs.files[part.file].kind == "jsonl"]
    tasks = [(inputs.files[parts[i].file].path, parts[i].start, parts[i].stop) for i in split]
    for lines, i in zip(_line_counts(tasks, work, workers, inputs), split, strict=True):
        following = parts[i].start + parts[i].size
        if i + 1 < len(parts) and parts[i + 1].file == parts[i].file and parts[i + 1].start == following:
            parts[i + 1] = dataclasses.replace(parts[i + 1], first_row=parts[i].first_row + lines)
    return parts, unreadable


def _line_counts(tasks: list[tuple[str, int, int]], work: str, workers: Workers, inputs: Inputs) -> list[int]:
    if not tasks:
        return []
    facts = [inputs.digest, [file.modified for file in inputs.files], tasks]
    path = os.path.join(work, f"lines-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json")
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        return json.load(file)
    counts = [0] * len(tasks)
    with Progress("counting lines", sum(stop - start for _, start, stop in tasks)) as progress:
        for number, count in workers.map(_count, tasks):
            counts[number] = count
            progress.advance(tasks[number][2] - tasks[number][1])
    store_writer.write_json(path, counts)
    return counts


def _count(_: shuffle.Settings, task: tuple[str, int, int]) -> int:
    try:
        return count_lines(*task)
    except OSError:
        return 0  # reading the part will fail too, and be reported there


def _first_stage(settings: shuffle.Settings, pieces: Sequence[shuffle.Piece], workers: Workers,
                 source: str) -> list[str]:
    """Tokenize all pieces that are not there yet; paths of all, in input order."""
    paths = [os.path.join(settings.work, piece.name(settings)) for piece in pieces]
    todo = []
    for piece, path in zip(pieces, paths, strict=True):
        # A piece with unreadable inputs is tried again: they may have been repaired.
        if not os.path.exists(path) or spill.read_summary(path)["unreadable"]:
            todo.append(piece)
    if len(todo) < len(pieces):
        say(f"{source}: going on, {len(pieces) - len(todo)} of {len(pieces)} pieces are done")
    # Large pieces first, so that no core waits long at the end.
    todo.sort(key=lambda piece: -piece.size)
    with Progress(f"{source}: reading and tokenizing", sum(piece.size for piece in todo)) as progress:
        for number, _ in workers.map(shuffle.tokenize_piece, todo):
            progress.advance(todo[number].size)
    return paths


@dataclasses.dataclass(frozen=True)
class _Written:
    """The training split: its shards' manifest entries and text bytes, and what the manifest tells besides."""

    buckets: list[shuffle.Bucket]
    shards: list[dict[str, Any]]
    num_bytes: int
    facts: dict[str, Any]


def _second_stage(settings: shuffle.Settings, facts: shuffle.PieceFacts, paths: list[str], workers: Workers,
                  request: Request) -> _Written:
    """Write all shards to train on, variant after variant, and set the held-out documents aside."""
    limit = held_out.settled_limit(request.validation, facts.documents, facts.lowest, facts.highest)
    content = json.dumps([[os.path.basename(path) for path in paths], facts.as_json(), settings.pack,
                          settings.transforms.arguments()])
    digest = hashlib.sha256(content.encode()).hexdigest()
    total = settings.num_buckets * settings.transforms.variants
    buckets = [shuffle.Bucket(number, tuple(paths), limit, digest) for number in range(total)]
    results = {bucket.number: result for bucket in buckets if (result := bucket.finished(settings))}
    todo = [bucket for bucket in buckets if bucket.number not in results]
    size = facts.num_bytes // settings.num_buckets
    with Progress(f"{request.source}: shuffling and writing", size * len(todo)) as progress:
        for number, result in workers.map(shuffle.write_bucket, todo):
            results[todo[number].number] = result
            progress.advance(size)
    done = [results[number] for number in range(total)]
    for result in done:
        facts.tally.merge(result["tally"])
    shards = [result["shard"] for result in done if result["shard"]]
    more: dict[str, Any] = {}
    if settings.transforms.active:
        counts: collections.Counter[str] = collections.Counter()
        for result in done:
            counts.update(result["transforms"])
        more["transformed"] = dict(sorted(counts.items(), key=lambda item: (len(item[0]), item[0])))
    if settings.pack:
        packed = [result["packing"] for result in done]
        more["packing"] = {name: sum(result[name] for result in packed) for name in packed[0]}
        if shards:
            shards.append(shuffle.write_end(settings))
    return _Written(buckets, shards, sum(result["bytes"] for result in done), more)


def _existing(request: Request, inputs: Inputs) -> dict[str, Any] | None:
    """The manifest of a finished identical output. Clears the way for a new one, or raises InputError."""
    folder = request.folder
    if not os.path.lexists(folder):
        return None
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: exists and is not a folder; choose another --out or --source")
    names = set(os.listdir(folder))
    arguments_path = os.path.join(folder, WORK, "arguments.json")
    manifest = store.read_manifest(folder) if store.MANIFEST in names else None
    if manifest is not None:
        prepared = manifest.get("prepare", {})
        difference = _difference(request.arguments, prepared.get("arguments", {}))
        if not difference and prepared.get("unreadable"):
            return None
        if not difference:
            difference = _changed_inputs(folder, inputs, prepared.get("inputs", {}))
        if not difference:
            store.open_source(folder)
            return manifest
        problem = f"is finished, made differently ({difference})"
    elif os.path.exists(arguments_path):
        with open(arguments_path, encoding="utf-8") as file:
            difference = _difference(request.arguments, json.load(file))
        if not difference:
            return None
        problem = f"is unfinished, begun differently ({difference})"
    elif names <= {WORK}:
        return None
    else:
        raise InputError(f"{folder}: exists and was not written by neo.data.prepare; choose another --out or --source, "
                         "or remove it yourself")
    if not request.overwrite:
        raise InputError(f"{folder}: {problem}; choose another --out or --source, or replace it with --overwrite")
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, store.MANIFEST))  # first: from here on it is unfinished
    shutil.rmtree(folder)
    return None


def _difference(wanted: dict[str, Any], found: Any) -> str:
    """The first argument that differs, in words; empty where none does."""
    found = found if isinstance(found, dict) else {}
    # What a later version of neo added is absent where it is not used: absent and present differ, too.
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        value, other = wanted.get(name), found.get(name)
        if other != value:
            return f"{name}: {_shown(other)} there, {_shown(value)} now"
    return ""


def _shown(value: Any) -> str:
    return "not used" if value is None else repr(value)


def _changed_inputs(folder: str, inputs: Inputs, found: dict[str, Any]) -> str:
    if found.get("sha256") != inputs.digest:
        return f"its inputs were {found.get('files')} files, {found.get('bytes')} bytes; now names or sizes differ"
    # Hashing everything again would cost minutes; a file written after the store was is reason enough to ask.
    finished = os.stat(os.path.join(folder, store.MANIFEST)).st_mtime_ns
    newer = next((file.name for file in inputs.files if file.modified > finished), None)
    return f"{newer} was changed since" if newer else ""


def _has_tokenizer(request: Request) -> bool:
    """Whether the store has the request's tokenizer; False for none yet, InputError for another one."""
    folder = os.path.join(request.store, "tokenizer")
    if not any(os.path.exists(os.path.join(folder, name)) for name in (MODEL_FILE, JSON_FILE)):
        return False
    there = Tokenizer.load(folder).sha256
    if there != request.tokenizer.sha256:
        raise InputError(f"{request.store}: its tokenizer (sha256 {there[:12]}...) is not the one given (sha256 "
                         f"{request.tokenizer.sha256[:12]}...); a store has one tokenizer: choose another --out")
    return True


def _remove_temporary(*folders: str) -> None:
    """Remove half-written files of a killed run: they may be what filled the disk."""
    for folder in folders:
        for name in os.listdir(folder):
            if name.endswith(".tmp"):
                os.remove(os.path.join(folder, name))


def _remove_stale(folder: str, splits: dict[str, Any]) -> None:
    """Remove shard files of an earlier attempt that the new manifest does not name."""
    keep = {name for split in splits.values() for shard in split["shards"] for name in shard["sha256"]}
    for name in os.listdir(folder):
        if SHARD_NAME.fullmatch(name) and name not in keep:
            os.remove(os.path.join(folder, name))


def _empty(request: Request, facts: shuffle.PieceFacts) -> str:
    reasons = first_reasons(facts.tally)
    if facts.unreadable:
        reasons.append(f"{len(facts.unreadable)} unreadable (first: {facts.unreadable[0]})")
    return f"empty corpus: no document in {' '.join(request.inputs[:3])}: {'; '.join(reasons) or 'nothing in it'}"


def first_reasons(tally: Tally) -> list[str]:
    """Why documents were skipped, most frequent first, each with its first place."""
    skipped = sorted(tally.counts["skipped"].items(), key=lambda item: -item[1][0])
    return [f"{count} {reason} (first: {place[2]})" for reason, (count, place) in skipped]


@contextlib.contextmanager
def _lock(work: str) -> Iterator[None]:
    """Hold the output against a second process; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(os.path.join(work, "lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{os.path.dirname(work)}: another process is preparing this source right now") from None
        yield


