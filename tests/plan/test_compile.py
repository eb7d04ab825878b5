"""Compiling a step with libtpu: the cache, turns, refusals, crashes; and, where libtpu is, a small step on v5e:2x2."""

from __future__ import annotations

import fcntl
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading

import pytest

import neo.config
from neo.errors import InputError
from neo.plan import child, compile, libtpu
from neo.plan.topology import parse

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed: pip install -e '.[plan]'")
TINY = {"model.num_layers": 1, "model.d_model": 128, "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 128,
        "model.d_ff": 256, "model.vocab_size": 512, "phases.fundamental.seq_len": 256, "phases.fundamental.global_batch": 8}
GIB = 2**30


@pytest.fixture
def turns(tmp_path, monkeypatch):
    """A lock of this test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / libtpu.LOCK


def stub(monkeypatch, program):
    """The child is this Python program instead; LIBTPU_INIT_ARGS and the job are there."""
    monkeypatch.setattr(libtpu, "version", lambda: "0.0.1")
    monkeypatch.setattr(libtpu, "command", lambda module, *arguments: [sys.executable, "-c", program, *map(str, arguments)])


def entry(cache, key="k", **facts):
    (cache / key).mkdir(parents=True)
    known = dict(lower_s=1.5, compile_s=20.0, versions={"jax": "0"}, mesh={"fsdp": 4})
    (cache / key / "facts.json").write_text(json.dumps({**known, **facts}))
    with gzip.open(cache / key / "step.hlo.gz", "wt") as file:
        file.write("HloModule step")


def test_an_entry_of_the_cache_is_read_and_flags_reach_the_compiler(tmp_path, turns, monkeypatch):
    cache = tmp_path / "cache"
    entry(cache, memory=dict(arguments=3 * GIB, temporaries=GIB, peak=5 * GIB))
    stub(monkeypatch, "import json, os, sys\n"
                      "job = json.load(open(sys.argv[1]))\n"
                      "assert job['flags'] == os.environ['LIBTPU_INIT_ARGS'].split() == ['--a=1', '--b=x']\n"
                      "assert (job['topology'], job['phase']) == ('v5e:2x2', 'fundamental') and 'XLA_FLAGS' not in os.environ\n"
                      "print('noise of C++')\n"
                      "print(json.dumps(dict(stage='compiling', lower_s=1.5)), flush=True)\n"
                      "print(json.dumps(dict(key='k', cached=True)))")
    monkeypatch.setenv("XLA_FLAGS", "--xla_nothing=1")
    said = []
    flag = type("Flag", (), dict(name="b", value="x"))()
    got = compile.compile_step(neo.config.load("neo_7b"), parse("v5e:2x2"), flags=["--a=1", flag], cache=cache,
                               progress=said.append)
    assert got.hlo == "HloModule step" and got.cached and got.memory.peak == 5 * GIB and got.memory.fits
    assert (got.lower_s, got.compile_s, got.facts["mesh"]) == (1.5, 20.0, {"fsdp": 4})
    assert said == ["lowering the step for v5e:2x2", "compiling the step for v5e:2x2 (lowered in 1.5 s)"]

    def ask(flags=("--a=1", "--b=x"), seq_len=8192):
        said.clear()
        config = neo.config.load("neo_7b", {"phases.fundamental.seq_len": seq_len})
        compile.compile_step(config, parse("v5e:2x2"), flags=flags, cache=cache, progress=said.append)
        return said

    assert ask() == [], "the same question is answered without a child"
    assert ask(seq_len=4096), "another config is another question"
    stub(monkeypatch, "print('{\"key\": \"k\", \"cached\": true}')")
    assert ask(flags=("--a=2", "--b=x")), "and so are other flags"


def test_a_program_that_is_too_large_is_no_error(tmp_path):
    entry(tmp_path, refused="the compiler ran out of HBM", refused_bytes=[20 * GIB, 16 * GIB])
    got = compile.read(tmp_path, "k", 16 * GIB, cached=False)
    assert got.refused and not got.memory.fits and got.memory.spare == -4 * GIB
    text = ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 25.31G of 15.75G "
            "hbm. Exceeded hbm capacity by 9.56G.\n\nTotal hbm usage >= 25.81G:\n    reserved  517.00M")
    newer = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
             "temporaries (25.31G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org/xla")
    for refusal in (text, newer):
        assert child.used_bytes(refusal) == (round(25.31 * GIB), round(15.75 * GIB))
        assert child.first_lines(refusal) == "the compiler ran out of HBM: 25.31 GiB needed, 15.75 GiB there"
    assert child.first_lines("Ran out of\nmemory in vmem") == "Ran out of memory in vmem"


@pytest.mark.parametrize("said", ["ERROR: Unknown command line flag 'xla_bogus'",
                                  "noise\nERROR: Illegal value 'abc' specified for flag 'xla_bogus'\nmore"])
def test_a_flag_that_libtpu_refuses_is_named(tmp_path, turns, monkeypatch, said):
    stub(monkeypatch, f"import sys; sys.exit({said!r})")
    with pytest.raises(InputError, match="libtpu 0.0.1 does not take the flag --xla_bogus=abc"):
        compile.compile_step(neo.config.load("neo_7b"), parse("v5e:2x2"), flags=["--xla_other=1", "--xla_bogus=abc"],
                             cache=tmp_path)


def test_a_compiler_that_crashes_refuses_one_plan(tmp_path, turns, monkeypatch):
    stub(monkeypatch, "import os, sys\n"
                      "print('F1121 20:49:57.573464   12858 llo.cc:281] Check failed: a == b', file=sys.stderr, flush=True)\n"
                      "os.abort()")
    got = compile.compile_step(neo.config.load("neo_7b"), parse("v5e:2x2"), cache=tmp_path)
    assert "crashed: signal 6: Check failed: a == b (llo.cc:281)" in got.refused and not got.memory.fits


def test_what_the_user_can_mend_and_what_not(tmp_path, turns, monkeypatch):
    config, topology = neo.config.load("neo_7b"), parse("v5e:2x2")
    stub(monkeypatch, "import json, sys; print(json.dumps(dict(input='config.mesh: no'))); sys.exit(2)")
    with pytest.raises(InputError, match="config.mesh: no"):
        compile.compile_step(config, topology, cache=tmp_path)
    stub(monkeypatch, "raise ValueError('a bug')")
    with pytest.raises(RuntimeError, match="ValueError: a bug"):
        compile.compile_step(config, topology, cache=tmp_path)
    with pytest.raises(InputError, match="--phase=fundamentl: there is no such phase .did you mean .fundamental."):
        compile.compile_step(config, topology, "fundamentl", cache=tmp_path)


def test_processes_take_turns_and_say_that_they_wait(turns):
    held = os.open(turns, os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    said, heard, entered = [], threading.Event(), threading.Event()

    def wait():
        with libtpu.turn(lambda text: (said.append(text), heard.set())):
            entered.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert heard.wait(60) and not entered.is_set()
    os.close(held)
    waiting.join(60)
    assert entered.is_set() and said == [f"waiting for another libtpu process (lock {turns})"]


def test_a_child_keeps_the_turn_of_a_parent_that_is_gone(turns):
    with libtpu.turn() as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    try:
        with open(turns) as mine, pytest.raises(BlockingIOError):
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        child.communicate(b"\n")
    with open(turns) as mine:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_of_the_compilers_log_only_what_matters_is_left():
    line = "W1121 20:49:57.573464   12858 spmd.cc:281] [SPMD] Involuntary full rematerialization. The compiler cannot go from"
    log = f"WARNING: Logging before InitGoogle()\nE0000 00:00:1795293127.8 32357 common_lib.cc:860] bad host\n{line}\n{line}\n"
    assert libtpu.warnings(log) == ("[SPMD] Involuntary full rematerialization. The compiler cannot go from",)
    assert libtpu.warnings("nothing\n") == ()
    assert libtpu.last_words("Traceback\n  x\nValueError: no\n\n") == "ValueError: no"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(cache, the step compiled, what was said)."""
    cache, said = tmp_path_factory.mktemp("plan"), []
    got = compile.compile_step(neo.config.load("neo_7b", TINY), parse("v5e:2x2"), cache=cache, progress=said.append)
    return cache, got, said


@needs_libtpu
def test_a_small_step_is_compiled_as_a_run_would_and_found_again(small):
    cache, got, said = small
    assert not got.refused and "is_scheduled=true" in got.hlo and not got.cached
    assert got.facts["attention"] == "pallas_tpu" and "neo_attention_backward" in got.hlo
    assert got.facts["mesh"] == dict(replica=1, fsdp=4, expert=1, context=1, tensor=1)
    assert (got.facts["micro_batch"], got.facts["accumulation"]) == (2, 1)
    # Parameters and both moments in float32, 1/4 of each; batch and scalars are small.
    assert 12 * got.facts["parameters"] / 4 < got.memory.arguments < 12 * got.facts["parameters"] / 4 * 1.2
    assert got.memory.arguments < got.memory.peak < got.memory.capacity == 15.75 * GIB and got.memory.temporaries > 0
    assert any(text.startswith("compiling") for text in said)
    # Another config, but the same program: lowered, and found.
    again = compile.compile_step(neo.config.load("neo_7b", {**TINY, "log.every_steps": 7}), parse("v5e:2x2"), cache=cache,
                                 progress=said.append)
    assert again.cached and again.key == got.key and again.hlo == got.hlo and again.memory == got.memory
    assert said[-1].startswith("lowering")


@needs_libtpu
def test_its_kernels_have_prices(small):
    from neo.plan.hlo import kernel_calls
    from neo.plan.hlo import parse as program
    from neo.plan.kernels import kernel_prices
    cache, got, _ = small
    said = []
    price = kernel_prices(got, parse("v5e:2x2"), cache=cache, progress=said.append)
    cycles = {call.name: price(call) for call in kernel_calls(program(got.hlo))}
    assert set(cycles) == {"neo_attention_forward", "neo_attention_backward"}
    # Two products forward, five backward, of a causal half of 256 x 256 x 128 for 2 sequences of 2 heads; 4 units of 128 x 128.
    ideal = 4 * 256 * 257 / 2 * 128 * 2 / (2 * 128 * 128 * 4)
    assert 2 * ideal < cycles["neo_attention_forward"] < 100 * ideal
    assert 5 * ideal < cycles["neo_attention_backward"] < 100 * ideal
    assert said and "2 kernels" in said[-1]
    said.clear()
    kernel_prices(got, parse("v5e:2x2"), cache=cache, progress=said.append)
    assert not said, "prices are kept"


@needs_libtpu
def test_the_compiler_says_by_how_much_a_step_does_not_fit(tmp_path):
    config = neo.config.load("neo_7b", {**TINY, "phases.fundamental.global_batch": 2**18, "train.micro_batch": 2**16,
                                        "train.remat": "none"})
    got = compile.compile_step(config, parse("v5e:2x2"), cache=tmp_path)
    assert "ran out of HBM" in got.refused and "\n" not in got.refused and not got.hlo
    assert not got.memory.fits and got.memory.peak > 16 * GIB
    again = compile.compile_step(config, parse("v5e:2x2"), cache=tmp_path)
    assert again.cached and again.refused == got.refused


@pytest.mark.parametrize(("machine", "part"), [("x86_64", "[plan]'"), ("arm64", "for Linux on x86_64, this is Linux on arm64")])
def test_a_missing_libtpu_is_named_with_what_helps(monkeypatch, machine, part):
    monkeypatch.setattr(libtpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(libtpu.platform, "system", lambda: "Linux")
    monkeypatch.setattr(libtpu.platform, "machine", lambda: machine)
    with pytest.raises(InputError, match="'libtpu', which is not installed") as caught:
        libtpu.version()
    assert part in str(caught.value) and "\n" not in str(caught.value)
