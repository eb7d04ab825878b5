"""From a config to its data order: source sizes, on disk or planned, and the limit on epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from neo.config.schema import Config, PhaseConfig
from neo.data import remote, store, store_files, synthetic
from neo.data.amendments import Amendment
from neo.data.order import Order
from neo.errors import InputError

UNKNOWN_TOKENS = 1 << 62  # a size that no run reaches the end of


class Size(NamedTuple):
    """Tokens of a source's training split; where the number comes from (store, planned, synthetic or unknown); alignment."""

    tokens: int
    origin: str
    alignment: int = 1  # sequence length that a packed source is for


def store_path(config: Config) -> str:
    """Where the run's token store is: a folder or a URL."""
    return config.data.store or f"data/{config.name}"


def source_path(config: Config, name: str) -> str:
    """Where one source lies: its entry in data.stores, else its folder in the store."""
    return config.data.stores.get(name) or store_files.join(store_path(config), name)


def source_names(phases: Sequence[PhaseConfig], amendments: Sequence[Amendment] = ()) -> tuple[str, ...]:
    """All sources that the phases and amendments name, in the order in which they first do."""
    mixtures = [mixture for phase in phases for mixture in (phase.mixture, phase.mixture_end)]
    return tuple(dict.fromkeys(name for mixture in (*mixtures, *(one.mixture for one in amendments)) for name in mixture))


def source_sizes(config: Config) -> dict[str, Size]:
    """Size of every source of the config: from its store where there is one, else as the recipe plans it."""
    names = config.sources
    with remote.several([source_path(config, name) for name in names]) as each:
        return dict(zip(names, each(lambda name: _size(config, name), names), strict=True))


def _size(config: Config, name: str) -> Size:
    if config.data.synthetic:
        return Size(synthetic.TRAIN_TOKENS, "synthetic")
    path = source_path(config, name)
    manifest = store.read_manifest(path)
    if manifest is not None:
        try:
            packing = manifest.get("packing")
            return Size(int(manifest["splits"]["train"]["tokens"]), "store", int(packing["seq_len"]) if packing else 1)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{store_files.join(path, store.MANIFEST)}: damaged ({type(error).__name__}: {error}); prepare "
                             "the source again or copy it again") from error
    if name in config.data.source_tokens:
        return Size(round(config.data.source_tokens[name]), "planned")
    return Size(UNKNOWN_TOKENS, "unknown")


def planned_order(config: Config, amendments: Sequence[Amendment] = ()) -> tuple[Order, dict[str, Size]]:
    """The data order with what is known of the sources: works without a token on disk.

    Raises InputError as `Order.create`, and for a mixture by epochs of a source whose size is not known.
    """
    sizes = source_sizes(config)
    for phase in config.phases:
        unknown = [name for name, epochs in {**phase.mixture, **phase.mixture_end}.items()
                   if epochs and phase.mixture_unit == "epochs" and sizes[name].origin == "unknown"]
        if unknown:
            raise InputError(f"phases.{phase.name}.mixture counts epochs, and nothing tells the size of "
                             f"{', '.join(unknown[:8])}: give --config.data.source_tokens.{unknown[0]}=TOKENS, or prepare it")
    tokens = {name: size.tokens for name, size in sizes.items()}
    alignment = {name: size.alignment for name, size in sizes.items()}
    return Order.create(config.phases, config.sources, tokens, config.data.seed, amendments, alignment), sizes


def create_order(config: Config, sources: Mapping[str, Any], amendments: Sequence[Amendment] = (),
                 phases: Sequence[PhaseConfig] | None = None) -> Order:
    """The run's data order over opened sources. `phases`: as they were before the amendments; default the config's.

    Raises InputError as `Order.create`, and for a plan that reads a source more often than the limit.
    """
    phases = config.phases if phases is None else phases
    tokens = {name: source.split("train").num_tokens for name, source in sources.items()}
    # The config first: an amendment may bring sources that the phases before it do not name.
    names = tuple(dict.fromkeys((*config.sources, *source_names(phases, amendments))))
    alignment = {name: source.alignment for name, source in sources.items()}
    order = Order.create(phases, names, tokens, config.data.seed, amendments, alignment)
    if not config.data.reweight_steps:  # else the weights of today say little about the end; they are capped as they come
        check_epochs(config, order, tokens)
    return order


def epoch_limit(config: Config, name: str) -> float:
    """How often a source may be read over the run; infinite where there is no limit."""
    return config.data.max_epochs_of.get(name, config.data.max_epochs) or float("inf")


def over_limit(config: Config, order: Order, tokens: Mapping[str, int]) -> dict[str, float]:
    """Source -> epochs of those that the run, up to train.steps, reads more often than their limit, by more than one step."""
    used = order.tokens_by_source(min(config.train.steps or order.num_steps, order.num_steps))
    step = max(span.seq_len * span.global_batch for span in order.spans)  # phases are rounded up to whole steps
    return {name: used[name] / tokens[name] for name in order.sources
            if name in tokens and used[name] > epoch_limit(config, name) * tokens[name] + step}


def check_epochs(config: Config, order: Order, tokens: Mapping[str, int]) -> None:
    """InputError naming every source over its limit, with the settings that would allow it."""
    over = over_limit(config, order, tokens)
    if not over:
        return
    named = ", ".join(f"{name!r} {epochs:.3g} times ({tokens[name]:,} tokens; limit {epoch_limit(config, name):g})"
                      for name, epochs in over.items())
    one = next(iter(over))
    raise InputError(f"the phases read sources more often than allowed: {named}; train on fewer tokens, give those sources "
                     f"less weight or more text, or allow it with --config.data.max_epochs_of.{one}={math.ceil(over[one])} "
                     "(for all: --config.data.max_epochs=0)")
