"""Groups of command line options that more than one command has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from quantkit.engines.held import Deployment
    from quantkit.scheme import Recipe

__all__ = ["deployment", "engine_options", "read_recipe", "recipe_options"]

F = TypeVar("F", bound=Callable[..., Any])


def _all(function: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def recipe_options(function: F) -> F:
    """What decides the numbers of a run: the fields of a recipe, and a file of them."""
    return _all(
        function,
        [
            click.option("--scheme", help="Scheme of every linear that no other option names. [default: W4A16]"),
            click.option("--experts", metavar="SCHEME", help="Scheme of the routed experts."),
            click.option("--shared-experts", metavar="SCHEME", help="Scheme of the shared experts."),
            click.option("--attention", metavar="SCHEME", help="Scheme of q, k, v and o projections."),
            click.option(
                "--linears", multiple=True, metavar="GLOB", help="Of an unknown architecture, quantise what this matches."
            ),
            click.option("--group-size", type=int, help="Weights per scale in schemes with groups. [default: 128]"),
            click.option("--method", type=click.Choice(["rtn", "gptq"]), help="[default: gptq for INT4, rtn for 8 bits]"),
            click.option(
                "--calibration", metavar="FILE|NAME", help=".txt, .jsonl, .parquet, or a named text. [default: stdlib]"
            ),
            click.option("--samples", type=int, help="Calibration windows. [default: 128]"),
            click.option("--seq-len", type=int, help="Tokens in a window. [default: 512]"),
            click.option("--seed", type=int, help="Which windows are drawn. [default: 0]"),
            click.option(
                "--recipe", "recipe_file", type=click.Path(path_type=Path), help="YAML file; options given here win."
            ),
        ],
    )


def read_recipe(recipe_file: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe of those options. Raises ConfigError."""
    from quantkit.scheme import Recipe

    given = {key: value for key, value in options.items() if value not in (None, ())}
    return Recipe.read(recipe_file, given) if recipe_file else Recipe.of(given, "options")


def engine_options(function: F) -> F:
    """An engine, and how it would be run."""
    return _all(
        function,
        [
            click.option("--engine", metavar="NAME[==VERSION]", help="vllm, sglang or transformers."),
            click.option("--tp", default=1, show_default=True, help="Tensor parallel devices."),
            click.option("--ep", is_flag=True, help="Expert parallel: each device holds whole experts."),
            click.option("--pp", default=1, show_default=True, help="Pipeline stages."),
            click.option("--hardware", default="gpu", show_default=True, help="gpu, smNN, cpu (x86) or zen."),
        ],
    )


def deployment(options: dict[str, Any]) -> Deployment:
    """Take `engine_options` but the engine out of a command's options."""
    from quantkit.engines.held import Deployment

    return Deployment(**{name: options.pop(name) for name in ("tp", "ep", "pp", "hardware")})
