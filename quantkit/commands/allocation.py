"""`quantkit sensitivity`, and the targets of `quantize` and `plan`: bits where they count."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantkit.commands.command import as_json, command, show
from quantkit.commands.options import engine_options, fitting, read_recipe, recipe_options, served_by
from quantkit.errors import ConfigError

if TYPE_CHECKING:
    from quantkit.allocate.choose import Target
    from quantkit.allocate.engine import Served
    from quantkit.allocate.measuring import Extent
    from quantkit.allocate.sensitivity import Sensitivity
    from quantkit.recipe import Recipe

__all__ = ["Asked", "Found", "asked_for", "found", "sensitivity", "target_options"]

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, dir_okay=False)
_MEASURED = ("schemes", "sensitivity_text", "sensitivity_windows", "bands")


def extent_options(function: F) -> F:
    """What sensitivities are measured of, and on."""
    for option in (
        click.option("--bands", type=click.IntRange(min=1), help="Layers in at most so many groups. [default: 16]"),
        click.option("--sensitivity-windows", type=click.IntRange(min=2), help="Windows of the sample. [default: 16]"),
        click.option(
            "--sensitivity-text",
            metavar="FILE|NAME",
            help="Where losses are measured. [default: what the calibration leaves of its text]",
        ),
        click.option("--schemes", metavar="NAME,...", help="What to choose from. [default: W4A16,W4A16:32,W8A16]"),
    ):
        function = option(function)
    return function


def target_options(function: F) -> F:
    """A target, and the sensitivities by which it is met."""
    for option in (
        click.option("--sensitivity", type=FILE, metavar="FILE", help="What `quantkit sensitivity` measured."),
        click.option("--target-kl", type=click.FloatRange(min=0, min_open=True), help="The least bytes with this mean KL."),
        click.option("--target-size", metavar="SIZE", help="The least loss in such a checkpoint: 200GB."),
        click.option("--target-bits", type=click.FloatRange(min=0, min_open=True), help="The same, in bits a weight."),
    ):
        function = option(function)
    return function


@dataclass(frozen=True)
class Asked:
    """target: None where there is none. file: of sensitivities, where one was named."""

    target: Target | None
    file: Path | None
    extent: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The recipe to go on with; the allocation that it is from, as run.json has it; or what measuring would cost, where
    there are no sensitivities yet."""

    recipe: Recipe
    allocation: dict[str, Any] | None = None
    measuring: dict[str, Any] | None = None

    def shown(self) -> dict[str, Any]:
        """What `plan` adds to its summary."""
        parts = {"allocation": self.allocation, "measuring": self.measuring}
        return {name: part for name, part in parts.items() if part}


def asked_for(options: dict[str, Any]) -> Asked:
    """Take `target_options` and `extent_options` out of a command's options. Raises ConfigError."""
    targets = {name: options.pop(name) for name in ("target_bits", "target_size", "target_kl")}
    file, extent = options.pop("sensitivity"), {name: options.pop(name) for name in _MEASURED}
    stated = [name for name, value in targets.items() if value is not None]
    if len(stated) > 1:
        words = " and ".join(f"--{name.replace('_', '-')}" for name in stated)
        raise ConfigError(f"{words} are {len(stated)} targets", "give one")
    if not stated:
        idle = [name for name, value in {"sensitivity": file, **extent}.items() if value is not None]
        if idle:
            words = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise ConfigError(f"{words} without a target", "add --target-bits, --target-size or --target-kl, or leave out")
        return Asked(None, None, extent)
    from quantkit.allocate.choose import Target, bytes_of

    size = bytes_of(targets["target_size"]) if targets["target_size"] else None
    return Asked(Target(targets["target_bits"], size, targets["target_kl"]), file, extent)


def _extent(options: dict[str, Any], recipe: Recipe) -> Extent:
    from quantkit.allocate.groups import named
    from quantkit.allocate.measuring import SCHEMES, Extent

    names = [name.strip() for name in (options["schemes"] or ",".join(SCHEMES)).split(",") if name.strip()]
    chosen = dict.fromkeys(named(name, recipe.group_size) for name in names)
    more = {"text": options["sensitivity_text"], "windows": options["sensitivity_windows"], "bands": options["bands"]}
    return Extent(tuple(chosen), **{key: value for key, value in more.items() if value is not None})


def found(
    model: str,
    recipe: Recipe,
    request: Asked,
    served: Served | None,
    out: Path | None,
    device: str = "auto",
    quiet: bool = True,
) -> Found:
    """The recipe that meets a target. out: where a result will go; sensitivities that were not named are measured beside
    it. Raises ConfigError."""
    if request.target is None:
        return Found(recipe)
    from quantkit.allocate.choose import allocate, check_bytes
    from quantkit.allocate.measuring import measuring_of
    from quantkit.allocate.sensitivity import Sensitivity
    from quantkit.checkpoint.folder import find_model
    from quantkit.checkpoint.reader import CheckpointReader
    from quantkit.extras import need

    need("allocate", "a target")
    if recipe.scheme is not None:
        raise ConfigError(f"--scheme {recipe.scheme} and a target, which chooses schemes", "give --schemes NAME,...")
    reader = CheckpointReader(find_model(model))
    file = request.file or (out.with_name(f"{out.name}.sensitivity.json") if out else None)
    if request.file is None and (file is None or not file.exists()):
        measuring = measuring_of(reader, recipe, _extent(request.extent, recipe))
        check_bytes(reader, measuring.groups, request.target)
        if out is None or file is None:
            return Found(recipe, measuring=measuring.summary())
        _measure(reader, measuring, file, device, quiet)
    assert file is not None
    measured = Sensitivity.read(file)
    _check_asked(request.extent, recipe, measured, file)
    allocation = allocate(reader, recipe, measured, request.target, served)
    return Found(allocation.recipe, {**allocation.as_dict(), "sensitivity": str(file)})


def _check_asked(options: dict[str, Any], recipe: Recipe, measured: Sensitivity, file: Path) -> None:
    """Sensitivities that are there already must be those that are asked for, where anything is asked of them."""
    from quantkit.allocate.groups import label

    extent = _extent(options, recipe)
    pairs = {
        "schemes": (",".join(map(label, extent.schemes)), ",".join(measured.schemes)),
        "bands": (extent.bands, measured.bands),
        "sensitivity_text": (extent.text, measured.text),
    }
    for name, (value, there) in pairs.items():
        if options[name] is not None and value != there:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{file} was measured with {option} {there}, and {value} is asked for", "name another file")


def _measure(reader: Any, measuring: Any, file: Path, device: str, quiet: bool) -> Any:
    from quantkit.allocate.measuring import measure
    from quantkit.commands.tables import console

    screen = console(stderr=True)
    cost = measuring.summary()
    if not quiet:
        screen.print(
            f"sensitivities: {cost['variants']} variants of {cost['groups']} groups, "
            f"{cost['readings']} readings of the weights, {cost['forward_tokens']:,} tokens",
            soft_wrap=True,
        )

    def progress(reading: int, readings: int, layer: int, layers: int) -> None:
        if not quiet:
            screen.print(f"sensitivities: reading {reading + 1} of {readings}, layer {layer} of {layers}")

    return measure(reader, measuring, file, device, progress)


@click.command()
@click.argument("model")
@click.option("-o", "--out", required=True, type=FILE, help="New file for what was measured.")
@recipe_options
@extent_options
@engine_options
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.", show_default=True)
@click.option("--dry-run", is_flag=True, help="Show what it would cost, measure nothing.")
@as_json
@click.option("--quiet", is_flag=True, help="No progress.")
@command
def sensitivity(
    model: str,
    out: Path,
    recipe_file: Path | None,
    engine: str | None,
    device: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure what each group of MODEL's linears loses in each scheme, for --target-bits and its like.

    Every group is measured alone, the rest in BF16, on text that the calibration does not see. Interrupted, the same command
    goes on after the last reading of the weights.

    \b
    quantkit sensitivity MODEL -o sensitivity.json --calibration chat.jsonl
    quantkit quantize MODEL -o OUT --calibration chat.jsonl --target-bits 4.5 --sensitivity sensitivity.json
    """
    from quantkit.allocate.measuring import measuring_of
    from quantkit.checkpoint.folder import find_model
    from quantkit.checkpoint.reader import CheckpointReader
    from quantkit.commands.allocation_tables import cost_table, sensitivity_table
    from quantkit.errors import OutputError

    extent = {name: options.pop(name) for name in _MEASURED}
    served = served_by(engine, options, model)
    recipe = fitting(read_recipe(recipe_file, options), served)
    reader = CheckpointReader(find_model(model))
    measuring = measuring_of(reader, recipe, _extent(extent, recipe))
    if dry_run:
        show(measuring.summary(), cost_table, as_json)
        return
    if out.exists():
        raise OutputError(f"{out} exists", "remove it, or choose another file")
    measured = _measure(reader, measuring, out, device, quiet)
    if as_json:
        click.echo(json.dumps(measured.model_dump(mode="json"), indent=2))
    elif not quiet:
        show(measured.model_dump(mode="json"), sensitivity_table, False)
