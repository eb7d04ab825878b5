"""`python -m neo.data.prepare`: text files to a token store."""

from __future__ import annotations

import os
import shlex
from typing import Any

from neo.cli import Argument, Command, Namespace, main
from neo.errors import InputError, StoppedForPerson

DEMO_VOCAB_SIZE = 4096  # model.vocab_size of configs/neo_demo.py

COMMAND = Command(
    prog="neo.data.prepare",
    summary="Turn text into a token store: tokenize, hold out documents for validation, shuffle.",
    arguments=(
        Argument("input", "files (.txt, .jsonl, both also .gz or .zst, .parquet), folders, globs, or "
                          "hf:NAME[/SUBSET][:SPLIT]", default=(), positional=True, many=True),
        Argument("out", "the store, a local folder; the source is written to OUT/SOURCE", default="",
                 shown="required; data/demo with --demo"),
        Argument("source", "name of the source, used in mixtures", default="", shown="required, except with --demo"),
        Argument("tokenizer", "tokenizer folder, Hugging Face folder or SentencePiece model; copied to OUT/tokenizer",
                 default="", shown="OUT/tokenizer"),
        Argument("text_field", "field or column with the text", default="text"),
        Argument("id_field", "field or column with the document's id", default="", shown="path and row"),
        Argument("tokens_field", "field with a list of token ids: records that are tokenized already, in place of text",
                 default=""),
        Argument("bytes_field", "with --tokens_field: field with the UTF-8 size of the text", default="",
                 shown="worked out from the tokens"),
        Argument("validation", "share of the documents held out, chosen by a hash of their ids", default=0.001,
                 type=float),
        Argument("seed", "seed of the shuffle", default=0, type=int),
        Argument("workers", "processes; the output does not depend on it", default=0, type=int, shown="all cores"),
        Argument("on_bad_text", "what to do with text that is not UTF-8", default="replace",
                 choices=("replace", "skip")),
        Argument("layout", "how tokens are stored: flat (memory map), or compressed records", default="flat",
                 choices=("flat", "array_record")),
        Argument("overwrite", "replace an output that was made differently", default=False, type=bool),
        Argument("demo", "prepare the demo: the interpreter's own standard library, with a tokenizer of its own",
                 default=False, type=bool),
    ),
    examples=(
        "python -m neo.data.prepare texts/ --out=data/mine --source=texts --tokenizer=data/mine/tokenizer",
        "python -m neo.data.prepare 'dump/*.jsonl.gz' hf:owner/name:train --out=data/x --source=web "
        "--tokenizer=tokenizers/t64k --text_field=content --id_field=url",
    ),
)


def run(args: Namespace) -> None:
    """Prepare one source (or the demo), then print a table, the config lines and the next command."""
    # Imports below: --help answers without them.
    from neo.data import preparation
    from neo.data.records import ReadOptions
    from neo.data.tokenizer import Tokenizer

    if args.demo:
        from neo.data.demo import prepare_demo

        extra = sorted(args.given - {"demo", "out", "workers", "overwrite"})
        if extra:
            raise InputError(f"--demo takes no other input or setting; leave out {', '.join(extra)}")
        out = args.out or os.path.join("data", "demo")
        manifests = prepare_demo(out, workers=args.workers, overwrite=args.overwrite)
        finish(out, manifests, "python -m neo.train --config=configs/neo_demo.py"
               + (f" --config.data.store={shlex.quote(out)}" if args.out else ""))
        return
    for name in ("input", "out", "source"):
        if not getattr(args, name):
            raise InputError(f"{'INPUT' if name == 'input' else '--' + name} is missing; see --help")
    tokenizer = Tokenizer.load(args.tokenizer or _own_tokenizer(args.out))
    request = preparation.Request(
        inputs=args.input, store=args.out, source=args.source, tokenizer=tokenizer,
        options=ReadOptions(args.text_field, args.id_field, args.on_bad_text, args.tokens_field, args.bytes_field),
        validation=args.validation,
        seed=args.seed, workers=args.workers, layout=args.layout, overwrite=args.overwrite)
    manifest, there = preparation.prepare(request)
    finish(args.out, [(manifest, there)])


def _own_tokenizer(out: str) -> str:
    folder = os.path.join(out, "tokenizer")
    if not os.path.isdir(folder):
        raise InputError(f"--tokenizer is missing, and {out} has none yet; make one with "
                         f"python -m neo.data.tokenizer train INPUT... --out={folder} --vocab_size=N")
    return folder


def finish(out: str, prepared: list[tuple[dict[str, Any], bool]], next_command: str = "") -> None:
    """Print what was written, and config lines for all sources of the store.

    `prepared` are manifests, each with whether it was there already; `next_command` defaults to a short training run.
    Raises StoppedForPerson where inputs could not be read.
    """
    from neo.data import store

    for manifest, there in prepared:
        if there:
            print(f"{os.path.join(out, manifest['source'])} is finished already: nothing to do")
    print()
    print("\n".join(table([manifest for manifest, _ in prepared])))
    for manifest, _ in prepared:
        for line in notes(manifest):
            print(line)
    everything = [store.read_manifest(os.path.join(out, name)) or {} for name in store.list_sources(out)]
    vocab_size, weights = prepared[0][0]["vocab_size"], token_shares(everything)
    print()
    print("Config lines:")
    print(f"    c.data.store = {out!r}")
    print(f"    c.model.vocab_size = {padded(vocab_size)}   # at least {vocab_size}")
    print(f"    mixture={weights!r}   # in each phase(...); these weights are the shares of the tokens")
    print()
    print(f"Wrote {', '.join(os.path.join(out, manifest['source']) for manifest, _ in prepared)}")
    print(f"Next: {next_command or try_command(out, weights, vocab_size)}")
    unreadable = [name for manifest, _ in prepared for name in manifest["prepare"].get("unreadable", ())]
    if unreadable:
        raise StoppedForPerson(f"{len(unreadable)} inputs could not be read, the others were used: "
                               f"{'; '.join(unreadable[:5])}{'; ...' if len(unreadable) > 5 else ''}. "
                               "Repair them and run the same command again")


def try_command(out: str, weights: dict[str, float], vocab_size: int) -> str:
    """A training command that runs as it stands: the demo's model on these sources."""
    mixture = ",".join(f"{name}={weight:g}" for name, weight in weights.items())
    workdir = f"runs/{os.path.basename(os.path.abspath(out))}"
    words = ["python", "-m", "neo.train", "--config=neo_demo", f"--workdir={workdir}",
             f"--config.data.store={out}",
             f"--config.phases.main.mixture={mixture}"]
    if vocab_size > DEMO_VOCAB_SIZE:
        words.append(f"--config.model.vocab_size={padded(vocab_size)}")
    return shlex.join(words)


def padded(vocab_size: int) -> int:
    """The next multiple of 128: the width of a matrix unit, and divisible over `tensor`."""
    return -(-vocab_size // 128) * 128


def token_shares(manifests: list[dict[str, Any]]) -> dict[str, float]:
    """Source -> its share of the tokens to train on, to three digits."""
    tokens = {manifest["source"]: manifest["splits"]["train"]["tokens"] for manifest in manifests}
    return {name: float(f"{count / max(sum(tokens.values()), 1):.3g}") for name, count in tokens.items()}


def table(manifests: list[dict[str, Any]]) -> list[str]:
    """One line per source: documents, tokens, bytes per token, validation, skipped."""
    rows = [("source", "documents", "tokens", "bytes/token", "validation", "skipped")]
    for manifest in manifests:
        train, held = manifest["splits"]["train"], manifest["splits"]["validation"]
        # The end-of-document tokens stand for no text.
        tokens = train["tokens"] + held["tokens"] - train["documents"] - held["documents"]
        skipped = sum(entry["documents"] for entry in manifest["prepare"]["skipped"].values())
        rows.append((manifest["source"], f"{train['documents']:,}", f"{train['tokens']:,}",
                     f"{(train['bytes'] + held['bytes']) / max(tokens, 1):.2f}",
                     f"{held['documents']:,} documents, {held['tokens']:,} tokens", f"{skipped:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if i in (0, 4) else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def notes(manifest: dict[str, Any]) -> list[str]:
    """What was skipped or repaired, and why, with the first place of each; and what is odd about the result."""
    name, prepared = manifest["source"], manifest["prepare"]
    lines = [f"{name}: {kind} {entry['documents']:,}: {reason} (first: {entry['first']})"
             for kind in ("skipped", "repaired") for reason, entry in prepared[kind].items()]
    if prepared["inputs"]["ignored"]:
        lines.append(f"{name}: {prepared['inputs']['ignored']:,} files of other types were left alone")
    if not manifest["splits"]["validation"]["documents"]:
        lines.append(f"{name}: no document is held out for validation"
                     + (" (there is only one)" if manifest["splits"]["train"]["documents"] == 1 else ""))
    return lines


if __name__ == "__main__":
    main(COMMAND, run)
