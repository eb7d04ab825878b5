"""A plan as text: one line per phase, one line per source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from neo.data.inspect_plan import PhasePlan, Plan, groups, label_of

TOP_OF_PHASE = 4  # ours: sources named in a phase's line
TOP = 16  # ours: sources listed without --all
AMENDMENTS = 5  # ours: amendments listed
BAR = 24  # characters of the longest bar


def count(number: float) -> str:
    """1.640M, 40.20B: four digits with a unit, smaller numbers in full."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= 0.99995 * size:
            value = number / size
            return f"{value:.{3 if value < 9.9995 else 2 if value < 99.995 else 1 if value < 999.95 else 0}f}{unit}"
    return f"{number:,.0f}"


def plan_lines(plan: Plan, phase: str = "", *, everything: bool = False) -> list[str]:
    """The plan of the run, or of one phase. `everything`: every source by itself."""
    lines = [f"{plan.name}: {count(plan.tokens)} tokens in {plan.steps:,} steps, {len(plan.phases)} "
             f"{'phase' if len(plan.phases) == 1 else 'phases'}, {len(plan.sources)} "
             f"{'source' if len(plan.sources) == 1 else 'sources'}, seed {plan.seed}", f"sizes: {_origins(plan)}"]
    if plan.steps_done:
        lines.append(f"done: {plan.steps_done:,} steps, {count(plan.tokens_done)} tokens")
    lines += [*_amendment_lines(plan, phase), ""]
    shown = [one for one in plan.phases if phase in ("", one.name)]
    lines += [*_phase_table(shown), ""]
    if phase:
        lines += _source_table(plan, shown[0], everything)
    else:
        lines += _source_table(plan, None, everything)
    lines += [f"over the limit: {name} is read {epochs:.2f} times, allowed are {plan.sources[name].limit:g}"
              for name, epochs in plan.over_limit.items()]
    return lines


def columns(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> list[str]:
    """Aligned columns; those whose numbers are in `left` to the left, the others to the right."""
    rows, left = list(rows), set(left)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def _amendment_lines(plan: Plan, phase: str) -> list[str]:
    """The newest amendments, of the run or of a phase."""
    amended = [one for one in plan.amended if phase in ("", one[1])]
    lines = [f"{len(amended) - AMENDMENTS} amendments before these"] if len(amended) > AMENDMENTS else []
    for step, name, weights in amended[-AMENDMENTS:]:
        top = sorted(weights.items(), key=lambda item: -item[1])
        more = f", {len(top) - TOP_OF_PHASE} more" if len(top) > TOP_OF_PHASE else ""
        lines.append(f"amended from step {step:,} on (phase {name}): "
                     + ", ".join(f"{source} {share:.1%}" for source, share in top[:TOP_OF_PHASE]) + more)
    return lines


def _origins(plan: Plan) -> str:
    """Where the sizes of the sources are from."""
    counted: dict[str, int] = {}
    for source in plan.sources.values():
        counted[source.origin] = counted.get(source.origin, 0) + 1
    texts = {"store": f"from the store {plan.store}", "planned": "planned (data.source_tokens; no store there)",
             "unknown": "unknown (no store, no data.source_tokens)", "synthetic": "synthetic"}
    return ", ".join(f"{number} {texts[origin]}" for origin, number in counted.items())


def _phase_table(phases: Sequence[PhasePlan]) -> list[str]:
    rows = [("phase", "tokens", "steps", "T", "batch", "rope base", "mostly")]
    for one in phases:
        tokens = {name: use.tokens for name, use in one.sources.items()}
        top, rest = groups(tokens, TOP_OF_PHASE)
        mostly = [f"{group.label} {group.tokens / one.tokens:.1%}" for group in top]
        if rest:
            mostly.append(f"{sum(len(group.members) for group in rest)} more")
        rows.append((one.name, count(one.tokens), f"{one.steps:,}", f"{one.seq_len:,}",
                     " > ".join(f"{batch:,}" for _, batch in one.batches), f"{one.rope_base:g}", ", ".join(mostly)))
    return columns(rows, left=(0, 6))


def _source_table(plan: Plan, phase: PhasePlan | None, everything: bool) -> list[str]:
    """Sources of the run, or of a phase of it, by tokens."""
    uses: Mapping[str, int] = ({name: source.tokens for name, source in plan.sources.items() if source.tokens} if phase is None
                               else {name: use.tokens for name, use in phase.sources.items()})
    total = sum(uses.values())
    top, rest = groups(uses, len(uses) if everything else TOP, fold=not everything)
    largest = top[0].tokens
    rows = [("source", "tokens", "share", "", "size", "", "epochs", "read again", "limit")]

    def row(label: str, names: Sequence[str], tokens: int) -> tuple[str, ...]:
        kinds = {plan.sources[name].origin for name in names}
        size, epochs, again = _known(plan, phase, names)
        limits = {plan.sources[name].limit for name in names}
        over = any(name in plan.over_limit for name in names)
        return (label, count(tokens), f"{tokens / total:.2%}", "#" * round(BAR * tokens / max(largest, 1)),
                count(size) if size is not None else "endless" if kinds == {"synthetic"} else "unknown",
                kinds.pop() if len(kinds) == 1 and size is not None else "",
                "" if epochs is None else f"{epochs:.2f}", "" if again is None else count(again),
                ("over " if over else "") + ("" if len(limits) > 1 else _limit(limits.pop())))

    rows += [row(label_of(group), group.members, group.tokens) for group in top]
    lines = columns(rows, left=(0, 3, 5))
    if rest:
        names = [name for group in rest for name in group.members]
        left = count(sum(uses[name] for name in names))
        lines += [f"and {len(names)} more sources with {left} tokens; --all lists each source"]
    elif not everything and any(len(group.members) > 1 for group in top):
        lines += ["--all lists each source"]
    return [*lines, ""] if plan.over_limit else lines


def _known(plan: Plan, phase: PhasePlan | None, names: Sequence[str]) -> tuple[int | None, float | None, int | None]:
    """(size, epochs, tokens read again) of some sources together; None each where a size is unknown."""
    if any(plan.sources[name].size is None for name in names):
        return None, None, None
    uses = plan.sources if phase is None else phase.sources
    size = sum(plan.sources[name].size or 0 for name in names)
    return size, sum(uses[name].tokens for name in names) / size, sum(uses[name].repeats or 0 for name in names)


def _limit(limit: float | None) -> str:
    return "none" if limit is None else f"{limit:g}"
