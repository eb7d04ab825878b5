from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time

import pytest

from neo.cli import invoke
from neo.data import demo, held_out, prepare, store
from neo.data.tokenizer import Tokenizer
from neo.errors import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))

MODULE = '''# A licence line.
# And another one.
#
# -------------------
# The block goes on here.

"""What the module is for.

    Indented further.
Not any more.
"""

import os  # a trailing remark is not prose


class Thing:
    """A thing."""

    def do(self):
        r"""Does it \\d."""
        # one line is no block
        return 1
'''


def test_prose_is_what_a_person_reads():
    assert demo.prose_of("pkg/__init__.py", MODULE) == (
        "pkg\n\nWhat the module is for.\n\n    Indented further.\nNot any more.\n\n"
        "A licence line.\nAnd another one.\n\nThe block goes on here.\n\n"
        "Thing\n\nA thing.\n\ndo\n\nDoes it \\d.\n")
    assert demo.prose_of("x.py", "print 'python 2'\n") == ""


def library(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_tests_and_foreign_packages_are_left_out(tmp_path):
    body = "x = 1\n" * 100
    library(tmp_path, {"b.py": body, "a/x.py": body, "test/t.py": body, "a/tests/t.py": body, "a/idle_test/t.py": body,
                       "site-packages/s.py": body, "encodings/cp1.py": body, "notes.txt": body, "short.py": "x"})
    assert [name for name, _ in demo.library_files(str(tmp_path), ".py")] == ["b.py", "short.py", "a/x.py"]


def test_a_missing_library_is_one_line(tmp_path):
    library(tmp_path, {"a.py": '"""' + "words " * 100 + '"""\n'})
    with pytest.raises(InputError, match="only .* of the standard library") as caught:
        demo.collect(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_cap_is_independent_of_the_order():
    documents = [(f"{i}.py", "x" * 100) for i in range(50)]
    kept = demo._cap(documents, 1000)
    assert len(kept) == 10 and kept == sorted(kept) == demo._cap(documents[::-1], 1000)
    assert kept != documents[:10]


@pytest.fixture(scope="module")
def found():
    return demo.collect(sysconfig.get_paths()["stdlib"])


def test_this_interpreters_library(found):
    for source, documents in found.items():
        size = sum(len(text.encode()) for _, text in documents)
        assert 500_000 < size <= demo.CAPS[source], (source, size)
        names = [name for name, _ in documents]
        assert names == sorted(set(names))
        assert not any(part in demo.LEFT_OUT - {"pydoc_data"} for name in names for part in name.split("/"))
    both = {name for name, _ in found["code"]} & {name for name, _ in found["prose"]}
    assert len(both) > 100, "a file's prose has the id of its code: both fall on the same side of the split"
    assert demo.collect(sysconfig.get_paths()["stdlib"]) == found


def test_the_demo_prepares_and_continues_and_ends(tmp_path, monkeypatch, capfd, found):
    """With a tenth of the corpus; the whole one runs in `make demo`."""
    small = {source: documents[::10] for source, documents in found.items()}
    monkeypatch.setattr(demo, "collect", lambda root: small)
    monkeypatch.setattr(demo, "VOCAB_SIZE", 600)
    out = tmp_path / "demo"

    class Stop(BaseException):
        pass

    real = demo.prepare

    def interrupted(request):
        if request.source == "prose":
            raise Stop
        return real(request)

    monkeypatch.setattr(demo, "prepare", interrupted)
    with pytest.raises(Stop):
        demo.prepare_demo(str(out))
    first = (out / "code" / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(demo, "prepare", real)
    command = ["--demo", f"--out={out}"]
    assert invoke(prepare.COMMAND, prepare.run, command) == 0
    assert "Next: python -m neo.train --config=configs/neo_demo.py" in capfd.readouterr().out
    assert (out / "code" / "manifest.json").stat().st_mtime_ns == first
    assert store.list_sources(str(out)) == ["code", "prose"]

    monkeypatch.setattr(demo, "collect", None)  # a third run does not even look
    start = time.monotonic()
    assert invoke(prepare.COMMAND, prepare.run, command) == 0
    assert time.monotonic() - start < 5
    assert capfd.readouterr().out.count("finished already") == 2

    record = json.loads((out / "corpus.json").read_text())
    assert record["python"] == sys.version.split()[0].rstrip("+") and len(record["sha256"]) == 64
    sources = {name: store.open_source(str(out / name)) for name in ("code", "prose")}
    tokenizer = Tokenizer.load(str(out))
    assert {s.tokenizer_sha256 for s in sources.values()} == {tokenizer.sha256}
    held = {name: set(s.split("validation").document_ids(0, s.split("validation").num_tokens))
            for name, s in sources.items()}
    trained = {name: set(s.split("train").document_ids(0, s.split("train").num_tokens)) for name, s in sources.items()}
    assert held["code"] and held["prose"]
    assert not held["code"] & trained["prose"] and not held["prose"] & trained["code"], "no leak between the sources"
    assert all(held_out.position(name) < held_out.limit(demo.VALIDATION) for name in held["code"] | held["prose"])
    split = sources["code"].split("train")
    ends = [0, *split.document_ends(0, split.num_tokens).tolist()]
    texts = dict(small["code"])
    for document_id, a, b in list(zip(split.document_ids(0, split.num_tokens), ends, ends[1:], strict=False))[:5]:
        assert tokenizer.decode(split.tokens(a, b)[:-1]) == texts[document_id]


def test_preparing_never_imports_jax():
    code = ("import sys; from neo.data import demo, prepare, preparation, tokenizer_commands; "
            "print([m for m in ('jax', 'tensorflow', 'torch') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
