"""Reversed documents: "Reverse Training to Nurse the Reversal Curse" (arXiv:2403.13799).

A model trained on "A is B" does not know "B is A" unless it also reads text backwards. Three units keep their inner order:

* token: the tokens of the document stand in reverse order;
* word: the words do, and so does the white space between them;
* entity: the words do, but names of several words stay as they are.

The paper finds names with a tagger. Here a name is a run of capitalised words, up to one that ends with a punctuation
mark: a heuristic, ours, which needs no model and gives the same text everywhere.
"""

from __future__ import annotations

import re

UNITS = ("token", "word", "entity")
_WORDS = re.compile(r"\s+|\S+")


def reverse_words(text: str) -> str:
    """`text` with its words in reverse order; twice gives the text back."""
    return "".join(reversed(_WORDS.findall(text)))


def reverse_keeping_entities(text: str) -> str:
    """`text` with its words in reverse order, but runs of capitalised words in theirs."""
    return "".join(reversed(units(text)))


def units(text: str) -> list[str]:
    """`text` cut into white space, words and names of several words; joined they are the text."""
    found: list[str] = []
    goes_on = False  # whether the last unit is, or may become, a name
    pieces = _WORDS.findall(text)
    for i, piece in enumerate(pieces):
        if piece.isspace():
            # Space belongs to a name only where a capitalised word follows.
            if goes_on and i + 1 < len(pieces) and pieces[i + 1][0].isupper():
                found[-1] += piece
            else:
                found.append(piece)
                goes_on = False
            continue
        if goes_on:
            found[-1] += piece
        else:
            found.append(piece)
        goes_on = piece[0].isupper() and piece[-1].isalnum()
    return found
