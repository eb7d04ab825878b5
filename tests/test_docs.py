"""The commands in README.md and docs/ work as they stand, or say why a test cannot run them."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- not run by tests: .+ -->\s*\Z")
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = {"convert.md": ("tokenizers", "gguf")}   # optional packages, by page
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def runnable_blocks(page: Path) -> list[str]:
    text = page.read_text()
    return [match.group(1) for match in BLOCK.finditer(text) if not MARK.search(text[:match.start()])]


def write_text_folder(folder: Path) -> None:
    """A user's folder of .txt files: the documentation strings of some modules."""
    import argparse
    import asyncio
    import collections
    import decimal
    import email
    import logging
    import pathlib
    folder.mkdir()
    modules = (argparse, asyncio, collections, decimal, email, json, logging, pathlib, re, subprocess)
    for module in modules:
        texts = [inspect.getdoc(value) or "" for _, value in inspect.getmembers(module) if callable(value)]
        for i in range(0, len(texts), 4):
            (folder / f"{module.__name__}_{i}.txt").write_text("\n\n".join(filter(None, texts[i:i + 4])))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if runnable_blocks(page)], ids=lambda page: page.name)
def test_commands_run(page, tmp_path):
    """Every bash block that carries no mark, in the order of the page, in one folder with a `mytext/`."""
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package)
    write_text_folder(tmp_path / "mytext")
    script = "set -eu\npython() { \"$NEO_TEST_PYTHON\" \"$@\"; }\n" + "\n".join(runnable_blocks(page))
    environment = {**os.environ, "NEO_TEST_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if page.name == "README.md":
        # From a folder of text files to a trained, sampled model.
        assert "bits per byte" in done.stdout
        losses = [json.loads(line) for line in next((tmp_path / "runs/mine/metrics").glob("*.jsonl")).read_text().splitlines()]
        losses = [record["train/loss"] for record in losses if "train/loss" in record]
        assert losses[-1] < losses[0]
        assert done.stdout.rstrip().splitlines()[-1].strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_prose_exist(page):
    """`python -m neo.x` is named only where neo.x is a command."""
    from neo.__main__ import commands
    known = {*commands(), "neo", "neo.config"}
    for name in set(re.findall(r"python -m (neo[\w.]*)", page.read_text())):
        assert name.rstrip(".") in known, f"{page.name} names python -m {name}"
