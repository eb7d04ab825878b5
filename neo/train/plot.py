"""loss.png: training loss, held-out loss and learning rate over tokens."""

from __future__ import annotations

import io

import numpy as np
from etils import epath

from neo.train.progress import count
from neo.train.workdir import read_records


def draw_loss(workdir: str | epath.Path) -> epath.Path | None:
    """Draw the run's loss curve from its metric files; None when there is nothing to draw yet."""
    records = read_records(workdir)
    train = [(r["tokens"], r["train/loss"]) for r in records if "train/loss" in r]
    held_out = [(r["tokens"], r["eval/loss"]) for r in records if "eval/loss" in r]
    if not train and not held_out:
        return None
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120)
    if train:
        axis.plot(*np.array(train).T, color="#4c78a8", lw=1.2, label="training loss")
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
    axis.set_title(epath.Path(workdir).name, fontsize=11)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    plt.close(figure)
    path = epath.Path(workdir) / "loss.png"
    path.write_bytes(image.getvalue())
    return path
