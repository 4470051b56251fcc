"""What every command shares: flags, errors with exit status 2, JSON on the last line.

A command is a frozen dataclass of its options, derived from ``Options``, and a function that takes
it and returns the JSON object; ``run(main, Verify)`` is the program. Fields without a default are
positional arguments, in their order; all others are flags, written with hyphens or underscores.
Class and field docstrings are the text of ``--help``.
"""

import contextlib
import functools
import json
import logging
import math
import operator
import os
import signal
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO, TypeVar
from urllib.request import getproxies_environment

from ivegan.errors import UserError

T = TypeVar("T")
Result = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command."""

    dry_run: bool = False
    """Print the resolved settings and the plan, and do nothing."""
    json: bool = False
    """Make the last line of stdout one JSON object."""

    def at_least(self, **lowest: int) -> None:
        """Check that each of these options is large enough.

        Raises:
            UserError: one is too small.
        """
        for name, least in lowest.items():
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is {getattr(self, name)}, but must be {least} or more.")


def run(
    main: Callable[[T], Result | None],
    kind: type[T],
    *,
    argv: Sequence[str] | None = None,
    failed: Callable[[Result], bool] | None = None,
) -> NoReturn:
    """Run a command and end the process with its exit status.

    Args:
        main: takes the parsed options and returns the object that ``--json`` prints.
        kind: the dataclass of the options.
        argv: the arguments; those of the process by default.
        failed: returns whether that object means exit status 1.
    """
    _exit(lambda: (options := _parse(argv, kind), main(options)), failed)


def run_preset(
    main: Callable[[str, Any, T], Result | None],
    kind: type[T],
    presets: Mapping[str, Any],
    *,
    default: str,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run a command whose first argument is a preset; main takes (preset name, config, options)."""

    def call() -> tuple[T, Result | None]:
        arguments = sys.argv[1:] if argv is None else argv
        name, config, options = parse_preset(arguments, presets, kind, default=default)
        return options, main(name, config, options)

    _exit(call)


def run_verb(
    verbs: Mapping[str, tuple[Callable[[Any], Result | None], type[Any]]],
    *,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run a command whose first argument selects one of several functions."""
    from tyro.conf import subcommand

    mains = {kind: main for main, kind in verbs.values()}

    def call() -> tuple[Any, Result | None]:
        kinds = [Annotated[kind, subcommand(name)] for name, (_, kind) in verbs.items()]
        options = _parse(argv, functools.reduce(operator.or_, kinds))
        return options, mains[type(options)](options)

    _exit(call)


def _parse(argv: Sequence[str] | None, kind: Any, *, description: str | None = None) -> Any:
    """Return the options that the arguments describe.

    Raises:
        SystemExit: with status 0 after ``--help``, with 2 after tyro's message about a wrong flag.
    """
    import tyro

    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs)
    return tyro.cli(kind, args=argv, prog=_script(), description=description, config=config)


def parse_preset(
    argv: Sequence[str], presets: Mapping[str, Any], kind: type[T], *, default: str
) -> tuple[str, Any, T]:
    """Return (preset name, its configuration with the overrides, the options).

    The preset is the first argument, or ``default`` where the first argument is a flag. Settings
    of the configuration carry their dotted name and always take a value (``--transform.flip
    True``); options stand beside them without a prefix.

    Raises:
        UserError: an unknown preset, or a setting out of range.
        SystemExit: for ``--help`` and a wrong flag.
    """
    from tyro.conf import FlagConversionOff, arg

    rest = list(argv)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else default
    if name not in presets:
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(presets)}.")
    config, flat = presets[name], arg(name="")
    fields = [
        ("config", Annotated[type(config), flat, FlagConversionOff], field(default=config)),
        ("options", Annotated[kind, flat], field(default=kind())),
    ]
    description = (
        f"{_first_line(kind)}\n\nUsage: {_script()} [PRESET] [OPTIONS], where PRESET is one of "
        f"{', '.join(presets)}; {default} by default. The defaults below are those of {name}. "
        "Flags take hyphens or underscores: --optim.lr-g is --optim.lr_g."
    )
    kind_of_both = make_dataclass("Arguments", fields, frozen=True)
    arguments = _parse(rest, kind_of_both, description=description)
    return name, arguments.config, arguments.options


def _exit(
    call: Callable[[], tuple[Any, Result | None]], failed: Callable[[Result], bool] | None = None
) -> NoReturn:
    """Run, print the JSON line if asked for, turn a UserError or Ctrl-C into a line, and exit."""
    _ask_this_machine_directly()
    with _unread_output_dropped():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        logging.getLogger("botocore").setLevel(logging.WARNING)  # logs where it finds credentials
        try:
            options, result = call()
        except UserError as error:
            sys.stdout.flush()
            print(" ".join(str(error).split()), file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        result = result or {}
        if options.json:
            print(json.dumps(_plain(result), allow_nan=False, default=str))
        raise SystemExit(1 if failed is not None and failed(result) else 0)


def _ask_this_machine_directly() -> None:
    """Let no proxy of the variables stand before MLflow, S3 and Ray on this machine."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if getproxies_environment() and given != "*":
        names = dict.fromkeys([*filter(None, given.split(",")), "localhost", "127.0.0.1"])
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(names)


class _Output:
    """A standard stream that discards what is written after its reader has closed the pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._discarding():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._discarding():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _discarding(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # what is buffered goes to the null device at the next flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                raise UserError(f"The output cannot be written: {error.strerror}.") from error


@contextlib.contextmanager
def _unread_output_dropped() -> Iterator[None]:
    """Let ``command | head`` end as without ``head``, and ``command >&-`` as with an output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed before the start: a file would get its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Output(stream) for stream in streams)  # pyright: ignore
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Return the lines of a table; the columns ``right`` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        columns = enumerate(zip(row, widths, strict=True))
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in columns)
        lines.append("  ".join(cells).rstrip())
    return lines


def _plain(value: Any) -> Any:
    """Return the value with NaN and infinities as None, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _script() -> str:
    return Path(sys.argv[0]).name
