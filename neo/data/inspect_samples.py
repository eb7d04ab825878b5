"""Windows of a run or a store as text: which documents meet in them, where they border, what is left out of the loss."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from neo.config.schema import Config, DataConfig
from neo.data.order import Order
from neo.data.windows import assemble, read_window

SHOWN_DOCUMENTS = 8  # ours: documents of a window shown without --chars=0
RUNS = 200  # ours: changes between masked and not that a document's text is cut at; beyond them none are shown
WORTH_IT = 40  # ours: characters that must be saved for a text to be cut; saying so takes 25
LOOK_FOR = 1000  # ours: sequences looked through for one whose source has a store
COLOURS = ("36", "33", "32", "35", "34", "31")  # ANSI, one document after the other
BOLD, DIM = "1", "2"


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a window holds of a document: `runs` of (text, whether its tokens are left out of the loss).

    `begins`, `ends`: whether the document does so in the window. The id is empty for padding.
    """

    document: str
    tokens: int
    masked: int
    begins: bool
    ends: bool
    segment: int
    runs: tuple[tuple[str, bool], ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One window: tokens [start, start + length + 1) of the source's training split. Step from 1; row, epoch from 0."""

    phase: str
    step: int
    row: int
    index: int
    source: str
    epoch: int
    start: int
    length: int
    pieces: tuple[Piece, ...]


def places(order: Order, number: int, phase: str = "") -> list[tuple[int, int]]:
    """Global sequence indices of the samples to show, each with the end of its phase: spread over the phases, and in each
    from its first window on."""
    spans: dict[str, list[int]] = {}
    for span in order.spans:
        first, last = spans.get(span.name, (span.first_index, 0))
        spans[span.name] = [first, max(last, span.first_index + span.sequences)]
    chosen = [spans[phase]] if phase else list(spans.values())
    return [(first + (last - first) * k // share, last) for (first, last), share in zip(chosen, _shares(number, len(chosen)),
                                                                                        strict=True) for k in range(share)]


def run_samples(config: Config, order: Order, sources: Mapping[str, Any], tokenizer: Any, number: int,
                phase: str = "") -> Iterator[Sample]:
    """Samples of the run whose sources are among `sources`; one that is not gives way to the next sequence that is."""
    for place, last in places(order, number, phase):
        for index in range(place, min(place + LOOK_FOR, last)):
            address = order.address(index)
            if address.source in sources:
                step = order.step_of(index)
                pieces = _pieces(sources[address.source].split("train"), address.start, address.length, tokenizer, config.data)
                yield Sample(config.phases[address.phase].name, step + 1, index - order.first_index(step), index,
                             address.source, address.epoch, address.start, address.length, tuple(pieces))
                break


def store_samples(sources: Mapping[str, Any], tokenizer: Any, number: int, length: int) -> Iterator[Sample]:
    """Windows of up to `length` tokens spread over the training splits; of packed sources the windows they were packed for."""
    for (name, source), share in zip(sources.items(), _shares(number, len(sources)), strict=True):
        split = source.split("train")
        length_here = source.alignment if source.alignment > 1 else min(length, split.num_tokens - 1)
        windows = (split.num_tokens - 1) // length_here if length_here > 0 else 0
        for k in range(min(share, windows)):
            start = windows * k // share * length_here
            yield Sample("", 0, 0, 0, name, 0, start, length_here,
                         tuple(_pieces(split, start, length_here, tokenizer, DataConfig())))


def sample_lines(sample: Sample, chars: int, style: Callable[[str, str], str]) -> Iterator[str]:
    """A sample for people. `chars`: of each document, its beginning and end; 0 is all of it."""
    where = f"phase {sample.phase}, step {sample.step:,}, row {sample.row:,}: " if sample.phase else ""
    yield style(BOLD, f"{where}{sample.source}, epoch {sample.epoch}, tokens {sample.start:,} to "
                      f"{sample.start + sample.length:,} (T = {sample.length:,})")
    shown = sample.pieces if not chars else sample.pieces[:SHOWN_DOCUMENTS]
    for i, piece in enumerate(shown):
        colour = COLOURS[i % len(COLOURS)]
        yield style(colour, f"--- {_header(piece)}")
        # Text by text: a line that leaves the loss only in part is dim only there.
        for line in _shorten(piece.runs, chars):
            parts = [style(f"{DIM};{colour}" if masked else colour, text) for text, masked in line]
            yield "    " + "".join(parts) if parts else ""
    if len(shown) < len(sample.pieces):
        rest = sample.pieces[len(shown):]
        yield f"--- and {len(rest)} more documents with {sum(piece.tokens for piece in rest):,} tokens; --chars=0 shows all"
    yield ""


def sample_json(sample: Sample) -> dict[str, Any]:
    """A sample as plain values, its text in full."""
    tree = dataclasses.asdict(sample)
    tree["documents"] = tree.pop("pieces")
    for piece in tree["documents"]:
        piece["text"] = "".join(text for text, _ in piece["runs"])
        piece["runs"] = [{"text": text, "masked": masked} for text, masked in piece["runs"]]
    return tree


def styles() -> Callable[[str, str], str]:
    """Puts text in ANSI styles on a terminal, unless NO_COLOR is set; elsewhere leaves it alone."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return lambda code, text: f"\x1b[{code}m{text}\x1b[0m" if text else ""
    return lambda code, text: text


def _shares(number: int, places: int) -> list[int]:
    """How many of `number` samples each place gets: as evenly as can be, the first and the last place before the others."""
    if 1 < number < places:
        chosen = {round(k * (places - 1) / (number - 1)) for k in range(number)}
        return [int(i in chosen) for i in range(places)]
    return [number // places + (i < number % places) for i in range(places)]


def _pieces(split: Any, start: int, length: int, tokenizer: Any, data: DataConfig) -> Iterator[Piece]:
    window = read_window(split, start, length, 0)
    row = assemble([window], cross_document_attention=data.cross_document_attention,
                   mask_end_of_document=data.mask_end_of_document, mask_repetition=data.mask_repetition)
    # Token i is the target of input i - 1; the first one is a target of the window before.
    masked = np.concatenate([[False], row["loss_mask"][0] == 0])
    segments = np.concatenate([row["segment_ids"][0], row["segment_ids"][0, -1:]])
    borders = [0, *window.ends.tolist(), length + 1]
    for first, last in itertools.pairwise(borders):
        ids = split.document_ids(start + first, start + last)
        yield Piece(ids[0] if ids else "", last - first, int(masked[first:last].sum()),
                    bool(first) or _is_border(split, start), last <= length or _is_border(split, start + last),
                    int(segments[first]), tuple(_runs(tokenizer, window.tokens[first:last].tolist(), masked[first:last])))


def _is_border(split: Any, position: int) -> bool:
    """Whether a document begins at this position, or the last one ends there."""
    if position in (0, split.num_tokens):
        return True
    return position in split.document_ends(position - 1, position + 1).tolist()


def _runs(tokenizer: Any, tokens: Sequence[int], masked: np.ndarray) -> Iterator[tuple[str, bool]]:
    """The text of the tokens, cut where masked and other tokens meet."""
    if tokenizer is None:
        return
    borders = [0, *(np.flatnonzero(masked[1:] != masked[:-1]) + 1).tolist(), len(tokens)]
    if len(borders) > RUNS:
        yield tokenizer.decode(tokens), False
        return
    done = ""
    for first, last in itertools.pairwise(borders):
        # Decoded from the beginning: tokens by themselves lose their space, or half a character.
        text = tokenizer.decode(tokens[:last])
        yield text[len(done):], bool(masked[first])
        done = text


def _header(piece: Piece) -> str:
    if not piece.document:
        return f"padding, {piece.tokens:,} tokens"
    at = {(True, True): "whole", (True, False): "begins here", (False, True): "ends here",
          (False, False): "neither begins nor ends here"}[piece.begins, piece.ends]
    loss = f", {piece.masked:,} left out of the loss" if piece.masked else ""
    return f"{piece.document}  ({piece.tokens:,} tokens, {at}, segment {piece.segment}{loss})"


def _shorten(runs: Sequence[tuple[str, bool]], chars: int) -> list[list[tuple[str, bool]]]:
    """The lines of a document, each in runs: all of them, or those of its first two thirds and last third of `chars`.

    Control characters are written out: a text may not steer the terminal.
    """
    total = sum(len(text) for text, _ in runs)
    if chars and total > chars + WORTH_IT:
        head, tail = chars * 2 // 3, total - (chars - chars * 2 // 3)
        runs = [*_cut(runs, 0, head), (f"\n... {tail - head:,} characters ...\n", True), *_cut(runs, tail, total)]
    lines: list[list[tuple[str, bool]]] = [[]]
    for text, masked in runs:
        for i, part in enumerate(text.split("\n")):
            if i:
                lines.append([])
            if part:
                lines[-1].append(("".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                                          for c in part.replace("\t", "    ")), masked))
    return lines


def _cut(runs: Sequence[tuple[str, bool]], first: int, last: int) -> Iterator[tuple[str, bool]]:
    """Characters [first, last) of the runs."""
    position = 0
    for text, masked in runs:
        yield text[max(first - position, 0):max(last - position, 0)], masked
        position += len(text)
