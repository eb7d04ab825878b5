"""The prepared sources of a config: where each lies, opened and checked against the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from neo.config.schema import Config
from neo.data import block_cache, remote, store, store_files
from neo.data.planning import source_path, store_path
from neo.data.synthetic import synthetic_source
from neo.errors import InputError, nearest

if TYPE_CHECKING:
    from neo.data.tokenizer import Tokenizer


def open_sources(config: Config, also: Iterable[str] = ()) -> dict[str, Any]:
    """Every source with a positive weight in some phase, by name, in the order of `config.sources`; then those of `also`.

    Raises InputError, with the cure: all sources that are missing in one message; one that is damaged, whose tokenizer
    differs from the others', or whose vocabulary is larger than the model's.
    """
    names = [name for name in config.sources if any(
        phase.mixture.get(name, 0) > 0 or phase.mixture_end.get(name, 0) > 0 for phase in config.phases)]
    names += [name for name in also if name not in names]
    if config.data.synthetic:
        sources: dict[str, Any] = {
            name: synthetic_source(name, vocab_size=config.model.vocab_size, seed=config.data.seed) for name in names}
    else:
        block_cache.configure(config.data.cache, config.data.cache_gb * 1e9)
        paths = [source_path(config, name) for name in names]
        with remote.several(paths) as each:
            _require_all(config, names, list(each(store.read_manifest, paths)))
            sources = dict(zip(names, each(store.open_source, paths), strict=True))
    first = next(iter(sources), None)
    for name, source in sources.items():
        if source.vocab_size > config.model.vocab_size:
            raise InputError(f"source {name!r} ({source.path}) has a vocabulary of {source.vocab_size}, more than "
                             f"model.vocab_size={config.model.vocab_size}; set --config.model.vocab_size="
                             f"{source.vocab_size} or more")
        if source.tokenizer_sha256 != sources[first].tokenizer_sha256:
            raise InputError(f"sources {first!r} and {name!r} were prepared with different tokenizers (sha256 "
                             f"{sources[first].tokenizer_sha256[:12]} and {source.tokenizer_sha256[:12]}); prepare "
                             f"{name!r} again with --tokenizer={store_files.join(store_path(config), 'tokenizer')}")
    return sources


def _require_all(config: Config, names: list[str], manifests: list[Any]) -> None:
    """InputError naming every source that has no finished store."""
    missing = [name for name, manifest in zip(names, manifests, strict=True) if manifest is None]
    if not missing:
        return
    folder = store_path(config)
    if len(missing) > 1:
        where = ", ".join(f"{name!r} ({source_path(config, name)})" for name in missing)
        raise InputError(f"{len(missing)} of {len(names)} sources have no finished token store: {where}; make each with "
                         f"`python -m neo.data.prepare INPUT... --out={folder} --source=NAME`, say where they lie with "
                         "--config.data.stores.NAME=FOLDER, or train on random tokens with --config.data.synthetic=True")
    name, path = missing[0], source_path(config, missing[0])
    unfinished = ".work" in store_files.list_folders(path)
    state = ("its preparation has not finished, start the same command again" if unfinished
             else f"there is no token store{nearest(name, store.list_sources(folder))}")
    raise InputError(f"source {name!r} at {path}: {state}; make it with `python -m neo.data.prepare INPUT... "
                     f"--out={folder} --source={name}`, or train on random tokens with --config.data.synthetic=True")


def open_tokenizer(config: Config, sources: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that stands in the store, else beside a source of data.stores; None for synthetic data.

    Raises InputError if it is missing or not the one that the sources were prepared with (sha256).
    """
    if config.data.synthetic:
        return None
    from neo.data.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer

    elsewhere = [source_path(config, name) for name in sources if config.data.stores.get(name)]
    folders = dict.fromkeys([store_path(config), *map(store_files.parent, elsewhere)])
    paths = [store_files.join(folder, "tokenizer") for folder in folders]
    path = next((one for one in paths if {MODEL_FILE, JSON_FILE} & set(store_files.list_sizes(one) or ())), None)
    if path is None:
        raise InputError(f"no tokenizer at {' or '.join(paths)}; copy the folder tokenizer/ of the store that the sources "
                         "were prepared in to one of these places")
    tokenizer = Tokenizer.load(path)
    for name, source in sources.items():
        if source.tokenizer_sha256 != tokenizer.sha256:
            raise InputError(f"{path}: this tokenizer (sha256 {tokenizer.sha256[:12]}) is not the one that source "
                             f"{name!r} was prepared with ({source.tokenizer_sha256[:12]}); put that one back, or "
                             "prepare the source again")
    return tokenizer
