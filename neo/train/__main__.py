"""`python -m neo.train --config=neo_demo`: train, resume, or show what would be trained."""

from __future__ import annotations

import json
import shlex
import sys
import time
from typing import Any

from neo.cli import JSON, Argument, Command, Namespace, main

_STARTED = time.monotonic()


def _fields() -> str:
    from neo.config.render import field_lines
    lines = ["config fields (docs/config_reference.md has them as a table):"]
    for path, kind, default, doc in field_lines():
        lines.append(f"  {f'--config.{path}={kind.upper()}':<52} {doc} ({default})")
    return "\n".join(lines)


COMMAND = Command(
    prog="neo.train",
    summary="Train a model, or go on with a run where it stopped.",
    arguments=(
        Argument("config", "config file, or the name of a recipe"),
        Argument("workdir", "folder of the run; the same one again resumes", default="", shown="runs/<config name>"),
        Argument("print_config", "show the resolved config, sizes and memory, and stop", type=bool),
        Argument("distributed", "auto joins the cluster it was started in; off runs alone", default="auto",
                 choices=("auto", "off")),
        Argument("coordinator", "HOST:PORT of process 0, where several are started by hand", default=""),
        Argument("num_processes", "how many processes there are, with --coordinator", default=0, type=int),
        Argument("process_id", "which one this is, from 0, with --coordinator", default=-1, type=int),
        JSON,
    ),
    examples=("python -m neo.train --config=neo_demo",
              "python -m neo.train --config=configs/neo_7b.py --workdir=gs://bucket/neo_7b --config.log.every_steps=50"),
    takes_overrides=True,
    details=_fields,
)


def run(args: Namespace) -> None:
    """Load the config, join the other processes, and train."""
    from neo.config import load
    config = load(args.config, args.overrides)
    if args.print_config:
        _print_config(config, args)
        return
    from neo.parallel.cluster import Cluster
    from neo.parallel.distributed import join, watched
    joined = join(Cluster(args.distributed, args.coordinator, args.num_processes, args.process_id), _facts(config),
                  join_seconds=config.train.join_seconds, heartbeat_seconds=config.train.heartbeat_seconds)
    with watched():
        print(f"neo.train: {joined}", file=sys.stderr)
        _train(config, args)


def _facts(config: Any) -> dict[str, Any]:
    """What must be the same on every process of a run."""
    from importlib import metadata

    from neo.config import to_dict
    installed = {found.name: found.version for name in ("neo-pretrain", "jax", "jaxlib")
                 for found in metadata.distributions(name=name)}
    return {"config": to_dict(config), **{f"{name} version": version for name, version in installed.items()}}


def _train(config: Any, args: Namespace) -> None:
    """Train, and print the result on process 0."""
    import jax

    from neo.config import find
    from neo.train.runner import result_text
    from neo.train.runner import run as train
    finished = train(config, args.workdir or None, config_text=find(args.config).read_text(), started=_STARTED)
    if jax.process_index() > 0:
        return
    result = finished.result()
    samples = _last_samples(finished, result["step"])
    if args.json:
        print(json.dumps({**result, "samples": samples}))
        return
    place = finished.workdir.path
    print(result_text(result, samples))
    print(f"\nin {place}: {', '.join(_written(place))}")
    if not result["synthetic"]:
        prompt = next((text for text in finished.config.eval.sample_prompts if text), "The")
        print(f"next: python -m neo.infer {place} --prompt={shlex.quote(prompt)}")


def _written(place: Any) -> list[str]:
    """What a person may want to open in a workdir."""
    found = [name for name in ("checkpoints/", "metrics/", "loss.png", "samples.jsonl") if (place / name).exists()]
    return found + ([f"tensorboard/ (tensorboard --logdir={place})"] if (place / "tensorboard").exists() else [])


def _last_samples(run: Any, step: int) -> list[dict[str, Any]]:
    path = run.workdir.path / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    newest = {line["prompt"]: line for line in lines if line["step"] == step}
    return list(newest.values())


def _print_config(config: Any, args: Namespace) -> None:
    from neo.config import to_dict
    from neo.config.render import as_python
    from neo.train.summary import summarise, summary_lines
    facts = summarise(config)
    if args.json:
        print(json.dumps({"config": to_dict(config), "overridden": [path for path, _ in args.overrides], **facts}, indent=2))
    else:
        print(as_python(config, [path for path, _ in args.overrides], summary_lines(facts)))


if __name__ == "__main__":
    main(COMMAND, run)
