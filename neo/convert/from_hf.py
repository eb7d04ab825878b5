"""`neo.convert from-hf`: a neo checkpoint from a Hugging Face folder or repository."""

from __future__ import annotations

from neo.cli import Namespace
from neo.convert import endings
from neo.convert.checkpoint_output import write
from neo.convert.output import check_place
from neo.convert.source import open_source
from neo.errors import InputError
from neo.models.hf.hub import local_folder
from neo.train.checkpoint_hf import is_hf_folder


def run(args: Namespace) -> None:
    """Download what is not here yet, then write the checkpoint in the type the files have."""
    folder = local_folder(args.src, args.revision)
    if not is_hf_folder(folder):
        raise InputError(f"{folder} is no Hugging Face model: it has no config.json with a model_type")
    out = check_place(args.out, [str(folder)])
    source = open_source(str(folder))
    named = args.src.rstrip("/").rpartition("/")[2] if folder.name in args.src else args.src
    made_from = [f"imported from the Hugging Face model {named}" + (f" at revision {args.revision}" if args.revision else "")]
    write(source, out, {"verb": "from-hf", "checkpoint": source.digest}, made_from, args.overwrite)
    print(endings.after_checkpoint(out, source.model))
