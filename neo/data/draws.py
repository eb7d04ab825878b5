"""Random draws for one document: functions of (purpose, seed, document id) alone, the same on every machine.

Whether a document is transformed must not depend on the documents around it, on the worker that reads it or on a
state carried along.
"""

from __future__ import annotations

import hashlib

from neo.data.held_out import RANGE


def draw(purpose: str, seed: int, document_id: str, variant: int = 0) -> int:
    """A uniform whole number, 0 .. 2**64 - 1; independent for every purpose and variant."""
    digest = hashlib.blake2b(f"{purpose}\0{variant}\0{document_id}".encode("utf-8", "surrogatepass"), digest_size=8,
                             person=b"neo draw", salt=(seed % RANGE).to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "big")


def below(limit: int, purpose: str, seed: int, document_id: str, variant: int = 0) -> int:
    """A uniform whole number, 0 .. limit - 1."""
    return draw(purpose, seed, document_id, variant) * limit >> 64


def chosen(rate: float, purpose: str, seed: int, document_id: str, variant: int = 0) -> bool:
    """True with probability `rate`, and spread over the variants of a document.

    The variants are places of one draw moved by 0, 1/2, 1/4, 3/4, 1/8, ... (van der Corput's sequence) round a circle:
    at rate 1/2 exactly one of the variants 0 and 1 is chosen, one of 2 and 3, and so on. Each variant alone is still
    chosen with probability `rate`, each document independently of the others.
    """
    shift = int(f"{variant:b}"[::-1], 2) * (RANGE >> variant.bit_length())
    return (draw(purpose, seed, document_id) + shift) % RANGE < int(rate * RANGE)
