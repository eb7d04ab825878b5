"""A tokenizer as the files of a Hugging Face model folder: `hf_files`.

transformers' own Llama tokenizer does not give SentencePiece's ids (it drops the model's normalizer and its setting of
the leading space), so the export writes a `tokenizer.json` of its own, and the class that leaves such a file alone
(`PreTrainedTokenizerFast`). Ids and text equal SentencePiece's; the differences that remain, all of them in how the
`tokenizers` package works:

* Control tokens written out in a text (`<s>`, the extra tokens) become their ids; in SentencePiece they stay text.
* Where a model adds a leading space, a text that is one symbol defined by the model's user and nothing else gets none.
* Where a model normalizes (nmt_nfkc and its kin), several combining marks on one letter in an order that Unicode does not
  use, or a mark on a ligature, may be composed otherwise, and a text of invisible characters alone gives no space.
  Models trained by neo keep text as it is.
* In a unigram model, the name of a byte (`<0x0A>`) written out in a text becomes the byte.
* Ids that never come from text (half a character in bytes, then a whole one) decode with other U+FFFD, and where a
  model has no bytes to fall back on, an unknown character decodes to nothing instead of a question mark.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from neo.data.tokenizer import (
    CONTROL,
    JSON_FILE,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    AnyTokenizer,
    Tokenizer,
)
from neo.data.tokenizer_special import CONFIG_FILE, DIGEST_KEY, SPECIAL_FILE
from neo.errors import InputError
from neo.extras import need

SPACE = "\u2581"  # what SentencePiece writes for a space
PRIVATE = 0x10FFFD  # the last private character of Unicode; those below are used too
COMPOSING = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")  # SentencePiece's own maps
# Characters that join a grapheme begun before them: marks, joiners, two vowels, half-width kana's, skin tones, jamo.
JOINING = ("[\\p{M}\u200c\u200d\u0e33\u0eb3\uff9e\uff9f\U0001f3fb-\U0001f3ff\u1160-\u11ff\ua960-\ua97c"
           "\ud7b0-\ud7fb]")


def hf_files(tokenizer: AnyTokenizer, *, vocab_rows: int, max_seq_len: int,
             add_bos: bool | None = None) -> dict[str, bytes]:
    """File name -> content of what a Hugging Face folder needs of a tokenizer, and neo_tokenizer.json.

    `vocab_rows` is the number of rows of the model's embedding table: rows past the tokenizer's last id are padding
    that no text uses. `max_seq_len` in tokens goes into `model_max_length`. `add_bos` says whether the files put
    BOS before a text, None as the tokenizer does (`Tokenizer.add_bos`; false for neo's own models: they are trained
    on documents without a first token that end with `eod_id`, and that is the exported EOS). A tokenizer that came
    from Hugging Face hands its files through as they were.

    Raises InputError: more ids than rows, a SentencePiece model that `tokenizers` cannot express (it says what).
    """
    if tokenizer.vocab_size > vocab_rows:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids but the model only {vocab_rows} rows "
                         "(model.vocab_size): this is not the tokenizer the model was trained with")
    if not isinstance(tokenizer, Tokenizer):
        if add_bos not in (None, tokenizer.add_bos):
            raise InputError(f"add_bos={add_bos}: this tokenizer's own files say {tokenizer.add_bos}")
        return tokenizer.files()
    add_bos = tokenizer.add_bos if add_bos is None else add_bos
    if add_bos and tokenizer.bos_id < 0:
        raise InputError("add_bos: this tokenizer has no token that begins a text")
    content = tokenizer_json(tokenizer, add_bos)
    special = _special_tokens(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 returns token_type_ids otherwise
        DIGEST_KEY: hashlib.sha256(content).hexdigest(),
    }
    return {JSON_FILE: content, CONFIG_FILE: _json(config), SPECIAL_FILE: _json(special),
            **tokenizer.files()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """bos, eos, unk and pad by name. Without a padding token of its own a model pads with <unk>, which byte fallback
    never produces; EOS as padding would be masked out of the targets in fine-tuning."""
    processor = tokenizer.processor
    pad = next((token for token in tokenizer.extra_tokens if token.lower() == "<pad>"), "")
    if not pad:
        pad = tokenizer.piece(processor.pad_id() if processor.pad_id() >= 0 else processor.unk_id())
    bos = {"bos_token": tokenizer.piece(tokenizer.bos_id)} if tokenizer.bos_id >= 0 else {}
    return {**bos, "eos_token": tokenizer.piece(tokenizer.eod_id), "unk_token": tokenizer.piece(processor.unk_id()),
            "pad_token": pad}


def tokenizer_json(tokenizer: Tokenizer, add_bos: bool = False) -> bytes:
    """The content of a tokenizer.json with the ids of a SentencePiece BPE or unigram model."""
    tk = need("tokenizers", extra="hf", why="writing tokenizer.json")
    proto = tokenizer.proto
    _check(proto)
    symbols = [p.piece for p in proto.pieces if p.type == USER_DEFINED]
    control = [p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL)]
    made = tk.Tokenizer(_model(tk, proto))
    made.normalizer = _normalizer(tk, proto.normalizer_spec, symbols)
    made.decoder = _decoder(tk, proto.normalizer_spec)
    made.add_special_tokens([tk.AddedToken(name, normalized=False, special=True)
                             for name in [*control, *tokenizer.extra_tokens]])
    # Cut out after normalization, as SentencePiece does: the leading space belongs to the text, not to each part.
    made.add_tokens([tk.AddedToken(name, normalized=True, special=False) for name in symbols])
    if add_bos:
        bos = tokenizer.piece(tokenizer.bos_id)
        made.post_processor = tk.processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)])
    if made.get_vocab_size(with_added_tokens=True) != tokenizer.vocab_size:
        raise InputError("two tokens of the tokenizer have the same name: Hugging Face's format cannot hold them")
    return (made.to_str(pretty=True) + "\n").encode()


def _check(proto: Any) -> None:
    """Raise InputError for settings that no tokenizer.json expresses."""
    spec = proto.normalizer_spec
    for wrong, what in ((not spec.escape_whitespaces, "escape_whitespaces=false"),
                        (proto.trainer_spec.treat_whitespace_as_suffix, "treat_whitespace_as_suffix=true"),
                        (proto.denormalizer_spec.precompiled_charsmap, "a denormalizer"),
                        (any(p.type == UNUSED for p in proto.pieces), "pieces of type UNUSED")):
        if wrong:
            raise InputError(f"the SentencePiece model has {what}: this cannot be written as tokenizer.json")


def _model(tk: Any, proto: Any) -> Any:
    spec = proto.trainer_spec
    if spec.model_type == spec.UNIGRAM:
        unknown = next(i for i, p in enumerate(proto.pieces) if p.type == UNKNOWN)
        return tk.models.Unigram([(p.piece, p.score) for p in proto.pieces], unk_id=unknown,
                                 byte_fallback=spec.byte_fallback)
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    unknown_piece = next(p.piece for p in proto.pieces if p.type == UNKNOWN)
    return tk.models.BPE(vocab, bpe_merges(proto), unk_token=unknown_piece, fuse_unk=True,
                         byte_fallback=spec.byte_fallback)


def bpe_merges(proto: Any) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model, first to last.

    SentencePiece merges the neighbours whose union is the piece of the highest score, however they are cut: every
    cut of a piece into two pieces is a merge with the rank of the piece.
    """
    normal = [p for p in proto.pieces if p.type == NORMAL]
    rank = {p.piece: i for i, p in enumerate(sorted(normal, key=lambda p: -p.score))}  # the lower id first where equal
    cuts = [(i, rank[a], rank[b], a, b) for piece, i in rank.items() for cut in range(1, len(piece))
            if (a := piece[:cut]) in rank and (b := piece[cut:]) in rank]
    return [(a, b) for _, _, _, a, b in sorted(cuts)]


def _normalizer(tk: Any, spec: Any, symbols: list[str]) -> Any:
    """What SentencePiece does to a text first: character map, spaces, leading space."""
    make, regex = tk.normalizers, tk.Regex
    steps = []
    if spec.precompiled_charsmap:
        steps += _character_map(tk, spec)
    if spec.remove_extra_whitespaces:
        steps += [make.Replace(regex(rf"\A +|[ {SPACE}]+\z"), ""), make.Replace(regex(" {2,}"), " ")]
    whole = make.Sequence(steps)
    # Symbols keep their characters: those the steps above would change stand in for themselves as private ones.
    stand_ins = {symbol: chr(PRIVATE - i) for i, symbol in enumerate(sorted(symbols, key=len, reverse=True), 1)
                 if whole.normalize_str(symbol) != symbol}
    steps = [*(make.Replace(symbol, private) for symbol, private in stand_ins.items()), *steps,
             *(make.Replace(private, symbol) for symbol, private in stand_ins.items())]
    if spec.add_dummy_prefix:
        # Not where the text is one symbol alone: symbols are looked up as the normalizer leaves them. Not before the
        # character map either: tokenizers (0.23) panics where it follows an insertion at the text's beginning.
        alone = "|".join(re.escape(symbol) for symbol in symbols)
        steps.append(make.Replace(regex(rf"\A(?!(?:{alone})\z)" if symbols else r"\A(?!\z)"), SPACE))
    steps.append(make.Replace(" ", SPACE))
    return make.Sequence(steps)


def _character_map(tk: Any, spec: Any) -> list[Any]:
    """SentencePiece's map of characters and sequences of characters.

    The package looks up whole graphemes, and where only the beginning of one is in the map it drops the rest (a mark
    after a ligature, the newline after a carriage return). So characters are kept apart, each is mapped alone, and
    what the map would have composed is composed after it: NFC of a character and the first mark after it.
    """
    make, regex = tk.normalizers, tk.Regex
    mapped = make.Precompiled(spec.precompiled_charsmap)
    if spec.name not in COMPOSING:
        return [mapped]
    apart = chr(PRIVATE)
    return [make.Replace(regex(rf"(?<=\r)(?=\n)|(?!\A)(?={JOINING})"), apart), mapped,
            make.Replace(regex(rf"(?<=[^\p{{M}}{apart}]){apart}"), ""), make.NFC(), make.Replace(apart, "")]


def _decoder(tk: Any, spec: Any) -> Any:
    make = tk.decoders
    steps = [make.Replace(SPACE, " "), make.ByteFallback(), make.Fuse()]
    if spec.remove_extra_whitespaces or spec.add_dummy_prefix:
        steps.append(make.Strip(" ", 1, 0))
    return make.Sequence(steps)
