"""What every command shares: errors as one message, output as a table or as JSON."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, TextIO, TypeVar

import click

from quantkit.errors import QuantkitError, shown

__all__ = ["Main", "as_json", "command", "show"]

F = TypeVar("F", bound=Callable[..., Any])
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # which takes seconds to import, and is not when it did not raise this
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _to_nowhere(stream: TextIO) -> None:
    """What is still buffered, and whatever follows, is lost without an error; the last flush would exit 120."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Forgiving:
    """Standard error on a disk that is full: what is said there is lost, the work and its exit code are not."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _to_nowhere(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _to_nowhere(self._stream)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """A request to end (`timeout`, a scheduler, a closed terminal) removes temporary files as Ctrl-C does. One that the
    caller has chosen to ignore stays ignored."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class Main(click.Group):
    """A group of commands whose exit codes do not depend on where standard error goes."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with redirect_stderr(_Forgiving(sys.stderr) if sys.stderr else None), _ending_in_order():
            try:
                return super().main(*args, **kwargs)
            except OSError as error:  # of help on a full disk, say
                click.echo(f"error: output: {error.strerror}", err=True)
                _to_nowhere(sys.stdout)
                sys.exit(QuantkitError.exit_code)


def command(function: F) -> F:
    """Print a QuantkitError as one message and exit with its code, and what the system says of a path likewise.

    Anything else is a bug: it keeps its traceback, and has a code of its own, since 1 and 3 are verdicts.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except QuantkitError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            _to_nowhere(sys.stdout)
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            where = shown(error.filename or "output")
            click.echo(f"error: {where}: {error.strerror}\nFix: check the path, its permissions and its disk", err=True)
            if not error.filename:
                _to_nowhere(sys.stdout)
            sys.exit(QuantkitError.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command resumes a quantization or a conversion", err=True)
            sys.exit(130)
        except Exception as error:
            if _out_of_memory(error):
                click.echo(f"error: out of memory: {error}\nFix: free memory, or give smaller batches", err=True)
                sys.exit(QuantkitError.exit_code)
            traceback.print_exc()
            click.echo("error: this is a bug in quantkit; please report it with the lines above", err=True)
            sys.exit(os.EX_SOFTWARE)

    return wrapped  # type: ignore[return-value]


def show(data: dict[str, Any], table: Callable[[dict[str, Any]], Any], json_wanted: bool) -> None:
    if json_wanted:
        click.echo(json.dumps(data, indent=2))
    else:
        from quantkit.commands.tables import console, print_tables

        print_tables(table(data), console())
