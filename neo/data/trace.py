"""`python -m neo.data.trace WORKDIR --step=1200`: which documents a training step saw, and which steps saw a document."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from neo.cli import JSON, Argument, Command, Namespace, main
from neo.errors import InputError

if TYPE_CHECKING:
    from neo.data.ledger import Found, Ledger, Part, Row, Sighting

EXCERPT = 160  # ours: characters of a document's text without --full
BOLD, DIM = "1", "2"  # ANSI styles


COMMAND = Command(
    prog="neo.data.trace",
    summary="List the documents in the batch of a step, or the steps that saw a document.",
    arguments=(
        Argument("workdir", "folder of the run, or its address", positional=True),
        Argument("step", "the step, as in metrics and messages: the first is 1; past or planned", default=None, type=int),
        Argument("row", "only this row of its batch, from 0", default=None, type=int),
        Argument("document", "SOURCE/ID, or an ID that is looked for in all sources", default=""),
        Argument("full", "the whole text instead of its beginning and end", type=bool),
        Argument("store", "where the token store lies now", default="", shown="where the run read it"),
        JSON,
    ),
    examples=("python -m neo.data.trace runs/neo_demo --step=20",
              "python -m neo.data.trace runs/neo_demo --step=20 --row=3 --full",
              "python -m neo.data.trace runs/neo_demo --document=code/argparse.py"),
)


def run(args: Namespace) -> None:
    """Print the rows of a step, or the sightings of a document."""
    if (args.step is None) == (not args.document):
        raise InputError("give one of --step=N and --document=ID")
    if args.row is not None and args.step is None:
        raise InputError("--row needs --step: a row of which batch?")
    from neo.data.ledger import Ledger
    ledger = Ledger.of(args.workdir, args.store)
    if args.step is not None:
        _show_step(ledger, args)
    else:
        _show_documents(ledger, args)


def _show_step(ledger: Ledger, args: Namespace) -> None:
    rows = ledger.batch(args.step) if args.row is None else [ledger.row(args.step, args.row)]
    phase = ledger.order.span_of_step(args.step - 1).name
    planned = args.step > ledger.steps_done
    if args.json:
        print(json.dumps({"workdir": ledger.workdir, "step": args.step, "phase": phase, "planned": planned,
                          "rows": [_row_json(ledger, row, args.full) for row in rows]}))
        return
    style = _style()
    note = f"; planned: the run has done {ledger.steps_done} steps" if planned else ""
    rows_there = ledger.num_rows(args.step)
    print(style(BOLD, f"step {args.step} of {ledger.order.num_steps}, phase {phase}: {rows_there} sequences{note}"))
    for row in rows:
        at = row.address
        print(style(BOLD, f"row {row.row}") + f"  {at.source}, epoch {at.epoch}, tokens {at.start} to {at.start + at.length}"
              + style(DIM, f"  sequence {row.index}"))
        for part in row.parts:
            print(f"  {_plain(part.document)}  " + style(DIM, _span(part)))
            for line in _lines(_text(ledger, row, part), args.full):
                print(f"    {line}")


def _row_json(ledger: Ledger, row: Row, full: bool) -> dict[str, Any]:
    at = row.address
    return {"row": row.row, "index": row.index, "source": at.source, "epoch": at.epoch, "start": at.start, "length": at.length,
            "documents": [{**part._asdict(), "text": _text(ledger, row, part) if full else
                           _excerpt(_text(ledger, row, part))} for part in row.parts]}


def _show_documents(ledger: Ledger, args: Namespace) -> None:
    found = ledger.find(args.document)
    if args.json:
        print(json.dumps({"workdir": ledger.workdir, "steps_done": ledger.steps_done,
                          "documents": [_document_json(ledger, one, args.full) for one in found]}))
        return
    style = _style()
    for one in found:
        seen, planned = _by_time(ledger, one)
        print(style(BOLD, f"{one.source}/{_plain(one.document)}")
              + f"  {one.stop - one.start} tokens, from {one.start} in its source")
        for line in _lines(ledger.text(one.source, one.start, one.stop), args.full):
            print(f"    {line}")
        print(f"in {len(seen)} sequences of the {ledger.steps_done} steps done" + (":" if seen else ""))
        for line in _sighting_lines(seen):
            print(f"  {line}")
        if planned:
            print(style(DIM, f"in {len(planned)} sequences of the steps to come, up to {ledger.order.num_steps}:"))
            for line in _sighting_lines(planned):
                print(style(DIM, f"  {line}"))


def _document_json(ledger: Ledger, one: Found, full: bool) -> dict[str, Any]:
    text = ledger.text(one.source, one.start, one.stop)
    seen, planned = ([{"step": s.step, "row": s.row, "index": s.index, "epoch": s.epoch, "first": s.part.first,
                       "last": s.part.last, "place": s.part.place} for s in some] for some in _by_time(ledger, one))
    return {**one._asdict(), "tokens": one.stop - one.start, "text": text if full else _excerpt(text), "seen": seen,
            "planned": planned}


def _by_time(ledger: Ledger, one: Found) -> tuple[list[Sighting], list[Sighting]]:
    """(by steps done, in steps to come)."""
    sightings = ledger.sightings(one)
    return ([seen for seen in sightings if seen.step <= ledger.steps_done],
            [seen for seen in sightings if seen.step > ledger.steps_done])


def _sighting_lines(sightings: list[Sighting]) -> Iterator[str]:
    for seen in sightings:
        yield f"step {seen.step}, row {seen.row}, epoch {seen.epoch}: {_span(seen.part)}"


def _span(part: Part) -> str:
    whole = part.last - part.first == part.tokens
    return f"{'all' if whole else f'tokens {part.first} to {part.last - 1} of'} {part.tokens}, at {part.place} in the window"


def _text(ledger: Ledger, row: Row, part: Part) -> str:
    start = row.address.start + part.place
    return ledger.text(row.address.source, start, start + part.last - part.first)


def _excerpt(text: str) -> str:
    """The beginning and the end of a long text."""
    half = EXCERPT // 2
    return text if len(text) <= EXCERPT else f"{text[:half]} ... {text[-half:]}"


def _lines(text: str, full: bool) -> list[str]:
    """A text for the terminal: all its lines, or one line of its beginning and end."""
    if not full:
        return [_plain(_excerpt(text))] if text else []
    return [_plain(line.replace("\t", "    ")) for line in text.split("\n")]


def _plain(text: str) -> str:
    """Control characters written out, so that no document steers the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _style() -> Callable[[str, str], str]:
    """Puts text in an ANSI style on a terminal (unless NO_COLOR is set); elsewhere leaves it alone."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return lambda code, text: f"\x1b[{code}m{text}\x1b[0m"
    return lambda code, text: text


if __name__ == "__main__":
    main(COMMAND, run)
