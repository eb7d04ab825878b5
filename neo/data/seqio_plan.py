"""What of seqio becomes what of a store: the user's module, a Mixture's Tasks with their rates, and their tokenizer.

Runs in the process of neo/data/seqio_export.py, the only one that imports seqio and TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from neo.data.tasks import refuse_fast_tokenizer
from neo.data.tokenizer import META_FILE, MODEL_FILE, AnyTokenizer, Tokenizer, from_model, load_tokenizer
from neo.errors import InputError, NeoError, nearest

SOURCE_NAMES_TAKEN = ("tokenizer", "mixtures")


@dataclasses.dataclass(frozen=True)
class Export:
    """What the child is asked for: a Task or Mixture `name` of `module`; `work` is the folder it writes to.

    `feature` holds the token ids, `prompt` (if any) those that stand before them and are not learned. `tokenizer` is the
    user's choice; `store_tokenizer` the one that the store has already, if it has one.
    """

    name: str
    module: str
    work: str
    split: str = "train"
    feature: str = "targets"
    prompt: str = ""
    id_field: str = ""
    tokenizer: str = ""
    store_tokenizer: str = ""


@dataclasses.dataclass(frozen=True)
class PlannedTask:
    """One Task of the mixture. `key` changes with all that is known to decide its content."""

    task: Any
    source: str
    rate: float
    key: str


def import_module(module: str) -> None:
    """Import the user's module: a dotted name found from the current folder, or the path of a .py file.

    Raises InputError in one line: not there, or its own error with file and line.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if module.endswith(".py"):
            if not os.path.isfile(module):
                raise InputError(f"--module={module}: no such file")
            sys.path.insert(0, os.path.dirname(os.path.abspath(module)))
            spec = importlib.util.spec_from_file_location(os.path.basename(module)[:-3], module)
            loaded = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, loaded)
            spec.loader.exec_module(loaded)
        else:
            importlib.import_module(module)
    except NeoError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise InputError(f"--module={module}: no module {error.name!r} in {here} or among the installed packages; "
                             "give a dotted name (my.tasks) or a path (my/tasks.py)") from error
        raise InputError(f"--module={module}: {place_of(error)}{summary(error)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"--module={module}: {place_of(error)}{summary(error)}") from error


def place_of(error: BaseException) -> str:
    """`file:line: ` of the user's code that raised, empty where none of it is on the way."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    own = os.path.dirname(os.path.abspath(__file__))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if "site-packages" not in frame.filename and not frame.filename.startswith(("<", own))
              and os.path.dirname(frame.filename) != os.path.dirname(os.__file__)
              and "importlib" not in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def summary(error: BaseException) -> str:
    """An error of TensorFlow, seqio or the user in one line."""
    lines = [line.strip() for line in re.sub(r"\{\{.*?\}\}", "", str(error)).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return (text if isinstance(error, NeoError) else f"{type(error).__name__}: {text}")[:400]


def find_provider(seqio: ModuleType, name: str) -> Any:
    """The Task or Mixture; InputError with the nearest name."""
    known = sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})
    if name not in known:
        close = nearest(name, known)
        listed = f"; there are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}" if known else ""
        raise InputError(f"--seqio_mixture={name}: the module registers no Task or Mixture of this name{close}{listed}")
    return seqio.get_mixture_or_task(name)


def flatten(seqio: ModuleType, provider: Any) -> dict[str, tuple[Any, float]]:
    """Task name -> (Task, rate) of a Task or of a Mixture, nested ones resolved as seqio does."""
    if isinstance(provider, seqio.Task):
        return {provider.name: (provider, 1.0)}
    rates = {}
    for task in provider.tasks:
        try:
            rate = float(provider.get_rate(task))
        except Exception as error:
            raise InputError(f"mixture {provider.name}: the rate of {task.name} cannot be worked out: "
                             f"{place_of(error)}{summary(error)}") from error
        if not math.isfinite(rate) or rate < 0:
            raise InputError(f"mixture {provider.name}: the rate of {task.name} is {rate}; 0 or more is needed")
        rates[task.name] = (task, rate)
    if not any(rate for _, rate in rates.values()):
        raise InputError(f"mixture {provider.name}: all rates are 0")
    return rates


def source_name(task: Any) -> str:
    """The source that a Task becomes: the recipe's for Tasks of neo.data.tasks, else the Task's name.

    What a source's name may not have becomes `_`.
    """
    name = getattr(task.source, "neo_source", "") or re.sub(r"[^A-Za-z0-9_-]", "_", task.name)
    return f"{name}_" if name in SOURCE_NAMES_TAKEN else name


def plan(seqio: ModuleType, export: Export) -> tuple[list[PlannedTask], AnyTokenizer, dict[str, Any]]:
    """The tasks to export, the tokenizer of their ids, and the facts for the parent. Raises InputError."""
    provider = find_provider(seqio, export.name)
    rates = {name: pair for name, pair in flatten(seqio, provider).items() if pair[1]}
    notes = []
    for name, (task, _) in list(rates.items()):
        try:
            splits = list(task.splits)
        except Exception as error:
            raise InputError(f"task {name}: its splits cannot be listed: {place_of(error)}{summary(error)}") from error
        if export.split not in splits:
            hint = f"task {name} has no split {export.split!r} (it has {', '.join(map(str, splits))})"
            notes.append(f"{hint}: left out, as seqio does")
            del rates[name]
    if not rates:
        raise InputError(f"--split={export.split}: {hint}")
    tasks = [task for task, _ in rates.values()]
    _, tokenizer = find_tokenizer(seqio, tasks, export)
    others = sorted({feature for task in tasks for feature in task.output_features} - {export.feature, export.prompt})
    if others:
        notes.append(f"only {export.feature} is used, not {', '.join(others)}; choose with --feature and --prompt_field")
    planned, sources = [], {}
    for name, (task, rate) in rates.items():
        source = source_name(task)
        if source in sources:
            raise InputError(f"tasks {sources[source]} and {name} would both become the source {source}; rename one")
        sources[source] = name
        planned.append(PlannedTask(task, source, rate, task_key(task, export, tokenizer)))
    import tensorflow_text
    facts = {"sources": {one.source: {"task": one.task.name, "rate": one.rate, "key": one.key} for one in planned},
             "notes": notes, "seqio": seqio.__version__,
             "tensorflow_text": tensorflow_text.__version__}
    return planned, tokenizer, facts


def find_tokenizer(seqio: ModuleType, tasks: Sequence[Any], export: Export) -> tuple[Any, AnyTokenizer]:
    """The tasks' vocabulary, and the tokenizer with the same ids that the store gets or has.

    That is --tokenizer where given, else the store's, else the vocabulary's model (with extra ids, as the vocabulary has
    them) and, where the model lies in a tokenizer folder of neo, what that says about the end of a document.
    """
    features = []
    for task, name in itertools.product(tasks, filter(None, (export.feature, export.prompt))):
        feature = task.output_features.get(name)
        if feature is None:
            flag = "feature" if name == export.feature else "prompt_field"
            raise InputError(f"task {task.name} has no feature {name!r}; "
                             f"give one that it has: --{flag}={' or '.join(task.output_features)}")
        if getattr(feature, "rank", 1) != 1 or not hasattr(feature, "vocabulary"):
            raise InputError(f"feature {name} of task {task.name} is not a list of token ids")
        features.append((f"{name} of task {task.name}", feature.vocabulary))
    first, vocabulary = features[0]
    for name, other in features:
        if other != vocabulary:
            raise InputError(f"{first} and {name} have different vocabularies, a store has one tokenizer: prepare each "
                             "into a store of its own")
    if isinstance(vocabulary, seqio.PassThroughVocabulary) and (export.tokenizer or export.store_tokenizer):
        return vocabulary, Tokenizer.load(export.tokenizer or export.store_tokenizer)  # the user says by what
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        raise InputError(f"feature {first} has a {type(vocabulary).__name__}; a store needs a "
                         "SentencePiece model: give the feature a seqio.SentencePieceVocabulary (ids made beforehand: a "
                         "PassThroughVocabulary, and --tokenizer), or write the texts to .jsonl and prepare those")
    own = vocabulary_tokenizer(vocabulary)
    for flag, path, cure in (("--tokenizer=", export.tokenizer, "leave out --tokenizer to use the vocabulary's own"),
                             ("", export.store_tokenizer, "choose another --out")):
        if path:
            return vocabulary, _same_ids(vocabulary, own, Tokenizer.load(path), f"{flag}{path}", cure)
    if own.eod_id < 0:
        raise InputError(f"{vocabulary.sentencepiece_model_file}: the model has no </s> to end documents with; take it over "
                         "with python -m neo.data.tokenizer import MODEL --out=FOLDER --eod_id=ID, give --tokenizer=FOLDER")
    return vocabulary, own


def vocabulary_tokenizer(vocabulary: Any) -> Tokenizer:
    """neo's tokenizer for a SentencePieceVocabulary, with what a neo_tokenizer.json beside its model says.

    `eod_id` is -1 where neither tells how documents end. Raises InputError: no model, tf-text's fast tokenizer.
    """
    path = vocabulary.sentencepiece_model_file
    try:
        model, end = vocabulary.sp_model, vocabulary.tokenizer.eos_id()
    except Exception as error:
        raise InputError(f"{path}: the vocabulary's model cannot be read: {summary(error)}") from error
    own = from_model(model, path, eod_id=max(end, 0))
    refuse_fast_tokenizer(vocabulary, own)
    beside = os.path.join(os.path.dirname(path), META_FILE)
    if not os.path.exists(beside):
        return own if end >= 0 else dataclasses.replace(own, eod_id=-1)
    with open(beside, "rb") as file:
        found = load_tokenizer({MODEL_FILE: model, META_FILE: file.read()}, path)
    if not isinstance(found, Tokenizer) or (vocabulary.extra_ids and found.extra_tokens):
        raise InputError(f"{beside}: its extra tokens and the vocabulary's {vocabulary.extra_ids} extra_ids would have the "
                         "same ids; leave out extra_ids")
    return found


def _same_ids(vocabulary: Any, own: Tokenizer, other: AnyTokenizer, where: str, cure: str) -> Tokenizer:
    """`other`, whose model must be the vocabulary's."""
    path = vocabulary.sentencepiece_model_file
    if not isinstance(other, Tokenizer):
        raise InputError(f"{where}: a Hugging Face tokenizer, the task's vocabulary is {path}; {cure}")
    if len(own.proto.pieces) != len(other.proto.pieces):
        extra = f" ({vocabulary.extra_ids} of them extra_ids)" if vocabulary.extra_ids else ""
        raise InputError(f"{where}: {len(other.proto.pieces)} pieces, the task's vocabulary {path} has "
                         f"{len(own.proto.pieces)}{extra}; {cure}")
    if own.proto.pieces != other.proto.pieces or own.proto.normalizer_spec != other.proto.normalizer_spec:
        raise InputError(f"{where}: not the model of the task's vocabulary {path}; {cure}")
    return other


def task_key(task: Any, export: Export, tokenizer: AnyTokenizer) -> str:
    """Digest of what decides a task's content, as far as it can be seen: source, preprocessors, files with sizes.

    What the preprocessors call in turn is not seen. Raises InputError: no files, or the source cannot list them.
    """
    import seqio

    source = task.source
    try:
        files = source.neo_files() if hasattr(source, "neo_files") else source.list_shards(export.split)
    except Exception as error:
        raise InputError(f"task {task.name}: {place_of(error)}{summary(error)}") from error
    if not files and isinstance(source, seqio.FileDataSource):
        raise InputError(f"task {task.name}: no file matches {vars(source).get('_split_to_filepattern', {}).get(export.split)}")
    stats = []
    for path in sorted(map(os.fsdecode, files)):
        status = os.stat(path) if os.path.exists(path) else None
        stats.append([path, status and status.st_size, status and status.st_mtime_ns])
    facts = [task.name, export.split, export.feature, export.prompt, export.id_field, tokenizer.sha256, seqio.__version__,
             stats, type(source).__qualname__, fingerprint(vars(source)), fingerprint(list(task.preprocessors))]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def fingerprint(value: Any, depth: int = 0) -> Any:
    """Plain values that change with what `value` is made of: functions by their source and what they close over."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if depth < 6:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(key): fingerprint(one, depth + 1) for key, one in sorted(value.items(), key=lambda item: str(item[0]))}
        if isinstance(value, (list, tuple)):
            return [fingerprint(one, depth + 1) for one in value]
        if isinstance(value, functools.partial):
            return [fingerprint(value.func, depth + 1), fingerprint(value.args, depth + 1),
                    fingerprint(value.keywords, depth + 1)]
        function = inspect.unwrap(value) if callable(value) else None
        if inspect.isfunction(function):
            try:
                text = inspect.getsource(function)
            except (OSError, TypeError):
                text = function.__code__.co_code.hex()
            closed = inspect.getclosurevars(function).nonlocals
            return [text, fingerprint(closed, depth + 1), fingerprint(function.__defaults__, depth + 1)]
    return f"{type(value).__module__}.{type(value).__qualname__}"
