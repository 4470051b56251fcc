"""The frame that every command shares: flags, one-sentence errors, JSON on the last line.

A command is a frozen dataclass of its options, derived from ``Options``, and a function that takes
it and returns the JSON object::

    @dataclass(frozen=True, kw_only=True)
    class Verify(cli.Options):
        \"\"\"Read every shard back.\"\"\"

        uri: str
        \"\"\"The data set.\"\"\"

    def main(options: Verify) -> dict[str, object]: ...

    def command() -> None:
        cli.run(main, Verify)

Fields without a default are positional arguments, in their order; all others are flags, written
with hyphens or underscores. Class and field docstrings are the text of ``--help``.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import logging
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ivegan.errors import UserError

T = TypeVar("T")

# How Python itself refuses a number, and what is meant.
_NUMBERS = {
    "invalid literal for int() with base 10: ": "whole number",
    "could not convert string to float: ": "number",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes."""

    dry_run: bool = False
    """Print the resolved settings and the plan, and do nothing."""
    json: bool = False
    """Make the last line of stdout one JSON object."""

    def at_least(self, **lowest: int) -> None:
        """Return if each of these options has so large a value.

        Raises:
            UserError: one has not.
        """
        for name, least in lowest.items():
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is {getattr(self, name)}, but must be {least} or more.")


def run(
    main: Callable[[T], Mapping[str, Any] | None],
    kind: type[T],
    *,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    failed: Callable[[Mapping[str, Any]], bool] | None = None,
) -> NoReturn:
    """Run a command and end the process with its exit status.

    Args:
        main: takes the parsed options and returns the object that ``--json`` prints.
        kind: the dataclass of the options.
        argv: the arguments; those of the process by default.
        prog: the name in help texts; the script's by default.
        failed: says of the returned object whether the exit status is 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    _finish(lambda: _answer(main, parse(argv, kind, prog=prog)), failed)


def run_preset(
    main: Callable[[str, Any, T], Mapping[str, Any] | None],
    kind: type[T],
    presets: Mapping[str, Any],
    *,
    default: str,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    failed: Callable[[Mapping[str, Any]], bool] | None = None,
) -> NoReturn:
    """Run a command whose first argument is a preset; main takes (preset name, config, options)."""
    argv = sys.argv[1:] if argv is None else argv

    def do() -> tuple[Mapping[str, Any], bool]:
        name, config, options = parse_preset(argv, presets, kind, default=default, prog=prog)
        return _answer(lambda chosen: main(name, config, chosen), options)

    _finish(do, failed)


def run_verb(
    verbs: Mapping[str, tuple[Callable[[Any], Mapping[str, Any] | None], type[Any]]],
    *,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    failed: Callable[[Mapping[str, Any]], bool] | None = None,
) -> NoReturn:
    """Run a command whose first argument says which of several functions is meant.

    Args:
        verbs: for each verb its function and the dataclass of its options.
        argv, prog, failed: as for ``run``.
    """
    argv = sys.argv[1:] if argv is None else argv
    prog = prog or _script()

    def do() -> tuple[Mapping[str, Any], bool]:
        if not argv:
            raise UserError(f"{prog} needs a verb: {' or '.join(verbs)}; see {prog} --help.")
        if argv[0] in ("-h", "--help"):
            print(f"usage: {prog} VERB [OPTIONS]\n")
            for verb, (_, kind) in verbs.items():
                print(f"  {verb:<10} {_first_line(kind)}")
            print(f"\n{prog} VERB --help tells the options of one.")
            raise SystemExit(0)
        if argv[0] not in verbs:
            raise UserError(f"There is no {prog} {argv[0]!r}; choose one of {', '.join(verbs)}.")
        main, kind = verbs[argv[0]]
        return _answer(main, parse(argv[1:], kind, prog=f"{prog} {argv[0]}"))

    _finish(do, failed)


def parse(argv: Sequence[str], kind: type[T], *, prog: str | None = None) -> T:
    """Return the options that the arguments describe.

    Raises:
        UserError: an unknown flag, a missing argument or a value of the wrong type.
        SystemExit: with status 0, after ``--help``.
    """
    return _tyro(kind, argv, prog or _script(), flags=_flags(kind), description=None)


def parse_preset(
    argv: Sequence[str],
    presets: Mapping[str, Any],
    kind: type[T],
    *,
    default: str,
    prog: str | None = None,
) -> tuple[str, Any, T]:
    """Return (preset name, its configuration with the overrides, the options).

    The preset is the first argument, or ``default`` where the first argument is a flag. Settings
    of the configuration carry their dotted name and always take a value (``--transform.flip
    True``); options stand beside them without a prefix.

    Raises:
        UserError: as for ``parse``, and an unknown preset.
        SystemExit: with status 0, after ``--help``.
    """
    import tyro

    prog = prog or _script()
    rest = list(argv)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else default
    if name not in presets:
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(presets)}.")
    config = presets[name]
    flat = tyro.conf.arg(name="")
    fields = [
        ("config", typing.Annotated[type(config), flat, tyro.conf.FlagConversionOff], config),
        ("options", typing.Annotated[kind, flat], kind()),
    ]
    both = dataclasses.make_dataclass(
        "Arguments",
        [(key, hint, dataclasses.field(default=value)) for key, hint, value in fields],
        frozen=True,
    )
    flags = _flags(type(config)) + _flags(kind)
    description = (
        f"{_first_line(kind)}\n\nUsage: {prog} [PRESET] [OPTIONS], where PRESET is one of "
        f"{', '.join(presets)}; {default} where none is given. The defaults below are those of "
        f"{name}."
    )
    found = _tyro(both, rest, prog, flags=flags, description=description, presets=presets)
    return name, found.config, found.options


def _answer(
    main: Callable[[T], Mapping[str, Any] | None], options: T
) -> tuple[Mapping[str, Any], bool]:
    return main(options) or {}, bool(getattr(options, "json", False))


def _finish(
    do: Callable[[], tuple[Mapping[str, Any], bool]],
    failed: Callable[[Mapping[str, Any]], bool] | None,
) -> NoReturn:
    """Run, print the JSON line if asked for, turn a UserError into its sentence, and exit."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where it found credentials
    try:
        result, as_json = do()
    except UserError as error:
        sys.stdout.flush()
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    if as_json:
        print(json.dumps(_plain(result), allow_nan=False, default=str))
    sys.stdout.flush()
    raise SystemExit(1 if failed is not None and failed(result) else 0)


def _plain(value: Any) -> Any:
    """Return the value with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tyro(
    kind: Any,
    argv: Sequence[str],
    prog: str,
    *,
    flags: list[str],
    description: str | None,
    presets: Mapping[str, Any] | None = None,
) -> Any:
    """Parse with tyro; its help goes out in our spelling, its error box as one sentence."""
    import tyro

    said, wrong = io.StringIO(), io.StringIO()
    asks_help = any(word in ("-h", "--help") for word in argv)
    try:
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(wrong),
            contextlib.nullcontext() if asks_help else _endless_lines(),
        ):
            found = tyro.cli(
                _with_metavars(kind),
                args=argv,
                prog=prog,
                description=description,
                use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs),
            )
        return kind(**{f.name: getattr(found, f.name) for f in dataclasses.fields(kind)})
    except SystemExit as stop:
        if stop.code in (0, None):
            print(_hyphens(said.getvalue()), end="")
            raise
        raise UserError(_sentence(wrong.getvalue(), prog, flags, presets or {})) from None


def _with_metavars(kind: Any) -> Any:
    """Return a like dataclass whose positional arguments carry their own names in help texts."""
    import tyro

    hints = typing.get_type_hints(kind, include_extras=True)
    named = {
        f.name: typing.Annotated[hints[f.name], tyro.conf.arg(metavar=f.name.upper())]
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    body = {"__annotations__": named, "__doc__": kind.__doc__}
    return dataclass(frozen=True, kw_only=True)(type(kind.__name__, (kind,), body))


@contextlib.contextmanager
def _endless_lines() -> Iterator[None]:
    """Let tyro believe in a very wide terminal, so that it breaks no line of an error."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _sentence(box: str, prog: str, flags: list[str], presets: Mapping[str, Any]) -> str:
    """Return what tyro's error box says, as one sentence that says what to do."""
    rows = [line.strip() for line in box.splitlines() if line.strip(" -")]
    text = rows[1] if len(rows) > 1 else " ".join(box.split())  # the first row is the title
    help_hint = f"see {prog} --help"
    if found := re.match(r"Unrecognized options: (.*)", text):
        words = found[1].split(", ")
        unknown = next((word for word in words if word.startswith("-")), None)
        if unknown is None:
            where = "put the preset first" if words[0] in presets else help_hint
            return f"The argument {words[0]!r} is not expected there; {where}."
        flag = unknown.partition("=")[0]
        near = _nearest(flag, flags)
        return f"There is no flag {flag}; " + (f"did you mean {near}?" if near else f"{help_hint}.")
    if found := re.match(r"Error parsing (\S+?)(?:/\S+)?: (.*)", text):
        flag, message = _hyphens(found[1]), found[2]
        for start, kind in _NUMBERS.items():
            if message.startswith(start):
                return f"{flag} takes a {kind}, but got {message.removeprefix(start)}."
        return f"{flag} cannot be read: {message.rstrip('.')}; {help_hint}."
    if found := re.match(r"Missing value for argument '(\S+?)'", text):
        return f"{_hyphens(found[1])} needs a value; {help_hint}."
    if found := re.match(r"invalid choice (.+) for argument '(\S+?)'.* one of \((.*?),?\)", text):
        choices = found[3].replace("'", "")
        return f"{_hyphens(found[2])} is {found[1]}, but must be one of {choices}."
    if text.startswith("Missing from"):
        missing = [row for row in rows[2:] if re.fullmatch(r"[A-Z_]+", row)]
        return f"{prog} needs {' and '.join(missing)}; {help_hint}."
    return f"{text.rstrip('.')}; {help_hint}."


def _nearest(flag: str, flags: list[str]) -> str | None:
    """Return the known flag most like a misspelt one, whose dotted prefix may be missing."""
    word = flag.lstrip("-").replace("-", "_")
    whole = {name.removeprefix("--"): name for name in flags}
    last = {name.rpartition(".")[2]: name for name in flags if "." in name}
    for names in (whole, last):
        if close := difflib.get_close_matches(word, names, n=1, cutoff=0.7):
            return _hyphens(names[close[0]])
    return None


def _flags(kind: Any, prefix: str = "--") -> list[str]:
    """Return the flags that a dataclass becomes."""
    hints = typing.get_type_hints(kind)
    names: list[str] = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            names += _flags(hints[field.name], f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def _hyphens(text: str) -> str:
    """Return the text with flags in our spelling: --run-id, but --optim.lr_g as it is stored."""
    return re.sub(r"--[a-z0-9_]+(?![\w.])", lambda flag: flag[0].replace("_", "-"), text)


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _script() -> str:
    return Path(sys.argv[0]).name
