"""`python -m neo.infer`, as it is typed."""

from __future__ import annotations

import io
import json

import pytest

from neo.cli import invoke
from neo.infer.__main__ import COMMAND, run


@pytest.fixture
def infer(capsys, monkeypatch):
    """infer(*arguments, stdin="") -> (exit code, stdout, stderr)."""
    def call(*arguments, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = invoke(COMMAND, run, [str(a) for a in arguments])
        return code, *capsys.readouterr()
    return call


def test_prompt_and_continuation_on_stdout(infer, workdir):
    code, out, err = infer(workdir, "--prompt=the quick", "--max_new_tokens=12")
    assert code == 0
    assert out.startswith("the quick") and len(out) > len("the quick\n")
    assert f"{workdir}/checkpoints/3: step 3, 300 tokens" in err
    assert "12 new tokens in" in err and "tokens/s" in err
    assert infer(f"{workdir}@3", "--prompt", "the quick", "--max-new-tokens", "12")[1] == out


def test_stdin_line_by_line_as_json(infer, workdir):
    code, out, _ = infer(workdir, "--json", "--max_new_tokens=12", "--top_k=20", stdin="the quick\n\nthe quick\r\n")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [r["prompt"] for r in records] == ["the quick", "", "the quick"]
    assert all(r["text"] == r["prompt"] + r["continuation"] for r in records)
    assert all((r["new_tokens"], r["step"]) == (12, 3) for r in records)
    assert records[1]["prompt_tokens"] == 0 < records[0]["prompt_tokens"]
    assert records[0]["text"] != records[2]["text"]


def test_temperature_zero_is_repeatable(infer, workdir):
    lines = infer(workdir, "--temperature=0", "--max_new_tokens=12", "--json", stdin="fox\nfox\n")[1].splitlines()
    assert json.loads(lines[0])["text"] == json.loads(lines[1])["text"]


def test_bytes_that_are_no_text(infer, workdir):
    code, out, _ = infer(workdir, "--prompt=a\udcffb", "--max_new_tokens=3")
    assert code == 0 and out.startswith("a?b")


@pytest.mark.parametrize("arguments,named", [
    (("{missing}", "--prompt=x"), "does not exist"),
    (("{workdir}@7", "--prompt=x"), "no checkpoint at step 7; it has step 3 (300 tokens)"),
    (("{workdir}@1K", "--temperature=-1"), "temperature=-1.0"),
    (("{workdir}", "--prompt=x", "--temprature=1"), "did you mean '--temperature'"),
    (("{workdir}", "--prompt=x", "--top_k=1.5"), "--top_k: '1.5' is not a whole number"),
    (("{workdir}", "--prompt=x", "--max_new_tokens=500"), "max_seq_len=200"),
    (("{workdir}",), "stdin was empty"),
    (("{synthetic}", "--prompt=x"), "synthetic data"),
    ((), "CHECKPOINT is missing"),
])
def test_bad_input_is_one_line_and_exit_2(infer, workdir, synthetic_workdir, tmp_path, arguments, named):
    places = {"workdir": workdir, "synthetic": synthetic_workdir, "missing": tmp_path / "no"}
    code, out, err = infer(*(a.format(**places) for a in arguments))
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("neo.infer: error: ") and named in last
    assert all(line.startswith("neo.infer: ") for line in err.splitlines()) and "Traceback" not in err
