"""Which documents are held out for validation, and in which order the others are written: by hashes of their ids.

The split depends on the id alone, not on any seed: preparing a source again, shuffled otherwise, with more documents
or another tokenizer, keeps every document on its side, so nothing held out once is trained on later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

RANGE = 1 << 64


def position(document_id: str) -> int:
    """Where a document id falls in 0 .. 2**64 - 1: the low ones are held out."""
    digest = hashlib.blake2b(document_id.encode("utf-8"), digest_size=8, person=b"neo validation")
    return int.from_bytes(digest.digest(), "big")


def shuffle_key(seed: int, document_id: str) -> bytes:
    """16 bytes by which documents are sorted: a global shuffle that differs for every seed."""
    digest = hashlib.blake2b(document_id.encode("utf-8"), digest_size=16, person=b"neo shuffle",
                             salt=(seed % RANGE).to_bytes(8, "little"))
    return digest.digest()


def limit(validation: float) -> int:
    """Documents whose position is below this are held out: the share `validation` (0 <= validation < 1) of all."""
    return int(validation * RANGE)


def settled_limit(validation: float, num_documents: int, lowest: int, highest: int) -> int:
    """`limit`, moved where a small source would get an empty side.

    With two documents or more (of different positions) and validation > 0, the one with the lowest position is held
    out at least, and the one with the highest is trained on at least. `lowest` and `highest` are over all documents.
    """
    if validation <= 0 or num_documents < 2 or lowest == highest:
        return 0
    return min(max(limit(validation), lowest + 1), highest)


def without_held_out(documents: Iterable[tuple[str, str]], validation: float) -> Iterator[str]:
    """Texts of (id, text) pairs that `settled_limit` leaves for training, in one pass.

    Two texts at most are kept back (more where ids repeat): the lowest so far may turn out to be the only one held out,
    the highest the only one to train on.
    """
    bound = limit(validation) if validation > 0 else 0
    lowest: tuple[int, list[str]] = (RANGE, [])  # of those at or above the bound, while none is below it
    highest: tuple[int, list[str]] = (-1, [])  # of those below the bound, while none is at or above it
    below = above = False
    yielded = False
    for document_id, text in documents:
        place = position(document_id)
        if place < bound:
            below = True
            if place > highest[0]:
                highest = (place, [text])
            elif place == highest[0]:
                highest[1].append(text)
            continue
        above = True
        if below or validation <= 0 or place > lowest[0]:
            yielded = True
            yield text
        elif place == lowest[0]:
            lowest[1].append(text)
        else:
            yielded = yielded or bool(lowest[1])
            yield from lowest[1]
            lowest = (place, [text])
    if not above:
        yield from highest[1]
    elif below or not yielded:
        yield from lowest[1]
