"""What every command shares: errors as one message, output as a table or as JSON."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import click

from quantkit.errors import QuantkitError, shown

__all__ = ["as_json", "command", "show"]

F = TypeVar("F", bound=Callable[..., Any])
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # which takes seconds to import, and is not when it did not raise this
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


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
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            where = shown(error.filename or "output")
            click.echo(f"error: {where}: {error.strerror}\nFix: check the path, its permissions and its disk", err=True)
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
        from quantkit.progress import console, print_tables

        print_tables(table(data), console())
