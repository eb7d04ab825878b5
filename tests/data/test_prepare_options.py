"""Prompts, groups, packing, transforms and variants through the whole of preparation."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import math
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from neo.data import fim, held_out, preparation, prepare, shuffle, spill, store, tokenizer_training
from neo.data.canary import read_canaries
from neo.data.preparation import Request
from neo.data.records import ReadOptions
from neo.data.tokenizer import Tokenizer
from neo.data.transforms import Transforms
from neo.errors import InputError

COUNT = 300
WORDS = ["the", "quick", "Brown", "Fox", "jumps", "over", "naïve", "狐狸", "\n", "  ", "1984"]
SEQ_LEN = 64


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return ["a " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def tokenizer(texts) -> Tokenizer:
    return dataclasses.replace(tokenizer_training.train(texts, 320), extra_tokens=fim.TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts) -> Path:
    """Documents d0, d1, ..., some with a prompt, in 40 groups and some in none; two have the same id."""
    path = tmp_path_factory.mktemp("corpus")
    records = [{"text": text, "id": f"d{i}"} | ({"prompt": f"say {i}:"} if i % 3 else {})
               | ({"repo": f"r{i % 40}"} if i % 7 else {}) for i, text in enumerate(texts)]
    records[14]["id"] = "d7"
    for name, some in (("a", records[:150]), ("b", records[150:])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    return path


@pytest.fixture(scope="module")
def canaries(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("canaries") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"the secret of {name} is 4711"}) + "\n" for name in ("alpha", "beta")))
    return str(path)


def request(folder, out, tokenizer, options=None, **changes) -> Request:
    base = Request((str(folder),), str(out), "web", tokenizer, ReadOptions(id_field="id", **(options or {})), 0.1, seed=3,
                   workers=1, bucket_bytes=8000, piece_bytes=4000)
    return dataclasses.replace(base, **changes)


@dataclasses.dataclass
class Read:
    """One document of a split as it was written."""

    id: str
    tokens: list[int]
    prompt: int
    joined: bool


def read_back(out: Path) -> dict[str, list[Read]]:
    source = store.open_source(str(out / "web"))
    store.verify(source)
    found = {}
    for name, split in source.splits.items():
        extras = split.extras(0, split.num_tokens)
        ends = [*extras.begins[1:].tolist(), split.num_tokens][:split.num_documents]
        ids = split.document_ids(0, split.num_tokens)
        if len(ids) < len(ends):  # padding of a packed split has no id
            continue
        found[name] = [Read(*row) for row in zip(
            ids, [split.tokens(a, b).tolist() for a, b in zip(extras.begins.tolist(), ends, strict=True)],
            extras.prompts.tolist(), extras.joined.tolist(), strict=True)]
    return found


def digests(out: Path) -> dict[str, bytes]:
    return {os.path.relpath(os.path.join(base, name), out): Path(base, name).read_bytes()
            for base, _, names in os.walk(out) for name in names}


def settings(canaries: str) -> dict[str, dict]:
    everything = Transforms(fim_rate=0.5, reverse="entity", reverse_rate=0.3, variants=3,
                            canaries=read_canaries(canaries, 0.2))
    return {
        "prompts": dict(options=dict(prompt_field="prompt")),
        "groups": dict(options=dict(group_field="repo")),
        "packing": dict(packing="best_fit", seq_len=SEQ_LEN),
        "packed groups with prompts": dict(options=dict(group_field="repo", prompt_field="prompt"), packing="best_fit",
                                           seq_len=SEQ_LEN),
        "transforms": dict(transforms=everything),
        "everything": dict(options=dict(group_field="repo"), packing="best_fit", seq_len=SEQ_LEN, transforms=everything),
    }


@pytest.mark.parametrize("name", ["prompts", "groups", "packing", "packed groups with prompts", "transforms", "everything"])
def test_output_is_the_same_for_any_cut_memory_and_number_of_workers(folder, tokenizer, canaries, tmp_path, monkeypatch, name):
    changes = settings(canaries)[name]
    preparation.prepare(request(folder, tmp_path / "one", tokenizer, **changes))
    expected = digests(tmp_path / "one")
    preparation.prepare(request(folder, tmp_path / "two", tokenizer, workers=2 if name == "everything" else 1,
                                piece_bytes=2500, **changes))
    assert digests(tmp_path / "two") == expected
    monkeypatch.setattr(spill, "RUN_BYTES", 500)
    preparation.prepare(request(folder, tmp_path / "three", tokenizer, piece_bytes=1 << 30, **changes))
    assert digests(tmp_path / "three") == expected
    # The same again is finished, another setting is another store.
    assert preparation.prepare(request(folder, tmp_path / "one", tokenizer, **changes))[1]
    with pytest.raises(InputError, match="made differently"):
        preparation.prepare(request(folder, tmp_path / "one", tokenizer))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["tokenize_piece", "write_bucket"])
def test_a_killed_run_goes_on(folder, tokenizer, canaries, tmp_path, monkeypatch, stage):
    job = request(folder, tmp_path / "killed", tokenizer, **settings(canaries)["everything"])
    real, calls = getattr(shuffle, stage), []

    def dies(state, task):
        calls.append(task)
        if len(calls) > 4:
            raise Killed
        return real(state, task)

    monkeypatch.setattr(shuffle, stage, dies)
    with pytest.raises(Killed):
        preparation.prepare(job)
    done = [str(task) for task in calls[:4]]
    calls.clear()
    monkeypatch.setattr(shuffle, stage, lambda state, task: (calls.append(str(task)), real(state, task))[1])
    preparation.prepare(job)
    assert calls and not set(done) & set(calls)
    preparation.prepare(dataclasses.replace(job, store=str(tmp_path / "fresh")))
    assert digests(tmp_path / "killed") == digests(tmp_path / "fresh")


def test_old_commands_keep_their_arguments(folder, tokenizer, tmp_path):
    # Another key here would make every finished store one that was "made differently".
    assert list(request(folder, tmp_path, tokenizer).arguments) == [
        "text_field", "id_field", "on_bad_text", "validation", "seed", "layout", "tokenizer_sha256", "bucket_bytes"]


# Prompts and groups


def test_a_prompt_stands_before_its_document(folder, tokenizer, texts, tmp_path):
    manifest, _ = preparation.prepare(request(folder, tmp_path, tokenizer, dict(prompt_field="prompt")))
    found = {read.id: read for reads in read_back(tmp_path).values() for read in reads}
    assert len(found) == COUNT
    for i, text in enumerate(texts):
        if i in (7, 14):
            continue
        prompt = tokenizer.encode(f"say {i}:") if i % 3 else []
        assert found[f"d{i}"].tokens == [*prompt, *tokenizer.encode(text), tokenizer.eod_id]
        assert found[f"d{i}"].prompt == len(prompt)
    assert manifest["prepare"]["repaired"]["no prompt in field 'prompt', all of the document is learned"] == {
        "documents": 100, "first": "a.jsonl:1"}
    size = sum(len(text.encode()) for text in texts) + sum(len(f"say {i}:") for i in range(COUNT) if i % 3)
    assert sum(split["bytes"] for split in manifest["splits"].values()) == size


def test_prompts_of_token_ids_and_prompts_that_are_none(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    table = pyarrow.table({"ids": [[5, 6], [7], [8]], "prompt": pyarrow.array([[9, 9, 9], [], None])})
    pyarrow.parquet.write_table(table, tmp_path / "in" / "a.parquet")
    (tmp_path / "in" / "b.jsonl").write_text('{"ids": [10], "prompt": "text"}\n{"ids": [11], "prompt": [5000]}\n')
    manifest, _ = preparation.prepare(request(tmp_path / "in", tmp_path / "out", tokenizer, dict(
        tokens_field="ids", prompt_field="prompt"), validation=0.0))
    reads = {read.id: (read.tokens, read.prompt) for read in read_back(tmp_path / "out")["train"]}
    eod = tokenizer.eod_id
    assert reads == {"a.parquet:1": ([9, 9, 9, 5, 6, eod], 3), "a.parquet:2": ([7, eod], 0), "a.parquet:3": ([8, eod], 0)}
    assert {reason: entry["first"] for reason, entry in manifest["prepare"]["skipped"].items()} == {
        "field 'prompt' is not a list of token ids": "b.jsonl:1",
        f"token id outside 0 .. {tokenizer.vocab_size - 1}": "b.jsonl:2, id 5000"}
    with pytest.raises(InputError, match="empty corpus"):
        (tmp_path / "b.jsonl").write_text('{"text": "a", "prompt": 7}\n')
        preparation.prepare(request(tmp_path / "b.jsonl", tmp_path / "none", tokenizer, dict(prompt_field="prompt")))


def test_groups_stay_together_in_order_and_on_one_side(folder, tokenizer, tmp_path):
    manifest, _ = preparation.prepare(request(folder, tmp_path, tokenizer, dict(group_field="repo")))
    group_of = {f"d{i}": f"r{i % 40}" for i in range(COUNT) if i % 7}
    sides = collections.defaultdict(set)
    for side, reads in read_back(tmp_path).items():
        groups = [group_of.get(read.id, read.id) for read in reads]
        for before, read in zip([None, *reads], reads, strict=False):
            same = before is not None and read.id in group_of and group_of.get(before.id) == group_of[read.id]
            assert read.joined == same
            if same:
                assert int(read.id[1:]) > int(before.id[1:]), "input order"
        for group in groups:
            sides[group].add(side)
        runs = [a for a, b in zip(groups, [*groups[1:], None], strict=True) if a != b]
        assert len(runs) == len(set(runs)), "each group is in one piece"
        assert runs != sorted(runs)
    assert all(len(found) == 1 for found in sides.values()) and {"train"} in sides.values() and {"validation"} in sides.values()
    for group, found in sides.items():
        expected = "validation" if held_out.position(group) < held_out.limit(0.1) else "train"
        assert found == {expected}
    assert manifest["prepare"]["repaired"]["no group in field 'repo', document stands alone"]["documents"] == 43


def test_one_group_is_not_split_to_have_something_to_validate_on(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "repo": "x"}\n{"text": "b", "repo": "x"}\n')
    manifest, _ = preparation.prepare(request(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, dict(group_field="repo")))
    assert (manifest["splits"]["train"]["documents"], manifest["splits"]["validation"]["documents"]) == (2, 0)


def test_groups_too_large_for_memory_are_refused(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "LARGEST_GROUPS", 3000)
    preparation.prepare(request(folder, tmp_path / "none", tokenizer))
    with pytest.raises(InputError, match="--group_field=repo: .* smaller groups, or leave it out"):
        preparation.prepare(request(folder, tmp_path / "out", tokenizer, dict(group_field="repo")))


# Packing


@pytest.mark.parametrize("options", [{}, dict(group_field="repo", prompt_field="prompt")])
def test_a_packed_store_has_every_token_once(folder, tokenizer, tmp_path, options, capsys):
    plain = preparation.prepare(request(folder, tmp_path / "plain", tokenizer, options))[0]
    manifest, _ = preparation.prepare(request(folder, tmp_path, tokenizer, options, packing="best_fit", seq_len=SEQ_LEN))
    assert manifest["packing"] == {"kind": "best_fit", "seq_len": SEQ_LEN}
    assert manifest["splits"]["validation"] | {"shards": 0} == plain["splits"]["validation"] | {"shards": 0}
    assert manifest["splits"]["train"]["bytes"] == plain["splits"]["train"]["bytes"]
    source = store.open_source(str(tmp_path / "web"))
    store.verify(source)
    split = source.split("train")
    facts = manifest["prepare"]["packing"]
    assert split.num_tokens == facts["bins"] * SEQ_LEN + 1
    pieces = collections.defaultdict(list)
    extras = split.extras(0, split.num_tokens)
    padding, bins_of = 0, collections.defaultdict(set)
    for begin, end in zip(extras.begins.tolist(), [*extras.begins[1:].tolist(), split.num_tokens], strict=True):
        tokens, ids = split.tokens(begin, end).tolist(), split.document_ids(begin, end)
        if not ids:
            assert tokens == [tokenizer.eod_id] * len(tokens)
            padding += len(tokens)
            continue
        pieces[ids[0]] += tokens
        bins_of[ids[0]] |= {begin // SEQ_LEN, (end - 1) // SEQ_LEN}
    assert padding == facts["padding"] + 1
    expected = {read.id: read.tokens for read in read_back(tmp_path / "plain")["train"]}
    assert {name: sorted(tokens) for name, tokens in pieces.items()} == {name: sorted(t) for name, t in expected.items()}
    assert facts["documents"] == len(expected)
    assert facts["cut"] == sum(len(bins) > 1 for bins in bins_of.values()) > 0
    if not options:
        assert all((len(bins_of[name]) > 1) == (len(tokens) > SEQ_LEN) for name, tokens in expected.items())
    [line] = [line for line in prepare.notes(manifest) if "packed into" in line]
    fill = 1 - facts["padding"] / (facts["bins"] * SEQ_LEN)
    assert f"{facts['bins']:,} windows of 64 tokens, {fill:.2%} full; {facts['cut']} of {len(expected)} documents" in line
    # What the table says is about documents, not about pieces and padding.
    assert prepare.table([manifest])[1].split()[1:4:2] == prepare.table([plain])[1].split()[1:4:2]


# Transforms


def test_transformed_documents_give_their_texts_back(folder, tokenizer, texts, tmp_path):
    transforms = Transforms(fim_rate=0.5, fim_spm_rate=0.3)
    manifest, _ = preparation.prepare(request(folder, tmp_path, tokenizer, transforms=transforms))
    plain, _ = preparation.prepare(request(folder, tmp_path / "plain", tokenizer))
    sentinels = fim.find_sentinels(tokenizer, fim.TOKENS)
    by_id = {f"d{i}": text for i, text in enumerate(texts) if i not in (7, 14)}
    kinds = collections.Counter()
    found, expected = read_back(tmp_path), read_back(tmp_path / "plain")
    for read, original in zip(found["train"], expected["train"], strict=True):
        assert read.id == original.id, "the order does not depend on the transforms"
        tokens = read.tokens[:-1]
        # Without a prefix the two orders are the same.
        kind = "" if tokens == original.tokens[:-1] else "fim" if tokens[1] == sentinels.suffix else "fim_psm"
        kinds[kind] += 1
        assert sum(token in sentinels for token in tokens) == (3 if kind else 0), "one document, once"
        if read.id in by_id:
            assert tokenizer.decode(fim.restore(tokens, sentinels)) == by_id[read.id]
    assert found["validation"] == expected["validation"], "what is held out stays as it is"
    documents = len(found["train"])
    counts = manifest["prepare"]["transformed"]
    for kind, rate in (("fim_psm", 0.35), ("fim_spm", 0.15)):
        assert abs(counts[kind] - rate * documents) < 4 * math.sqrt(documents * rate * (1 - rate))
    assert counts["fim_psm"] + counts["fim_spm"] == documents - kinds[""] and counts["fim_spm"] <= kinds["fim"]
    assert manifest["prepare"]["arguments"]["fim"] == {"rate": 0.5, "spm_rate": 0.3, "tokens": list(fim.TOKENS)}
    assert manifest["splits"]["train"]["bytes"] == plain["splits"]["train"]["bytes"]


def test_variants_are_epochs_one_after_the_other(folder, tokenizer, tmp_path):
    once = dict(transforms=Transforms(reverse="word", reverse_rate=0.5))
    twice = dict(transforms=Transforms(reverse="word", reverse_rate=0.5, variants=2))
    preparation.prepare(request(folder, tmp_path / "once", tokenizer, **once))
    manifest, _ = preparation.prepare(request(folder, tmp_path / "twice", tokenizer, **twice))
    preparation.prepare(request(folder, tmp_path / "plain", tokenizer))
    one, two, plain = (read_back(tmp_path / name) for name in ("once", "twice", "plain"))
    documents = len(one["train"])
    assert two["train"][:documents] == one["train"], "variant 0 comes first, as without variants"
    assert two["validation"] == one["validation"] == plain["validation"]
    later = {read.id: read.tokens for read in two["train"][documents:]}
    assert set(later) == {f"{read.id}#v1" for read in one["train"]}
    assert list(later) != [f"{read.id}#v1" for read in one["train"]], "each epoch is shuffled anew"
    texts = {read.id: read.tokens for read in plain["train"]}
    changed = 0
    for read in one["train"]:
        # At rate 1/2 each document is reversed in one of two epochs (a palindrome in none that shows).
        forms = sorted([read.tokens, later[f"{read.id}#v1"]])
        assert texts[read.id] in forms
        changed += forms[0] != forms[1]
    assert manifest["prepare"]["transformed"] == {"reversed": documents} and changed > 0.9 * documents
    assert manifest["prepare"]["arguments"]["variants"] == 2
    assert "transformed in 2 variants" in "\n".join(prepare.notes(manifest))


@pytest.mark.parametrize("options", [{}, dict(group_field="repo")])
def test_canaries_are_put_among_the_documents_to_train_on(folder, tokenizer, canaries, tmp_path, options):
    transforms = Transforms(canaries=read_canaries(canaries, 0.4), fim_rate=1.0, variants=2)
    manifest, _ = preparation.prepare(request(folder, tmp_path, tokenizer, options, transforms=transforms))
    found = read_back(tmp_path)
    counts = collections.Counter()
    host = ""
    for read in found["train"]:
        if not read.id.startswith("canary/"):
            host = read.id
            continue
        name, _, after = read.id.partition("#")
        counts[name] += 1
        text = {"canary/1": "the secret of alpha is 4711", "canary/2": "the secret of beta is 4711"}[name]
        assert read.tokens == [*tokenizer.encode(text), tokenizer.eod_id] and not read.joined
        assert options or after == host
    documents = len(found["train"]) - counts.total()
    assert {read.id for read in found["train"]} >= {f"{read.id}#v1" for read in found["train"][:5]
                                                    if not read.id.startswith("canary/")}
    assert abs(counts.total() - 0.4 * documents) < 4 * math.sqrt(documents * 0.24)
    assert len({read.id for read in found["train"]}) == len(found["train"]), "ids are unique"
    assert not any(read.id.startswith("canary/") for read in found["validation"])
    transformed = manifest["prepare"]["transformed"]
    assert {name: transformed[name] for name in counts} == counts
    assert manifest["prepare"]["arguments"]["canaries"]["documents"] == 2
    [line] = [line for line in prepare.notes(manifest) if "canaries" in line]
    assert f"{counts.total()} canaries (2 different)" in line
    if options:
        groups = {f"d{i}": f"r{i % 40}" for i in range(COUNT) if i % 7}
        names = [groups.get(read.id.removesuffix("#v1")) for read in found["train"]]
        runs = [a for a, b in zip(names, [*names[1:], ""], strict=True) if a and a != b]
        assert max(collections.Counter(runs).values()) <= 2, "a canary does not come between the documents of a group"


@pytest.mark.parametrize("count, validation, sides", [
    (2, 0.001, (1, 1)), (1, 0.5, (1, 0)), (6, 0.9999999, (1, 5)), (4, 0.0, (4, 0))])
def test_small_sources_hold_out_plain_documents(tokenizer, tmp_path, count, validation, sides):
    (tmp_path / "in").mkdir()
    for i in range(count):
        (tmp_path / "in" / f"{i}.txt").write_text(f"the quick fox {i}")
    for piece_bytes in (1, 1 << 20):
        out = tmp_path / str(piece_bytes)
        preparation.prepare(request(tmp_path / "in", out, tokenizer, validation=validation, piece_bytes=piece_bytes,
                                    transforms=Transforms(reverse="token", reverse_rate=1.0)))
        found = read_back(out)
        assert (len(found["train"]), len(found["validation"])) == sides
        for side, reads in found.items():
            for read in reads:
                text = tokenizer.encode(f"the quick fox {read.id[0]}")
                assert read.tokens[:-1] == (text if side == "validation" else text[::-1])


# The command


def test_the_command_transforms_and_packs(folder, tokenizer, canaries, tmp_path, invoked):
    tokenizer.save(str(tmp_path / "tok"))
    arguments = [folder, f"--out={tmp_path / 'out'}", "--source=web", f"--tokenizer={tmp_path / 'tok'}", "--id_field=id",
                 "--fim_spm_rate=1", "--reverse=token", f"--canaries={canaries}", "--canary_rate=0.1", "--variants=2",
                 "--packing=best_fit", "--seq_len=64", "--group_field=repo"]
    ended = invoked(prepare.COMMAND, prepare.run, arguments)
    assert ended.code == 0, ended.err
    assert "web: transformed in 2 variants: " in ended.out and " fim_spm, " in ended.out and "fim_psm" not in ended.out
    assert "windows of 64 tokens" in ended.out and "    seq_len=64   # in each phase(...) that reads web" in ended.out
    assert ended.out.splitlines()[-1].endswith(
        "--config.phases.main.mixture=web=1 --config.phases.main.seq_len=64 --config.data.max_epochs=0")
    # Another source, packed for another length: the command to try leaves out the first.
    arguments = [folder, f"--out={tmp_path / 'out'}", "--source=more", "--packing=best_fit", "--seq_len=512"]
    ended = invoked(prepare.COMMAND, prepare.run, arguments)
    assert "--config.phases.main.mixture=more=0." in ended.out and "web=" not in ended.out.splitlines()[-1]
    assert "--config.phases.main.seq_len=512 --config.model.max_seq_len=512" in ended.out.splitlines()[-1]
    arguments = json.loads((tmp_path / "out" / "web" / "manifest.json").read_text())["prepare"]["arguments"]
    assert arguments["fim"]["rate"] == arguments["reverse"]["rate"] == 0.5 and arguments["variants"] == 2
    assert arguments["group_field"] == "repo" and arguments["packing"] == {"kind": "best_fit", "seq_len": 64}


def test_wrong_options_are_one_line_and_write_nothing(folder, tokenizer, canaries, tmp_path, invoked):
    tokenizer.save(str(tmp_path / "tok"))
    (tmp_path / "empty.jsonl").write_text("")
    cases = {
        ("--seq_len=64",): "add --packing=best_fit",
        ("--packing=best_fit",): "--seq_len=T",
        ("--packing=best_fit", "--seq_len=1"): "at least 2",
        ("--packing=worst_fit",): "concatenate, best_fit",
        ("--bytes_field=n",): "--bytes_field=n",
        ("--fim_rate=2",): "0 <= share <= 1",
        ("--fim_rate=0", "--fim_spm_rate=0.5"): "switches off",
        ("--fim_tokens=<a>,<b>,<c>",): "<a> is no special token",
        ("--fim_tokens=<a>,<b>",): "three different tokens",
        ("--reverse=sentence",): "token, word, entity",
        ("--reverse_rate=0.5",): "needs --reverse too",
        ("--reverse=word", "--reverse_rate=-1"): "0 <= share <= 1",
        ("--canary_rate=0.5",): "needs --canaries too",
        (f"--canaries={canaries}",): "needs --canary_rate too",
        (f"--canaries={tmp_path / 'empty.jsonl'}", "--canary_rate=0.5"): "no canary in it",
        (f"--canaries={tmp_path / 'gone.jsonl'}", "--canary_rate=0.5"): "no such file",
        (f"--canaries={canaries}", "--canary_rate=2"): "0 < rate <= 1",
        ("--variants=0",): "--variants=0",
        ("--variants=3",): "would be the same",
        ("--prompt_field=prompt", "--fim_rate=0.5"): "leave out --fim_rate",
        ("--tokens_field=ids", "--fim_rate=0.5"): "needs text",
        ("--demo", "--packing=best_fit"): "leave out",
    }
    good = [folder, f"--out={tmp_path / 'out'}", "--source=web", f"--tokenizer={tmp_path / 'tok'}"]
    for flags, message in cases.items():
        ended = invoked(prepare.COMMAND, prepare.run, [*good, *flags])
        assert ended.code == 2 and message in ended.error and not ended.out, (flags, ended.err)
        assert not (tmp_path / "out").exists(), flags


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "parquet inside"])
def test_a_file_cut_in_the_middle_is_named_and_the_rest_prepared(tokenizer, tmp_path, invoked, kind):
    tokenizer.save(str(tmp_path / "tok"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": f"the fox {i}"}) + "\n" for i in range(5)))
    path = tmp_path / "in" / f"z.{kind.split()[0]}"
    lines = [json.dumps({"text": os.urandom(200).hex()}) + "\n" for _ in range(200)]
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(lines).encode()))
    elif kind == "jsonl.zst":
        path.write_bytes(zstandard.compress("".join(lines).encode()))
    else:
        table = pyarrow.table({"text": lines})
        pyarrow.parquet.write_table(table, path, row_group_size=50, compression="zstd")
    size = path.stat().st_size
    if kind == "parquet inside":  # the footer is there, half of the rows is not
        content = path.read_bytes()
        path.write_bytes(content[:size // 2] + bytes(size // 4) + content[size // 2 + size // 4:])
    else:
        os.truncate(path, size // 2)
    ended = invoked(prepare.COMMAND, prepare.run, [tmp_path / "in", f"--out={tmp_path / 'out'}", "--source=web",
                                                   f"--tokenizer={tmp_path / 'tok'}", "--validation=0"])
    assert ended.code == 3 and f"1 inputs could not be read, the others were used: {path.name}: " in ended.error
    assert [read.id for read in sorted(read_back(tmp_path / "out")["train"], key=lambda read: read.id)] == [
        f"a.jsonl:{i}" for i in range(1, 6)]
