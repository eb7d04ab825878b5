"""seqio and tensorflow-text, for real. One process imports TensorFlow for all of it (seqio_process.py), the command once."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neo.data import prepare, seqio_prepare, store, tokenizer_training
from neo.data.seqio_plan import Export
from neo.data.tokenizer import Tokenizer
from neo.errors import InputError

HERE = Path(__file__).parent
WORDS = ("the", "quick", "brown", "fox", "naïve", "狐狸", "jumps", "\n", "\t", "  ", "1984", "def f(x):", "𠮷", "🦊")


def needed() -> None:
    """Skip without the packages. They are not imported here: TensorFlow would stay in the process of all other tests."""
    for package in ("seqio", "tensorflow_text"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


def write_folder(folder: Path) -> None:
    """Texts, tokenizers and modules of a user."""
    draw = random.Random(0)
    (folder / "texts").mkdir()
    texts: list[str] = []
    for name, count, longest in (("web", 40, 300), ("code", 20, 3000), ("zh", 15, 50), ("b", 3, 20)):
        rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randrange(1, longest))), "id": f"{name}-{i}"}
                for i in range(count)]
        if name == "web":
            rows[7] = {"text": "", "id": "web-7"}
            rows[9]["text"] = " ".join(draw.choices(WORDS, k=20_000))  # longer than any sequence
        texts += [row["text"] for row in rows]
        (folder / "texts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts" / "t1.txt").write_text("the quick fox")
    (folder / "texts" / "t2.txt").write_text("the brown fox\n" * 50)
    (folder / "texts" / "broken.jsonl").write_text("".join(
        json.dumps({"text": f"the {'broken' if i == 5 else 'quick'} fox", "id": str(i)}) + "\n" for i in range(8)))
    tokenizer_training.train(texts, 350).save(str(folder / "tok"))
    tokenizer_training.train(texts, 320).save(str(folder / "small"))
    shutil.copy(HERE / "fixtures" / "my_tasks.py", folder)
    (folder / "broken.py").write_text("import seqio\n\nimport not_installed_at_all\n")
    (folder / "wrong").mkdir()
    (folder / "wrong" / "syntax.py").write_text("import seqio\nx = = 1\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("seqio")
    write_folder(path)
    return path


@pytest.fixture(scope="module")
def found(folder, root, environment) -> dict[str, Any]:
    """What the process with TensorFlow found."""
    needed()
    child = subprocess.run([sys.executable, str(HERE / "seqio_process.py"), str(folder), str(root)], capture_output=True,
                           text=True, env={**environment, **seqio_prepare.ENVIRONMENT})
    assert child.returncode == 0, child.stderr[-5000:]
    return json.loads(child.stdout.splitlines()[-1])


def documents(path: Path) -> dict[str, list[int]]:
    """id -> tokens, of all splits; every document is found to end with its only end-of-document token."""
    source = store.open_source(str(path))
    result = {}
    for split in source.splits.values():
        stops = sorted({0, *split.document_ends(0, split.num_tokens).tolist(), split.num_tokens})
        tokens = split.tokens(0, split.num_tokens).tolist()
        names = split.document_ids(0, split.num_tokens)
        for name, (start, stop) in zip(names, itertools.pairwise(stops), strict=True):
            assert tokens[start:stop].count(source.eod_id) == 1 and tokens[stop - 1] == source.eod_id
            result[name] = tokens[start:stop]
    return result


def expected(folder: Path, name: str, task: str = "", upper: bool = False) -> dict[str, list[int]]:
    """What the documents of texts/NAME.jsonl must be: tokenized whole, counted in the file's order, empty ones left out."""
    tokenizer = Tokenizer.load(str(folder / "tok"))
    rows = [json.loads(line) for line in (folder / "texts" / f"{name}.jsonl").read_text().splitlines()]
    texts = [row["text"].upper() if upper else row["text"] for row in rows]
    return {f"{task or f'my.{name}'}:{number}": [*tokenizer.encode(text), tokenizer.eod_id]
            for number, text in enumerate(texts, 1) if text}


@pytest.mark.parametrize("kind", ["en", "zh", "code", "edge"])
def test_ids_of_a_bpe_model_are_those_of_sentencepiece(found, kind):
    counts = found[f"parity {kind}"]
    assert counts["texts"] >= 4
    assert [counts[name] for name in ("tf_text", "sentencepiece", "seqio", "seqio_tf", "decoded")] == [0] * 5


def test_the_fast_tokenizer_is_wrong_and_refused(found):
    for kind in ("en", "code"):
        assert found[f"parity {kind}"]["fast"] > 0.5 * found[f"parity {kind}"]["texts"]   # about nine in ten
    assert found["fast bpe"][0] == 2 and "use_fast_tokenizer=True: FastSentencepieceTokenizer gives" in found["fast bpe"][1]
    assert found["fast unigram"][0] == 2 and "byte-fallback" in found["fast unigram"][1]
    assert found["bad fast"][0] == 2 and "a BPE model" in found["bad fast"][1] and not found["bad fast"][2]


def test_a_nested_mixture_becomes_sources_of_whole_documents(found, folder):
    assert found["first"] == {"there": [False] * 3, "asked": ["my_code", "my_web", "my_zh"]}
    for name in ("web", "zh"):
        assert documents(folder / "whole" / f"my_{name}") == expected(folder, name)
    longest = max(map(len, documents(folder / "whole" / "my_web").values()))
    assert longest > 20_000
    assert Tokenizer.load(str(folder / "whole" / "tokenizer")).sha256 == Tokenizer.load(str(folder / "tok")).sha256
    manifest = store.read_manifest(str(folder / "whole" / "my_zh"))
    rows = [json.loads(line) for line in (folder / "texts" / "zh.jsonl").read_text().splitlines()]
    assert sum(split["bytes"] for split in manifest["splits"].values()) == sum(len(row["text"].encode()) for row in rows)
    assert manifest["splits"]["validation"]["documents"] > 0
    assert not (folder / "whole" / ".seqio").exists()


def test_rates_are_kept(found, folder):
    mixture = json.loads((folder / "whole" / "mixtures" / "nested.json").read_text())
    assert mixture["mixture"] == pytest.approx({"my_web": 0.6, "my_zh": 0.2, "my_code": 0.2})
    assert (mixture["module"], mixture["split"], mixture["seqio"]) == ("my_tasks", "train", "0.0.20")
    # seqio draws documents: in tokens a source counts as much as its documents are long.
    ratio = {name: mixture["mixture_of_documents"][name] / mixture["mixture"][name] for name in mixture["mixture"]}
    lengths = {name: [len(tokens) for tokens in documents(folder / "killed" / name).values()] for name in ratio}
    means = {name: sum(some) / len(some) for name, some in lengths.items()}
    assert ratio["my_web"] / ratio["my_zh"] == pytest.approx(means["my_web"] / means["my_zh"])
    assert sum(mixture["mixture_of_documents"].values()) == pytest.approx(1)


def test_finished_sources_are_left_alone_and_a_killed_command_goes_on(found, folder):
    assert found["prepared nested whole"] == {"there": [True] * 3, "asked": []}
    assert found["killed"]["asked"] == ["my_code", "my_web"]
    assert found["killed"]["left"] == [".seqio", "my_code", "my_web", "tokenizer"]
    assert found["prepared nested killed"] == {"there": [True, True, False], "asked": ["my_zh"]}
    for name in ("web", "code", "zh"):
        assert documents(folder / "killed" / f"my_{name}") == expected(folder, name)


def test_a_finished_export_is_not_made_again(found, folder):
    assert found["exported"] == ["lock", "my_zh", "my_zh.json", "tokenizer"] and found["opened"] == 0
    assert documents(folder / "exported" / "my_zh") == expected(folder, "zh")


def test_a_changed_task_is_not_taken_for_the_old_one(found, folder):
    assert found["changed"][0] == 2 and "my_code: is finished, made from another version of the task" in found["changed"][1]
    assert found["changed asked"] == []
    assert documents(folder / "whole" / "my_code") == expected(folder, "code", upper=True)


def test_extra_ids_are_part_of_the_tokenizer(found, folder):
    tokenizer = Tokenizer.load(str(folder / "extra_ids" / "tokenizer"))
    assert tokenizer.vocab_size == 360 and tokenizer.piece(350) == "\u2581<extra_id_9>"
    assert documents(folder / "extra_ids" / "my_extra") == expected(folder, "zh", "my.extra")


def test_a_feature_may_be_a_prompt(found, folder):
    tokenizer = Tokenizer.load(str(folder / "tok"))
    rows = [json.loads(line) for line in (folder / "texts" / "zh.jsonl").read_text().splitlines()]
    assert documents(folder / "question" / "my_question") == {
        row["id"]: [*tokenizer.encode(f"Q {row['id']}\n"), *tokenizer.encode(row["text"]), tokenizer.eod_id] for row in rows}


def test_ids_made_before_need_a_tokenizer_only(found, folder):
    assert documents(folder / "pretokenized" / "my_pretokenized") == expected(folder, "zh", "my.pretokenized")
    assert found["bad outside"][0] == 3 and "is outside the vocabulary of 320" in found["bad outside"][1]


def test_random_steps_give_the_same_every_time(found, folder):
    once, again = (documents(folder / name / "my_random") for name in ("random", "random_again"))
    assert once == again
    plain = expected(folder, "zh", "my.random")
    assert once.keys() == plain.keys() and all(once[name] != plain[name] for name in plain)
    assert len({tuple(once[name][len(plain[name]) - 1:]) for name in plain}) > 5


def test_a_packed_store_can_be_asked_for(found, folder):
    assert store.read_manifest(str(folder / "packed" / "my_web"))["packing"]["seq_len"] == 128
    packed, plain = (json.loads((folder / name / "mixtures" / "nested.json").read_text()) for name in ("packed", "killed"))
    assert packed["mixture_of_documents"] == pytest.approx(plain["mixture_of_documents"])


@pytest.mark.parametrize(("label", "text"), [
    ("unknown", r"--seqio_mixture=nestd: the module registers no Task or Mixture of this name \(did you mean 'nested'\?\)"),
    ("split", r"--split=test: task my\.\w+ has no split 'test' \(it has train\)"),
    ("feature", r"task my\.code has no feature 'target'; give one that it has: --feature=targets"),
    ("module", r"--module=my_task: no module 'my_task' in .*seqio"),
    ("import error", r"--module=broken: .*/broken\.py:3: ModuleNotFoundError: No module named 'not_installed_at_all'"),
    ("syntax", r"--module=wrong/syntax\.py: .*wrong/syntax\.py:2: SyntaxError: invalid syntax"),
    ("no file", r"--module=nothing\.py: no such file"),
    ("no module", r"--module is missing"),
    ("id_field", r"task my\.code: its examples have no 'uri' \(they have targets_pretokenized, targets, name\)"),
    ("bytes vocabulary", r"targets of task my\.bytes has a ByteVocabulary; a store needs a SentencePiece model"),
    ("two vocabularies", r"targets of task my\.\w+ and targets of task my\.\w+ have different vocabularies"),
    ("other tokenizer", r"--tokenizer=bpe: 1200 pieces, the task's vocabulary tok/tokenizer\.model has 350; leave out"),
    ("no tokenizer", r"nowhere: no such tokenizer"),
    ("sequence length", r"my_tasks\.py:\d+: TypeError: .*needs_length may need a sequence length"),
    ("rates", r"mixture zero: all rates are 0"),
    ("rate", r"mixture callable: the rate of my\.web cannot be worked out: .*my_tasks\.py:\d+: ZeroDivisionError"),
    ("text", r"task my\.text: ValueError: Task dataset has incorrect type for feature 'targets'"),
    ("missing files", r"task my\.lines: no file matches nothing/\*\.txt"),
    ("validation", r"--validation=1\.5: give a share"),
    ("same source", r"tasks my\.web and my:web would both become the source my_web"),
])
def test_bad_input_is_one_line_and_leaves_nothing(found, label, text):
    code, line, left = found[f"bad {label}"]
    assert code == 2 and re.search(text, line) and "\n" not in line, line
    assert not left


def test_a_task_that_fails_in_the_middle_is_for_a_person(found):
    code, line, left = found["bad fails"]
    assert code == 3 and left and "\n" not in line
    assert "task my.fails, after 5 documents: " in line and "ValueError: a text that is broken" in line
    code, line, _ = found["bad empty"]
    assert code == 3 and "task my.empty: no document with a token in it" in line


def test_what_is_there_is_not_replaced(found):
    assert found["bad store"][0] == 2 and "whole/tokenizer: 350 pieces, the task's" in found["bad store"][1]
    code, line = found["bad source"]
    assert code == 2 and "mine/my_web: is finished, and was not made from a seqio task" in line


def test_a_recipe_is_registered(found, folder):
    assert found["registered"]["tasks"] == {"a": "neo.tiny.a", "b": "neo.tiny.b"}
    assert found["registered"]["mixtures"] == {"short": "neo.tiny.phase.short", "long": "neo.tiny.phase.long"}
    assert found["registered"]["rates"]["neo.tiny.phase.short"] == {"neo.tiny.a": 0.7, "neo.tiny.b": 0.3}
    assert found["mixed"] == [40, ["targets"]]
    # Prepared, its sources are the recipe's, with the ids that neo's own reader gives.
    mixture = json.loads((folder / "tiny" / "mixtures" / "neo.tiny.phase.short.json").read_text())
    assert mixture["mixture"] == pytest.approx({"a": 0.7, "b": 0.3})
    tokenizer = Tokenizer.load(str(folder / "tok"))
    assert documents(folder / "tiny" / "b")["neo.tiny.b:1"] == [*tokenizer.encode("the quick fox"), tokenizer.eod_id]
    assert documents(folder / "tales" / "a") == {
        f"tale {i}": [*tokenizer.encode(f"once upon a time {i}"), tokenizer.eod_id] for i in range(5)}


def test_every_seed_recipe_has_names_that_seqio_takes(found):
    sources, phases, distinct = found["yulan"]
    assert sources == distinct > 200 and phases >= 27


def test_a_recipe_is_never_cut(found):
    assert found["chunk"]["same"] and found["chunk"]["ends"]
    assert found["chunk"]["longest"][1] == 64 < found["chunk"]["longest"][0]
    assert found["seqio loses"][0] < 0.5 * found["seqio loses"][1]  # without `chunk`: the trap


@pytest.mark.parametrize(("label", "text"), [
    ("twice", "seqio has a Task or Mixture 'neo.tiny.a' already"), ("missing", "inputs lacks 1 of the 2 sources of tiny: b"),
    ("unknown", "inputs names 'bb', which no mixture of tiny has (did you mean 'b'?)"), ("pattern", "needs {source} in it")])
def test_bad_registrations(found, label, text):
    code, line = found[f"register {label}"]
    assert code == 2 and text in line


def test_ids_are_compared(found):
    assert found["unigram"] >= 4
    assert found["other ids"][0] == 2 and "seqio's vocabulary and SentencePiece give other ids" in found["other ids"][1]


def test_the_command(folder, tmp_path, invoked, monkeypatch):
    needed()
    monkeypatch.chdir(folder)
    out = tmp_path / "store"
    ended = invoked(prepare.COMMAND, prepare.run, ["--seqio_mixture=nested", "--module=my_tasks", f"--out={out}",
                                                   "--id_field=name", "--workers=1"])
    assert ended.code == 0, ended.err
    assert "mixture={'my_code': 0.2, 'my_web': 0.6, 'my_zh': 0.2}" in ended.out
    assert f"{out}/mixtures/nested.json" in ended.out and "python -m neo.train" in ended.out
    assert "my_web: 39 documents, " in ended.err and "my_web: 1 documents without a token left out" in ended.err
    assert not re.search("absl|WARNING|oneDNN|cuda|charsmap|noise", ended.err + ended.out)
    by_name = {json.loads(line)["id"]: tokens for line, tokens in zip(
        (folder / "texts" / "zh.jsonl").read_text().splitlines(), expected(folder, "zh").values(), strict=True)}
    assert documents(out / "my_zh") == by_name


def fake_tensorflow(folder: Path, out: Path, monkeypatch, body: str) -> None:
    """The child will find a `tensorflow` with this body."""
    (out / "fake").mkdir(parents=True)
    (out / "fake" / "tensorflow.py").write_text(body)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(out / "fake"))


def test_without_tensorflow_the_extra_is_named(folder, tmp_path, monkeypatch, invoked):
    fake_tensorflow(folder, tmp_path, monkeypatch, "raise ModuleNotFoundError('No module', name='tensorflow')")
    arguments = ["--seqio_mixture=nested", "--module=my_tasks", f"--out={tmp_path / 'store'}"]
    ended = invoked(prepare.COMMAND, prepare.run, arguments)
    assert ended.code == 2 and "needs the package 'tensorflow', which is not installed: pip install" in ended.error
    assert "[data]" in ended.error
    assert not (tmp_path / "store").exists()


def test_a_killed_child_is_safe_to_restart(folder, tmp_path, monkeypatch, invoked):
    fake_tensorflow(folder, tmp_path, monkeypatch, "import os\nos.kill(os.getpid(), 9)")
    arguments = ["--seqio_mixture=nested", "--module=my_tasks", f"--out={tmp_path / 'store'}"]
    ended = invoked(prepare.COMMAND, prepare.run, arguments)
    assert ended.code == 75 and "killed by signal 9" in ended.error
    (tmp_path / "fake" / "tensorflow.py").write_text("raise ValueError('odd')")
    ended = invoked(prepare.COMMAND, prepare.run, arguments)
    assert ended.code == 1 and "ended with exit code 1" in ended.err and "ValueError: odd" in ended.err


@pytest.mark.parametrize(("arguments", "text"), [
    (["--module=my_tasks", "--out=x"], "need --seqio_mixture=NAME"),
    (["--seqio_mixture=nested", "--out=x"], "--module is missing"),
    (["--seqio_mixture=nested", "--module=my_tasks"], "--out is missing"),
    (["texts", "--seqio_mixture=nested", "--module=my_tasks", "--out=x", "--source=y"], "leave out INPUT, --source"),
])
def test_wrong_arguments(tmp_path, monkeypatch, invoked, arguments, text):
    monkeypatch.chdir(tmp_path)
    ended = invoked(prepare.COMMAND, prepare.run, arguments)
    assert ended.code == 2 and text in ended.error
    assert not os.listdir(tmp_path)


def test_only_one_command_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    out = str(tmp_path / "store")
    with seqio_prepare._work(out, os.path.join(out, ".seqio")), pytest.raises(InputError, match="another process"):
        with seqio_prepare._work(out, os.path.join(out, ".seqio")):
            pass


def test_the_export_is_plain_data():
    export = Export("a", "b", "c", id_field="d")
    assert Export(**json.loads(json.dumps(vars(export)))) == export
