"""A plan as a picture: share of each source over the tokens of the run, and how often each source is read."""

from __future__ import annotations

import io
import itertools
from typing import Any

from etils import epath

from neo.data.inspect_plan import Area, Group, Plan, epochs_of, groups, label_of
from neo.data.inspect_text import count
from neo.errors import InputError

TOP = 12  # sources drawn by themselves
MANY_PHASES = 12  # ours: from here on the borders of phases are not all named
MARK = "neo.data.inspect"  # in the file: a picture of this command may be drawn over
LEVELS = 3  # ours: rows of text above the band
CHARACTER = 0.0092  # of the width of the areas, at the size of text used
# Strong tones, then lighter ones, so that neighbours differ.
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#88bde6", "#ffbf79",
           "#8cd17d", "#ff9da6")
REST = "#cfcfcf"


def check_out(out: str) -> None:
    """InputError unless the picture can be written there: a .png in a folder that is there, over no other file."""
    path = epath.Path(out)
    if not out.endswith(".png"):
        raise InputError(f"--out={out}: the picture is a PNG, so give a name that ends in .png")
    if path.is_dir():
        raise InputError(f"--out={out}: that is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise InputError(f"--out={out}: there is no folder {path.parent}; make it first")
    if path.exists() and MARK.encode() not in path.read_bytes()[:4096]:
        raise InputError(f"--out={out}: there is a file that is not a picture of {MARK}; choose another name")


def draw(plan: Plan, out: str) -> None:
    """Write the picture to `out` (see `check_out`)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts, rest = _parts(plan)
    colours = [REST if rest and group is parts[-1] else COLOURS[i % len(COLOURS)] for i, group in enumerate(parts)]
    figure = plt.figure(figsize=(12, 5.8), dpi=100)
    grid = figure.add_gridspec(2, 2, width_ratios=(2.6, 1), height_ratios=(1, 14), hspace=0.04, wspace=0.50,
                               left=0.05, right=0.985, top=0.81, bottom=0.10)
    strip, areas, bars = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    _draw_shares(areas, plan, parts, colours)
    _draw_shapes(strip, plan)
    _draw_epochs(bars, plan, parts, colours, rest)
    phases = f"{len(plan.phases)} {'phase' if len(plan.phases) == 1 else 'phases'}"
    figure.suptitle(f"{plan.name}: {count(plan.tokens)} tokens, {plan.steps:,} steps, {phases}, {len(plan.sources)} sources",
                    x=0.05, y=0.985, ha="left", fontsize=12)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": MARK})
    plt.close(figure)
    epath.Path(out).write_bytes(image.getvalue())


def _parts(plan: Plan) -> tuple[list[Group], bool]:
    """The sources to draw, the largest first, and whether the last stands for all the others.

    Those that have the largest share at some time: what matters only at the end is part of the plan too.
    """
    found, _ = groups({name: source.tokens for name, source in plan.sources.items() if source.tokens}, len(plan.sources))
    if len(found) <= TOP + 1:
        return found, False
    peak = {group.label: max(_share(area, group) for area in plan.areas) for group in found}
    shown = set(sorted(peak, key=lambda label: -peak[label])[:TOP])
    rest = [group for group in found if group.label not in shown]
    names = tuple(name for group in rest for name in group.members)
    parts = [group for group in found if group.label in shown]
    return [*parts, Group("rest", names, sum(group.tokens for group in rest))], True


def _share(area: Area, group: Group) -> float:
    return sum(area.shares.get(name, 0.0) for name in group.members)


def _draw_shares(axis: Any, plan: Plan, parts: list[Group], colours: list[str]) -> None:
    """Shares as a stacked area, constant inside each stretch."""
    edges = [edge for area in plan.areas for edge in (area.first_token, area.first_token + area.tokens)]
    heights = [[height for area in plan.areas for height in (_share(area, group),) * 2] for group in parts]
    axis.stackplot(edges, heights, colors=colours, linewidth=0)
    for before, phase in itertools.pairwise(plan.phases):
        same = (before.seq_len, before.batches[-1][1], before.rope_base) == (
            phase.seq_len, phase.batches[0][1], phase.rope_base)
        axis.axvline(phase.first_token, color="white" if same else "black", lw=0.6 if same else 1.2, alpha=0.9)
    if plan.steps_done:
        axis.axvline(plan.tokens_done, color="black", lw=1.4, ls="--")
        left = 2 * plan.tokens_done > plan.tokens
        axis.text(plan.tokens_done, 0.98, "  done  ", fontsize=9, va="top", ha="right" if left else "left")
    axis.set_xlim(0, plan.tokens)
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axis.xaxis.set_major_formatter(lambda x, _: _tick(x))
    axis.set_xlabel("tokens; lines: phases, black where T, batch or rope base change" if len(plan.phases) > 1 else "tokens")


def _draw_shapes(axis: Any, plan: Plan) -> None:
    """A band over the areas: sequence length, batch and rope base, with the names of the phases where they are few."""
    runs: list[tuple[str, int, int]] = []
    for phase in plan.phases:
        token = phase.first_token
        for steps, batch in phase.batches:
            text = f"T {phase.seq_len:,}, batch {batch:,}"
            if len({one.rope_base for one in plan.phases}) > 1:
                text += f", rope {phase.rope_base:g}"
            if 1 < len(plan.phases) <= MANY_PHASES:
                text = f"{phase.name}: {text}"
            end = token + steps * batch * phase.seq_len
            runs = ([*runs[:-1], (text, runs[-1][1], end)] if runs and runs[-1][0] == text else [*runs, (text, token, end)])
            token = end
    taken: list[list[tuple[float, float]]] = [[] for _ in range(LEVELS)]
    for i, (text, first, last) in enumerate(runs):
        axis.axvspan(first, last, color=("#e3ebf3", "#f6e6cd")[i % 2], lw=0)
        width = CHARACTER * (len(text) + 2) * plan.tokens
        if last - first > width:
            axis.text((first + last) / 2, 0.45, text, ha="center", va="center", fontsize=8)
            continue
        # What does not fit into its band stands above it, as low as there is room.
        left = first + last > plan.tokens
        low, high = (last - width, last) if left else (first, first + width)
        level = next((k for k, row in enumerate(taken) if all(high < a or b < low for a, b in row)), None)
        if level is not None:
            taken[level].append((low, high))
            axis.text(last if left else first, 1.25 + 0.85 * level, text, ha="right" if left else "left", va="bottom",
                      fontsize=8)
    axis.set_xlim(0, plan.tokens)
    axis.set_ylim(0, 1)
    axis.axis("off")


def _draw_epochs(axis: Any, plan: Plan, parts: list[Group], colours: list[str], has_rest: bool) -> None:
    """Epochs as bars in the areas' colours, the largest source at the bottom as in the areas: also their legend."""
    known = [epochs_of(group.members, plan) for group in parts]
    places = range(len(parts))
    axis.barh(places, [value or 0 for value in known], color=colours, height=0.72)
    right = max([value for value in known if value] + [1.0]) * (1.8 if plan.over_limit else 1.45)
    for place, group, value in zip(places, parts, known, strict=True):
        over = any(name in plan.over_limit for name in group.members)
        text = "size unknown" if value is None else f"{value:.2f}{' over its limit' if over else ''}"
        axis.text((value or 0) + 0.015 * right, place, text, va="center", fontsize=8, color="#c0392b" if over else "black")
    limits = {plan.sources[name].limit for group in parts for name in group.members}
    if len(limits) == 1 and None not in limits and (limit := limits.pop()) < right:
        axis.axvline(limit, color="#c0392b", lw=1, ls="--")
    names = [f"{len(group.members)} more" if has_rest and group is parts[-1] else _short(label_of(group)) for group in parts]
    labels = [f"{name}  {count(group.tokens)}" for name, group in zip(names, parts, strict=True)]
    axis.set_yticks(list(places), labels, fontsize=8)
    axis.set_xlim(0, right)
    axis.set_ylim(-0.6, max(len(parts), 6) - 0.4)  # a few bars are no wider than many
    axis.set_xlabel("epochs over the run")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _tick(tokens: float) -> str:
    """200B, 1.2T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"


def _short(label: str, most: int = 26) -> str:
    """The label with its middle left out where it is long."""
    return label if len(label) <= most else f"{label[:most - 11]}...{label[-8:]}"
