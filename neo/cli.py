"""The command line grammar that every neo command shares, and the way commands end.

    python -m neo.<x> [verb] [arguments] [--flag=value]

`--flag value` works too, `-` equals `_` in names, nothing is abbreviated. A module declares what it takes and
hands it over; it must be importable without running (the command table and the tests read COMMAND):

    COMMAND = Command(
        prog="neo.infer",
        summary="Continue a prompt with a trained model.",
        arguments=(
            Argument("checkpoint", "workdir, workdir@STEP or checkpoint folder", positional=True),
            Argument("prompt", "text to continue", default=None, shown="stdin, line by line"),
            Argument("top_k", "sample among the k likeliest tokens; 0 = all", default=0, type=int),
            JSON,
        ),
        examples=("python -m neo.infer runs/neo_demo --prompt='import '", ...),
    )

    def run(args: Namespace) -> int | None:
        import jax  # heavy imports belong here: --help answers in under a second
        ...

    if __name__ == "__main__":
        main(COMMAND, run)

Results go to stdout, progress and logs to stderr. Exit codes are those of `neo.errors`.
"""

from __future__ import annotations

import dataclasses
import decimal
import errno
import inspect
import math
import os
import select
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace as Namespace
from typing import Any, NoReturn

from neo.errors import InputError, NeoError, StoppedForPerson, nearest

INTERRUPTED = 130
WHOLE_NUMBER_DIGITS = 30  # ours: far above any token count; keeps `1e999999999` from filling the memory


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of a command.

    `type` is `str`, `int`, `float`, `bool`, or any function from text to a value that raises ValueError or
    InputError. A `bool` is False unless given; `--x`, `--x=true` and `--x=false` set it. `many` makes a
    tuple: the rest of the positionals, or a flag that may be repeated. `shown` replaces the default in
    the help where the default is worked out later ("all cores").
    """

    name: str
    doc: str
    default: Any = REQUIRED
    type: Callable[[str], Any] = str
    choices: tuple[Any, ...] = ()
    positional: bool = False
    many: bool = False
    shown: str = ""

    @property
    def key(self) -> str:
        """Attribute name in the Namespace."""
        return _plain(self.name)

    @property
    def required(self) -> bool:
        """Whether the command refuses to start without it."""
        return self.default is REQUIRED and self.type is not bool

    @property
    def label(self) -> str:
        """How messages and help name it: `CHECKPOINT`, `INPUT...` or `--top_k`."""
        if self.positional:
            return self.key.upper() + ("..." if self.many else "")
        return "--" + self.key

    def start_value(self) -> Any:
        """Value when it is not given."""
        if self.default is REQUIRED:
            return False if self.type is bool else () if self.many else None
        return self.default


JSON = Argument("json", "print the result as JSON on stdout", default=False, type=bool)


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command takes. With `verbs`, the first argument chooses one; `arguments` then hold for each verb.

    `takes_overrides` collects `--config.a.b=VALUE` and `--config.a.b VALUE`. `details` is called by `--help`
    only, for text that costs something to make (the list of config fields).
    """

    prog: str
    summary: str
    arguments: tuple[Argument, ...] = ()
    examples: tuple[str, ...] = ()
    verbs: Mapping[str, Command] = dataclasses.field(default_factory=dict)
    takes_overrides: bool = False
    details: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        keys = [argument.key for argument in self.arguments]
        doubles = {key for key in keys if keys.count(key) > 1}
        if doubles:
            raise ValueError(f"{self.prog}: declared twice: {sorted(doubles)}")
        if sum(argument.positional and argument.many for argument in self.arguments) > 1:
            raise ValueError(f"{self.prog}: two positional arguments that take many values cannot be told apart")


class HelpAsked(Exception):
    """`-h` or `--help` was given; the text is the help."""


def main(command: Command, run: Callable[[Namespace], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse `argv` (default: the process's own), call `run` and leave the process with its exit code."""
    sys.exit(invoke(command, run, argv))


def invoke(command: Command, run: Callable[[Namespace], int | None], argv: Sequence[str] | None = None) -> int:
    """Like `main`, but return the exit code: for tests, and for commands that call each other.

    A `NeoError` becomes one line on stderr and its exit code, Ctrl-C 130, a full disk 3; anything else is a bug in
    neo: traceback and 1 (`error.add_note("log: ...")` adds lines to the traceback).
    """
    prog = command.prog
    try:
        try:
            _refuse_foreign_package()
            args = parse(command, sys.argv[1:] if argv is None else argv)
        except HelpAsked as asked:
            print(asked)
            sys.stdout.flush()
            return 0
        code = run(args)
        sys.stdout.flush()
        return 0 if code is None else int(code)
    except NeoError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(f"{prog}: {error if error.args else 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_gone():
            return 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            print(f"{prog}: error: the disk is full{where} ({error.strerror})", file=sys.stderr)
            return StoppedForPerson.exit_code
        return _report_bug(prog)
    except Exception:
        return _report_bug(prog)


def _refuse_foreign_package() -> None:
    """InputError if `neo/__init__.py` is not ours: the unrelated `neo` was installed into the same folder later."""
    package = sys.modules.get("neo")
    if getattr(package, "DISTRIBUTION", None) != "neo-pretrain":
        raise InputError(f"{getattr(package, '__file__', 'neo')} belongs to the unrelated package 'neo', which shares "
                         "the import name: `pip uninstall neo neo-pretrain`, then install neo-pretrain again")


def _report_bug(prog: str) -> int:
    traceback.print_exc()
    print(f"{prog}: this is a bug in neo, not in your input; please report the lines above", file=sys.stderr)
    return 1


def _stdout_is_gone() -> bool:
    """Whether the reader of stdout (`| head`) has left; then keep the interpreter from complaining at exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file: a test's or a notebook's stdout
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return gone


def parse(command: Command, argv: Sequence[str]) -> Namespace:
    """Turn `argv` into a Namespace with one attribute per argument, or raise `InputError`, or `HelpAsked`.

    Besides the arguments it has `verb` (empty without verbs), `given` (keys that were typed) and `overrides`: a list
    of (path, text) in the order typed, the path without `config.` and otherwise as typed.
    """
    verb = ""
    if command.verbs:
        verb, argv = _choose_verb(command, argv)
        chosen = command.verbs[verb]
        command = dataclasses.replace(
            chosen,
            prog=f"{command.prog} {verb}",
            arguments=chosen.arguments + command.arguments,
            takes_overrides=chosen.takes_overrides or command.takes_overrides,
        )
    flags = {argument.key: argument for argument in command.arguments if not argument.positional}
    values: dict[str, Any] = {argument.key: argument.start_value() for argument in command.arguments}
    given: set[str] = set()
    loose: list[str] = []
    overrides: list[tuple[str, str]] = []

    for name, text, following in _tokens(argv):
        if name is None:
            loose.append(text)
            continue
        key = _plain(name)
        if key in ("help", "h"):
            raise HelpAsked(help_text(command))
        if command.takes_overrides and name.startswith("config."):
            path = name.removeprefix("config.")
            overrides.append((path, _value_of(f"--{name}", text, following)))
            continue
        argument = flags.get(key)
        if argument is None:
            raise InputError(f"unknown flag --{name}{_flag_hint(command, name, flags)}; --help lists what there is")
        if argument.type is bool:
            value = _bool_of(argument, text, following)
        else:
            value = parse_value(argument, _value_of(argument.label, text, following))
        if argument.many:
            value = ((*values[key], value) if key in given else (value,))
        values[key] = value
        given.add(key)

    positionals = [argument for argument in command.arguments if argument.positional]
    for argument, texts in _share_out(positionals, loose):
        parsed = tuple(parse_value(argument, text) for text in texts)
        values[argument.key] = parsed if argument.many else parsed[0]
        given.add(argument.key)
    for argument in command.arguments:
        if argument.required and argument.key not in given:
            raise InputError(f"{argument.label} is missing: {argument.doc}")
    return Namespace(**values, verb=verb, overrides=overrides, given=frozenset(given))


def parse_value(argument: Argument, text: str) -> Any:
    """Read `text` as the argument's type and check its choices; InputError names argument, text and what is right."""
    try:
        value = _READERS.get(argument.type, argument.type)(text)
    except ValueError as error:
        wanted = _TYPE_NAMES.get(argument.type)
        reason = f"is not {wanted}" if wanted else f"is not valid: {error}"
        raise InputError(f"{argument.label}: {text!r} {reason}") from None
    if argument.choices and value not in argument.choices:
        known = [str(choice) for choice in argument.choices]
        raise InputError(f"{argument.label}: {text!r} is none of {', '.join(known)}{nearest(text, known)}")
    return value


def whole_number(text: str) -> int:
    """Exact integer from `12`, `10_000`, `1e5` or `3.7e12`; ValueError for anything with a fraction."""
    try:
        number = decimal.Decimal(text.strip())
    except decimal.InvalidOperation:
        raise ValueError(f"{text!r} is not a whole number") from None
    if not number.is_finite() or number.adjusted() > WHOLE_NUMBER_DIGITS or number != int(number):
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)


def finite_number(text: str) -> float:
    """Float from text; ValueError for infinities and NaN."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a finite number")
    return number


def truth(text: str) -> bool:
    """Bool from true/false, yes/no, 1/0 in any case; ValueError otherwise."""
    word = text.strip().lower()
    if word not in _TRUTH:
        raise ValueError(f"{text!r} is neither true nor false")
    return _TRUTH[word]


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_READERS: dict[Any, Callable[[str], Any]] = {int: whole_number, float: finite_number, bool: truth}
_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}


def help_text(command: Command) -> str:
    """The text of `--help`: one sentence, arguments with defaults, examples, and the command's own details."""
    positionals = [argument for argument in command.arguments if argument.positional]
    flags = [argument for argument in command.arguments if not argument.positional]
    usage = ["python -m", command.prog]
    usage += ["VERB"] if command.verbs else []
    usage += [a.label if a.required else f"[{a.label}]" for a in positionals]
    usage += [f"{a.label}={_kind(a)}" for a in flags if a.required]
    usage += ["[--flag=value ...]"] if any(not a.required for a in flags) else []
    usage += ["[--config.a.b=VALUE ...]"] if command.takes_overrides else []
    lines = [command.summary, "", "  " + " ".join(usage), ""]
    if command.verbs:
        lines += ["verbs:"]
        lines += _columns([(name, verb.summary) for name, verb in command.verbs.items()])
        lines += ["", f"  python -m {command.prog} VERB --help tells more about one", ""]
    rows = [(_form(a), f"{a.doc} {_default_note(a)}".strip()) for a in positionals + flags]
    if command.takes_overrides:
        rows.append(("--config.a.b=VALUE", "set field b of config group a; may be repeated, the last one counts"))
    rows.append(("-h, --help", "show this text"))
    lines += ["arguments:", *_columns(rows)]
    if command.examples:
        lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    if command.details is not None:
        lines += ["", inspect.cleandoc(command.details())]
    return "\n".join(lines)


def _choose_verb(command: Command, argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    known = list(command.verbs)
    if argv and argv[0] in ("-h", "--help"):
        raise HelpAsked(help_text(command))
    if not argv or argv[0].startswith("-"):
        raise InputError(f"the first argument must be one of {', '.join(known)}; --help tells more")
    for verb in known:
        if _plain(verb) == _plain(argv[0]):
            return verb, argv[1:]
    raise InputError(f"unknown verb {argv[0]!r}{nearest(argv[0], known)}; there are {', '.join(known)}")


class _Following:
    """The word after a flag, if it may be taken as the flag's value."""

    def __init__(self, words: Sequence[str], index: int) -> None:
        self.word = words[index] if index < len(words) and not words[index].startswith("--") else None
        self.taken = False

    def take(self) -> str:
        self.taken = True
        assert self.word is not None
        return self.word


def _tokens(argv: Sequence[str]) -> Iterator[tuple[str | None, Any, _Following]]:
    """Yield (flag name or None, text after `=` or the bare word, word that follows)."""
    index = 0
    while index < len(argv):
        word = argv[index]
        index += 1
        following = _Following(argv, index)
        if word == "--":
            for rest in argv[index:]:
                yield None, rest, following
            return
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            yield name, (text if equals else None), following
            index += following.taken
        elif word == "-h":
            yield "help", None, following
        elif word.startswith("-") and word != "-" and not _is_number(word):
            raise InputError(f"unknown flag {word}: flags begin with two dashes; --help lists what there is")
        else:
            yield None, word, following


def _value_of(label: str, text: str | None, following: _Following) -> str:
    if text is not None:
        return text
    if following.word is None:
        raise InputError(f"{label} needs a value: {label}=VALUE")
    return following.take()


def _bool_of(argument: Argument, text: str | None, following: _Following) -> bool:
    if text is None and following.word is not None and following.word.lower() in ("true", "false"):
        text = following.take()  # only these words: `--json runs/x` must not swallow the path
    return True if text is None else parse_value(argument, text)


def _share_out(positionals: list[Argument], words: list[str]) -> Iterator[tuple[Argument, list[str]]]:
    """Pair positional arguments with words; the one that takes many gets what the others leave."""
    needed = sum(argument.required for argument in positionals)
    spare = len(words) - needed
    position = 0
    for argument in positionals:
        if argument.many:
            after = positionals[positionals.index(argument) + 1:]
            count = max(len(words) - position - sum(other.required for other in after), 0)
        elif argument.required:
            count = 1
        else:
            count = 1 if spare > 0 else 0
            spare -= count
        taken = words[position:position + count]
        position += len(taken)
        if taken:
            yield argument, taken
    if position < len(words):
        takes = " ".join(a.label for a in positionals) or "flags only"
        raise InputError(f"unexpected argument {words[position]!r}: the command takes {takes}")


def _flag_hint(command: Command, name: str, flags: Mapping[str, Argument]) -> str:
    if command.takes_overrides and "." in name:
        return f" (config fields are written --config.{name})"
    return nearest(f"--{_plain(name)}", [argument.label for argument in flags.values()] + ["--help"])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _kind(argument: Argument) -> str:
    if argument.choices:
        return "/".join(str(choice) for choice in argument.choices)
    return {int: "INT", float: "FLOAT", str: "TEXT"}.get(argument.type, "VALUE")  # type: ignore[call-overload]


def _form(argument: Argument) -> str:
    if argument.positional or argument.type is bool:
        return argument.label
    return f"{argument.label}={_kind(argument)}" + (" ..." if argument.many else "")


def _default_note(argument: Argument) -> str:
    if argument.shown:
        return f"({argument.shown})"
    if argument.required:
        return "(required)"
    value = argument.start_value()
    if value is None or value is False or value == ():
        return ""
    return f"({'empty' if value == '' else value})"


def _columns(rows: Sequence[tuple[str, str]], width: int = 110) -> list[str]:
    """Two aligned columns; the right one wrapped at `width` characters."""
    left = min(max((len(name) for name, _ in rows), default=0), 34)
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - left - 4) or [""]
        if len(name) > left:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:<{left}}  {wrapped.pop(0)}")
        lines += [" " * (left + 4) + line for line in wrapped]
    return lines
