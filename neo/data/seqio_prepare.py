"""A seqio Task or Mixture as sources of a token store: `python -m neo.data.prepare --seqio_mixture=NAME`.

TensorFlow stays in a process of its own (neo/data/seqio_export.py). It writes one Task after the other as .parquet
files of token ids to OUT/.seqio/SOURCE; each is then prepared as any input, so that shuffle, held-out split and shards
are those of every source. A finished source says in SOURCE/seqio.json what it was made from, and is not made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import neo
from neo.cli import Namespace
from neo.data import preparation, store
from neo.data.progress import PLAIN_SECONDS, Waiting, say
from neo.data.records import ReadOptions
from neo.data.seqio_plan import Export
from neo.data.store_writer import write_json
from neo.data.tokenizer import JSON_FILE, MODEL_FILE, AnyTokenizer, Tokenizer
from neo.errors import InputError, RestartSafe, StoppedForPerson

WORK, LOG, ORIGIN = ".seqio", "log.txt", "seqio.json"
MIXTURES = "mixtures"
# TensorFlow: no accelerator, which belongs to somebody else, and as few words as it can.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3",
               "GRPC_VERBOSITY": "ERROR", "TQDM_DISABLE": "1"}


@dataclasses.dataclass(frozen=True)
class MixtureRequest:
    """What to prepare: a Task or Mixture `name` that importing `module` registers, into the store `out`.

    `feature` holds the token ids, `prompt_field` is the feature with those before them that are not learned (`inputs` of
    a question-and-answer Task); `id_field` names documents (else task and position); `tokenizer` is needed only where
    the vocabulary does not say what it is. The others as in preparation.Request.
    """

    name: str
    module: str
    out: str
    split: str = "train"
    feature: str = "targets"
    prompt_field: str = ""
    id_field: str = ""
    tokenizer: str = ""
    validation: float = 0.001
    seed: int = 0
    workers: int = 0
    layout: str = "flat"
    packing: str = "concatenate"
    seq_len: int = 0
    overwrite: bool = False

    @property
    def json_path(self) -> str:
        """Where the mixture is written down."""
        return os.path.join(self.out, MIXTURES, re.sub(r"[^\w.-]", "_", self.name) + ".json")

    def source(self, name: str, tokenizer: Any) -> preparation.Request:
        """The request that makes a source from its exported files."""
        return preparation.Request(
            inputs=(os.path.join(self.out, WORK, name),), store=self.out, source=name, tokenizer=tokenizer,
            options=ReadOptions(id_field="id", tokens_field="tokens", bytes_field="bytes",
                                prompt_field="prompt" if self.prompt_field else ""),
            validation=self.validation, seed=self.seed, workers=self.workers, layout=self.layout, packing=self.packing,
            seq_len=self.seq_len, overwrite=self.overwrite)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The sources' manifests, each with whether it was there already; and the mixture as `json_path` has it."""

    manifests: list[tuple[dict[str, Any], bool]]
    mixture: dict[str, Any]


def prepare_mixture(request: MixtureRequest) -> Prepared:
    """Export and prepare all Tasks of a mixture; finished ones are left as they are.

    Raises InputError (nothing was changed): packages, module, names, vocabulary, a source made differently.
    StoppedForPerson: a Task that fails while it is read, a full disk. RestartSafe: the process with TensorFlow was killed.
    """
    if not request.module:
        raise InputError("--module is missing: the module (my.tasks, or a path) that registers the Task or Mixture")
    if not request.out:
        raise InputError("--out is missing; see --help")
    tokenizer_folder = os.path.join(request.out, "tokenizer")
    # Before TensorFlow, what can be said at once: the arguments, the tokenizers.
    request.source("any", None).check()
    there = tokenizer_folder if _is_tokenizer(tokenizer_folder) else ""
    for folder in filter(None, (request.tokenizer, there)):
        Tokenizer.load(folder)
    work = os.path.join(request.out, WORK)
    with _work(request.out, work):
        export = Export(request.name, request.module, work, request.split, request.feature, request.prompt_field,
                        request.id_field, request.tokenizer, there)
        with Child(export, os.path.join(work, LOG)) as child:
            with Waiting(f"starting TensorFlow, importing {request.module}"):
                plan = child.receive("plan")
            for note in plan["notes"]:
                say(note)
            tokenizer = Tokenizer.load(os.path.join(work, "tokenizer"))
            _check_tokenizer(tokenizer_folder, tokenizer)
            state = {name: _finished(request, name, facts["key"], tokenizer) for name, facts in plan["sources"].items()}
            manifests = [(manifest or _make(request, name, tokenizer, child), manifest is not None)
                         for name, manifest in state.items()]
    mixture = describe(request, plan, tokenizer)
    os.makedirs(os.path.dirname(request.json_path), exist_ok=True)
    write_json(request.json_path, mixture)
    return Prepared(manifests, mixture)


def _make(request: MixtureRequest, name: str, tokenizer: AnyTokenizer, child: Child) -> dict[str, Any]:
    """Export one source and prepare it."""
    folder = os.path.join(request.out, WORK, name)
    say(f"{name}: reading and tokenizing with seqio")
    start = time.monotonic()
    facts = child.ask(name)
    if not facts["documents"]:
        raise StoppedForPerson(f"task {facts['task']}: no document with a token in it ({facts['empty']} empty ones)")
    say(f"{name}: {facts['documents']:,} documents, {facts['tokens']:,} tokens in {time.monotonic() - start:.1f} s")
    for line in warnings(name, facts):
        say(line)
    manifest, _ = preparation.prepare(request.source(name, tokenizer))
    write_json(os.path.join(request.out, name, ORIGIN), facts)
    os.remove(f"{folder}.json")
    shutil.rmtree(folder)
    return manifest


def warnings(name: str, facts: Mapping[str, Any]) -> list[str]:
    """What is odd about an exported task, for the user to judge."""
    lines = []
    if facts["empty"]:
        lines.append(f"{name}: {facts['empty']:,} documents without a token left out")
    if facts["inner_ends"]:
        lines.append(f"{name}: {facts['inner_ends']:,} documents have an end-of-document token inside: does the task pack "
                     "several documents into one example?")
    if facts["different"]:
        lines.append(f"{name}: {facts['different']} of the first {facts['compared']} documents: SentencePiece cuts the same "
                     "text into other tokens of the same score than tensorflow-text (known of unigram models)")
    if facts["respelled"] > facts["different"]:
        lines.append(f"{name}: {facts['respelled']} of the first {facts['compared']} documents have token ids that their "
                     "text would not get from the vocabulary: does the task use another tokenizer?")
    return lines


def describe(request: MixtureRequest, plan: Mapping[str, Any], tokenizer: AnyTokenizer) -> dict[str, Any]:
    """The mixture for its JSON file. `mixture` has the rates, for a phase, which counts tokens; seqio draws documents, and
    `mixture_of_documents` has the weights in tokens that come to the same documents.
    """
    rates = {name: facts["rate"] for name, facts in plan["sources"].items()}
    lengths = {}
    for name in rates:
        with open(os.path.join(request.out, name, ORIGIN), encoding="utf-8") as file:
            facts = json.load(file)
        lengths[name] = facts["tokens"] / facts["documents"] + 1  # its end
    return {"format": "neo.mixture", "version": 1, "name": request.name, "module": request.module, "split": request.split,
            "feature": request.feature, "prompt_field": request.prompt_field, "id_field": request.id_field,
            "seqio": plan["seqio"], "tensorflow_text": plan["tensorflow_text"], "tokenizer_sha256": tokenizer.sha256,
            "mixture": shares(rates),
            "mixture_of_documents": shares({name: rate * lengths[name] for name, rate in rates.items()}),
            "sources": dict(plan["sources"])}


def shares(rates: Mapping[str, float]) -> dict[str, float]:
    """Rates as shares of their sum."""
    total = sum(rates.values())
    return {name: rate / total for name, rate in rates.items()}


def _finished(request: MixtureRequest, name: str, key: str, tokenizer: AnyTokenizer) -> dict[str, Any] | None:
    """The manifest of the source, if it was made from the same task in the same way; None if it has to be made.

    Raises InputError if it is there and other, unless it may be overwritten.
    """
    folder = os.path.join(request.out, name)
    manifest = store.read_manifest(folder) if os.path.isdir(folder) else None
    if manifest is None or request.overwrite:
        return None
    if os.path.isdir(os.path.join(request.out, WORK, name)):
        return None  # its export is still there: preparation itself finds out
    cure = "choose another --out, or replace it with --overwrite"
    try:
        with open(os.path.join(folder, ORIGIN), encoding="utf-8") as file:
            found = json.load(file)["key"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder}: is finished, and was not made from a seqio task; {cure}") from None
    arguments = manifest.get("prepare", {}).get("arguments")
    wanted = request.source(name, tokenizer).arguments
    if found != key or arguments != wanted:
        differing = [field for field in wanted if (arguments or {}).get(field) != wanted[field]]
        what = f"with another {differing[0]}" if differing else "from another version of the task, its module or its files"
        raise InputError(f"{folder}: is finished, made {what}; {cure}")
    store.open_source(folder)
    return manifest


def _is_tokenizer(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in (MODEL_FILE, JSON_FILE))


def _check_tokenizer(folder: str, tokenizer: AnyTokenizer) -> None:
    """InputError if the store has another tokenizer: before hours of exporting."""
    if _is_tokenizer(folder) and Tokenizer.load(folder).sha256 != tokenizer.sha256:
        raise InputError(f"{folder}: not the tokenizer of this task (sha256 {tokenizer.sha256[:12]}...); a store has one "
                         "tokenizer: choose another --out")


@contextlib.contextmanager
def _work(out: str, work: str) -> Iterator[None]:
    """The folder of temporary files, held against a second process; gone afterwards unless it holds finished work."""
    new = [path for path in (out, work) if not os.path.isdir(path)]
    os.makedirs(work, exist_ok=True)
    with open(os.path.join(work, "lock"), "w") as file:
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{out}: another process is preparing a seqio mixture here right now") from None
        try:
            yield
        except InputError:
            if not any(name.endswith(".json") for name in os.listdir(work)):  # no finished export
                shutil.rmtree(work)
                for path in new:
                    with contextlib.suppress(OSError):
                        os.rmdir(path)
            raise
        shutil.rmtree(work)


class Child:
    """The process with TensorFlow; use as a context manager. What it prints goes to the file `log`."""

    def __init__(self, export: Export, log: str):
        self.log = log
        path = os.pathsep.join(filter(None, (str(Path(neo.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        with open(log, "w") as output:
            # A session of its own: Ctrl-C is for the parent, which ends the child.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "neo.data.seqio_export", json.dumps(dataclasses.asdict(export))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True, encoding="utf-8",
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path}, start_new_session=True)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def ask(self, source: str) -> dict[str, Any]:
        """Have a source exported; returns what came out of it."""
        with contextlib.suppress(BrokenPipeError):  # it ended: its last words are still to be read
            self.process.stdin.write(source + "\n")
            self.process.stdin.flush()
        return self.receive("done")

    def receive(self, kind: str) -> dict[str, Any]:
        """The next answer of this kind; shows progress. Raises the child's error."""
        shown = time.monotonic()
        for line in self.process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise self._error(answer)
            if kind in answer:
                return answer[kind]
            if "progress" in answer and time.monotonic() - shown >= PLAIN_SECONDS:
                shown = time.monotonic()
                name, documents, tokens = answer["progress"]
                say(f"{name}: {documents:,} documents, {tokens:,} tokens")
        code = self.process.wait()
        if code < 0:
            raise RestartSafe(f"the process with TensorFlow was killed by signal {-code} (9 usually means out of memory); "
                              "finished tasks are kept: run the same command again")
        with open(self.log, encoding="utf-8", errors="replace") as file:
            tail = file.read()[-4000:]
        raise RuntimeError(f"the process with TensorFlow ended with exit code {code}:\n{tail}")

    def _error(self, answer: Mapping[str, Any]) -> Exception:
        if answer.get("errno"):
            return OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
        if answer["code"] == StoppedForPerson.exit_code:
            return StoppedForPerson(f"{answer['error']}; finished tasks are kept: repair it and run the same command "
                                    f"again (log: {self.log})")
        return InputError(answer["error"])


def run(args: Namespace) -> None:
    """`neo.data.prepare --seqio_mixture`: prepare, then print the table, the config lines and the next command."""
    taken = {field.name for field in dataclasses.fields(MixtureRequest)} | {"seqio_mixture"}
    if not args.seqio_mixture:
        raise InputError("--module, --split and --feature need --seqio_mixture=NAME, the Task or Mixture")
    extra = sorted(args.given - taken)
    if extra:
        flags = ", ".join("INPUT" if name == "input" else f"--{name}" for name in extra)
        raise InputError(f"--seqio_mixture={args.seqio_mixture}: its Tasks say what is read and become the sources; "
                         f"leave out {flags}")
    request = MixtureRequest(args.seqio_mixture, **{name: getattr(args, name) for name in sorted(taken & set(vars(args)))
                                                    if name != "seqio_mixture"})
    report(request, prepare_mixture(request))


def report(request: MixtureRequest, prepared: Prepared) -> None:
    """Print the table and the config lines."""
    from neo.data.prepare import notes, rows, table, try_command

    mixture = prepared.mixture
    for manifest, there in prepared.manifests:
        if there:
            print(f"{os.path.join(request.out, manifest['source'])} is finished already: nothing to do")
    print()
    print("\n".join(table([manifest for manifest, _ in prepared.manifests])))
    for manifest, _ in prepared.manifests:
        for line in notes(manifest):
            print(line)
    vocab_size = prepared.manifests[0][0]["vocab_size"]
    rates, documents = ({name: float(f"{share:.6g}") for name, share in mixture[key].items()}
                        for key in ("mixture", "mixture_of_documents"))
    print()
    print("Config lines:")
    print(f"    c.data.store = {request.out!r}")
    print(f"    c.model.vocab_size = {rows(request.out)}   # at least {vocab_size}")
    print(f"    mixture={rates!r}   # in each phase(...): the rates of {request.name}, as shares of the tokens")
    if len(rates) > 1:
        print(f"    mixture={documents!r}   # or this: as many documents of each as seqio draws, whose rates count documents")
    if request.seq_len:
        print(f"    seq_len={request.seq_len}   # in each phase(...) that reads these sources, which are packed for it")
    print()
    print(f"Wrote {', '.join(os.path.join(request.out, manifest['source']) for manifest, _ in prepared.manifests)} and "
          f"{request.json_path}")
    print(f"Next: {try_command(request.out, rates, rows(request.out), request.seq_len)}")
