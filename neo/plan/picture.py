"""Plans as a picture: what fills the memory of a device, and what its step is made of, one row per plan."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neo.plan.plan import Plan
from neo.plan.report import GIB, name_of

MARK = "neo.plan"   # in the file, as its software
MOST = 12           # rows (ours): more are not read
COLOURS = {"arguments": "#4c78a8", "temporaries": "#9ecae9",
           "matrix products": "#54a24b", "kernels": "#b279a2", "other operations": "#eeca3b", "communication": "#e45756"}


def draw(plans: Sequence[Plan], path: Path, title: str) -> None:
    """Write a PNG of at most `MOST` plans, in the order given; plans without a cost have a memory bar only."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = list(plans)[:MOST]
    # Margins in inches, so that a row has the same height in every picture.
    width, above, below, row = 12.5, 0.62, 0.88, 0.66
    height = above + below + row * len(shown)
    figure = plt.figure(figsize=(width, height), dpi=100)
    bottom, tall = below / height, row * len(shown) / height
    left = figure.add_axes((0.16, bottom, 0.29, tall))
    right = figure.add_axes((0.475, bottom, 0.515, tall), sharey=left)
    for number, plan in enumerate(shown):
        _memory_bar(left, number, plan)
        _time_bar(right, number, plan)
    _finish_memory(left, shown)
    _finish_time(right, shown)
    left.set_yticks(range(len(shown)), _labels(shown), fontsize=9)
    left.set_ylim(len(shown) - 0.5, -0.5)
    right.tick_params(left=False, labelleft=False)
    figure.text(0.008, 1 - 0.12 / height, title, ha="left", va="top", fontsize=12)
    for axis, handles, at in ((left, _keys("arguments", "temporaries"), 0.16), (right, _time_keys(), 0.475)):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        figure.legend(handles=handles, frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(at - 0.016, 0.0),
                      ncols=len(handles), columnspacing=0.9, handlelength=1, handletextpad=0.5)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": MARK})
    plt.close(figure)
    path.write_bytes(image.getvalue())


def _labels(plans: Sequence[Plan]) -> list[str]:
    """Mesh, then batch and remat; the number of compiler flags where it alone tells two plans apart."""
    names = [name_of(plan) for plan in plans]
    labels = []
    for plan, name in zip(plans, names, strict=True):
        mesh, _, rest = name.partition(", ")
        flags = f", {len(plan.flags)} flag{'s' * (len(plan.flags) != 1)}" if names.count(name) > 1 else ""
        labels.append("\n".join([*textwrap.wrap(mesh, 28), rest + flags]))
    return labels


def _keys(*names: str) -> list[Any]:
    from matplotlib.patches import Patch
    return [Patch(color=COLOURS[name], label=name) for name in names]


def _time_keys() -> list[Any]:
    from matplotlib.patches import Patch
    return [*_keys("matrix products", "kernels", "other operations"),
            Patch(color=COLOURS["communication"], alpha=0.45, label="communication, hidden"),
            Patch(color=COLOURS["communication"], label="communication, not hidden")]


def _memory_bar(axis: Any, row: int, plan: Plan) -> None:
    use = plan.memory
    arguments = min(use.arguments, use.peak)
    axis.barh(row, arguments / GIB, 0.56, color=COLOURS["arguments"])
    axis.barh(row, (use.peak - arguments) / GIB, 0.56, left=arguments / GIB, color=COLOURS["temporaries"])
    text = f"{use.peak / GIB:.1f}" if plan.fits else f"{use.peak / GIB:.1f}: does not fit" if use.peak else "does not compile"
    axis.annotate(text, (use.peak / GIB, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
                  color="black" if plan.fits else "#c0302f")


def _finish_memory(axis: Any, plans: Sequence[Plan]) -> None:
    capacity = max(plan.memory.capacity for plan in plans) / GIB
    most = max(capacity, *(plan.memory.peak / GIB for plan in plans))
    axis.axvline(capacity, color="black", lw=1.2)
    axis.annotate(f"{capacity:.1f} there is", (capacity, 1), xycoords=("data", "axes fraction"), xytext=(-3, 3),
                  textcoords="offset points", ha="right", fontsize=8)
    axis.set_xlim(0, most * (1.05 if most == capacity else 1.3))
    axis.set_xlabel("GiB of a device", fontsize=9)


def _time_bar(axis: Any, row: int, plan: Plan) -> None:
    """Computation above, communication below it: what sticks out beyond the computation is not hidden."""
    cost = plan.cost
    if cost is None:
        axis.annotate("not compiled" if not plan.refused else "refused by the compiler", (0, row), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=8, color="#777777")
        return
    at = 0.0
    for name, seconds in (("matrix products", cost.matmul), ("kernels", cost.kernels), ("other operations", cost.other)):
        axis.barh(row - 0.10, 1e3 * seconds, 0.36, left=at, color=COLOURS[name])
        at += 1e3 * seconds
    best = 1e3 * cost.best
    # What the schedule hides lies under the computation; the rest lengthens the step.
    exposed = min(max(0.0, best - at), 1e3 * cost.communication)
    hidden = 1e3 * cost.communication - exposed
    axis.barh(row + 0.18, hidden, 0.20, left=max(0.0, at - hidden), color=COLOURS["communication"], alpha=0.45)
    axis.barh(row + 0.18, exposed, 0.20, left=at, color=COLOURS["communication"])
    axis.plot([best, best], [row - 0.3, row + 0.3], color="black", lw=1.5)
    axis.annotate(f"{best:,.0f} ms, MFU {100 * plan.mfu(cost.best):.0f} %", (best, row), xytext=(5, 0),
                  textcoords="offset points", va="center", fontsize=8)


def _finish_time(axis: Any, plans: Sequence[Plan]) -> None:
    longest = max((1e3 * max(plan.cost.best, plan.cost.compute) for plan in plans if plan.cost), default=1.0)
    axis.set_xlim(0, longest * 1.24)
    axis.set_xlabel("ms of a step (black line: its predicted end)", fontsize=9)
