"""The tokenizer that goes with a store and with every checkpoint: a SentencePiece model and the ids around it.

A tokenizer folder has two files: `tokenizer.model`, and `neo_tokenizer.json` with what the model does not say (which
token ends a document, tokens added after the model's last id). Command: `python -m neo.data.tokenizer`.

Tokenizers of other kinds (byte-level BPE and whatever else a Hugging Face `tokenizer.json` holds) have the same
interface in neo/data/tokenizer_hf.py; `Tokenizer.load` and `load_tokenizer` give whichever the files are. How either
is written for Hugging Face: neo/data/tokenizer_export.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from neo.cli import JSON, Argument, Command, Namespace, main
from neo.data import store_files
from neo.errors import InputError

if TYPE_CHECKING:
    from neo.data.tokenizer_hf import HFTokenizer
    from neo.data.tokenizer_words import Words

AnyTokenizer: TypeAlias = Union["Tokenizer", "HFTokenizer"]  # quoted names cannot stand beside |

FORMAT = "neo.tokenizer"
VERSION = 2  # version 1 is what neo without Hugging Face tokenizers reads: still written wherever it says everything
MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
META_FILE = "neo_tokenizer.json"
STRETCH = 1 << 20  # ours: characters encoded at a time where that makes no difference; SentencePiece needs much memory
FEW_CHARACTERS = 4096  # ours: texts up to here do not pay for finding the borders of words
PAD_VOCAB_TO = 128  # the width of a matrix unit, and divisible over `tensor`
LARGEST_MODEL_BYTES = 256 << 20  # ours: real models have 0.2 to 35 MB; anything beyond is not a tokenizer
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of a piece, in SentencePiece and in GGUF


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. `extra_tokens` are control tokens with the ids after the model's own.

    `add_bos`: the model that goes with it is trained on texts that begin with `bos_id` (Llama 2, Mistral), so documents
    and prompts do; for neo's own tokenizers they do not. Ids from `vocab_size` on (rows a model has only for padding)
    decode to nothing; `padded_size`, where it is not 0, says how many rows a model for it should have.
    """

    model: bytes = dataclasses.field(repr=False)
    bos_id: int
    eod_id: int
    extra_tokens: tuple[str, ...] = ()
    add_bos: bool = False
    padded_size: int = 0

    @staticmethod
    def load(path: str) -> AnyTokenizer:
        """Load a tokenizer folder, a store or checkpoint folder that contains `tokenizer/`, a Hugging Face folder or a
        SentencePiece model.

        Local path or fsspec URL. Raises InputError: nothing there, not a SentencePiece BPE or unigram model, newer
        version.
        """
        if path.endswith(".model"):
            return from_model(read_file(path), path)
        if path.endswith(f"/{JSON_FILE}") or path == JSON_FILE:
            path = path[:-len(JSON_FILE)] or "."
        sizes = store_files.list_sizes(path)
        if sizes is None:
            problem = "a file that is not a SentencePiece model" if os.path.isfile(path) else "no such tokenizer"
            raise InputError(f"{path}: {problem}; give a folder with {MODEL_FILE} or {JSON_FILE}, or a file *.model")
        if not {MODEL_FILE, JSON_FILE} & set(sizes):
            inner = store_files.join(path, "tokenizer")
            sizes = store_files.list_sizes(inner) or {}
            if not {MODEL_FILE, JSON_FILE} & set(sizes):
                raise InputError(f"{path}: no {MODEL_FILE} in it, and no {JSON_FILE}; "
                                 "make a tokenizer with python -m neo.data.tokenizer train")
            path = inner
        if sizes.keys() & {JSON_FILE, "tokenizer_config.json", "config.json"}:
            from neo.data.tokenizer_hf import from_hf_folder
            return from_hf_folder(path)
        return load_tokenizer({name: read_file(store_files.join(path, name)) for name in (MODEL_FILE, META_FILE)
                               if name in sizes}, path)

    @staticmethod
    def from_files(files: Mapping[str, bytes], where: str = "tokenizer") -> AnyTokenizer:
        """`load_tokenizer`: the reverse of `files`."""
        return load_tokenizer(files, where)

    def files(self) -> dict[str, bytes]:
        """File name -> content of the tokenizer's folder; the same bytes wherever it is saved."""
        meta = {"format": FORMAT, "version": 1, "vocab_size": self.vocab_size, "bos_id": self.bos_id,
                "eod_id": self.eod_id, "extra_tokens": list(self.extra_tokens)}
        if self.add_bos:
            meta |= {"version": 2, "add_bos": True}
        if self.padded_size:
            meta |= {"padded_vocab_size": self.padded_size}
        return {MODEL_FILE: self.model, META_FILE: write_meta(meta)}

    def save(self, folder: str) -> None:
        """Write the two files into `folder`, each in one rename, the model last."""
        save_files(self.files(), folder, MODEL_FILE)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest over the model and its ids: two tokenizers with the same digest give the same tokens.

        Padding is the model's matter and not in it.
        """
        digest = hashlib.sha256()
        for content in dataclasses.replace(self, padded_size=0).files().values():
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end what the model writes, `eod_id` first."""
        return (self.eod_id,)

    @functools.cached_property
    def proto(self) -> Any:
        """The parsed model, a sentencepiece ModelProto: pieces with scores and types, trainer_spec, normalizer_spec."""
        from sentencepiece import sentencepiece_model_pb2
        return sentencepiece_model_pb2.ModelProto.FromString(self.model)

    @functools.cached_property
    def processor(self) -> Any:
        """The sentencepiece.SentencePieceProcessor."""
        import sentencepiece
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def model_size(self) -> int:
        """Number of ids of the SentencePiece model alone."""
        return self.processor.vocab_size()

    @property
    def vocab_size(self) -> int:
        """Number of ids, extra tokens included: ids are 0 .. vocab_size - 1."""
        return self.model_size + len(self.extra_tokens)

    @property
    def padded_vocab_size(self) -> int:
        """Rows that a model's table should have: `padded_size`, or the next multiple of 128."""
        return self.padded_size or next_multiple(self.vocab_size, PAD_VOCAB_TO)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with neither a first nor a last special token. Lone surrogates become question marks."""
        return [i for ids in self._encode_stretches(text) for i in ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of `text` as the model is to see it: with `bos_id` first where it was trained so (`add_bos`)."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    def encode_document(self, text: str, dtype: Any) -> Any:
        """Ids of `text` and then `eod_id`, as an array of `dtype`: what a store holds of a document.

        `bos_id` comes first where prompts have it first (`add_bos`).
        """
        import numpy as np
        # SentencePiece is asked for each word once: see tokenizer_words. The ids are the same.
        stretches = self.words.encode(_clean(text)) if self.words else self._encode_stretches(text)
        parts = itertools.chain([[self.bos_id] * self.add_bos], stretches, [[self.eod_id]])
        return np.concatenate([np.asarray(ids, dtype) for ids in parts])

    @functools.cached_property
    def words(self) -> Words | None:
        """What encodes documents word by word, for models where that gives the same ids."""
        from neo.data.tokenizer_words import Words, borders
        pattern = borders(self.proto)
        return Words(self.proto, pattern) if pattern else None

    def _encode_stretches(self, text: str) -> Iterator[list[int]]:
        """Ids of `text`, of a stretch of it at a time where cutting makes no difference."""
        text = _clean(text)
        if len(text) > FEW_CHARACTERS and self.words:
            yield from (ids.tolist() for ids in self.words.encode(text))
            return
        start = 0
        while len(text) - start > STRETCH and self._newline_separates:
            stop = text.rfind("\n", start, start + STRETCH) + 1
            if stop == 0:  # a line longer than a stretch stays whole
                stop = text.find("\n", start) + 1 or len(text)
            yield self.processor.encode(text[start:stop], out_type=int)
            start = stop
        if start < len(text):
            yield self.processor.encode(text[start:], out_type=int)

    @functools.cached_property
    def _newline_separates(self) -> bool:
        """Whether text may be cut after any newline without changing its tokens."""
        spec, newline = self.proto.normalizer_spec, self.proto.pieces[self.processor.piece_to_id("\n")]
        return (spec.name == "identity" and not spec.add_dummy_prefix and not spec.remove_extra_whitespaces
                and newline.type == USER_DEFINED)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens and ids past the vocabulary give nothing, broken UTF-8 gives U+FFFD.

        Raises ValueError for a negative id.
        """
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token id {min(ids)} is negative")
        return self.processor.decode([i for i in ids if i < self.model_size])

    def piece(self, token: int) -> str:
        """What a token is called in the model, for people to read."""
        if token >= self.model_size:
            return self.extra_tokens[token - self.model_size]
        return self.processor.id_to_piece(token)

    def gguf_pieces(self) -> list[tuple[bytes, float, int]]:
        """(UTF-8 name, score, type) of each id: what GGUF's tokenizer of kind "llama" holds, extra tokens included.

        Types are SentencePiece's: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1 .. 6. The other settings
        are in `proto.normalizer_spec` (add_dummy_prefix, remove_extra_whitespaces, name).
        """
        return [*((p.piece.encode(), p.score, p.type) for p in self.proto.pieces),
                *((token.encode(), 0.0, CONTROL) for token in self.extra_tokens)]

    @functools.cached_property
    def token_bytes(self) -> Any:
        """UTF-8 bytes of text that each id stands for: int64 [vocab_size]; 0 for control tokens.

        Their sum over a document's tokens is the document's size (plus one where the model adds a leading space, and
        for models that keep text as it is: those trained here do).
        """
        import numpy as np
        p = self.processor
        sizes = [1 if p.is_byte(i) else 0 if p.is_control(i) or p.is_unknown(i)
                 else len(p.id_to_piece(i).replace("\u2581", " ").encode()) for i in range(self.model_size)]
        return np.array(sizes + [0] * len(self.extra_tokens), np.int64)

    @functools.cached_property
    def byte_tokens(self) -> Any:
        """Which ids are single bytes, of characters the model has no piece for: bool [vocab_size]."""
        import numpy as np
        return np.array([*(p.type == BYTE for p in self.proto.pieces), *(False for _ in self.extra_tokens)], bool)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def next_multiple(size: int, of: int) -> int:
    """The smallest multiple of `of` that is not below `size`."""
    return -(-size // of) * of


def with_padding(tokenizer: AnyTokenizer, multiple: int) -> AnyTokenizer:
    """The tokenizer with its vocabulary padded to the next multiple; recorded where that is not what 128 gives."""
    size = tokenizer.vocab_size
    rows = next_multiple(size, multiple)
    return dataclasses.replace(tokenizer, padded_size=0 if rows == next_multiple(size, PAD_VOCAB_TO) else rows)


def load_tokenizer(files: Mapping[str, bytes], where: str = "tokenizer") -> AnyTokenizer:
    """The tokenizer that these files are, whatever its kind; `where` names the place in messages.

    Without neo_tokenizer.json the ids of the model (or what tokenizer_config.json says) hold. Raises InputError:
    neither a model nor a tokenizer.json, damaged, newer version.
    """
    meta = read_meta(files[META_FILE], where) if META_FILE in files else None
    if meta["kind"] == "huggingface" if meta else MODEL_FILE not in files and JSON_FILE in files:
        from neo.data.tokenizer_hf import from_hf_files
        return from_hf_files(files, where, meta=meta)
    if MODEL_FILE not in files:
        raise InputError(f"{where}: {MODEL_FILE} is missing")
    if meta is None:
        return from_model(files[MODEL_FILE], where)
    return from_model(files[MODEL_FILE], where, eod_id=meta["eod_id"], bos_id=meta["bos_id"],
                      extra_tokens=meta["extra_tokens"], add_bos=meta["add_bos"], padded_size=meta["padded_vocab_size"])


def read_meta(content: bytes, where: str) -> dict[str, Any]:
    """The checked content of neo_tokenizer.json, of any version, with all keys of the newest."""
    try:
        meta = {"kind": "sentencepiece", "add_bos": False, "extra_tokens": [], "eos_ids": [],
                "padded_vocab_size": 0, **json.loads(content)}
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r}")
        if meta["version"] > VERSION:
            raise InputError(f"{where}: tokenizer version {meta['version']}, this neo reads versions up to "
                             f"{VERSION}; install a newer neo")
        if meta["kind"] not in ("sentencepiece", "huggingface"):
            raise ValueError(f"kind {meta['kind']!r}")
        ids = [meta["bos_id"], meta["eod_id"], meta["vocab_size"], meta["padded_vocab_size"], *meta["eos_ids"]]
        if not (all(type(i) is int for i in ids) and type(meta["add_bos"]) is bool
                and all(isinstance(token, str) for token in meta["extra_tokens"])):
            raise ValueError("wrong types")
        if meta["padded_vocab_size"] and meta["padded_vocab_size"] < meta["vocab_size"]:
            raise ValueError(f"padded_vocab_size {meta['padded_vocab_size']}, vocab_size {meta['vocab_size']}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{store_files.join(where, META_FILE)}: damaged ({error!r}); copy or import it again") from error
    return meta


def write_meta(meta: Mapping[str, Any]) -> bytes:
    """The content of neo_tokenizer.json."""
    return (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode()


def save_files(files: Mapping[str, bytes], folder: str, last: str) -> None:
    """Write files into `folder`, each in one rename; `last` is what makes the folder a tokenizer."""
    os.makedirs(folder, exist_ok=True)
    for name, content in sorted(files.items(), key=lambda item: item[0] == last):
        path = os.path.join(folder, name)
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def from_model(model: bytes, where: str, *, eod_id: int | None = None, bos_id: int | None = None,
               extra_tokens: Sequence[str] = (), add_bos: bool = False, padded_size: int = 0) -> Tokenizer:
    """A Tokenizer around the bytes of a SentencePiece model; `eod_id` defaults to the model's `</s>`.

    Raises InputError: not a SentencePiece model, not BPE or unigram, ids outside the vocabulary, no end token.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        # ParseFromString also accepts some foreign bytes: pieces are what tells a model.
        proto.ParseFromString(model)
        kind, pieces = proto.trainer_spec.model_type, len(proto.pieces)
    except Exception as error:
        raise InputError(f"{where}: not a SentencePiece model ({type(error).__name__})") from error
    if not pieces:
        raise InputError(f"{where}: not a SentencePiece model (it has no pieces)")
    if kind not in (sentencepiece_model_pb2.TrainerSpec.BPE, sentencepiece_model_pb2.TrainerSpec.UNIGRAM):
        raise InputError(f"{where}: the SentencePiece model is of type {kind}; BPE (2) and unigram (1) can be used")
    tokenizer = Tokenizer(model, -1, -1, tuple(extra_tokens))
    try:
        processor = tokenizer.processor
    except RuntimeError as error:
        raise InputError(f"{where}: SentencePiece refuses this model: {str(error).splitlines()[0]}") from error
    eod_id = processor.eos_id() if eod_id is None else eod_id
    bos_id = processor.bos_id() if bos_id is None else bos_id
    if eod_id < 0:
        raise InputError(f"{where}: the model has no </s>; say which token ends a document: --eod_id=ID")
    if not eod_id < tokenizer.vocab_size or not -1 <= bos_id < tokenizer.vocab_size:
        raise InputError(f"{where}: eod_id {eod_id} or bos_id {bos_id} is outside the vocabulary of "
                         f"{tokenizer.vocab_size}")
    if add_bos and bos_id < 0:
        raise InputError(f"{where}: texts are to begin with <s>, which the model does not have")
    return Tokenizer(model, bos_id, eod_id, tuple(extra_tokens), add_bos, padded_size)


def read_file(path: str) -> bytes:
    """The content of one of a tokenizer's files. Raises InputError: not there, unreadable, too large for one."""
    try:
        content = bytearray()
        for chunk in store_files.iterate_bytes(path):
            content += chunk
            if len(content) > LARGEST_MODEL_BYTES:
                raise InputError(f"{path}: too large for a tokenizer (limit {LARGEST_MODEL_BYTES >> 20} MiB)")
        return bytes(content)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such tokenizer") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--weights={text}: give numbers with commas between them, one for each INPUT") from None


_TEXT = (
    Argument("text_field", "field or column with the text", default="text"),
    Argument("id_field", "field or column with the document's id", default="", shown="path and row"),
    Argument("on_bad_text", "what to do with text that is not UTF-8", default="replace", choices=("replace", "skip")),
)
_OUT = Argument("out", "folder of the tokenizer, for example data/mine/tokenizer")
_OVERWRITE = Argument("overwrite", "replace another tokenizer in that folder", default=False, type=bool)
_PADDING = Argument("pad_vocab_to", "rows of the model's table: the next multiple of this", default=0, type=int,
                    shown="128; 256 with --preset=map_neo")
_INPUT = Argument("input", "as for neo.data.prepare: files, folders, globs, hf:NAME[/SUBSET][:SPLIT]", positional=True,
                  many=True)

COMMAND = Command(
    prog="neo.data.tokenizer",
    summary="Train a SentencePiece tokenizer, take over an existing one, or measure one.",
    verbs={
        "train": Command(
            prog="train", summary="Train a tokenizer on documents outside the validation split.",
            arguments=(
                _INPUT, _OUT,
                Argument("vocab_size", "ids of the SentencePiece model", default=64000, type=int),
                Argument("preset", "map_neo: as MAP-NEO's; default: also newline, tab and runs of spaces as pieces",
                         default="default", choices=("map_neo", "default")),
                Argument("validation", "share of the documents to leave out; give neo.data.prepare the same",
                         default=0.001, type=float),
                Argument("sample_bytes", "train on about so much text, chosen by document; needs 20 times this memory",
                         default=200_000_000, type=int),
                Argument("weights", "share of each INPUT in that text, in the same order: 0.5,0.3,0.2", default=(),
                         type=_weights, shown="by size"),
                _PADDING, *_TEXT, _OVERWRITE),
            examples=("python -m neo.data.tokenizer train texts/ --out=data/mine/tokenizer --vocab_size=8000",
                      "python -m neo.data.tokenizer train 'web/*.jsonl.gz' code/ --weights=0.7,0.3 --out=tokenizers/t "
                      "--preset=map_neo")),
        "import": Command(
            prog="import", summary="Take over a SentencePiece model, or the tokenizer of a Hugging Face folder.",
            arguments=(
                Argument("file", "the model (tokenizer.model), or a folder with one or with tokenizer.json",
                         positional=True), _OUT,
                Argument("eod_id", "id of the token that ends a document", default=-1, type=int,
                         shown="the model's </s>, the folder's eos_token"),
                Argument("extra_token", "control token with the next id after a SentencePiece model's; may be repeated",
                         default=(), many=True),
                Argument("no_bos", "texts do not begin with BOS, whatever the folder says", default=False, type=bool),
                dataclasses.replace(_PADDING, shown="the rows in the folder's config.json; 128"),
                _OVERWRITE),
            examples=("python -m neo.data.tokenizer import tokenizer.model --out=data/mine/tokenizer",
                      "python -m neo.data.tokenizer import Llama-3.1-8B/ --out=tokenizers/llama3",
                      "python -m neo.data.tokenizer import neo_7b/ --out=tokenizers/neo --eod_id=64002 "
                      "--extra_token='<CLS>' --extra_token='<SEP>' --extra_token='<EOD>'")),
        "report": Command(
            prog="report",
            summary="Bytes per token by source and language, byte pieces, speed and round-trip failures of a tokenizer.",
            arguments=(Argument("tokenizer", "tokenizer folder or model", positional=True), _INPUT, *_TEXT,
                       Argument("language_field", "field or column with the document's language", default="",
                                shown="none: the script of most letters"), JSON),
            examples=("python -m neo.data.tokenizer report data/mine/tokenizer texts/",
                      "python -m neo.data.tokenizer report neo_7b/tokenizer.model 'web/*.jsonl.gz' --json")),
    },
    examples=("python -m neo.data.tokenizer train texts/ --out=data/mine/tokenizer --vocab_size=8000",
              "python -m neo.data.tokenizer report data/mine/tokenizer texts/"),
)


def run(args: Namespace) -> None:
    """The command's three verbs."""
    from neo.data import tokenizer_commands  # the rest of this package, not needed by those who only load

    getattr(tokenizer_commands, f"run_{args.verb}")(args)


if __name__ == "__main__":
    main(COMMAND, run)
