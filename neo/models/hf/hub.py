"""A Hugging Face model by name: a folder of this machine, or a repository of the hub, of which only what is needed is fetched.

Weights come as safetensors or not at all; nothing of a repository is ever executed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from neo.errors import InputError
from neo.extras import need

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Everything but weights: configs, indices, tokenizers, chat templates.
SMALL_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def local_folder(text: str, revision: str = "") -> Path:
    """The folder of a Hugging Face model; a repository is downloaded into the hub's cache first (resumed, not repeated).

    Args:
        text: an existing folder, or a repository id such as `m-a-p/neo_7b`.
        revision: branch, tag or commit of a repository; empty = its default branch.

    Raises InputError: neither of the two, no such repository or revision, no access, no network and not in the cache, weights
    that are only pickled.
    """
    folder = Path(text)
    if text and folder.is_dir():
        if revision:
            raise InputError(f"--revision={revision} is for repositories of the hub; {text} is a folder of this machine")
        return folder
    if text and folder.exists():
        raise InputError(f"{text} is a file; give the folder of a Hugging Face model, or a repository id")
    if not _REPOSITORY.fullmatch(text):
        raise InputError(f"{text!r} does not exist; give the folder of a Hugging Face model, or a repository id (owner/name)")
    return _download(text, revision)


def _download(repository: str, revision: str) -> Path:
    hub = need("huggingface_hub", extra="hf", why=f"downloading {repository}")
    need("huggingface_hub.errors", extra="hf")
    folder = Path(_fetch(hub, repository, revision, SMALL_FILES))
    if (folder / INDEX).is_file():
        weights = _files_of_index(folder / INDEX)
    elif _has_only_pickles(hub, repository, revision):
        raise InputError(f"{repository} has pickled weights only, which can run code when they are read; {cure_for_pickles()}")
    else:
        weights = [SINGLE]
    folder = Path(_fetch(hub, repository, revision, (*SMALL_FILES, *weights)))
    missing = [name for name in weights if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{repository}: {missing[0]} is not there (looked for in the hub's cache, {folder}); without a "
                         "network only what was downloaded before can be read")
    return folder


def cure_for_pickles() -> str:
    """How to get safetensors from a model that has only pickled weights."""
    return ("get safetensors first: another revision of the repository (the hub's convert bot opens a pull request, "
            "--revision=refs/pr/N), or where you trust it, "
            "transformers.AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DIR)")


def _fetch(hub: Any, repository: str, revision: str, patterns: tuple[str, ...]) -> str:
    errors = hub.errors
    named = f"{repository} at revision {revision}" if revision else repository
    try:
        return hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns))
    except errors.GatedRepoError:
        raise InputError(f"{named}: its owner asks you to accept terms on the hub first; then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{named}: the hub has no such repository, or it is private and you are not logged in "
                         "(`hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repository}: the hub has no revision {revision!r} of it") from None
    except errors.HFValidationError as error:
        raise InputError(f"{repository} is no folder, and no repository id either: {_first_line(error)}") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(f"{named} is no folder here, not in the hub's cache, and the hub cannot be reached; give a folder, "
                         "or run again with a network") from None
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise InputError(f"{named} cannot be downloaded: {_first_line(error)}") from None


def _files_of_index(path: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("it names files outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path.name}: not a safetensors index ({error!r})") from None
    return names


def _has_only_pickles(hub: Any, repository: str, revision: str) -> bool:
    """Whether the repository is known to have pickled weights and no safetensors; False when it cannot be asked."""
    try:
        names = hub.HfApi().list_repo_files(repository, revision=revision or None)
    except Exception:   # offline with a filled cache: the download itself will tell
        return False
    return any(name.endswith(PICKLED) for name in names) and not any(name.endswith(".safetensors") for name in names)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
