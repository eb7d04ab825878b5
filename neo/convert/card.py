"""The model card (README.md) of an exported folder: what the model is, what it was trained on, how the files were made.

Nothing is claimed that the checkpoint does not say: the licence is left to whoever publishes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import neo
from neo.config import Config, to_dict
from neo.config.schema import ModelConfig
from neo.convert.source import Source
from neo.data.progress import amount
from neo.train.progress import count

SOURCES = 12   # ours: sources named in a row of the card's table of phases


def model_card(source: Source, hf: Mapping[str, Any], command: str, num_parameters: int, num_bytes: int) -> str:
    """README.md as text.

    Args:
        hf: the config.json that was written.
        command: how the folder was made, without private paths.
        num_parameters, num_bytes: of the tensors that were written.
    """
    title = (source.config.name if source.config is not None else "") or source.name
    parts = [_front_matter(hf), f"# {title}\n", _what_it_is(source, hf, num_parameters, num_bytes), _use(title),
             _origin(source), _training(source), _files(hf, command)]
    if source.config is not None:
        resolved = json.dumps(without_paths(to_dict(source.config)), indent=1, ensure_ascii=False)
        parts.append(f"<details><summary>Resolved config</summary>\n\n```json\n{resolved}\n```\n\n</details>\n")
    return "\n".join(part for part in parts if part)


def _front_matter(hf: Mapping[str, Any]) -> str:
    return "\n".join([
        "---",
        "# license: choose one (https://huggingface.co/docs/hub/repositories-licenses); neo does not choose for you",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:", "- neo", f"- {hf['model_type']}",
        "---", ""])


def _what_it_is(source: Source, hf: Mapping[str, Any], num_parameters: int, num_bytes: int) -> str:
    model = source.model
    rows = [("parameters", f"{num_parameters:,} ({count(num_parameters)})"),
            ("class", f"`{hf['architectures'][0]}`, {hf['dtype']}, {amount(num_bytes)}"),
            ("layers, width", f"{model.num_layers}, {model.d_model}"),
            ("heads", f"{model.num_heads} of {model.head_size}, {model.num_kv_heads} key/value"),
            ("feed-forward", f"{model.d_ff}, {model.activation}{', gated' if model.mlp == 'gated' else ''}"),
            ("positions", _positions(model)),
            ("context", f"{model.max_seq_len} tokens{_windows(model)}"),
            ("vocabulary", f"{model.vocab_size} rows" + _tokenizer(source))]
    if source.tokens:
        rows.insert(0, ("tokens seen", f"{source.tokens:,} ({count(source.tokens)}), step {source.step:,}"))
    lines = ["A language model pre-trained with neo." if source.tokens else "A language model, converted with neo.", "",
             "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    return "\n".join(lines)


def _positions(model: ModelConfig) -> str:
    kinds = list(dict.fromkeys(model.layer_positions))
    base = f", base {model.rope_base:g}" if "rope" in kinds else ""
    scaled = f", scaled {model.rope_factor:g} x ({model.rope_scaling})" if model.rope_scaling != "none" else ""
    return ", ".join(kinds) + base + scaled


def _windows(model: ModelConfig) -> str:
    windows = sorted({window for window in model.layer_windows if window})
    if not windows:
        return ""
    share = sum(window is not None for window in model.layer_windows)
    return f"; sliding window {', '.join(map(str, windows))} in {share} of {model.num_layers} layers"


def _tokenizer(source: Source) -> str:
    return "" if source.tokenizer is None else f", {source.tokenizer.vocab_size} of them the tokenizer's"


def _use(title: str) -> str:
    return "\n".join([
        "## Use", "", "```python", "from transformers import pipeline",
        f'print(pipeline("text-generation", "{title}")("Once upon a time")[0]["generated_text"])', "```", ""])


def _training(source: Source) -> str:
    config = source.config
    if config is None or not config.phases or not source.tokens:
        return ""
    optimizer = config.optimizer
    lines = ["## Training", "", _recipe(config, source), ""]
    lines += ["| phase | tokens | sequence | batch | learning rate | mixture |", "|---|---|---|---|---|---|"]
    for phase in config.phases:
        total = 1.0 if phase.mixture_unit == "epochs" else sum(phase.mixture.values()) or 1.0
        largest = sorted(phase.mixture.items(), key=lambda item: -item[1])
        mixture = ", ".join(f"{name} {weight / total:.3g}" for name, weight in largest[:SOURCES])
        mixture += f", {len(largest) - SOURCES} more" * (len(largest) > SOURCES)
        mixture += " (epochs)" * (phase.mixture_unit == "epochs")
        rate = f"{phase.lr_shape} {phase.peak_lr:g} to {phase.final_lr:g}"
        lines.append(f"| {phase.name} | {count(phase.tokens)} | {phase.seq_len} | {phase.global_batch} | {rate} | {mixture} |")
    lines += ["", f"Optimizer {optimizer.name}, b1 {optimizer.b1:g}, b2 {optimizer.b2:g}, weight decay "
                  f"{optimizer.weight_decay:g}, gradient norm clipped at {optimizer.clip_norm:g}.", ""]
    return "\n".join(lines)


def _recipe(config: Config, source: Source) -> str:
    parts = [f"Recipe `{config.name}`"]
    if source.phase:
        parts.append(f"this checkpoint is from phase `{source.phase}`")
    if "eval/loss" in source.measured:
        parts.append(f"held-out loss {source.measured['eval/loss']:.4f} nats per token")
    if "eval/bits_per_byte" in source.measured:
        parts.append(f"{source.measured['eval/bits_per_byte']:.4f} bits per byte")
    return "; ".join(parts) + "."


def _origin(source: Source) -> str:
    if not source.made_from:
        return ""
    return "## Origin\n\n" + "\n".join(f"* {line}" for line in source.made_from) + "\n"


def _files(hf: Mapping[str, Any], command: str) -> str:
    return "\n".join([
        "## How these files were made", "", "```", command, "```", "",
        f"neo {neo.__version__}; weights cast to {hf['dtype']} from the checkpoint's own type, tensor by tensor. "
        "`python -m neo.convert verify CHECKPOINT EXPORT` compares logits and greedy text with the checkpoint's.", ""])


def without_paths(tree: Any) -> Any:
    """The tree with every absolute path or address cut to its last part: where somebody keeps files is nobody's business."""
    if isinstance(tree, Mapping):
        return {name: without_paths(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_paths(value) for value in tree]
    if isinstance(tree, str) and (tree.startswith(("/", "~")) or "://" in tree):
        return tree.rstrip("/").rpartition("/")[2]
    return tree
