"""One record of an input to one document: which fields it is made of, and what is skipped, repaired and counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neo.data.inputs import InputFile
from neo.errors import nearest

LARGEST_DOCUMENT = 1 << 30  # ours: bytes of one document; larger ones would not fit into memory as tokens
BAD_TEXT = ("replace", "skip")


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What a document is made of: fields of a record, and what to do with text that is not valid UTF-8.

    With `tokens_field` a record holds token ids in place of text, and `bytes_field` the UTF-8 size of their text.
    `prompt_field` is text (or ids) that stands before the document's and is not learned; documents with the same value
    in `group_field` stay together.
    """

    text_field: str = "text"
    id_field: str = ""
    on_bad_text: str = "replace"
    tokens_field: str = ""
    bytes_field: str = ""
    prompt_field: str = ""
    group_field: str = ""

    @property
    def content_field(self) -> str:
        """The field without which there is no document."""
        return self.tokens_field or self.text_field

    @property
    def columns(self) -> tuple[str, ...]:
        """All fields that are read."""
        fields = (self.content_field, self.id_field, self.bytes_field, self.prompt_field, self.group_field)
        return tuple(dict.fromkeys(field for field in fields if field))

    def arguments(self) -> dict[str, Any]:
        """The options as a manifest records them: those that later versions added only where they are used."""
        always = ("text_field", "id_field", "on_bad_text")
        return {name: value for name, value in dataclasses.asdict(self).items() if value or name in always}


@dataclasses.dataclass(frozen=True)
class Document:
    """One document. (file, row) is its place in the input, the same however the input is cut.

    `prompt` is what stands before it and is not learned. Of a pre-tokenised document `text` is empty, `tokens` and
    `prompt` are its ids (integers of any type, [n]) and `num_bytes` the UTF-8 size of their text, -1 where the record
    does not tell. `group` is empty for a document that stands alone.
    """

    id: str
    text: str
    file: int
    row: int
    tokens: np.ndarray | None = None
    prompt: Any = ""
    num_bytes: int = -1
    group: str = ""


@dataclasses.dataclass
class Tally:
    """What was skipped or repaired: kind -> reason -> (count, first place), the place being (file, row, where)."""

    counts: dict[str, dict[str, list]] = dataclasses.field(default_factory=lambda: {"skipped": {}, "repaired": {}})

    def add(self, kind: str, reason: str, place: Sequence[Any], count: int = 1) -> None:
        """Count one document, or `count` of them."""
        entry = self.counts[kind].setdefault(reason, [0, list(place)])
        entry[0] += count
        entry[1] = min(entry[1], list(place))

    def merge(self, other: Mapping[str, Mapping[str, Sequence]]) -> None:
        """Add the counts of another tally; the first place is that of the input, not of the merging order."""
        for kind, reasons in other.items():
            for reason, (count, place) in reasons.items():
                self.add(kind, reason, place, count)


def decoded(raw: bytes, place: Sequence[Any], options: ReadOptions, tally: Tally) -> str | None:
    """Text of UTF-8 bytes, or None where it is skipped."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        if options.on_bad_text == "skip":
            return tally.add("skipped", "bad UTF-8", place)
        tally.add("repaired", "bad UTF-8 replaced", place)
        return raw.decode("utf-8", "replace")


def cleaned(text: str, place: Sequence[Any], options: ReadOptions, tally: Tally) -> str | None:
    """`text` without lone surrogates, or None where it is skipped: bad UTF-8, empty, too large."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        if options.on_bad_text == "skip":
            return tally.add("skipped", "bad UTF-8", place)
        tally.add("repaired", "bad UTF-8 replaced", place)
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if not text.strip():
        return tally.add("skipped", "empty", place)
    if len(text) > LARGEST_DOCUMENT:
        return tally.add("skipped", "larger than 1 GiB", place)
    return text


def from_record(file: InputFile, number: int, row: int, record: Mapping[str, Any], options: ReadOptions,
                tally: Tally) -> Document | None:
    """The document of a record (row `row`, from 1, of input `number`), or None where it is skipped and counted."""
    place = (number, row, f"{file.name}:{row}")
    content = record.get(options.content_field)
    if content is None:
        known = [str(key) for key in record]
        hint = nearest(options.content_field, known) or f" (fields: {', '.join(known[:8])})"
        return tally.add("skipped", f"no field {options.content_field!r}", (*place[:2], place[2] + hint))
    read = _read_tokens if options.tokens_field else _read_text
    found = read(record, content, place, options, tally)
    if found is None:
        return None
    document_id = _name(record, options.id_field, place, tally, "no id in field {!r}, file and row used")
    group = _name(record, options.group_field, place, tally, "no group in field {!r}, document stands alone")
    return Document(document_id or place[2], file=number, row=row, group=group, **found)


def _name(record: Mapping[str, Any], field: str, place: Sequence[Any], tally: Tally, missing: str) -> str:
    """The text or whole number in `field`; empty without a field, and (counted) without a usable value."""
    if not field:
        return ""
    value = record.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value:
        return value.encode("utf-8", "replace").decode("utf-8")
    tally.add("repaired", missing.format(field), place)
    return ""


def _read_text(record: Mapping[str, Any], content: Any, place: Sequence[Any], options: ReadOptions,
               tally: Tally) -> dict[str, Any] | None:
    if not isinstance(content, str):
        return tally.add("skipped", f"field {options.text_field!r} is not text", place)
    text = cleaned(content, place, options, tally)
    if text is None:
        return None
    prompt = _prompt(record, place, options, tally)
    if not isinstance(prompt, str):
        return tally.add("skipped", f"field {options.prompt_field!r} is not text", place)
    if not prompt:
        return {"text": text}
    prompt = cleaned(prompt, place, options, tally)
    return None if prompt is None else {"text": text, "prompt": prompt}


def _read_tokens(record: Mapping[str, Any], content: Any, place: Sequence[Any], options: ReadOptions,
                 tally: Tally) -> dict[str, Any] | None:
    tokens = _ids(content)
    if tokens is None:
        return tally.add("skipped", f"field {options.tokens_field!r} is not a list of token ids", place)
    if not len(tokens):
        return tally.add("skipped", "empty", place)
    prompt = _ids(_prompt(record, place, options, tally))
    if prompt is None:
        return tally.add("skipped", f"field {options.prompt_field!r} is not a list of token ids", place)
    num_bytes = -1
    if options.bytes_field:
        value = record.get(options.bytes_field)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            num_bytes = value
        else:
            tally.add("repaired", f"no size in field {options.bytes_field!r}, bytes of the tokens used", place)
    return {"text": "", "tokens": tokens, "prompt": prompt, "num_bytes": num_bytes}


def _prompt(record: Mapping[str, Any], place: Sequence[Any], options: ReadOptions, tally: Tally) -> Any:
    """What is in the prompt's field; empty text where there is none."""
    if not options.prompt_field:
        return ""
    prompt = record.get(options.prompt_field)
    if prompt is None or (hasattr(prompt, "__len__") and not len(prompt)) or (
            isinstance(prompt, str) and not prompt.strip()):
        tally.add("repaired", f"no prompt in field {options.prompt_field!r}, all of the document is learned", place)
        return ""
    return prompt


def _ids(value: Any) -> np.ndarray | None:
    """A list of whole numbers as an array [n], or None for anything else."""
    if isinstance(value, str):
        return np.zeros(0, np.int64) if not value else None
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of unequal length inside
        return None
    if array.ndim == 1 and not len(array):
        return array.astype(np.int64)
    return array if array.ndim == 1 and array.dtype.kind in "iu" else None
