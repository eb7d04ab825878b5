"""Rules of the house that a program can check, over everything git tracks (or would track)."""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from neo.__main__ import COMMAND, commands
from neo.cli import parse
from neo.config import schema

ROOT = Path(__file__).resolve().parents[1]

# The floors, from the ground up. What is not named here is on the ground floor.
FLOORS = (
    {"config", "errors", "cli", "extras", "kernels", "parallel"},
    {"models", "data"},
    {"train"},
    {"infer", "eval"},
    {"align", "convert", "plan", "audit", "curate"},
)
OPENED_FIRST = ("neo/models/decoder.py", "neo/kernels/attention/api.py", "neo/train/loop.py", "neo/train/step.py",
                "neo/data/loader.py")


@functools.cache
def files() -> tuple[Path, ...]:
    """Tracked files and new ones git does not ignore."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True, text=True).stdout.split("\0")
    return tuple(ROOT / name for name in listed if name and (ROOT / name).is_file())


def sources(*folders: str) -> list[Path]:
    return [path for path in files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in the file, wherever it stands."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield node.lineno, module
            if module == "neo":
                for alias in node.names:
                    yield node.lineno, f"neo.{alias.name}"


def floor(room: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), 0)


def test_imports_never_go_up_a_floor():
    wrong = []
    for path in sources("neo"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) == 2 and parts[1] in ("__init__", "__main__"):
            continue  # the roof: names every room, opens them when used
        for line, module in imports(path):
            if not module.startswith("neo."):
                continue
            here, there = parts[1], module.split(".")[1]
            if floor(there) > floor(here) or (here, there) == ("data", "models"):
                wrong.append(f"{name(path)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_rooms_are_on_a_floor():
    rooms = {path.relative_to(ROOT).with_suffix("").parts[1] for path in sources("neo")} - {"__init__", "__main__"}
    assert rooms <= set().union(*FLOORS), "give the new room a floor in FLOORS"


def test_files_are_small():
    python = sources("neo", "tests", "bench", "configs", "launch", "docs")
    long = {name(path): count for path in python if (count := len(path.read_text().splitlines())) > 600}
    assert not long, f"over 600 lines is two rooms: {long}"
    first = {name(path): len(path.read_text().splitlines()) for path in python if name(path) in OPENED_FIRST}
    assert len(first) >= 4, "OPENED_FIRST names files that are gone"
    assert max(first.values()) <= 400, f"files a reader opens first stay under 400 lines: {first}"


def test_no_file_is_named_for_nothing():
    assert not [name(path) for path in files() if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_no_big_files():
    assert not [name(path) for path in files() if path.stat().st_size > 1_000_000]


def test_tree_names_no_machine_and_no_package_host():
    hosts = ["index-url", "find-links", "trusted-host", r"pypi\.org", r"files\.pythonhosted", r"download\.pytorch\.org",
             r"//[\w.-]*(artifactory|nexus)"]
    places = [re.escape(f"{ROOT}/"), r"/(root|Users)/", r"(?<![\w>.])/opt/", r"/home/(?!me\b|you\b|user\b)\w"]
    pattern = re.compile("|".join(hosts + places))
    wrong = []
    for path in files():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # pictures, token fixtures
        wrong += [f"{name(path)}:{number} {line.strip()[:100]}" for number, line in enumerate(text.splitlines(), 1)
                  if pattern.search(line)]
    assert not wrong, "\n".join(wrong)


def test_public_functions_and_classes_say_what_they_do():
    silent = []
    for path in sources("neo"):
        for node in tree(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None:
                    silent.append(f"{name(path)}:{node.lineno} {node.name}")
                for part in node.body if isinstance(node, ast.ClassDef) else []:
                    if (isinstance(part, ast.FunctionDef) and not part.name.startswith("_")
                            and not node.bases  # overrides inherit their docstring
                            and not part.decorator_list  # properties are named like fields
                            and ast.get_docstring(part) is None):
                        silent.append(f"{name(path)}:{part.lineno} {node.name}.{part.name}")
        if ast.get_docstring(tree(path)) is None:
            silent.append(f"{name(path)}:1 the module")
    assert not silent, "\n".join(silent)


def config_groups() -> list[type]:
    return [kind for kind in vars(schema).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)]


def test_every_config_field_is_documented():
    assert len(config_groups()) >= 10
    for group in config_groups():
        assert group.__doc__ and not group.__doc__.startswith(f"{group.__name__}("), f"{group.__name__} has no text"
        for field in dataclasses.fields(group):
            if group is not schema.Config or field.metadata:
                assert len(field.metadata.get("doc", "")) > 10, f"{group.__name__}.{field.name} has no text"


def test_every_config_field_is_read_somewhere():
    def attributes(node: ast.AST) -> set[str]:
        return {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}

    def words(node: ast.AST) -> set[str]:  # what a getattr over a table of names may read
        nodes = list(ast.walk(node))
        if not any(isinstance(part, ast.Name) and part.id == "getattr" for part in nodes):
            return set()
        return {part.value for part in nodes if isinstance(part, ast.Constant) and isinstance(part.value, str)}

    readers = [tree(path) for path in sources("neo") if name(path) not in ("neo/config/schema.py",)]
    read = set().union(*map(attributes, readers), *map(words, readers))
    for node in ast.walk(tree(ROOT / "neo/config/schema.py")):  # properties that are read outside pass it on
        if isinstance(node, ast.FunctionDef) and node.name in read:
            read |= attributes(node)
    unread = [f"{group.__name__}.{field.name}" for group in config_groups() if group is not schema.Config
              for field in dataclasses.fields(group) if field.name not in read]
    assert not unread, f"fields nothing reads: {unread}"


# Any attempt to import one of these ends the child, also where the package is not installed.
GUARD = textwrap.dedent("""
    import importlib.abc, importlib.machinery, os, sys

    class Refuse(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name, path=None, target=None):
            if name in ("torch", "tensorflow", "seqio", "transformers"):
                return importlib.machinery.ModuleSpec(name, self)
        def exec_module(self, module):
            pass
        def create_module(self, spec):
            import traceback
            traceback.print_stack()
            print("imported", spec.name, file=sys.stderr, flush=True)
            os._exit(9)

    sys.meta_path.insert(0, Refuse())
""")


def guarded(program: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", GUARD + textwrap.dedent(program), *argv], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, **environment})


def test_the_guard_refuses():
    assert guarded("import torch").returncode == 9
    assert guarded("try:\n    import tensorflow.io\nexcept ImportError:\n    pass").returncode == 9
    assert guarded("import importlib.util; importlib.util.find_spec('torch'); import json").returncode == 0


def test_import_neo_is_light():
    child = guarded("""
        import time
        import neo
        heavy = {"jax", "jaxlib", "flax", "orbax", "numpy", "grain", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy
        assert time.process_time() < 0.5, time.process_time()
    """)
    assert child.returncode == 0, child.stderr


def test_no_module_of_the_trainer_imports_tensorflow_or_torch():
    child = guarded("""
        import importlib, pkgutil
        import neo
        count = 0
        for room in ("config", "kernels", "parallel", "models", "data", "train", "infer"):
            package = getattr(neo, room)
            for module in pkgutil.walk_packages(package.__path__, f"neo.{room}."):
                importlib.import_module(module.name)
                count += 1
        assert count > 30, count
        assert "jax" in sys.modules
    """, JAX_PLATFORMS="cpu")
    assert child.returncode == 0, child.stderr


def test_training_imports_neither_tensorflow_nor_torch(tmp_path):
    """A whole run: start-up, steps, metrics files, plot, checkpoint."""
    child = guarded("""
        import runpy
        runpy.run_module("neo.train", run_name="__main__", alter_sys=True)
    """, "--config=neo_demo", f"--workdir={tmp_path}/run", "--config.data.synthetic=True", "--config.train.steps=1",
        "--config.model.num_layers=2", "--config.model.d_model=64", "--config.model.num_heads=2",
        "--config.model.num_kv_heads=2", "--config.model.d_ff=64", "--config.phases.main.global_batch=2",
        JAX_PLATFORMS="cpu")
    assert child.returncode == 0, child.stderr
    assert list((tmp_path / "run/tensorboard").iterdir()) and (tmp_path / "run/loss.png").exists()


def test_training_run_is_a_function_however_often_it_is_named():
    import neo

    for _ in range(2):
        assert callable(neo.train.run)
        assert isinstance(neo.Run, type)


@pytest.mark.parametrize("command", [COMMAND, *commands().values()], ids=lambda command: command.prog)
def test_examples_in_the_help_are_accepted(command):
    assert len(command.examples) + sum(len(verb.examples) for verb in command.verbs.values()) >= 2
    for owner in (command, *command.verbs.values()):
        for example in owner.examples:
            words = shlex.split(example, comments=True)
            while "=" in words[0]:
                words.pop(0)  # VARIABLE=value in front
            end = next((i for i, word in enumerate(words) if word in ("<", ">", "|", "&&")), len(words))
            words = words[:end]
            assert words[:2] == ["python", "-m"]
            if words[2] == command.prog:
                parse(command, words[3:])
