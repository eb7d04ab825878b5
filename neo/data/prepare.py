"""`python -m neo.data.prepare`: text files to a token store."""

from __future__ import annotations

import os
import shlex
from typing import Any

from neo.cli import Argument, Command, Namespace, main
from neo.errors import InputError, StoppedForPerson

DEMO_TOKENS = 1200 * 4 * 256  # of its one phase
DEMO_VOCAB_SIZE, DEMO_MAX_SEQ_LEN = 4096, 256  # of model in configs/neo_demo.py

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
        # What a document is made of.
        Argument("text_field", "field or column with the text", default="text"),
        Argument("id_field", "field or column with the document's id", default="", shown="path and row"),
        Argument("prompt_field", "field with text that stands before the document's and is not learned", default=""),
        Argument("group_field", "field with a name: documents of the same name stay together, in input order, on one "
                                "side of the held-out split, and may see each other", default=""),
        Argument("tokens_field", "field with a list of token ids: records that are tokenized already, in place of text",
                 default=""),
        Argument("bytes_field", "with --tokens_field: field with the UTF-8 size of the text", default="",
                 shown="worked out from the tokens"),
        Argument("on_bad_text", "what to do with text that is not UTF-8", default="replace",
                 choices=("replace", "skip")),
        # How the documents are ordered and stored.
        Argument("validation", "share of the documents held out, chosen by a hash of their ids", default=0.001,
                 type=float),
        Argument("seed", "seed of the shuffle and of the transforms", default=0, type=int),
        Argument("packing", "concatenate: documents follow one another, windows may begin anywhere; best_fit: documents "
                            "are packed whole into windows of --seq_len tokens", default="concatenate",
                 choices=("concatenate", "best_fit")),
        Argument("seq_len", "with --packing=best_fit: sequence length of the phases that read the store", default=0,
                 type=int, shown="required then"),
        Argument("layout", "how tokens are stored: flat (memory map), or compressed records", default="flat",
                 choices=("flat", "array_record")),
        # What is done to documents to train on; those held out stay as they are.
        Argument("fim_rate", "fill-in-the-middle: share of the documents", default=0.5, type=float,
                 shown="0.5 where another --fim flag is given, else 0"),
        Argument("fim_spm_rate", "fill-in-the-middle: share of these with the suffix first", default=0.5, type=float),
        Argument("fim_tokens", "fill-in-the-middle: special tokens of prefix, suffix and middle",
                 default="<fim_prefix>,<fim_suffix>,<fim_middle>"),
        Argument("reverse", "what is reversed: token, word, or entity (words, but names stay as they are)", default="",
                 choices=("token", "word", "entity"), shown="nothing"),
        Argument("reverse_rate", "with --reverse: share of the documents", default=0.5, type=float),
        Argument("canaries", "a .jsonl file of known documents to put among the others", default="", shown="none"),
        Argument("canary_rate", "with --canaries: number of canaries per document, at most 1", default=0.0, type=float,
                 shown="required then"),
        Argument("variants", "write every document so many times, each time transformed by new draws: one pass over "
                             "the store is then so many epochs", default=1, type=int),
        # A seqio Task or Mixture in place of INPUT and --source.
        Argument("seqio_mixture", "a seqio Task or Mixture to prepare, one source for each Task; needs the extra [data]",
                 default="", shown="none"),
        Argument("module", "with --seqio_mixture: the module that registers it (my.tasks, or a path)", default="",
                 shown="required then"),
        Argument("split", "with --seqio_mixture: split to read", default="train"),
        Argument("feature", "with --seqio_mixture: feature with the token ids", default="targets"),
        # How it runs.
        Argument("workers", "processes; the output does not depend on it", default=0, type=int, shown="all cores"),
        Argument("overwrite", "replace an output that was made differently", default=False, type=bool),
        Argument("demo", "prepare the demo: the interpreter's own standard library, with a tokenizer of its own",
                 default=False, type=bool),
    ),
    examples=(
        "python -m neo.data.prepare texts/ --out=data/mine --source=texts --tokenizer=data/mine/tokenizer",
        "python -m neo.data.prepare 'dump/*.jsonl.gz' hf:owner/name:train --out=data/x --source=web "
        "--tokenizer=tokenizers/t64k --text_field=content --id_field=url",
        "python -m neo.data.prepare code.jsonl --out=data/x --source=code --fim_rate=0.5 --variants=4 "
        "--packing=best_fit --seq_len=4096",
        "python -m neo.data.prepare --seqio_mixture=my_mixture --module=my.tasks --out=data/mine",
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
    if args.given & {"seqio_mixture", "module", "split", "feature"}:
        from neo.data import seqio_prepare

        seqio_prepare.run(args)
        return
    for name in ("input", "out", "source"):
        if not getattr(args, name):
            raise InputError(f"{'INPUT' if name == 'input' else '--' + name} is missing; see --help")
    transforms = _transforms(args)
    tokenizer = Tokenizer.load(args.tokenizer or _own_tokenizer(args.out))
    request = preparation.Request(
        inputs=args.input, store=args.out, source=args.source, tokenizer=tokenizer,
        options=ReadOptions(args.text_field, args.id_field, args.on_bad_text, args.tokens_field, args.bytes_field,
                            args.prompt_field, args.group_field),
        validation=args.validation, seed=args.seed, workers=args.workers, layout=args.layout, transforms=transforms,
        packing=args.packing, seq_len=args.seq_len, overwrite=args.overwrite)
    manifest, there = preparation.prepare(request)
    finish(args.out, [(manifest, there)])


def _transforms(args: Namespace) -> Any:
    """The transforms that the flags ask for. Raises InputError for a flag that another one would have to give a meaning."""
    from neo.data.canary import read_canaries
    from neo.data.transforms import Transforms

    for flag, needed in (("reverse_rate", "reverse"), ("canary_rate", "canaries"), ("canaries", "canary_rate")):
        if flag in args.given and needed not in args.given:
            raise InputError(f"--{flag}={getattr(args, flag)}: needs --{needed} too")
    fim = args.given & {"fim_rate", "fim_spm_rate", "fim_tokens"}
    if fim and not args.fim_rate and len(fim) > 1:
        raise InputError(f"--fim_rate={args.fim_rate:g}: switches off what {', '.join(sorted(fim - {'fim_rate'}))} set; "
                         "leave them out")
    return Transforms(
        fim_rate=args.fim_rate if fim else 0.0, fim_spm_rate=args.fim_spm_rate,
        fim_tokens=tuple(args.fim_tokens.split(",")), reverse=args.reverse,
        reverse_rate=args.reverse_rate if args.reverse else 0.0, variants=args.variants,
        canaries=read_canaries(args.canaries, args.canary_rate, args.text_field) if args.canaries else None)


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
    print(f"    c.model.vocab_size = {rows(out)}   # at least {vocab_size}")
    print(f"    mixture={weights!r}   # in each phase(...); these weights are the shares of the tokens")
    packed = {manifest["source"]: manifest["packing"]["seq_len"] for manifest in everything if manifest.get("packing")}
    for name, length in packed.items():
        print(f"    seq_len={length}   # in each phase(...) that reads {name}, which is packed for it")
    # Sources packed for different lengths cannot be in one phase; the one just written can be tried.
    first = [manifest["source"] for manifest, _ in prepared]
    seq_len = next((packed[name] for name in [*first, *packed] if name in packed), 0)
    together = {name: weight for name, weight in weights.items() if packed.get(name, seq_len) == seq_len}
    print()
    print(f"Wrote {', '.join(os.path.join(out, manifest['source']) for manifest, _ in prepared)}")
    print(f"Next: {next_command or try_command(out, together, rows(out), seq_len)}")
    unreadable = [name for manifest, _ in prepared for name in manifest["prepare"].get("unreadable", ())]
    if unreadable:
        raise StoppedForPerson(f"{len(unreadable)} inputs could not be read, the others were used: "
                               f"{'; '.join(unreadable[:5])}{'; ...' if len(unreadable) > 5 else ''}. "
                               "Repair them and run the same command again")


def try_command(out: str, weights: dict[str, float], vocab_size: int, seq_len: int = 0) -> str:
    """A training command that runs as it stands: the demo's model on these sources, at `seq_len` where they are packed."""
    mixture = ",".join(f"{name}={weight:g}" for name, weight in weights.items())
    workdir = f"runs/{os.path.basename(os.path.abspath(out))}"
    words = ["python", "-m", "neo.train", "--config=neo_demo", f"--workdir={workdir}",
             f"--config.data.store={out}",
             f"--config.phases.main.mixture={mixture}"]
    if seq_len:
        words.append(f"--config.phases.main.seq_len={seq_len}")
    if seq_len > DEMO_MAX_SEQ_LEN:
        words.append(f"--config.model.max_seq_len={seq_len}")
    if vocab_size > DEMO_VOCAB_SIZE:
        words.append(f"--config.model.vocab_size={padded(vocab_size)}")
    if _read_too_often(out, weights):
        words.append("--config.data.max_epochs=0")
    return shlex.join(words)


def _read_too_often(out: str, weights: dict[str, float]) -> bool:
    """Whether the demo's run would read a source of the store more often than a config allows by default."""
    from neo.config.schema import DataConfig
    from neo.data import store

    manifests = {name: store.read_manifest(os.path.join(out, name)) for name in weights}
    return any(weight / sum(weights.values()) * DEMO_TOKENS > DataConfig().max_epochs * manifest["splits"]["train"]["tokens"]
               for name, weight in weights.items() if (manifest := manifests[name]))


def padded(vocab_size: int) -> int:
    """The next multiple of 128: the width of a matrix unit, and divisible over `tensor`."""
    return -(-vocab_size // 128) * 128


def rows(out: str) -> int:
    """Rows that a model's table should have for a store, as its tokenizer says: the next multiple of 128, or its own."""
    from neo.data.tokenizer import Tokenizer

    return Tokenizer.load(os.path.join(out, "tokenizer")).padded_vocab_size


def token_shares(manifests: list[dict[str, Any]]) -> dict[str, float]:
    """Source -> its share of the tokens to train on, to three digits."""
    tokens = {manifest["source"]: manifest["splits"]["train"]["tokens"] for manifest in manifests}
    return {name: float(f"{count / max(sum(tokens.values()), 1):.3g}") for name, count in tokens.items()}


def table(manifests: list[dict[str, Any]]) -> list[str]:
    """One line per source: documents, tokens, bytes per token, validation, skipped."""
    rows = [("source", "documents", "tokens", "bytes/token", "validation", "skipped")]
    for manifest in manifests:
        train, held = manifest["splits"]["train"], manifest["splits"]["validation"]
        packing = manifest["prepare"].get("packing")
        documents = packing["documents"] if packing else train["documents"]  # the index counts pieces and padding
        # The end-of-document tokens stand for no text, nor does padding.
        tokens = train["tokens"] + held["tokens"] - documents - held["documents"] - (packing["padding"] if packing else 0)
        skipped = sum(entry["documents"] for entry in manifest["prepare"]["skipped"].values())
        rows.append((manifest["source"], f"{documents:,}", f"{train['tokens']:,}",
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
    lines += _extras(manifest)
    if prepared["inputs"]["ignored"]:
        lines.append(f"{name}: {prepared['inputs']['ignored']:,} files of other types were left alone")
    if not manifest["splits"]["validation"]["documents"]:
        lines.append(f"{name}: no document is held out for validation"
                     + (" (there is only one)" if manifest["splits"]["train"]["documents"] == 1 else ""))
    return lines


def _extras(manifest: dict[str, Any]) -> list[str]:
    """What was transformed, added and packed."""
    name, prepared = manifest["source"], manifest["prepare"]
    arguments, lines = prepared["arguments"], []
    variants = f" in {arguments['variants']} variants" if "variants" in arguments else ""
    counts = prepared.get("transformed", {})
    canaries = {kind: count for kind, count in counts.items() if kind.startswith("canary/")}
    if counts or variants:
        words = [f"{count:,} {kind}" for kind, count in counts.items() if kind not in canaries]
        words += [f"{sum(canaries.values()):,} canaries ({len(canaries)} different)"] if canaries else []
        lines.append(f"{name}: transformed{variants}: {', '.join(words) or 'none'}")
    if "packing" in prepared:
        packing, seq_len = prepared["packing"], manifest["packing"]["seq_len"]
        places = packing["bins"] * seq_len
        lines.append(f"{name}: packed into {packing['bins']:,} windows of {seq_len:,} tokens, "
                     f"{1 - packing['padding'] / max(places, 1):.2%} full; {packing['cut']:,} of {packing['documents']:,} "
                     f"documents ({packing['cut'] / max(packing['documents'], 1):.2%}) are cut")
    return lines


if __name__ == "__main__":
    main(COMMAND, run)
