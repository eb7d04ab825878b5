"""The seeds' recipes as seqio Tasks and Mixtures, for those who work with seqio.

    from neo.data import tasks

    tasks.register("moxin_7b", tokenizer="data/moxin_7b/tokenizer", inputs={
        "slimpajama": "slimpajama/*.jsonl.zst", "dclm_baseline": "dclm/", "the_stack_dedup": "tfds:my_stack:1.0.0"})

makes the Tasks `neo.moxin_7b.slimpajama`, ... and for each phase a Mixture, here `neo.moxin_7b.phase.context_2k`, with
the recipe's weights as rates. (A seqio name may have letters, digits, `_`, `.`, `:` and `#`; others become `_`.) Such a
name is one for `python -m neo.data.prepare --seqio_mixture=NAME --module=MODULE`, with a module that calls `register`.

Importing this module costs nothing; seqio and TensorFlow are imported when a function is called.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from neo.config import load
from neo.config.schema import Config, PhaseConfig
from neo.data.documents import ReadOptions, Tally, read_part, split_file
from neo.data.inputs import find_inputs
from neo.data.tokenizer import MODEL_FILE, AnyTokenizer, Tokenizer
from neo.errors import InputError, nearest
from neo.extras import need

TFDS = "tfds:"
FAST_IS_WRONG = ("use_fast_tokenizer=True: FastSentencepieceTokenizer gives other token ids than SentencePiece for {} "
                 "model, without an error; leave it out")


@dataclasses.dataclass(frozen=True)
class Registered:
    """Names that `register` gave: of the Task of each source, and of the Mixture of each phase.

    A phase whose mixture changes to `mixture_end` has a second one, under `<phase>.end`.
    """

    tasks: dict[str, str]
    mixtures: dict[str, str]


def import_seqio() -> ModuleType:
    """seqio, with TensorFlow and tensorflow-text. Raises InputError naming the extra where one is not installed."""
    for name in ("tensorflow", "tensorflow_text"):  # first, so that a missing one is named and not a file of seqio's
        need(name, extra="data")
    return need("seqio", extra="data")


def register(config: str | Config, inputs: str | Mapping[str, str | Sequence[str]], tokenizer: str, *,
             text_field: str = "text", id_field: str = "", on_bad_text: str = "replace",
             tfds_data_dir: str | None = None) -> Registered:
    """Register a recipe's sources as Tasks and its phases as Mixtures.

    Args:
        config: a recipe's name, the path of one, or a loaded Config.
        inputs: source name -> what `neo.data.prepare` reads (a file, folder or glob of .txt, .jsonl, .parquet, also
            compressed; or several), or `tfds:NAME:VERSION`; or one text for all, with {source} for the source's name.
        tokenizer: a tokenizer folder, or a SentencePiece model.
        text_field, id_field: fields of a record, or of a TFDS example.

    A Task's examples have `targets` (token ids, end-of-document last, never cut: see `chunk`) and `id`. Files are found
    when the Task is read. Raises InputError: sources without input, inputs without source, rates that are not known,
    names taken.
    """
    seqio = import_seqio()
    config = config if isinstance(config, Config) else load(config)
    if isinstance(inputs, str):
        if "{source}" not in inputs:
            raise InputError(f"inputs={inputs!r}: one text for all sources needs {{source}} in it")
        inputs = {name: inputs.replace("{source}", name) for name in config.sources}
    unknown = [name for name in inputs if name not in config.sources]
    if unknown:
        raise InputError(f"inputs names {unknown[0]!r}, which no mixture of {config.name} has"
                         f"{nearest(unknown[0], config.sources)}; its sources are {', '.join(config.sources[:12])}")
    missing = [name for name in config.sources if name not in inputs]
    if missing:
        raise InputError(f"inputs lacks {len(missing)} of the {len(config.sources)} sources of {config.name}: "
                         f"{', '.join(missing[:12])}{', ...' if len(missing) > 12 else ''}")
    prefix = f"neo.{seqio_name(config.name)}"
    names = {source: f"{prefix}.{seqio_name(source)}" for source in config.sources}
    rates = {f"{phase.name}{ending}": phase_rates(config, phase, mixture) for phase in config.phases
             for ending, mixture in (("", phase.mixture), (".end", phase.mixture_end)) if mixture}
    mixtures = {phase: f"{prefix}.phase.{'.'.join(map(seqio_name, phase.split('.')))}" for phase in rates}
    _check_names([*names.values(), *mixtures.values()], {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    feature = seqio.Feature(vocabulary(tokenizer), add_eos=True)
    eod_id = Tokenizer.load(tokenizer).eod_id
    options = ReadOptions(text_field=text_field, id_field=id_field, on_bad_text=on_bad_text)
    for source, name in names.items():
        _add_task(seqio, name, source, inputs[source], feature, eod_id, options, tfds_data_dir)
    for phase, name in mixtures.items():
        seqio.MixtureRegistry.add(name, [(names[source], rate) for source, rate in rates[phase].items() if rate])
    return Registered(names, mixtures)


def seqio_name(name: str) -> str:
    """`name` with what a seqio Task's name may not have, and `.`, as `_`."""
    return re.sub(r"[^\w:#]", "_", name)


def _check_names(names: Sequence[str], taken: set[str]) -> None:
    for name in names:
        if name in taken:
            raise InputError(f"seqio has a Task or Mixture {name!r} already; register a recipe once, under one name")
        taken.add(name)


def phase_rates(config: Config, phase: PhaseConfig, mixture: Mapping[str, float]) -> dict[str, float]:
    """Rates of a phase's mixture, proportional to its tokens.

    A mixture by epochs needs `config.data.source_tokens`: InputError where a source is not in it.
    """
    if phase.mixture_unit != "epochs":
        return dict(mixture)
    unknown = [name for name in mixture if name not in config.data.source_tokens]
    if unknown:
        raise InputError(f"phases.{phase.name}: rates of a mixture by epochs need the tokens of each source; "
                         f"config.data.source_tokens lacks {', '.join(unknown[:8])}")
    return {name: epochs * config.data.source_tokens[name] for name, epochs in mixture.items()}


def vocabulary(tokenizer: str, *, extra_ids: int = 0, use_fast_tokenizer: bool = False) -> Any:
    """A seqio.SentencePieceVocabulary of a tokenizer folder or a SentencePiece model, with the ids neo gives.

    Raises InputError for a tokenizer of another kind, and for the fast tokenizer where it is wrong.
    """
    seqio = import_seqio()
    loaded = Tokenizer.load(tokenizer)
    if not isinstance(loaded, Tokenizer):
        raise InputError(f"{tokenizer}: seqio reads SentencePiece models, this is a Hugging Face tokenizer; prepare its "
                         "texts with python -m neo.data.prepare INPUT...")
    paths = [tokenizer] if tokenizer.endswith(".model") else [os.path.join(tokenizer, MODEL_FILE),
                                                              os.path.join(tokenizer, "tokenizer", MODEL_FILE)]
    path = next((path for path in paths[:-1] if os.path.exists(path)), paths[-1])
    result = seqio.SentencePieceVocabulary(path, extra_ids=extra_ids, use_fast_tokenizer=use_fast_tokenizer)
    refuse_fast_tokenizer(result, loaded)
    return result


def refuse_fast_tokenizer(vocabulary: Any, tokenizer: AnyTokenizer) -> None:
    """InputError for a vocabulary that asks for tf-text's fast tokenizer where its ids are wrong.

    Of a BPE model it gives wrong ids; of a unigram model it gives <unk> where the model has bytes for a rare character.
    """
    if getattr(vocabulary, "_use_fast_tokenizer", False) and isinstance(tokenizer, Tokenizer):
        if tokenizer.proto.trainer_spec.model_type == tokenizer.proto.trainer_spec.BPE:
            raise InputError(FAST_IS_WRONG.format("a BPE"))
        if tokenizer.byte_tokens.any():
            raise InputError(FAST_IS_WRONG.format("a byte-fallback"))


def chunk(dataset: Any, sequence_length: Mapping[str, int] | None) -> Any:
    """A last preprocessor that cuts `targets` into examples of at most sequence_length instead of losing the rest.

    seqio cuts every example at the sequence length and drops what is behind it, end-of-document included. Without a
    sequence length the dataset is as it was.
    """
    if not sequence_length or not sequence_length.get("targets"):
        return dataset
    import tensorflow as tf

    size = sequence_length["targets"]

    def cut(example: Mapping[str, Any]) -> Any:
        targets = example["targets"]
        total = tf.size(targets)
        borders = tf.minimum(tf.range(0, total + size, size), total)
        return tf.data.Dataset.from_tensor_slices({"targets": tf.RaggedTensor.from_row_splits(targets, borders)})

    return dataset.flat_map(cut).map(lambda example: {"targets": tf.ensure_shape(example["targets"], (None,))})


def _add_task(seqio: ModuleType, name: str, recipe_source: str, inputs: str | Sequence[str], feature: Any, eod_id: int,
              options: ReadOptions, tfds_data_dir: str | None) -> None:
    import tensorflow as tf

    if isinstance(inputs, str) and inputs.startswith(TFDS):
        source = seqio.TfdsDataSource(tfds_name=inputs.removeprefix(TFDS), tfds_data_dir=tfds_data_dir)
        fields = {"targets": options.text_field, **({"id": options.id_field} if options.id_field else {})}
    else:
        source = _file_source(seqio, (inputs,) if isinstance(inputs, str) else tuple(inputs), options)
        fields = {"targets": "text", "id": "id"}
    source.neo_source = recipe_source  # what prepare calls it, where the Task's name had to differ

    plain = tf.autograph.experimental.do_not_convert  # nothing to convert, and converting takes longer than the rest

    def rename(dataset: Any) -> Any:
        return dataset.map(plain(lambda example: {new: example[old] for new, old in fields.items()}))

    def append_eod(dataset: Any) -> Any:
        return dataset.map(plain(lambda example: {**example, "targets": tf.concat([example["targets"], [eod_id]], 0)}))

    # The end is the tokenizer's, which need not be the model's </s> that seqio would append.
    seqio.TaskRegistry.add(name, source=source, output_features={"targets": feature},
                           preprocessors=[rename, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(),
                                          append_eod, chunk])


def _file_source(seqio: ModuleType, inputs: tuple[str, ...], options: ReadOptions) -> Any:
    """A seqio DataSource that reads what neo.data.prepare reads, the same way: same documents, ids and order."""
    import tensorflow as tf

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        files = list(enumerate(find_inputs(inputs).files))
        if shuffle_files:
            random.Random(seed).shuffle(files)

        def documents() -> Iterator[dict[str, str]]:
            for number, file in files:
                for part in split_file(number, file, 1 << 62):
                    for document in read_part(file, part, options, Tally()):
                        yield {"text": document.text, "id": document.id}

        spec = tf.TensorSpec((), tf.string)
        return tf.data.Dataset.from_generator(documents, output_signature={"text": spec, "id": spec})

    source = seqio.FunctionDataSource(dataset, splits=("train",))
    source.neo_files = lambda: [file.path for file in find_inputs(inputs).files]
    return source
