"""The process with TensorFlow in it: seqio Tasks to .parquet files of token ids, for neo/data/seqio_prepare.py.

    python -m neo.data.seqio_export '{"name": ..., "module": ..., ...}'

It answers in lines of JSON on its standard output: `plan`, then for each source named on its standard input `progress`
and `done`; `error` with an exit code where it ends. What TensorFlow and the user's module print goes to its stderr,
which the parent keeps in a file: TensorFlow prints a lot, whatever it is told.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from neo.data.seqio_plan import Export, PlannedTask, import_module, place_of, plan, summary
from neo.data.store_writer import write_json
from neo.data.tasks import import_seqio
from neo.data.tokenizer import AnyTokenizer
from neo.errors import InputError, NeoError, StoppedForPerson, nearest

FIRST_DOCUMENTS = 32          # ours: documents of each task on which the two tokenizers are compared
COMPARED_CHARACTERS = 20_000  # ours: of each of them
GROUP_TOKENS = 1 << 22        # ours: tokens per row group, 16 MiB in memory
FILE_TOKENS = 1 << 26         # ours: tokens per file
PROGRESS_SECONDS = 2.0


@dataclasses.dataclass
class Facts:
    """What came out of a Task. `different`: of the `compared` first documents, how many seqio's vocabulary and neo's
    tokenizer cut differently; `respelled`: in how many the task's ids are not what its vocabulary gives for their text.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    inner_ends: int = 0
    compared: int = 0
    different: int = 0
    respelled: int = 0


def open_dataset(seqio: ModuleType, task: Any, split: str) -> Any:
    """The task's examples, whole and in their own order: no sequence length, no trimming, no shuffle, one epoch."""
    import tensorflow as tf

    try:
        dataset = _seeded(task).get_dataset(
            sequence_length=None, split=split, shuffle=False, seed=0, num_epochs=1, use_cached=task.requires_caching,
            trim_output_features=False, try_in_mem_cache=False)
    except Exception as error:
        needing = [seqio.utils.function_name(step) for step in task.preprocessors
                   if "sequence_length" in _parameters(step)]
        hint = (f"; {', '.join(needing)} may need a sequence length: here documents stay whole, leave such steps out"
                if needing else "")
        raise InputError(f"task {task.name}: {place_of(error)}{summary(error)}{hint}") from error
    options = tf.data.Options()
    options.deterministic = True
    return dataset.with_options(options)


def _seeded(task: Any) -> Any:
    """The task, with a source that takes a seed.

    Random preprocessors need a seed to give the same every time; seqio hands it on to a source's function too, and
    refuses functions without one (which it registers), even where nothing is shuffled.
    """
    function = getattr(task.source, "_dataset_fn", None)
    if function is None or "seed" in _parameters(function):
        return task
    task, source = copy.copy(task), copy.copy(task.source)
    source._dataset_fn = lambda split, shuffle_files, seed=None: function(split=split, shuffle_files=shuffle_files)
    task._source = source
    return task


def _parameters(step: Any) -> Sequence[str]:
    """Names of a preprocessor's parameters."""
    try:
        return list(inspect.signature(step).parameters)
    except (TypeError, ValueError):
        return []


def examples(task: Any, dataset: Any, export: Export) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(document id, token ids [n], those of its prompt [m]) of each example, in order."""
    spec = dataset.element_spec
    fields = [name for name in (export.feature, export.prompt, export.id_field) if name]
    for field in fields:
        if field not in spec:
            raise InputError(f"task {task.name}: its examples have no {field!r}{nearest(field, spec)} (they have "
                             f"{', '.join(spec)})")
    import tensorflow as tf

    chosen = tf.autograph.experimental.do_not_convert(lambda example: {name: example[name] for name in fields})
    nothing = np.zeros(0, np.int64)
    count = 0
    try:
        for example in dataset.map(chosen).as_numpy_iterator():
            count += 1
            yield (_identity(task, example, export.id_field, count), np.asarray(example[export.feature]),
                   np.asarray(example[export.prompt]) if export.prompt else nothing)
    except (NeoError, OSError, GeneratorExit):
        raise
    except Exception as error:
        raise StoppedForPerson(f"task {task.name}, after {count} documents: {place_of(error)}{summary(error)}") from error


def _identity(task: Any, example: dict[str, Any], field: str, count: int) -> str:
    if not field:
        return f"{task.name}:{count}"
    value = example[field]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace") or f"{task.name}:{count}"
    if isinstance(value, (int, np.integer)):
        return str(value)
    raise InputError(f"task {task.name}: field {field!r} holds {type(value).__name__}; an id is text or a whole number")


class Comparison:
    """Whether seqio's vocabulary and neo's tokenizer give the same ids, on the first documents of a task."""

    def __init__(self, vocabulary: Any, tokenizer: AnyTokenizer, facts: Facts):
        self.tokenizer, self.facts = tokenizer, facts
        self.theirs = vocabulary.tf_tokenizer if hasattr(vocabulary, "sp_model") else None

    def add(self, name: str, ids: np.ndarray, text: str) -> None:
        """Compare on one document. InputError where ids differ and the model is BPE, or their texts differ."""
        if self.theirs is None or self.facts.compared >= FIRST_DOCUMENTS:
            return
        whole = len(text) <= COMPARED_CHARACTERS
        text = text[:COMPARED_CHARACTERS]
        theirs, ours = self.theirs.tokenize(text).numpy().tolist(), self.tokenizer.encode(text)
        self.facts.compared += 1
        self.facts.respelled += whole and theirs != ids.tolist()
        if theirs == ours:
            return
        shorter = min(len(theirs), len(ours))
        at = next((i for i in range(shorter) if theirs[i] != ours[i]), shorter)
        unigram = self.tokenizer.proto.trainer_spec.model_type == self.tokenizer.proto.trainer_spec.UNIGRAM
        if not unigram or self.tokenizer.decode(theirs) != self.tokenizer.decode(ours):
            raise InputError(f"document {name}: seqio's vocabulary and SentencePiece give other ids from token {at} on "
                             f"({theirs[at:at + 4]} and {ours[at:at + 4]}); such a store could not be used")
        self.facts.different += 1  # two ways of the same probability: both are right


def write_task(seqio: ModuleType, planned: PlannedTask, tokenizer: AnyTokenizer, export: Export,
               tell: Callable[..., None]) -> dict[str, Any]:
    """Write one task's documents as .parquet files with columns id, tokens, prompt, bytes; returns its facts.

    A finished folder of the same key is left as it is. Token ids have no end-of-document: preparation puts it there.
    """
    folder = os.path.join(export.work, planned.source)
    done = f"{folder}.json"  # beside the folder, which holds nothing but input for neo.data.preparation
    if os.path.exists(done):
        with open(done, encoding="utf-8") as file:
            found = json.load(file)
        if found["key"] == planned.key:
            return found
        os.remove(done)
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
    vocabulary = planned.task.output_features[export.feature].vocabulary
    ends = {end for end in (getattr(vocabulary, "eos_id", None), *tokenizer.eos_ids) if end is not None and end >= 0}
    first = np.array([tokenizer.bos_id] * tokenizer.add_bos, np.int64)  # as a store of this tokenizer has them
    facts, last = Facts(), time.monotonic()
    comparison = Comparison(vocabulary, tokenizer, facts)
    writer = PartWriter(folder)
    for name, ids, prompt in examples(planned.task, open_dataset(seqio, planned.task, export.split), export):
        ids, prompt = without_ends(ids, ends, tokenizer), without_ends(prompt, ends, tokenizer)
        if not len(ids):
            facts.empty += 1
            continue
        both = np.concatenate([prompt, ids])
        low, high = int(both.min()), int(both.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise StoppedForPerson(f"task {planned.task.name}, document {name}: token id {low if low < 0 else high} is "
                                   f"outside the vocabulary of {tokenizer.vocab_size}")
        text = tokenizer.decode(ids)
        comparison.add(name, ids, text)
        size = len(text.encode("utf-8"))
        facts.documents += 1
        facts.tokens += len(first) + len(both)
        facts.bytes += size
        facts.inner_ends += bool(np.isin(both, list(ends)).any())
        if len(prompt):
            writer.add(name, ids, np.concatenate([first, prompt]), size)
        else:
            writer.add(name, np.concatenate([first, ids]), prompt, size)
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            tell(progress=[planned.source, facts.documents, facts.tokens])
    writer.close()
    result = {"key": planned.key, "task": planned.task.name, **dataclasses.asdict(facts)}
    write_json(done, result)
    return result


def without_ends(ids: np.ndarray, ends: set[int], tokenizer: AnyTokenizer) -> np.ndarray:
    """Token ids [n] as text: without the end tokens at their end, and without the first token that texts begin with."""
    if ids.dtype.kind not in "iu":
        raise InputError(f"the feature holds {ids.dtype}, not token ids; tokenize it (seqio.preprocessors.tokenize)")
    ids = ids.astype(np.int64)
    stop = len(ids)
    while stop and int(ids[stop - 1]) in ends:
        stop -= 1
    start = int(bool(stop and tokenizer.add_bos and ids[0] == tokenizer.bos_id))
    return ids[start:stop]


class PartWriter:
    """Writes part-00000.parquet, ... with columns id, tokens, prompt, bytes; each file appears when it is whole."""

    def __init__(self, folder: str):
        self.folder, self.number = folder, 0
        self._writer: Any = None
        self._rows: list[tuple[str, np.ndarray, np.ndarray, int]] = []
        self._tokens = self._in_file = 0

    def add(self, name: str, ids: np.ndarray, prompt: np.ndarray, size: int) -> None:
        """One more document: token ids [n], those of its prompt [m], bytes of its text."""
        self._rows.append((name, ids.astype(np.int32), prompt.astype(np.int32), size))
        self._tokens += len(ids) + len(prompt)
        if self._tokens >= GROUP_TOKENS or len(self._rows) >= GROUP_TOKENS // 64:
            self._flush()
        if self._in_file >= FILE_TOKENS:
            self._finish()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._finish()

    def _path(self) -> str:
        return os.path.join(self.folder, f"part-{self.number:05d}.parquet")

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        if not self._rows:
            return

        def lists(arrays: Sequence[np.ndarray]) -> Any:
            offsets = np.concatenate([[0], np.cumsum([len(one) for one in arrays])]).astype(np.int32)
            return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.concatenate(arrays)))

        names, ids, prompts, sizes = zip(*self._rows, strict=True)
        table = pyarrow.table({"id": pyarrow.array(names, pyarrow.string()), "tokens": lists(ids),
                               "prompt": lists(prompts), "bytes": pyarrow.array(sizes, pyarrow.int64())})
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self._path() + ".tmp", table.schema, compression="zstd")
        self._writer.write_table(table)
        self._in_file += self._tokens
        self._rows, self._tokens = [], 0

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            os.replace(self._path() + ".tmp", self._path())
            self._writer, self._in_file, self.number = None, 0, self.number + 1


def serve(export: Export, tell: Callable[..., None], requests: Iterator[str]) -> None:
    """Plan, then export the sources that `requests` names, one per line."""
    seqio = import_seqio()
    import absl.logging
    import tensorflow as tf

    absl.logging.set_verbosity(absl.logging.ERROR)
    tf.config.set_visible_devices([], "GPU")
    # Random steps outside seqio's seeds: the same every time. Later it would destroy the tokenizers made before.
    tf.random.set_seed(0)
    import_module(export.module)
    planned, tokenizer, facts = plan(seqio, export)
    tokenizer.save(os.path.join(export.work, "tokenizer"))
    tell(plan=facts)
    by_source = {one.source: one for one in planned}
    for line in requests:
        tell(done=write_task(seqio, by_source[line.strip()], tokenizer, export, tell))


def run(argument: str) -> int:
    """The child: returns its exit code. Its standard output is for answers only, also against print in other modules."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        serve(Export(**json.loads(argument)), tell, iter(sys.stdin.readline, ""))
    except NeoError as error:
        traceback.print_exc()
        tell(error=str(error), code=error.exit_code)
        return error.exit_code
    except OSError as error:
        traceback.print_exc()
        tell(error=str(error), errno=error.errno, file=error.filename, code=1)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
