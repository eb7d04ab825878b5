"""`python -m neo.data.inspect --config=FILE`, `WORKDIR` or `STORE`: what a run reads, or what a token store holds."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from neo.cli import JSON, Argument, Command, Namespace, main
from neo.errors import InputError, StoppedForPerson, nearest

if TYPE_CHECKING:
    from neo.config import Config
    from neo.data.inspect_samples import Sample
    from neo.data.order import Order
    from neo.data.planning import Size


COMMAND = Command(
    prog="neo.data.inspect",
    summary="Show what a run reads of each source, as text, picture and samples; or what a token store holds.",
    arguments=(
        Argument("store", "a token store, one source of it, or the workdir of a run", default=None, positional=True),
        Argument("config", "config file, or the name of a recipe: its plan, also before there is a store", default=None),
        Argument("phase", "only this phase in the table and the samples", default="", shown="all phases"),
        Argument("samples", "how many windows to show as text, spread over the phases; 0 = none", default=3, type=int),
        Argument("chars", "characters of each document shown; 0 = all", default=400, type=int),
        Argument("all", "every source by itself, also where they are many", type=bool),
        Argument("out", "where the picture of a plan goes", default="inspect.png"),
        Argument("verify", "read every file of the store and compare its sha256", type=bool),
        JSON,
    ),
    examples=("python -m neo.data.inspect --config=configs/yulan_mini.py",
              "python -m neo.data.inspect --config=mpt_7b --config.phases.main.tokens=2e11 --samples=0",
              "python -m neo.data.inspect data/demo --verify",
              "python -m neo.data.inspect runs/neo_demo"),
    takes_overrides=True,
)


class _Subject(NamedTuple):
    """A run to show: planned, or one that has begun (`done` steps); `sources` are those opened."""

    config: Config
    order: Order
    sizes: Mapping[str, Size]
    sources: dict[str, Any]
    done: int
    next: str


def run(args: Namespace) -> None:
    """Show a plan, a run or a store."""
    if bool(args.config) == bool(args.store):
        raise InputError("give one of --config=FILE (the plan of a run), WORKDIR (a run) and STORE (what a token store holds)")
    for name in ("samples", "chars"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name}={getattr(args, name)}: 0 or more is needed")
    if args.config:
        _show(_planned(args), args)
        return
    if args.overrides:
        raise InputError(f"--config.{args.overrides[0][0]} changes a plan: give --config=FILE")
    if _is_run(args.store):
        _show(_begun(args), args)
        return
    _inspect_store(args)


def _is_run(path: str) -> bool:
    """Whether this is a workdir: it has a config.json."""
    from neo.data import store_files
    return "config.json" in (store_files.list_sizes(path) or {})


def _planned(args: Namespace) -> _Subject:
    """The run of a config, with the stores that are there opened where they are needed."""
    from neo.config import PhaseConfig, load
    from neo.data.planning import planned_order
    from neo.data.sources import open_sources

    config = load(args.config, args.overrides)
    _check_arguments(config, args)
    order, sizes = planned_order(config)
    there = [name for name, size in sizes.items() if size.origin == "store"]
    sources = {}
    if there and (args.samples or args.verify):
        # As the trainer opens them (many at a time, checked against each other), but without those that are missing.
        sources = open_sources(dataclasses.replace(config, phases=(PhaseConfig(mixture=dict.fromkeys(there, 1.0)),)))
    given = [f"--config={args.config}", *(f"--config.{path}={text}" for path, text in args.overrides)]
    return _Subject(config, order, sizes, sources, 0,
                    f"python -m neo.train {shlex.join(given)}{'' if there or config.data.synthetic else ' --print_config'}")


def _begun(args: Namespace) -> _Subject:
    """The run of a workdir, with its amendments."""
    from neo.data.ledger import Ledger
    from neo.data.planning import Size

    ledger = Ledger.of(args.store)
    _check_arguments(ledger.config, args)
    origin = "synthetic" if ledger.config.data.synthetic else "store"
    sizes = {name: Size(ledger.sources[name].split("train").num_tokens, origin) if name in ledger.sources else
             Size(0, "unknown") for name in ledger.order.sources}   # unknown: only mentioned, with a weight of 0
    sources = {} if ledger.config.data.synthetic else dict(ledger.sources)
    return _Subject(ledger.config, ledger.order, sizes, sources, ledger.steps_done,
                    f"python -m neo.data.trace {shlex.quote(args.store)} --step={max(ledger.steps_done, 1)}")


def _check_arguments(config: Config, args: Namespace) -> None:
    from neo.data.inspect_plot import check_out
    names = [phase.name for phase in config.phases]
    if args.phase and args.phase not in names:
        raise InputError(f"--phase={args.phase}: there is no such phase{nearest(args.phase, names)}; "
                         f"phases: {', '.join(names)}")
    check_out(args.out)


def _show(subject: _Subject, args: Namespace) -> None:
    """Text, samples and picture; StoppedForPerson at the end of a plan over its limits."""
    from neo.data.inspect_plan import make_plan, to_json
    from neo.data.inspect_plot import draw
    from neo.data.inspect_text import plan_lines
    from neo.data.planning import check_epochs

    config, order, sizes, sources, done, following = subject
    plan = make_plan(config, order, sizes, done)
    if not args.json:
        print("\n".join([*plan_lines(plan, args.phase, everything=args.all), ""]))
    if args.verify:
        _verify(sources, args)
    samples = _plan_samples(config, order, sources, args) if sources and args.samples else []
    draw(plan, args.out)
    if args.json:
        _print_json({"plan": to_json(plan), "samples": samples, "picture": args.out})
    else:
        _print_samples(samples, args)
        if not sources and args.samples and not config.data.synthetic:
            print(f"no samples: none of the sources is prepared ({plan.store})")
        print(f"Wrote {args.out}")
        if not plan.over_limit:
            print(f"Next: {following}")
    if config.data.reweight_steps:  # the weights of today say little about the end; they are capped as they come
        return
    try:
        check_epochs(config, order, {name: size.tokens for name, size in sizes.items() if size.origin != "unknown"})
    except InputError as error:
        raise StoppedForPerson(str(error)) from None


def _inspect_store(args: Namespace) -> None:
    from neo.data.inspect_samples import store_samples
    from neo.data.inspect_store import SAMPLE_LENGTH, describe, open_store, store_lines
    from neo.data.tokenizer import Tokenizer

    sources, folder = open_store(args.store)
    for name in ("phase", "out"):
        if name in args.given:
            raise InputError(f"--{name} is of a plan, and {args.store} is a store: give --config=FILE or a WORKDIR")
    facts = {name: describe(source) for name, source in sources.items()}
    if not args.json:
        print("\n".join([*store_lines(facts), ""]))
    if args.verify:
        _verify(sources, args)
    samples: list[Sample] = []
    if args.samples:
        try:
            tokenizer = Tokenizer.load(folder.rstrip("/") + "/tokenizer")
        except InputError as error:
            print(f"no samples: {error}", file=sys.stderr)
        else:
            fitting = {name: source for name, source in sources.items() if source.tokenizer_sha256 == tokenizer.sha256}
            for name in sources.keys() - fitting.keys():
                print(f"no samples of {name}: it was prepared with another tokenizer than {folder}/tokenizer", file=sys.stderr)
            samples = list(store_samples(fitting, tokenizer, args.samples, SAMPLE_LENGTH))
    if args.json:
        _print_json({"store": args.store, "sources": facts, "samples": samples, "verified": args.verify})
    else:
        _print_samples(samples, args)


def _plan_samples(config: Config, order: Order, sources: dict[str, Any], args: Namespace) -> list[Sample]:
    from neo.data.inspect_samples import run_samples
    from neo.data.sources import open_tokenizer
    try:
        tokenizer = open_tokenizer(config, sources)
    except InputError as error:
        print(f"no samples: {error}", file=sys.stderr)
        return []
    return list(run_samples(config, order, sources, tokenizer, args.samples, args.phase))


def _verify(sources: dict[str, Any], args: Namespace) -> None:
    from neo.data.inspect_store import verify_all
    verify_all(sources)
    if not args.json:
        print(f"verified: every file of {', '.join(sources) or 'no source'} is what was written\n")


def _print_samples(samples: list[Sample], args: Namespace) -> None:
    from neo.data.inspect_samples import sample_lines, styles
    style = styles()
    for sample in samples:
        for line in sample_lines(sample, args.chars, style):
            print(line)


def _print_json(tree: dict[str, Any]) -> None:
    from neo.data.inspect_samples import sample_json
    print(json.dumps({**tree, "samples": [sample_json(sample) for sample in tree["samples"]]}))


if __name__ == "__main__":
    main(COMMAND, run)
