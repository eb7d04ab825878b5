"""Packaging: what setup.py declares, the tested versions, the package's first contact with a machine."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import neo
from neo import extras
from neo.__main__ import commands
from neo.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
FROM_OUTER_MAKE = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "EXTRAS", "PYTHON", "VENV", "VERSION", "SELECT",
                   "WORKERS"}


@pytest.fixture(scope="module")
def declared() -> dict:
    """The keyword arguments of setup(), without needing setuptools."""
    seen: dict = {}
    fake = types.ModuleType("setuptools")
    fake.setup = seen.update
    fake.find_packages = lambda include: include
    real = sys.modules.get("setuptools")
    sys.modules["setuptools"] = fake
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        sys.modules.pop("setuptools")
        if real is not None:
            sys.modules["setuptools"] = real
    return seen


@pytest.fixture(scope="module")
def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements(declared: dict) -> list[str]:
    """Everything neo itself asks for, with all extras."""
    return [*declared["install_requires"], *(text for extra in declared["extras_require"].values() for text in extra)]


def pin_for(pins: list[Requirement], name: str, python: str) -> str | None:
    wanted = [pin for pin in pins if canonicalize_name(pin.name) == canonicalize_name(name)
              and (pin.marker is None or pin.marker.evaluate({"python_version": python}))]
    assert len(wanted) <= 1, f"{name} is pinned twice for Python {python}"
    return next(iter(wanted[0].specifier)).version if wanted else None


def run(*argv: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    # `make test EXTRAS=... PYTHON=...` runs these tests and hands its flags, level and variables down to every child:
    # they would change what a make in here does.
    outer = {name: value for name, value in os.environ.items() if name not in FROM_OUTER_MAKE}
    return subprocess.run(argv, cwd=cwd, text=True, capture_output=True, env={**outer, **environment})


def test_name_version_and_extras(declared):
    assert declared["name"] == neo.DISTRIBUTION != "neo"
    assert declared["version"] == neo.__version__
    assert f"## {neo.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert set(declared["extras_require"]) == set(extras.EXTRAS)
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_versions_are_pinned_without_hosts(declared, pins):
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"(#.*)?|[a-z0-9-]+==[\w.]+(; python_version (<|>=) \"3\.\d+\")?", line), line
    for python in PYTHONS:
        for text in requirements(declared):
            wanted = Requirement(text)
            pinned = pin_for(pins, wanted.name, python)
            assert pinned is not None, f"{wanted.name} is not pinned for Python {python}"
            assert wanted.specifier.contains(pinned), f"{text} does not allow the tested {pinned}"


def test_pins_hold_for_everything_the_base_install_pulls_in(declared, pins):
    """Walks the installed packages' own requirements: nothing below neo is left to chance."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    waiting = [Requirement(text) for text in (*declared["install_requires"], "pytest", "hypothesis")]
    done: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            if (canonicalize_name(wanted.name), extra) in done:
                continue
            done.add((canonicalize_name(wanted.name), extra))
            pinned = pin_for(pins, wanted.name, python)
            assert pinned is not None, f"{wanted.name} is needed but not pinned"
            assert wanted.specifier.contains(pinned), f"{wanted} does not allow the pinned {pinned}"
            for text in importlib.metadata.requires(wanted.name) or ():
                below = Requirement(text)
                if below.marker is None or below.marker.evaluate({"extra": extra}):
                    waiting.append(below)
    assert len(done) > 40


def test_data_files_of_the_package_are_installed(declared):
    """Files beside the code that are not Python are left out of an installation unless setup.py names them."""
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "neo"], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout.split()
    data = {name for name in files if not name.endswith(".py")}
    named = {str(path.relative_to(ROOT)) for package, patterns in declared["package_data"].items() for pattern in patterns
             for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    assert data and data <= named, sorted(data - named)


def test_every_import_is_declared(declared):
    """A package that neo imports without being asked to declare it would be missing on a fresh machine."""
    provides = importlib.metadata.packages_distributions()
    known = {canonicalize_name(Requirement(text).name) for text in requirements(declared)}
    missing = set()
    for path in sorted((ROOT / "neo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for top in {name.split(".")[0] for name in names if name}:
                if top == "neo" or top in sys.stdlib_module_names:
                    continue
                owners = {canonicalize_name(owner) for owner in provides.get(top, [top])}
                if not owners & known and top != "jaxlib":
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert not missing, "\n".join(sorted(missing))


def test_command_table():
    child = run(sys.executable, "-m", "neo")
    assert child.returncode == 0, child.stderr
    for name, command in commands().items():
        assert f"python -m {name} " in child.stdout and command.summary in child.stdout


@pytest.mark.parametrize("name", ["neo", *commands()])
def test_help_is_quick_and_without_jax(name):
    program = textwrap.dedent(f"""
        import runpy, sys, time
        sys.argv = [{name!r}, "--help"]
        try:
            runpy.run_module({name!r}, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code == 0, end.code
        heavy = {{"jax", "flax", "orbax", "grain", "tensorflow", "torch"}} & set(sys.modules)
        assert not heavy, heavy
        assert time.process_time() < 1.0, time.process_time()
    """)
    child = run(sys.executable, "-c", program)
    assert child.returncode == 0, child.stderr
    assert "examples:" in child.stdout


@pytest.mark.parametrize("name", ["neo", *commands()])
def test_unknown_flag_is_one_line_and_code_2(name):
    verb = list(commands()[name].verbs)[:1] if name in commands() else []
    child = run(sys.executable, "-m", name, *verb, "--no-such-flag=1")
    assert child.returncode == 2, child.stderr
    assert re.fullmatch(rf"{re.escape(name)}: error: .*--no-such-flag.*\n", child.stderr)


def test_foreign_neo_is_told_in_one_line(tmp_path):
    """`neo` on the package index is another project with the same import name."""
    assert "unrelated" not in run(sys.executable, "-c", "import neo").stderr
    metadata = tmp_path / "neo-0.14.6.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: neo\nVersion: 0.14.6\n")
    child = run(sys.executable, "-c", "import neo", PYTHONPATH=str(tmp_path))
    assert child.returncode == 0
    assert re.fullmatch(r"neo: the unrelated package 'neo' 0\.14\.6 is installed here too .*\n", child.stderr)


def test_workers_do_not_repeat_the_line(tmp_path):
    metadata = tmp_path / "neo-0.14.6.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: neo\nVersion: 0.14.6\n")
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent("""
        import multiprocessing
        import neo

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                print(pool.map(neo.errors.InputError, ["a", "b"]))  # workers import neo
    """))
    child = run(sys.executable, str(program), PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert child.returncode == 0, child.stderr
    assert child.stderr.count("unrelated") == 1


def test_files_mixed_with_the_foreign_package_are_refused(tmp_path):
    """Both installed into one site-packages, the foreign one later: its __init__.py won."""
    package = tmp_path / "neo"
    package.mkdir()
    (package / "__init__.py").write_text("'''Neo is a package for electrophysiology data.'''\n")
    for name in ("cli.py", "errors.py"):
        shutil.copy(ROOT / "neo" / name, package)
    program = "from neo.cli import Command, invoke; raise SystemExit(invoke(Command('neo.x', 'X.'), print, []))"
    child = run(sys.executable, "-c", program, cwd=tmp_path)
    assert child.returncode == 2
    assert "belongs to the unrelated package 'neo'" in child.stderr and child.stderr.count("\n") == 1


def test_missing_extra_is_named_with_its_install_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=re.escape("needs the package 'no_such_package', which is not installed: "
                                                   "pip install -e '.[hf]'")):
        extras.need("no_such_package.part", extra="hf")
    monkeypatch.chdir(tmp_path)
    assert extras.install_line("hf") == f"pip install -e '{ROOT}[hf]'"
    with pytest.raises(ValueError, match="no extra called"):
        extras.need("json", extra="nope")
    assert extras.need("json.decoder", extra="hf").JSONDecoder
    (tmp_path / "half_installed.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        extras.need("half_installed", extra="hf")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMakefile:
    def test_unusable_python_is_named(self):
        child = run("make", "check", "PYTHON=no-such-python")
        assert child.returncode == 2
        assert "neo needs Python 3.11 or newer, no-such-python is missing" in child.stderr

    def test_old_python_is_named(self, tmp_path):
        old = tmp_path / "python3"
        old.write_text("#!/bin/sh\ncase \"$2\" in *print*) echo 3.9;; *) exit 1;; esac\n")
        old.chmod(0o755)
        child = run("make", "check", f"PYTHON={old}")
        assert child.returncode == 2
        assert f"{old} is 3.9" in child.stderr

    def test_demo_is_the_two_readme_commands(self):
        child = run("make", "-n", "demo", f"PYTHON={sys.executable}", "VENV=nowhere")
        assert child.returncode == 0, child.stderr
        assert child.stdout.endswith("nowhere/bin/python -m neo.data.prepare --demo --out=data/demo\n"
                                     "nowhere/bin/python -m neo.train --config=configs/neo_demo.py\n")
        assert "-e '.' -c constraints.txt" in child.stdout and "to download" in child.stdout

    def test_second_python_only_where_none_was_named(self):
        child = run("make", "-n", "test", f"PYTHON={sys.executable}", "VENV=nowhere")
        assert child.returncode == 0, child.stderr
        assert "run-part" not in child.stdout and "nowhere/bin/python -m ruff check ." in child.stdout
