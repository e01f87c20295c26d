"""What the command line offers is what there is, though it knows the words before it imports what they stand for."""

from __future__ import annotations

from typing import get_args

from click.testing import CliRunner

from quantkit.choices import KERNELS, METHODS, TARGETS, FormatName
from quantkit.cli import main
from quantkit.engines.registry import ENGINES
from quantkit.formats.table import FORMATS
from quantkit.kernels import dispatch
from quantkit.recipe import Recipe
from quantkit.scheme import BF16, PRESETS


def said(*command: str) -> str:
    return " ".join(CliRunner().invoke(main, [*command, "--help"], catch_exceptions=False).stdout.split())


def test_each_word_stands_for_something() -> None:
    assert tuple(FORMATS) == get_args(FormatName) == TARGETS[:-1] and all(row.name == name for name, row in FORMATS.items())
    assert set(KERNELS) == {*dispatch.OPTIONS, dispatch.REFERENCE}
    assert all(Recipe(method=method).method == method for method in METHODS)


def test_help_names_what_there_is() -> None:
    assert all(f" {name}" in said() for name in (*PRESETS, BF16))
    assert ", ".join(TARGETS) in said("convert") and all(name in said("plan") for name in ENGINES)
