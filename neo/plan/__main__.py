"""`python -m neo.plan --config=neo_7b --topology=v5p:4x4x4`: what a run would need and how fast it would be, without a chip."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo.cli import JSON, Argument, Command, Namespace, main, whole_number
from neo.errors import InputError, StoppedForPerson

if TYPE_CHECKING:
    from neo.config import Config
    from neo.plan.plan import Plan
    from neo.plan.planner import Engine
    from neo.plan.topology import Topology

_STARTED = time.monotonic()
FILES = ("plan.json", "plan.txt", "plan.png")


def _counts(text: str) -> tuple[int, ...]:
    """Chips of the scaling table: `16,64,256`."""
    return tuple(whole_number(part) for part in text.split(",")) if text else ()


COMMAND = Command(
    prog="neo.plan",
    summary="Plan a run on TPUs or GPUs that are not here: does it fit, how long is a step, what limits it.",
    arguments=(
        Argument("config", "config file, or the name of a recipe", default=None, shown="needed but for --topology=list"),
        Argument("topology", "chip:torus (v5p:4x4x4), GPU:per node x nodes (h100:8x16), slices in front (2*v5p:4x4x4), "
                             "a product name (v5p-128), or list"),
        Argument("search", "try meshes, micro-batches and remat policies, and rank what fits", type=bool),
        Argument("candidates", "how many of them --search compiles", default=8, type=int),
        Argument("phase", "the phase that is planned", default="", shown="the one with the most tokens"),
        Argument("scaling", "also a table of weak scaling over these numbers of chips: 16,64,256", default=(), type=_counts,
                 shown="none"),
        Argument("flags", "compiler flags: '--a=1 --b=2', none, or quick: without those that make compiling slow", default="",
                 shown="those that neo.train sets for the chip"),
        Argument("out", "folder for plan.json, plan.txt, plan.png and compiled programs", default="",
                 shown="plans/<config>-<topology>"),
        JSON,
    ),
    examples=("python -m neo.plan --config=configs/neo_7b.py --topology=v5p:4x4x4",
              "python -m neo.plan --config=moxin_7b --topology=v5e:16x16 --search",
              "python -m neo.plan --config=neo_2b --topology=h100:8x4 --config.train.remat=full --json",
              "python -m neo.plan --topology=list"),
    takes_overrides=True,
)


def run(args: Namespace) -> None:
    """Plan, or search, or list the topologies."""
    if args.topology == "list":
        from neo.plan.topology import table
        print(table())
        return
    if not args.config:
        raise InputError("--config is missing: config file, or the name of a recipe")
    if args.candidates < 1:
        raise InputError(f"--candidates={args.candidates}: 1 or more is needed")
    from neo.config import load
    from neo.plan import planner
    from neo.plan.compile import phase_of
    from neo.plan.topology import parse

    config = load(args.config, args.overrides)
    topology = parse(args.topology)
    phase_of(config, args.phase)
    out = _out_folder(args.out or f"plans/{config.name}-{_plain(topology.name)}")
    flags = args.flags or ("none" if config.train.compiler_flags == "none" else "")
    engine = planner.engine_for(topology, out / "cache", _say, flags)
    if topology.note:
        _say(topology.note)
    answer = _answer(config, topology, engine, out / "cache", args)
    answer.write(out)
    print(json.dumps(answer.to_json(), indent=1) if args.json else answer.text)
    if not args.json:
        print(f"\nin {out}: {', '.join(FILES)}")
    if answer.refusal:
        raise StoppedForPerson(answer.refusal)
    if not args.json:
        words = ["python", "-m", "neo.train", f"--config={args.config}", *answer.best.overrides]
        print(f"next: {shlex.join(words)}")


class _Answer:
    """What the command found: one plan, or those of a search; text, JSON and picture of it."""

    def __init__(self, plans: Sequence[Plan], best: Plan | None, parts: Sequence[str], refusal: str = "", **more: Any) -> None:
        self.plans, self.best, self.refusal, self.more = list(plans), best, refusal, more
        self.text = "\n\n".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        """Plans as `report.to_json` gives them."""
        from neo.plan.report import to_json
        return {"plans": [to_json(one) for one in self.plans], "best": to_json(self.best) if self.best else None, **self.more}

    def write(self, out: Path) -> None:
        """The three files."""
        from neo.plan.picture import draw
        from neo.train.progress import count
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.json").write_text(json.dumps({"format": "neo.plan", **self.to_json()}, indent=1) + "\n")
        (out / "plan.txt").write_text(self.text + "\n")
        if self.plans:
            one = self.plans[0]
            title = (f"{one.config} on {one.topology} ({one.devices} x {one.chip}), phase {one.phase}: "
                     f"{count(one.tokens_per_step)} tokens a step")
            draw(self.plans, out / "plan.png", title)


def _answer(config: Config, topology: Topology, engine: Engine, cache: Path, args: Namespace) -> _Answer:
    from neo.plan import planner, search
    from neo.plan.report import report

    given = tuple(f"--config.{path}={text}" for path, text in args.overrides)
    if args.search:
        return _searched(config, topology, engine, cache, args, given)
    made = planner.plan(config, topology, engine, phase=args.phase, overrides=given)
    if made.fits:
        return _Answer([made], made, [report(made), *_scaling(config, topology, engine, made, args)])
    _say(f"it does not fit: {made.refused or 'too big'}; looking for the nearest plan that does")
    near = search.nearest_fit(config, topology, engine, made, given=given, say=_say)
    text = search.refusal(config, topology, engine, made, near, args.phase)
    return _Answer([made, *([near] if near else [])], near, [report(made), text, report(near) if near else ""], text)


def _searched(config: Config, topology: Topology, engine: Engine, cache: Path, args: Namespace,
              given: tuple[str, ...]) -> _Answer:
    from neo.plan import planner, search
    from neo.plan.report import ranking, report

    # Flags that multiply the time of a compile are for the best alone: they change all candidates alike.
    quick = planner.engine_for(topology, cache, _say, "quick") if engine.compile and engine.flags and not args.flags else engine
    found = search.search(config, topology, quick, phase=args.phase, given=given, most=args.candidates, final=engine, say=_say)
    best = found.winner
    head = f"{config.name} on {topology.name}: {len(found.plans)} of {found.considered} candidates " + (
        "worked out" if not engine.compile else "compiled" if found.final is None else "compiled without the slow flags")
    parts = [head, ranking(found.plans, found.dropped, found.left) if found.plans else "", *found.impossible]
    if best is None:
        text = search.refusal(config, topology, engine, None, None, args.phase)
        return _Answer(found.plans, None, [*parts, text], text, dropped=found.dropped, left=found.left)
    parts += ["the best:" if found.final is None else "the best, with all compiler flags:", report(best)]
    parts += [f"to paste: {' '.join(best.overrides)}"]
    parts += _scaling(config, topology, engine, best, args)
    shown = [*([found.final] if found.final else []), *found.plans]
    return _Answer(shown, best, parts, dropped=found.dropped, left=found.left)


def _scaling(config: Config, topology: Topology, engine: Engine, made: Plan, args: Namespace) -> list[str]:
    if not args.scaling:
        return []
    from neo.plan.scaling import table
    return [table(config, topology, made, args.scaling, engine)]


def _out_folder(path: str) -> Path:
    """A folder that is new, empty, or holds an earlier plan: that one is replaced, its compiled programs are kept."""
    out = Path(path)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={path}: that is a file; give a folder")
    if out.is_dir() and any(one.name != "cache" for one in out.iterdir()):
        plan = out / "plan.json"
        if not plan.is_file() or '"neo.plan"' not in plan.read_text(errors="replace")[:200]:
            raise InputError(f"--out={path}: the folder is not empty and holds no plan of neo; give another one")
    return out


def _plain(name: str) -> str:
    """A topology's name as part of a folder's: `2*v5p:4x4x4` -> `2x_v5p_4x4x4`."""
    return name.replace("*", "x_").replace(":", "_")


def _say(text: str) -> None:
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(COMMAND, run)
