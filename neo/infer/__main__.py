"""`python -m neo.infer CHECKPOINT --prompt=TEXT`: continue a prompt with a trained model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from neo.cli import JSON, Argument, Command, Namespace, main
from neo.errors import InputError

COMMAND = Command(
    prog="neo.infer",
    summary="Continue a prompt with a trained model.",
    arguments=(
        Argument("checkpoint", "workdir, workdir@STEP, workdir@16.78B (tokens), checkpoint folder or Hugging Face folder",
                 positional=True),
        Argument("prompt", "text to continue; empty begins a document", default=None, shown="stdin, line by line"),
        Argument("max_new_tokens", "longest continuation, in tokens", default=128, type=int),
        Argument("temperature", "0 takes the likeliest token always; higher is more random", default=0.8, type=float),
        Argument("top_k", "draw from the k likeliest tokens only; 0 = all", default=0, type=int),
        Argument("top_p", "draw from the likeliest tokens that make up this probability", default=1.0, type=float),
        Argument("seed", "another number draws other text", default=0, type=int),
        JSON,
    ),
    examples=("python -m neo.infer runs/neo_demo --prompt='def __init__(self'",
              "python -m neo.infer runs/neo_demo@600 --temperature=0 --json < prompts.txt"),
)


def run(args: Namespace) -> None:
    """Load once, then answer each prompt as it comes."""
    started = time.monotonic()
    from neo.infer.model import load
    from neo.infer.sampling import Sampling
    Sampling(args.temperature, args.top_k, args.top_p, args.seed)   # refused before the checkpoint is read
    model = load(args.checkpoint)
    settings = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k,
                "top_p": args.top_p, "seed": args.seed}
    found = model.checkpoint
    _tell(f"{found.path}: {found.title}; loaded in {time.monotonic() - started:.1f} s")
    _ = model.tokenizer   # refused, where there is none, before anything is read from stdin
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):   # bytes that are no text become U+FFFD, in and out
            stream.reconfigure(errors="replace")
    number, new_tokens, seconds = 0, 0, 0.0
    for number, prompt in enumerate(_prompts(args.prompt), 1):
        begun = time.monotonic()
        # The number of the prompt is part of its key: equal lines get different text.
        one = model.continuations([prompt], first_index=number - 1, **settings)[0]
        spent = time.monotonic() - begun
        new_tokens, seconds = new_tokens + one.new_tokens, seconds + spent
        if args.json:
            record = {"prompt": prompt, "text": one.text, "continuation": one.continuation,
                      "prompt_tokens": one.prompt_tokens, "new_tokens": one.new_tokens, "ended": one.ended,
                      "seconds": round(spent, 3), "checkpoint": str(found.path), "step": found.step}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            print(one.text, flush=True)
    if not number:
        raise InputError("stdin was empty: give --prompt=TEXT, or prompts on stdin, one per line")
    speed = new_tokens / max(seconds, 1e-9)
    _tell(f"{new_tokens} new tokens in {seconds:.1f} s ({speed:.0f} tokens/s, compiling included)")


def _prompts(given: str | None) -> Iterator[str]:
    """The prompt of the command line, else the lines of stdin as they come."""
    if given is not None:
        yield _clean(given)
        return
    if sys.stdin.isatty():
        _tell("type a prompt and Enter; Ctrl-D ends")
    for line in sys.stdin:
        yield _clean(line.removesuffix("\n").removesuffix("\r"))


def _clean(text: str) -> str:
    """Bytes of the command line that are no UTF-8 reach Python as lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _tell(text: Any) -> None:
    print(f"neo.infer: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(COMMAND, run)
