"""A tokenizer as keys of a GGUF file: SentencePiece BPE models, and byte-level BPE of the Hugging Face kind.

llama.cpp has its own code for both. For byte-level BPE it cuts text with regular expressions built into it, chosen by name
(`tokenizer.ggml.pre`): a tokenizer that cuts otherwise cannot be expressed and is refused, since its ids would differ silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from neo.data.tokenizer import UNUSED, USER_DEFINED, AnyTokenizer, Tokenizer
from neo.errors import InputError

if TYPE_CHECKING:
    from neo.data.tokenizer_hf import HFTokenizer

PAD_SCORE = -1000.0
SPACE = "\u2581".encode()   # SentencePiece's sign for a space

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
           r"\s*[\r\n]+|\s+(?!\S)|\s+")
_TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
           r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
           r"\s*[\r\n]+|\s+(?!\S)|\s+")
# How text is cut, step by step, and whether a piece that is a token as a whole is taken before any merge -> the name under
# which llama.cpp knows it (src/llama-vocab.cpp, llm_tokenizer_bpe and llama_vocab::impl::load).
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "starcoder",
    ((_CL100K,), False): "dbrx",
    ((_CL100K,), True): "llama-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the file says of the tokenizer.

    Attributes:
        keys: (writer's method, value) in the order of the file.
        notes: what llama.cpp does otherwise than the tokenizer, for people to read.
    """

    keys: tuple[tuple[str, Any], ...]
    notes: tuple[str, ...] = ()


def vocabulary(tokenizer: AnyTokenizer, rows: int, chat_template: str = "") -> Vocabulary:
    """The tokenizer's keys for a model with `rows` rows of embeddings; rows beyond its ids become unused tokens.

    Raises InputError: more ids than rows, a kind of tokenizer or pre-tokenizer that llama.cpp does not have.
    """
    if tokenizer.vocab_size > rows:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {rows}: it is another model's")
    if isinstance(tokenizer, Tokenizer):
        made = _sentencepiece(tokenizer, tokenizer, rows)
    elif tokenizer.sentencepiece is not None:
        made = _sentencepiece(tokenizer, tokenizer.sentencepiece, rows)
    elif tokenizer.model_type != "BPE":
        raise InputError(f"the tokenizer is of type {tokenizer.model_type}; llama.cpp gets BPE, byte-level or SentencePiece's")
    else:
        made = (_byte_level if tokenizer.is_byte_level else _like_sentencepiece)(tokenizer, rows)
    if chat_template:
        made = dataclasses.replace(made, keys=(*made.keys, ("add_chat_template", chat_template)))
    return made


def _sentencepiece(tokenizer: AnyTokenizer, model: Tokenizer, rows: int) -> Vocabulary:
    normalizer, trainer = model.proto.normalizer_spec, model.proto.trainer_spec
    if trainer.model_type != trainer.BPE:
        raise InputError("the tokenizer is a SentencePiece unigram model; llama.cpp reads SentencePiece models of type BPE "
                         "only (its unigram code has no byte fallback): the model can be exported to Hugging Face, not to GGUF")
    keys = _pieces(model.gguf_pieces(), rows) + _special(tokenizer, {"unk": trainer.unk_id, "pad": trainer.pad_id})
    keys += [("add_add_space_prefix", normalizer.add_dummy_prefix),
             ("add_remove_extra_whitespaces", normalizer.remove_extra_whitespaces)]
    notes = []
    if normalizer.precompiled_charsmap:
        notes.append(_normalises(normalizer.name))
    if normalizer.remove_extra_whitespaces:
        notes.append("the tokenizer removes extra spaces, llama.cpp does not: texts with several spaces in a row get other ids")
    if normalizer.add_dummy_prefix and any(piece.type == USER_DEFINED for piece in model.proto.pieces):
        notes.append("llama.cpp puts a space behind each user-defined token, as before the first word: ids differ there")
    return Vocabulary(tuple(keys), tuple(notes))


def _like_sentencepiece(tokenizer: HFTokenizer, rows: int) -> Vocabulary:
    """A tokenizer.json that does what a SentencePiece BPE model does (Llama 2, Gemma), without the model itself."""
    plain, space = "Ab  c\n\td e\u0301", SPACE.decode()
    cut, processor = plain, tokenizer.processor
    if processor.normalizer is not None:
        cut = processor.normalizer.normalize_str(cut)
    if processor.pre_tokenizer is not None:
        cut = "".join(part for part, _ in processor.pre_tokenizer.pre_tokenize_str(cut))
    spaced = plain.replace(" ", space)
    if not tokenizer.description["model"].get("byte_fallback") or cut not in (spaced, space + spaced):
        raise InputError("the tokenizer is neither byte-level BPE nor SentencePiece's BPE with byte fallback "
                         f"(it makes {cut!r} of {plain!r}): llama.cpp has no such tokenizer")
    keys = [*_pieces(tokenizer.gguf_pieces(), rows), *_special(tokenizer, {}), ("add_add_space_prefix", cut != spaced)]
    return Vocabulary(tuple(keys))


def _byte_level(tokenizer: HFTokenizer, rows: int) -> Vocabulary:
    steps = tuple(_members(tokenizer.description.get("pre_tokenizer")))
    patterns, whole = tokenizer.pre_tokenizer_patterns, bool(tokenizer.description["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((patterns, whole)) if all(map(_is_plain, steps)) else None
    if name is None:
        cuts = " then ".join(patterns)[:200] or "it does not cut"
        raise InputError(f"llama.cpp has no pre-tokenizer that cuts text like this tokenizer ({cuts}; known: "
                         f"{', '.join(PRE_TOKENIZERS.values())}): its ids would differ, so no GGUF is written")
    tokens, _, types = (list(column) for column in zip(*tokenizer.gguf_pieces(), strict=True))
    keys: list[tuple[str, Any]] = [("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", name)]
    pads = _pads(tokens, rows)
    keys += [("add_token_list", [*tokens, *pads]), ("add_token_types", [*types, *[UNUSED] * len(pads)]),
             ("add_token_merges", [" ".join(merge) for merge in tokenizer.merges]), *_special(tokenizer, {})]
    notes = [_normalises(step["type"]) for step in _members(tokenizer.description.get("normalizer"))]
    if name == "tekken":
        notes.append("llama.cpp cuts words with combining marks otherwise than this tokenizer: they get other ids")
    return Vocabulary(tuple(keys), tuple(notes))


def _is_plain(step: Mapping[str, Any]) -> bool:
    """Whether a step cuts text at the matches of its expression and changes nothing else."""
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space")
    if step["type"] == "Split":   # to remove what lies between matches is the same where every character is in a match
        return "Regex" in step["pattern"] and step["behavior"] in ("Isolated", "Removed") and (
            bool(step.get("invert")) == (step["behavior"] == "Removed"))
    return step["type"] == "Digits" and bool(step.get("individual_digits"))


def _members(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of tokenizer.json, those inside a Sequence too."""
    if part is not None and part["type"] == "Sequence":
        for member in part.get("normalizers") or part.get("pretokenizers") or ():
            yield from _members(member)
    elif part is not None:
        yield part


def _pieces(pieces: list[tuple[bytes, float, int]], rows: int) -> list[tuple[str, Any]]:
    """Tokens of a SentencePiece kind, as many as rows: llama.cpp refuses any other number."""
    # User-defined tokens are looked for in the text as it is, before spaces become SPACE.
    tokens = [name.replace(SPACE, b" ") if kind == USER_DEFINED else name for name, _, kind in pieces]
    pads = _pads(tokens, rows)
    return [("add_tokenizer_model", "llama"), ("add_tokenizer_pre", "default"), ("add_token_list", [*tokens, *pads]),
            ("add_token_scores", [*(score for _, score, _ in pieces), *[PAD_SCORE] * len(pads)]),
            ("add_token_types", [*(kind for _, _, kind in pieces), *[UNUSED] * len(pads)])]


def _pads(tokens: list[bytes], rows: int) -> list[bytes]:
    """Names for the rows that no token has; each name may be there once."""
    names = set(tokens)
    pads = [f"[PAD{i}]".encode() for i in range(len(tokens), rows)]
    return [name if name not in names else b"[" + name + b"]" for name in pads]


def _special(tokenizer: AnyTokenizer, others: Mapping[str, int]) -> list[tuple[str, Any]]:
    """Ids of special tokens. A document's end is the end of generation; BOS is put first where the tokenizer does so."""
    bos = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eod_id
    ids = {"bos": bos, "eos": tokenizer.eod_id, **{name: i for name, i in others.items() if i >= 0}}
    turns = [i for i in getattr(tokenizer, "eos_ids", ()) if i != tokenizer.eod_id]
    if turns:   # a chat model also ends its turn
        ids["eot"] = turns[0]
    keys: list[tuple[str, Any]] = [(f"add_{name}_token_id", i) for name, i in ids.items()]
    return [*keys, ("add_add_bos_token", bool(tokenizer.add_bos)), ("add_add_eos_token", False)]


def _normalises(how: str) -> str:
    return f"the tokenizer normalises text ({how}), llama.cpp does not: unusual characters get other ids"
