"""What the files of a Hugging Face folder say about its tokenizer: the special ids, and whether BOS comes first."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from neo.data import store_files
from neo.data.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer, from_model
from neo.errors import InputError

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
# Of the tokenizer.json that goes with it: in neo_tokenizer.json, and in tokenizer_config.json of neo's own exports.
DIGEST_KEY = "neo_tokenizer_json_sha256"
# Files of the model that name its special ids; read, not kept.
ABOUT_IDS = ("config.json", "generation_config.json")
# Classes of transformers that put BOS before a text unless told not to.
ADDS_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """What the package tokenizers refuses, as InputError: it raises bare Exceptions, and panics that are not even that."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({' '.join(str(error).split())[:200]})") from error


def special_ids(parsed: Any, size: int, added: Mapping[int, bool], files: Mapping[str, bytes], where: str,
                 eod_id: int | None) -> dict[str, Any]:
    """bos_id, eod_id, eos_ids, add_bos, vocab_size and padded_vocab_size from what a hub's folder says."""
    config, special, model, generation = (settings(files, name, where) for name in (CONFIG_FILE, SPECIAL_FILE, *ABOUT_IDS))
    text_model = model.get("text_config") if isinstance(model.get("text_config"), dict) else model

    def named(key: str) -> int | None:
        for source in (config, special):
            name = source.get(key)
            name = name.get("content") if isinstance(name, dict) else name
            if isinstance(name, str) and (found := parsed.token_to_id(name)) is not None:
                return found
        return None

    def numbered(key: str) -> list[int]:
        found: list[int] = []
        for source in (generation, text_model, model):
            value = source.get(key)
            found += [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i not in found]
        return found

    bos = named("bos_token")
    bos = next(iter(numbered("bos_token_id")), -1) if bos is None else bos
    first = _first_of_template(parsed)
    if bos < 0 and first is not None:
        bos = first
    rows = text_model.get("vocab_size")
    if type(rows) is int and size > rows:
        lost = [i for i in parsed.get_vocab(with_added_tokens=True).values() if i >= rows and not added.get(i)]
        if lost or rows < 1:
            raise InputError(f"{where}: {JSON_FILE} has ids up to {size - 1}, but config.json says vocab_size={rows}: "
                             "this tokenizer belongs to another model")
        size = rows  # special tokens of a larger relative, such as an image token: never used by this model
    eos = [i for i in numbered("eos_token_id") if i < size]
    eod = eod_id if eod_id is not None else named("eos_token")
    if eod is None:
        if not eos:
            raise InputError(f"{where}: no file says which token ends a document; say it: --eod_id=ID")
        eod = eos[0]
    told = config.get("add_bos_token")
    add_bos = told if isinstance(told, bool) else first is not None and first == bos
    return {"bos_id": bos if bos < size else -1, "eod_id": eod, "eos_ids": [eod, *(i for i in eos if i != eod)],
            "add_bos": add_bos and 0 <= bos < size, "vocab_size": size,
            "padded_vocab_size": rows if type(rows) is int and rows > size else 0}


def _first_of_template(parsed: Any) -> int | None:
    """The special token that the post-processor puts before a text, if it does."""
    with refusals("the tokenizer cannot encode the text 'a'"):
        plain, full = (parsed.encode("a", add_special_tokens=add).ids for add in (False, True))
    return full[0] if len(full) > len(plain) and full[1:len(plain) + 1] == plain else None


def settings(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """The JSON object in a file of the folder; empty where there is no such file. Raises InputError: not JSON."""
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{store_files.join(where, name)}: damaged, not JSON ({error}); copy it again") from error
    return found if isinstance(found, dict) else {}


def sentencepiece_of(files: Mapping[str, bytes], where: str, eod_id: int | None) -> Tokenizer:
    """A folder with tokenizer.model alone: its added tokens are those with the ids after the model's last."""
    config, added, model = (settings(files, name, where) for name in (CONFIG_FILE, "added_tokens.json", "config.json"))
    own = from_model(files[MODEL_FILE], where, eod_id=0)
    later: dict[int, str] = {i: name for name, i in added.items() if type(i) is int}
    decoder = config.get("added_tokens_decoder")
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and i.isdigit():
            later[int(i)] = token["content"]
    later = {i: name for i, name in sorted(later.items()) if i >= own.vocab_size}
    rows = model.get("vocab_size")
    if type(rows) is int:
        if own.vocab_size > rows:
            raise InputError(f"{where}: {MODEL_FILE} has {own.vocab_size} ids, but config.json says vocab_size={rows}: "
                             "this tokenizer belongs to another model")
        later = {i: name for i, name in later.items() if i < rows}
    if list(later) != list(range(own.vocab_size, own.vocab_size + len(later))):
        raise InputError(f"{where}: ids of added tokens ({', '.join(map(str, later))}) do not follow the "
                         f"{own.vocab_size} of {MODEL_FILE}")

    def named(key: str, default: int) -> int:
        name = config.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        ids = [i for i, extra in later.items() if extra == name]
        if ids:
            return ids[0]
        found = own.processor.piece_to_id(name) if isinstance(name, str) else default
        return found if found != own.processor.unk_id() else default

    bos = named("bos_token", own.processor.bos_id())
    eod = named("eos_token", own.processor.eos_id()) if eod_id is None else eod_id
    told = config.get("add_bos_token")
    kind = str(config.get("tokenizer_class", "LlamaTokenizer")).removesuffix("Fast")
    add_bos = told if isinstance(told, bool) else kind in ADDS_BOS
    return from_model(files[MODEL_FILE], where, eod_id=eod if eod >= 0 else None, bos_id=bos,
                      extra_tokens=tuple(later.values()), add_bos=add_bos and bos >= 0,
                      padded_size=rows if type(rows) is int and rows > own.vocab_size + len(later) else 0)
