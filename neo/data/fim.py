"""Fill-in-the-middle: a document with its middle moved to its end, marked by three special tokens.

"Efficient Training of Language Models to Fill in the Middle" (arXiv:2207.14255), as StarCoder and Megatron-LM
(GPTFIMDataset) lay it out; p, m, s are the tokens of prefix, middle and suffix, each encoded on its own:

    PSM   <prefix> p <suffix> s <middle> m
    SPM   <prefix> <suffix> s <middle> p m

The document is cut at two characters drawn uniformly, before it is tokenized, so that a model learns to go on inside
a word. Everything happens within one document.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from neo.data.draws import below
from neo.data.tokenizer import CONTROL, AnyTokenizer, Tokenizer
from neo.errors import InputError, nearest

TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")  # StarCoder's names


class Sentinels(NamedTuple):
    """Ids of the three special tokens."""

    prefix: int
    suffix: int
    middle: int


def split(text: str, seed: int, document_id: str, variant: int = 0) -> tuple[str, str, str]:
    """Prefix, middle and suffix of `text`, any of which may be empty: two cuts, each uniform over all places."""
    first, last = sorted(below(len(text) + 1, purpose, seed, document_id, variant) for purpose in ("fim a", "fim b"))
    return text[:first], text[first:last], text[last:]


def arrange(prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], sentinels: Sentinels,
            spm: bool) -> list[int]:
    """The tokens of a document in the order PSM or SPM."""
    if spm:
        return [sentinels.prefix, sentinels.suffix, *suffix, sentinels.middle, *prefix, *middle]
    return [sentinels.prefix, *prefix, sentinels.suffix, *suffix, sentinels.middle, *middle]


def restore(tokens: Sequence[int], sentinels: Sentinels) -> list[int]:
    """The tokens in the order of the text: undoes `arrange`, and leaves other documents as they are.

    Raises ValueError where the three tokens stand in an order that `arrange` does not give.
    """
    tokens = list(tokens)
    places = [i for i, token in enumerate(tokens) if token in sentinels]
    if not places:
        return tokens
    if tuple(tokens[i] for i in places) != tuple(sentinels):
        raise ValueError(f"special tokens {[tokens[i] for i in places]}, not {tuple(sentinels)} once each")
    start, suffix, middle = places
    # In SPM the prefix stands before the middle already, and between the first two tokens there is nothing.
    return tokens[:start] + tokens[start + 1:suffix] + tokens[middle + 1:] + tokens[suffix + 1:middle]


@functools.lru_cache(maxsize=8)
def find_sentinels(tokenizer: AnyTokenizer, names: tuple[str, ...]) -> Sentinels:
    """The ids of three special tokens, prefix, suffix and middle. Raises InputError: not three, no such token, not special."""
    if len(set(names)) != 3:
        raise InputError(f"--fim_tokens={','.join(names)}: give three different tokens, of prefix, suffix and middle: "
                         f"{','.join(TOKENS)}")
    special = special_tokens(tokenizer)
    missing = [name for name in names if name not in special]
    if missing:
        how = "name those of this tokenizer, or add them to its tokenizer.json"
        if isinstance(tokenizer, Tokenizer):
            wanted = " ".join(f"--extra_token={name!r}" for name in (*tokenizer.extra_tokens, *missing))
            how = f"make a tokenizer that has them: python -m neo.data.tokenizer import FOLDER --out=NEW_FOLDER {wanted}"
        raise InputError(f"--fim_tokens={','.join(names)}: {missing[0]} is no special token of the tokenizer"
                         f"{nearest(missing[0], list(special))}; {how}")
    return Sentinels(*(special[name] for name in names))


def special_tokens(tokenizer: AnyTokenizer) -> dict[str, int]:
    """Name -> id of the tokens that no text is encoded to."""
    if isinstance(tokenizer, Tokenizer):
        pieces = tokenizer.proto.pieces
        return {**{piece.piece: i for i, piece in enumerate(pieces) if piece.type == CONTROL},
                **{name: tokenizer.model_size + i for i, name in enumerate(tokenizer.extra_tokens)}}
    return {text: i for i, (text, special) in tokenizer.added_tokens.items() if special and i < tokenizer.vocab_size}
