"""What each verb prints last: what it wrote, and the commands to load, serve and upload it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from neo.config.schema import ModelConfig
from neo.convert.source import Source


def uses_of_folder(out: Path) -> list[str]:
    """How to load, serve and upload a Hugging Face folder."""
    folder = _short(out)
    return [f"    load    python -c \"from transformers import pipeline; print(pipeline('text-generation', {folder!r})"
            "('Once upon a time')[0])\"",
            f"    serve   vllm serve {shlex.quote(folder)}",
            f"    upload  hf upload OWNER/{out.name} {shlex.quote(folder)}      # choose a license in README.md first"]


def uses_of_gguf(out: Path) -> list[str]:
    """The same for a GGUF file."""
    file = shlex.quote(_short(out))
    return [f"    load    llama-cli -m {file} -p 'Once upon a time' -n 64",
            f"    serve   llama-server -m {file}",
            f"    upload  hf upload OWNER/{out.stem}-GGUF {file}"]


def after_hf(out: Path, source: Source, checkpoint: str) -> str:
    """After to-hf."""
    folder = _short(out)
    lines = [f"Wrote {folder} ({_size(out)})", *uses_of_folder(out),
             f"Next: python -m neo.convert verify {shlex.join((checkpoint, folder))}"]
    if source.tokenizer is None:
        lines.insert(1, "    without a tokenizer, as the checkpoint has none: token ids in, token ids out")
    return "\n".join(lines)


def after_all(out: Path, names: list[str]) -> str:
    """After to-hf --all."""
    folder = _short(out)
    newest = shlex.quote(f"{folder}/{names[-1]}")
    return "\n".join([
        f"Wrote {len(names)} checkpoints to {folder}: {', '.join(names)}",
        f"    load    python -c \"from transformers import pipeline; print(pipeline('text-generation', "
        f"{f'{folder}/{names[-1]}'!r})('Once upon a time')[0])\"",
        f"    serve   vllm serve {newest}",
        f"    upload  for x in {' '.join(names)}; do hf upload OWNER/{out.name} {shlex.quote(folder)}/$x --revision $x; done",
        "Next: python -m neo.convert verify CHECKPOINT FOLDER"])


def after_gguf(out: Path, checkpoint: str) -> str:
    """After to-gguf."""
    file = _short(out)
    return "\n".join([f"Wrote {file} ({_size(out)})", *uses_of_gguf(out),
                      f"Next: python -m neo.convert verify {shlex.join((checkpoint, file))}"])


def after_checkpoint(out: Path, model: ModelConfig) -> str:
    """After from-hf and average, which write a neo checkpoint."""
    folder = shlex.quote(_short(out))
    return "\n".join([
        f"Wrote {folder} ({_size(out)})",
        f"    load    python -m neo.infer {folder} --prompt='Once upon a time'",
        f"    serve   python -m neo.convert to-hf {folder} {folder}-hf && vllm serve {folder}-hf",
        f"    upload  hf upload OWNER/{out.name} {folder}",
        "The model in a config file, to train on from it:",
        f"    {model_lines(model)}",
        f"Next: python -m neo.train --config=YOURS.py --config.init.checkpoint={folder}"])


def model_lines(model: ModelConfig) -> str:
    """The line of a config file that describes this architecture: what differs from the defaults."""
    changed = [f"{field.name}={getattr(model, field.name)!r}" for field in dataclasses.fields(model)
               if getattr(model, field.name) != field.default]
    return f"c.model.update({', '.join(changed)})"


def _short(path: Path) -> str:
    """As a user would type it: from here where it lies below here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    size = sum(one.stat().st_size for one in files)
    count = f", {len(files)} files" if path.is_dir() else ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}{count}"
    return f"{size} bytes{count}"
