"""loss.png: training loss, held-out loss and learning rate over tokens."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from neo.train.progress import count
from neo.train.workdir import read_records


def draw_loss(workdir: str | epath.Path) -> epath.Path | None:
    """Draw the run's loss curve from its metric files; None when there is nothing to draw yet."""
    image = loss_image(read_records(workdir), epath.Path(workdir).name)
    if image is None:
        return None
    path = epath.Path(workdir) / "loss.png"
    path.write_bytes(image)
    return path


def loss_image(records: Sequence[Mapping[str, Any]], title: str) -> bytes | None:
    """The loss curve of metric records as a PNG; None when there is nothing to draw yet.

    Without pyplot: a notebook keeps its own way of showing figures, and any thread may draw.
    """
    train = [(r["tokens"], r["train/loss"]) for r in records if "train/loss" in r]
    held_out = [(r["tokens"], r["eval/loss"]) for r in records if "eval/loss" in r]
    if not train and not held_out:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120)
    axis = figure.subplots()
    if train:
        axis.plot(*np.array(train).T, "o"[:len(train) == 1], color="#4c78a8", ms=3, lw=1.2, label="training loss")
    if held_out:
        axis.plot(*np.array(held_out).T, "o-", color="#e45756", ms=4, lw=1.2, label="held-out loss")
    axis.set_xlabel("tokens seen")
    axis.set_ylabel("nats per token")
    axis.xaxis.set_major_formatter(lambda x, _: count(x))
    axis.grid(alpha=0.3)
    last = held_out[-1] if held_out else train[-1]
    axis.annotate(f"{last[1]:.3f}", last, textcoords="offset points", xytext=(0, 8), ha="right", fontsize=9)
    rates = [(r["tokens"], r["optim/lr"]) for r in records if "optim/lr" in r]
    if rates:
        right = axis.twinx()
        right.plot(*np.array(rates).T, color="#999999", lw=0.8, ls="--", label="learning rate")
        right.set_ylabel("learning rate", color="#777777")
        right.set_ylim(bottom=0)
        right.tick_params(colors="#777777")
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    handles = [*axis.get_legend_handles_labels()[0], *(right.get_legend_handles_labels()[0] if rates else [])]
    axis.legend(handles=handles, frameon=False, loc="upper right")
    axis.set_title(title, fontsize=11)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
