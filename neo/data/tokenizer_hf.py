"""A Hugging Face `tokenizer.json` (byte-level BPE as of GPT-NeoX, Llama 3, Qwen2, and other kinds) with the interface of
`neo.data.tokenizer.Tokenizer`, through the package `tokenizers`; and the tokenizer of a Hugging Face model folder.

Files are parsed, never executed; code a folder brings along is not looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neo.data import store_files
from neo.data.tokenizer import (
    BYTE,
    CONTROL,
    FORMAT,
    JSON_FILE,
    META_FILE,
    MODEL_FILE,
    NORMAL,
    PAD_VOCAB_TO,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    VERSION,
    AnyTokenizer,
    Tokenizer,
    from_model,
    load_tokenizer,
    next_multiple,
    read_file,
    read_meta,
    save_files,
    write_meta,
)
from neo.data.tokenizer_special import (
    ABOUT_IDS,
    CONFIG_FILE,
    DIGEST_KEY,
    SPECIAL_FILE,
    refusals,
    sentencepiece_of,
    settings,
    special_ids,
)
from neo.errors import InputError
from neo.extras import need

# What a tokenizer consists of beside tokenizer.json: handed through as it is, to transformers and to the next reader.
KEPT = (JSON_FILE, CONFIG_FILE, SPECIAL_FILE, "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
        "chat_template.json", MODEL_FILE)
LARGEST_VOCABULARY = 1 << 24  # ours: ids beyond are no tokenizer's, and arrays of that size would be allocated
SPACE = "\u2581"
STRETCH = 1 << 20  # ours: characters encoded at a time where that makes no difference
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
# Patterns (GPT-2 and GPT-NeoX; Llama 3; Qwen2) that cut between a line's end and the letter of the next, whatever is
# around them.
LINES_APART = {GPT2_PATTERN, _CL100K % "{1,3}", _CL100K % ""}
LINE_END = re.compile(r"(?<=[A-Za-z0-9.,;:!?)}\]>\"'])\n(?=[A-Za-z])")


@dataclasses.dataclass(frozen=True)
class HFTokenizer:
    """Text to token ids and back, by a tokenizer.json. The interface is that of `Tokenizer`.

    `contents` are the files of the tokenizer (name, bytes), sorted by name. `eos_ids` are all ids that end what the
    model writes; `eod_id`, one of them, ends a document. `add_bos`: documents and prompts begin with `bos_id`.
    `vocab_size` is the largest id + 1; special tokens with ids from there on are left out (a text model without the
    image token). `padded_size`, where it is not 0: rows of the model it came with, which were more than its ids.
    """

    contents: tuple[tuple[str, bytes], ...] = dataclasses.field(repr=False)
    bos_id: int
    eod_id: int
    vocab_size: int
    add_bos: bool = False
    eos_ids: tuple[int, ...] = ()
    padded_size: int = 0

    def files(self) -> dict[str, bytes]:
        """File name -> content of the tokenizer's folder: the files as they came, and neo_tokenizer.json."""
        meta = {"format": FORMAT, "version": VERSION, "kind": "huggingface", "vocab_size": self.vocab_size,
                "bos_id": self.bos_id, "eod_id": self.eod_id, "eos_ids": list(self.eos_ids), "add_bos": self.add_bos,
                DIGEST_KEY: hashlib.sha256(dict(self.contents)[JSON_FILE]).hexdigest()}
        if self.padded_size:
            meta |= {"padded_vocab_size": self.padded_size}
        return {**dict(self.contents), META_FILE: write_meta(meta)}

    def save(self, folder: str) -> None:
        """Write the files into `folder`, each in one rename, tokenizer.json last."""
        save_files(self.files(), folder, JSON_FILE)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest over tokenizer.json and the ids: two tokenizers with the same digest give the same tokens."""
        files = dataclasses.replace(self, padded_size=0).files()  # padding is the model's matter
        digest = hashlib.sha256()
        for name in (JSON_FILE, META_FILE):
            digest.update(hashlib.sha256(files[name]).digest())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """The parsed tokenizer.json: model (with vocab and merges), normalizer, pre_tokenizer, decoder, ..."""
        return json.loads(dict(self.contents)[JSON_FILE])

    @property
    def padded_vocab_size(self) -> int:
        """Rows that a model's table should have: `padded_size`, or the next multiple of 128."""
        return self.padded_size or next_multiple(self.vocab_size, PAD_VOCAB_TO)

    def _processor(self, *, special_is_text: bool) -> Any:
        tk = need("tokenizers", extra="hf", why="a Hugging Face tokenizer")
        content = dict(self.contents)[JSON_FILE].decode()
        if any(token["id"] >= self.vocab_size for token in self.description.get("added_tokens") or []):
            kept = [token for token in self.description["added_tokens"] if token["id"] < self.vocab_size]
            content = json.dumps({**self.description, "added_tokens": kept})
        made = parse(tk, content, "tokenizer.json")
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = special_is_text
        return made

    @functools.cached_property
    def processor(self) -> Any:
        """The tokenizers.Tokenizer of documents: a special token written out in a text is text."""
        return self._processor(special_is_text=True)

    @functools.cached_property
    def prompt_processor(self) -> Any:
        """The tokenizers.Tokenizer of prompts: a special token written out in a prompt is that token."""
        return self._processor(special_is_text=False)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with neither a first nor a last special token. Lone surrogates become question marks.

        A special token written out in the text (`<|endoftext|>` in a page about language models) is encoded as text:
        no document can end itself, or begin a turn of a chat. transformers makes the token of it: see `encode_prompt`.
        """
        return [i for ids in self._encode_stretches(text) for i in ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of `text` as transformers gives them to the model: special tokens written out in it are those tokens,
        and `bos_id` comes first where the model was trained so (`add_bos`)."""
        with refusals("the tokenizer cannot encode this text"):
            ids = self.prompt_processor.encode(_clean(text), add_special_tokens=False).ids
        return [self.bos_id] * self.add_bos + ids

    def encode_document(self, text: str, dtype: Any) -> Any:
        """Ids of `text` and then `eod_id`, as an array of `dtype`: what a store holds of a document.

        `bos_id` comes first where prompts have it first (`add_bos`).
        """
        import numpy as np
        parts = itertools.chain([[self.bos_id] * self.add_bos], self._encode_stretches(text), [[self.eod_id]])
        return np.concatenate([np.array(ids, dtype) for ids in parts])

    def _encode_stretches(self, text: str) -> Iterator[list[int]]:
        text, start = _clean(text), 0
        while len(text) - start > STRETCH and self._lines_apart:
            cut = max((found.end() for found in LINE_END.finditer(text, start, start + STRETCH)), default=0)
            if not cut:  # nowhere to cut in this stretch: it stays whole up to the next place
                found = LINE_END.search(text, start + STRETCH - 2)
                cut = found.end() if found else len(text)
            yield self._ids(text[start:cut])
            start = cut
        if start < len(text):
            yield self._ids(text[start:])

    def _ids(self, text: str) -> list[int]:
        with refusals("the tokenizer cannot encode this text"):
            return self.processor.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _lines_apart(self) -> bool:
        """Whether text may be cut at LINE_END without changing its tokens."""
        normalizer, steps = self.description.get("normalizer"), _steps(self.description.get("pre_tokenizer"))
        patterns = self.pre_tokenizer_patterns
        added = [token for token in self.description.get("added_tokens") or [] if not token.get("special")]
        return (bool(patterns) and patterns[0] in LINES_APART and (normalizer is None or normalizer["type"] == "NFC")
                and all(step["type"] in ("Split", "ByteLevel") for step in steps)
                and not any(step.get("add_prefix_space") for step in steps)
                and not any("\n" in token["content"] or token.get("rstrip") or token.get("lstrip") for token in added))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens and ids past the vocabulary give nothing, broken UTF-8 gives U+FFFD.

        Nothing is tidied up afterwards (`clean_up_tokenization_spaces`). Raises ValueError for a negative id.
        """
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token id {min(ids)} is negative")
        return self.processor.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """What a token is called, for people to read; empty for an id without a token."""
        return self.vocabulary[token]

    @functools.cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Name of each id, [vocab_size], as tokenizer.json has it (byte-level names where `is_byte_level`); an id
        without a token has an empty one."""
        names = [""] * self.vocab_size
        for name, i in self.processor.get_vocab(with_added_tokens=True).items():
            names[i] = name
        return tuple(names)

    @functools.cached_property
    def added_tokens(self) -> dict[int, tuple[str, bool]]:
        """Id -> (text, whether special) of the tokens that are cut out of a text before the model sees it."""
        return {token["id"]: (token["content"], bool(token.get("special")))
                for token in self.description.get("added_tokens") or [] if token["id"] < self.vocab_size}

    @functools.cached_property
    def merges(self) -> tuple[tuple[str, str], ...]:
        """Merges of a BPE model, first to last; empty for other models."""
        found = self.description["model"].get("merges") or []
        return tuple(tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in found)

    @property
    def model_type(self) -> str:
        """Kind of the model: BPE, Unigram, WordPiece or WordLevel."""
        return self.description["model"].get("type") or ("BPE" if "merges" in self.description["model"] else "Unigram")

    @property
    def is_byte_level(self) -> bool:
        """Whether the names of tokens are bytes written in GPT-2's alphabet of 256 characters (`byte_of`)."""
        steps = _steps(self.description.get("pre_tokenizer")) + _steps(self.description.get("decoder"))
        return any(step["type"] == "ByteLevel" for step in steps)

    @property
    def pre_tokenizer_patterns(self) -> tuple[str, ...]:
        """Regular expressions that cut a text into words, in order; GPT-2's own where ByteLevel brings it."""
        found = []
        for step in _steps(self.description.get("pre_tokenizer")):
            if step["type"] == "Split":
                found.append(step["pattern"].get("Regex") or re.escape(step["pattern"].get("String", "")))
            elif step["type"] == "Digits":
                found.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
            elif step["type"] == "ByteLevel" and step.get("use_regex", True):
                found.append(GPT2_PATTERN)
        return tuple(found)

    @functools.cached_property
    def sentencepiece(self) -> Tokenizer | None:
        """The SentencePiece tokenizer among the files (Llama 2, Mistral), where it has the same names for its ids."""
        model = dict(self.contents).get(MODEL_FILE)
        if model is None:
            return None
        try:
            own = from_model(model, MODEL_FILE, eod_id=0)
        except InputError:  # the name is used for other formats too
            return None
        names = [own.piece(i) for i in range(own.vocab_size)]
        extra = self.vocabulary[len(names):]
        if list(self.vocabulary[:len(names)]) != names or not all(extra):
            return None
        return Tokenizer(model, self.bos_id, self.eod_id, extra, self.add_bos)

    def gguf_pieces(self) -> list[tuple[bytes, float, int]]:
        """(name, score, type) of each id, as GGUF wants them: see `Tokenizer.gguf_pieces` for the types.

        Of a byte-level model: for GGUF's kind "gpt2", together with `merges` (names stay in the byte alphabet, added
        tokens are their text). Of a SentencePiece-like model (Llama 2 without its tokenizer.model): for kind "llama",
        scores from the merges' order. An id without a token is UNUSED and called [PADi].
        """
        if self.sentencepiece is not None:
            return self.sentencepiece.gguf_pieces()
        model = self.description["model"]
        if self.model_type == "Unigram":
            score = {name: float(value) for name, value in model["vocab"]}
        else:
            score = {a + b: -float(i) for i, (a, b) in reversed(list(enumerate(self.merges)))}
        unknown = None if self.is_byte_level else model.get("unk_token")
        pieces = []
        for i, name in enumerate(self.vocabulary):
            if name and name == unknown:
                pieces.append((name.encode(), 0.0, UNKNOWN))
            elif i in self.added_tokens:
                text, special = self.added_tokens[i]
                pieces.append((text.encode(), 0.0, CONTROL if special else USER_DEFINED))
            elif not name:
                pieces.append((f"[PAD{i}]".encode(), 0.0, UNUSED))
            elif not self.is_byte_level and re.fullmatch("<0x[0-9A-F]{2}>", name):
                pieces.append((name.encode(), 0.0, BYTE))
            else:
                pieces.append((name.encode(), score.get(name, -float(len(self.merges))), NORMAL))
        return pieces

    @functools.cached_property
    def token_bytes(self) -> Any:
        """UTF-8 bytes of text that each id stands for: int64 [vocab_size]; 0 for special tokens and unused ids."""
        import numpy as np
        sizes = []
        for i, name in enumerate(self.vocabulary):
            if i in self.added_tokens:
                text, special = self.added_tokens[i]
                sizes.append(0 if special else len(text.encode()))
            elif self.is_byte_level:
                sizes.append(len(name))  # one character of the alphabet is one byte
            elif re.fullmatch("<0x[0-9A-F]{2}>", name):
                sizes.append(1)
            else:
                sizes.append(len(name.replace(SPACE, " ").encode()))
        return np.array(sizes, np.int64)

    @functools.cached_property
    def byte_tokens(self) -> Any:
        """Which ids are a single byte of a character: bool [vocab_size]; in a byte-level model those that are not
        ASCII."""
        import numpy as np
        byte = byte_of()
        found = [i not in self.added_tokens
                 and (len(name) == 1 and byte.get(name, 0) >= 0x80 if self.is_byte_level
                      else re.fullmatch("<0x[0-9A-F]{2}>", name) is not None) for i, name in enumerate(self.vocabulary)]
        return np.array(found, bool)


@functools.cache
def byte_of() -> dict[str, int]:
    """Character -> byte of GPT-2's alphabet (openai/gpt-2, encoder.py: printable bytes are themselves, the others
    follow from U+0100 on)."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    return {chr(byte): byte for byte in itself} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The members of a Sequence, nested ones too; a part that is none stands alone."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("decoders") or part.get("processors") or part.get("normalizers")
    return [part] if inner is None else [step for member in inner for step in _steps(member)]


def parse(tk: Any, content: str, where: str) -> Any:
    """A tokenizers.Tokenizer of the text of a tokenizer.json. Raises InputError where the package refuses it."""
    with refusals(f"{where}: not a tokenizer.json that tokenizers {tk.__version__} reads"):
        return tk.Tokenizer.from_str(content)


def from_hf_files(files: Mapping[str, bytes], where: str, *, meta: Mapping[str, Any] | None = None,
                  eod_id: int | None = None) -> HFTokenizer:
    """An HFTokenizer of the files of a folder, as `HFTokenizer.files` gives them or as a model hub has them.

    Without `meta` (neo_tokenizer.json) the special ids are looked up in tokenizer_config.json, special_tokens_map.json,
    generation_config.json and config.json. Raises InputError: damaged, ids outside the vocabulary, no end token.
    """
    tk = need("tokenizers", extra="hf", why=f"{where}: a Hugging Face tokenizer")
    if JSON_FILE not in files:
        raise InputError(f"{where}: {JSON_FILE} is missing")
    contents = tuple(sorted((name, bytes(files[name])) for name in KEPT if name in files))
    try:
        added = json.loads(files[JSON_FILE]).get("added_tokens") or []
        added = {int(token["id"]): bool(token.get("special")) for token in added}
        parsed = parse(tk, files[JSON_FILE].decode(), store_files.join(where, JSON_FILE))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{store_files.join(where, JSON_FILE)}: damaged ({error!r}); copy it again") from error
    size = max(parsed.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not 0 < size <= LARGEST_VOCABULARY:
        raise InputError(f"{where}: {JSON_FILE} has ids up to {size - 1}; 0 to {LARGEST_VOCABULARY - 1} can be used")
    if meta is not None and meta.get(DIGEST_KEY) != hashlib.sha256(files[JSON_FILE]).hexdigest():
        raise InputError(f"{where}: {JSON_FILE} is not the one that {META_FILE} was written for; copy or import it again")
    if meta is None:
        meta = special_ids(parsed, size, added, files, where, eod_id)
    if not 0 < meta["vocab_size"] <= size:
        raise InputError(f"{where}: vocab_size is {meta['vocab_size']}, but {JSON_FILE} has {size} ids")
    made = HFTokenizer(contents, meta["bos_id"], meta["eod_id"], meta["vocab_size"], meta["add_bos"],
                       tuple(meta["eos_ids"]) or (meta["eod_id"],), meta["padded_vocab_size"])
    if not all(0 <= i < made.vocab_size for i in (made.eod_id, *made.eos_ids)) or not (
            -1 + made.add_bos <= made.bos_id < made.vocab_size):
        raise InputError(f"{where}: eod_id {made.eod_id}, eos_ids {list(made.eos_ids)} or bos_id {made.bos_id} is "
                         f"outside the vocabulary of {made.vocab_size}")
    return made


def from_hf_folder(folder: str, *, eod_id: int | None = None) -> AnyTokenizer:
    """The tokenizer of a Hugging Face model folder (local or fsspec URL), of any kind.

    Precedence: neo's own export gives the tokenizer it was made of, where its tokenizer.json has not been changed
    since; then tokenizer.json; then tokenizer.model. `eod_id` replaces the token that ends a document. Raises
    InputError: no tokenizer in it, damaged, more ids than config.json has rows.
    """
    sizes = store_files.list_sizes(folder)
    if sizes is None:
        raise InputError(f"{folder}: no such folder")
    files = {name: read_file(store_files.join(folder, name)) for name in (*KEPT, META_FILE, *ABOUT_IDS) if name in sizes}
    if META_FILE in files and _is_neos(files, folder):
        made = load_tokenizer(files, folder)
        return made if eod_id is None else with_eod(made, eod_id)
    if JSON_FILE in files:
        return from_hf_files(files, folder, eod_id=eod_id)
    if MODEL_FILE in files:
        return sentencepiece_of(files, folder, eod_id)
    raise InputError(f"{folder}: no {JSON_FILE} and no {MODEL_FILE} in it"
                     + ("; vocab.json with merges.txt alone is not read: save it once with transformers' "
                        "AutoTokenizer.from_pretrained(...).save_pretrained(...)" if "vocab.json" in files else ""))


def with_eod(tokenizer: AnyTokenizer, eod_id: int) -> AnyTokenizer:
    """The tokenizer with another token that ends a document. Raises InputError for an id it does not have."""
    if not 0 <= eod_id < tokenizer.vocab_size:
        raise InputError(f"eod_id {eod_id} is outside the vocabulary of {tokenizer.vocab_size}")
    if isinstance(tokenizer, Tokenizer):
        return dataclasses.replace(tokenizer, eod_id=eod_id)
    return dataclasses.replace(tokenizer, eod_id=eod_id,
                               eos_ids=(eod_id, *(i for i in tokenizer.eos_ids if i != eod_id)))


def _is_neos(files: Mapping[str, bytes], where: str) -> bool:
    """Whether neo_tokenizer.json holds: not where tokenizer.json is no longer the one that neo wrote it for."""
    meta = read_meta(files[META_FILE], where)
    said = meta if meta["kind"] == "huggingface" else settings(files, CONFIG_FILE, where)
    return JSON_FILE not in files or said.get(DIGEST_KEY) == hashlib.sha256(files[JSON_FILE]).hexdigest()
