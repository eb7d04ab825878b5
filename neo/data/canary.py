"""Canaries: known documents put among the others at a known rate, to measure later what a model has learned by heart.

Each training document draws whether a canary follows it, and which one. Canaries are written as they are, never
transformed, and never held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from neo.data.documents import Part, Unreadable, read_part
from neo.data.draws import below, chosen
from neo.data.inputs import find_inputs
from neo.data.records import ReadOptions, Tally
from neo.errors import InputError


@dataclasses.dataclass(frozen=True)
class Canaries:
    """Texts by the number of their line in the file, from 1, and the expected number of canaries per document."""

    texts: tuple[tuple[int, str], ...]
    rate: float
    sha256: str

    @property
    def arguments(self) -> dict[str, Any]:
        """What a manifest records."""
        return {"documents": len(self.texts), "sha256": self.sha256, "rate": self.rate}

    def after(self, seed: int, document_id: str, variant: int = 0) -> int:
        """Which canary (an index of `texts`) follows a document; -1 for none."""
        if not chosen(self.rate, "canary", seed, document_id, variant):
            return -1
        return below(len(self.texts), "which canary", seed, document_id, variant)


def read_canaries(path: str, rate: float, text_field: str = "text") -> Canaries:
    """Read a .jsonl file of canaries. Raises InputError: not such a file, a line that cannot be used, a rate outside 0 .. 1."""
    if not 0 < rate <= 1:
        raise InputError(f"--canary_rate={rate}: give the number of canaries per document, 0 < rate <= 1")
    files = find_inputs([path]).files
    if len(files) != 1 or files[0].kind != "jsonl":
        raise InputError(f"--canaries={path}: give one .jsonl file, a canary a line")
    tally = Tally()
    try:
        documents = list(read_part(files[0], Part(0), ReadOptions(text_field=text_field), tally))
    except Unreadable as error:
        raise InputError(f"--canaries={path}: {error}") from error
    wrong = sorted((place, reason) for reasons in tally.counts.values() for reason, (_, place) in reasons.items())
    if wrong:
        place, reason = wrong[0]
        raise InputError(f"--canaries={path}: {place[2]}: {reason}; every line is {{\"{text_field}\": \"...\"}}")
    if not documents:
        raise InputError(f"--canaries={path}: no canary in it; every line is {{\"{text_field}\": \"...\"}}")
    texts = tuple((document.row, document.text) for document in documents)
    return Canaries(texts, rate, hashlib.sha256(repr(texts).encode()).hexdigest())
