"""The shared command line grammar, tested through small commands of its own."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.cli import JSON, Argument, Command, HelpAsked, help_text, invoke, main, parse, whole_number
from neo.errors import InputError, RestartSafe, StoppedForPerson

SHOW = Command(
    prog="neo.show",
    summary="Show things.",
    arguments=(
        Argument("checkpoint", "where from", positional=True),
        Argument("prompt", "text to continue", default=None, shown="stdin"),
        Argument("max_new_tokens", "how many", default=128, type=int),
        Argument("temperature", "randomness", default=0.8, type=float),
        Argument("mode", "how", default="replace", choices=("replace", "skip")),
        Argument("tag", "labels", default=(), many=True),
        JSON,
    ),
    examples=("python -m neo.show runs/x", "python -m neo.show runs/x --json"),
)
TRAIN = Command(
    prog="neo.t", summary="Train.", arguments=(Argument("config", "recipe"), JSON), takes_overrides=True)
CONVERT = Command(
    prog="neo.c",
    summary="Convert.",
    arguments=(JSON,),
    verbs={
        "to-hf": Command("", "Write.", (Argument("out", "where", positional=True),)),
        "average": Command("", "Mean.", (Argument("checkpoint", "what", positional=True, many=True),
                                         Argument("out", "where", positional=True))),
    },
)


def fails(command: Command, *argv: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(command, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_and_both_ways_to_give_a_value():
    assert vars(parse(SHOW, ["runs/x"])) == {
        "checkpoint": "runs/x", "prompt": None, "max_new_tokens": 128, "temperature": 0.8, "mode": "replace",
        "tag": (), "json": False, "verb": "", "overrides": [], "given": frozenset({"checkpoint"})}
    for argv in (["--max_new_tokens=7", "x"], ["x", "--max-new-tokens", "7"], ["--max-new_tokens=7", "x"]):
        assert parse(SHOW, argv).max_new_tokens == 7
    assert parse(SHOW, ["x", "--prompt", "a = b"]).prompt == "a = b"
    assert parse(SHOW, ["x", "--prompt=--a=b"]).prompt == "--a=b"
    assert parse(SHOW, ["x", "--prompt="]).prompt == ""
    assert parse(SHOW, ["x", "--temperature", "-1.5"]).temperature == -1.5
    assert parse(SHOW, ["x", "--tag=a", "--tag", "b"]).tag == ("a", "b")
    assert parse(SHOW, ["--", "--x"]).checkpoint == "--x"


def test_bools_do_not_swallow_the_next_word():
    assert parse(SHOW, ["--json", "runs/x"]).json is True
    assert parse(SHOW, ["--json", "runs/x"]).checkpoint == "runs/x"
    assert parse(SHOW, ["--json", "False", "runs/x"]).json is False
    assert parse(SHOW, ["--json=no", "runs/x"]).json is False
    assert "maybe" in fails(SHOW, "x", "--json=maybe")


def test_mistakes_are_named_in_one_line():
    assert "did you mean '--prompt'" in fails(SHOW, "x", "--promt=a")
    assert "unknown flag --max_new" in fails(SHOW, "x", "--max_new=3"), "no abbreviations"
    assert "unknown flag -p" in fails(SHOW, "x", "-p", "a")
    assert "--prompt needs a value" in fails(SHOW, "x", "--prompt")
    assert "--prompt needs a value" in fails(SHOW, "x", "--prompt", "--json")
    assert "'1.5' is not a whole number" in fails(SHOW, "x", "--max_new_tokens=1.5")
    assert "'warm' is not a number" in fails(SHOW, "x", "--temperature=warm")
    assert "did you mean 'skip'" in fails(SHOW, "x", "--mode=skp")
    assert "CHECKPOINT is missing" in fails(SHOW)
    assert "unexpected argument 'y'" in fails(SHOW, "x", "y")
    assert "--config is missing" in fails(TRAIN)


def test_overrides_keep_their_order_and_text():
    args = parse(TRAIN, ["--config=c", "--config.a.b=1e5", "--config.mesh.fsdp", "-1", "--config.a.b=x=y", "--json"])
    assert args.config == "c"
    assert args.overrides == [("a.b", "1e5"), ("mesh.fsdp", "-1"), ("a.b", "x=y")]
    assert "--config.a.b needs a value" in fails(TRAIN, "--config=c", "--config.a.b")
    assert "--config.train.steps" in fails(TRAIN, "--config=c", "--train.steps=3")
    assert "unknown flag" in fails(SHOW, "x", "--config.a.b=1")


def test_verbs():
    args = parse(CONVERT, ["to_hf", "there", "--json"])
    assert (args.verb, args.out, args.json) == ("to-hf", "there", True)
    args = parse(CONVERT, ["average", "a", "b", "c", "out"])
    assert (args.checkpoint, args.out) == (("a", "b", "c"), "out")
    assert "CHECKPOINT... is missing" in fails(CONVERT, "average", "out")
    assert "did you mean 'average'" in fails(CONVERT, "averge")
    assert "one of to-hf, average" in fails(CONVERT)


def test_optional_positional_takes_only_what_is_left():
    command = Command("p", "s", (Argument("a", "a", positional=True), Argument("b", "b", default="B", positional=True)))
    assert (parse(command, ["1"]).a, parse(command, ["1"]).b) == ("1", "B")
    assert (parse(command, ["1", "2"]).a, parse(command, ["1", "2"]).b) == ("1", "2")


def test_declarations_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="twice"):
        Command("p", "s", (Argument("a-b", ""), Argument("a_b", "")))
    with pytest.raises(ValueError, match="told apart"):
        Command("p", "s", tuple(Argument(name, "", positional=True, many=True) for name in "ab"))


@given(st.integers(-10**25, 10**25))
def test_whole_numbers_are_exact(number):
    assert whole_number(str(number)) == number
    assert whole_number(f"{number:_}") == number
    assert whole_number(f"{number}e3") == number * 1000


def test_whole_number_forms():
    assert whole_number("1e5") == 100_000
    assert whole_number("3.7e12") == 3_700_000_000_000
    for text in ("1.5", "nan", "inf", "1e999999999", "", "0x10", "ten"):
        with pytest.raises(ValueError):
            whole_number(text)


def test_help_names_every_argument_with_default_and_two_examples():
    with pytest.raises(HelpAsked) as caught:
        parse(SHOW, ["x", "--prompt", "-h", "--help"])
    text = str(caught.value)
    assert text == help_text(SHOW)
    for wanted in ("Show things.", "CHECKPOINT", "--max_new_tokens=INT", "(128)", "(0.8)", "(stdin)", "replace/skip",
                   "--json", "python -m neo.show runs/x --json"):
        assert wanted in text
    assert max(map(len, text.splitlines())) <= 120
    with pytest.raises(HelpAsked, match="Mean."):
        parse(CONVERT, ["average", "--help"])
    with pytest.raises(HelpAsked, match="to-hf +Write."):
        parse(CONVERT, ["--help"])


def test_exit_codes(capsys):
    def ending(what):
        def run(args):
            if isinstance(what, BaseException):
                raise what
            return what
        code = invoke(SHOW, run, ["x"])
        return code, capsys.readouterr().err

    assert ending(None) == (0, "")
    assert ending(3) == (3, "")
    assert ending(InputError("bad thing")) == (2, "neo.show: error: bad thing\n")
    assert ending(StoppedForPerson("look")) == (3, "neo.show: error: look\n")
    assert ending(RestartSafe("again")) == (75, "neo.show: error: again\n")
    assert ending(KeyboardInterrupt()) == (130, "neo.show: interrupted\n")
    code, text = ending(OSError(errno.ENOSPC, "No space left on device", "/x/y"))
    assert code == 3 and "disk is full while writing /x/y" in text and "Traceback" not in text
    code, text = ending(ZeroDivisionError("oops"))
    assert code == 1 and "Traceback" in text and "bug in neo" in text
    code, text = ending(OSError("other"))
    assert code == 1 and "Traceback" in text


def test_main_leaves_the_process_with_the_code(capsys):
    with pytest.raises(SystemExit) as caught:
        main(SHOW, lambda args: None, ["x", "--nope"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("neo.show: error: unknown flag --nope")


def test_reader_of_stdout_that_leaves_is_no_bug():
    program = textwrap.dedent("""
        from neo.cli import Command, main
        def run(args):
            for i in range(100_000):
                print(i)
        main(Command("neo.x", "Count."), run)
    """)
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "0\n"
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait() == 1
