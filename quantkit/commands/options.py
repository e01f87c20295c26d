"""Groups of command line options that more than one command has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantkit.choices import EFFORTS, KERNELS, METHODS
from quantkit.errors import ConfigError

if TYPE_CHECKING:
    from quantkit.allocate.engine import Served
    from quantkit.engines.held import Deployment
    from quantkit.recipe import Recipe
    from quantkit.tasks.tasks import Plan

__all__ = [
    "bos_option",
    "deployment",
    "engine_options",
    "fitting",
    "read_recipe",
    "read_tasks",
    "recipe_options",
    "served_by",
    "task_options",
]

F = TypeVar("F", bound=Callable[..., Any])


def _all(function: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


bos_option = click.option(
    "--add-bos/--no-add-bos",
    default=None,
    help="Whether raw text begins with the model's BOS token. [default: as it was trained]",
)


def recipe_options(function: F) -> F:
    """What decides the numbers of a run: the fields of a recipe, and a file of them."""
    return _all(
        function,
        [
            click.option("--scheme", help="Scheme of every linear that no other option names. [default: docs/quantize.md]"),
            click.option("--experts", metavar="SCHEME", help="Scheme of the routed experts."),
            click.option("--shared-experts", metavar="SCHEME", help="Scheme of the shared experts."),
            click.option("--attention", metavar="SCHEME", help="Scheme of q, k, v and o projections."),
            click.option("--mlp", metavar="SCHEME", help="Scheme of the MLPs of dense layers."),
            click.option(
                "--linears", multiple=True, metavar="GLOB", help="Of an unknown architecture, quantize what this matches."
            ),
            click.option(
                "--keep", multiple=True, metavar="GLOB", help="Linears that stay in BF16 on purpose; before rules."
            ),
            click.option(
                "--group-size", type=int, help="Weights per scale in schemes with groups, 8 or more. [default: 128]"
            ),
            click.option("--method", type=click.Choice(METHODS), help="[default: gptq for INT4, rtn for 8 bits]"),
            click.option(
                "--effort",
                type=click.Choice(EFFORTS),
                help="fast: gptq. default: learned where every token passes. best: learned, on 437,000 tokens.",
            ),
            click.option("--tune/--no-tune", default=None, help="Learn scales end to end at last. [default: no]"),
            click.option(
                "--calibration", metavar="FILE|NAME", help="A text, or a=2+b+c: docs/formats.md. [default: stdlib]"
            ),
            click.option("--samples", type=int, help="Calibration windows, 1 or more. [default: by the model]"),
            click.option("--seq-len", type=int, help="Tokens in a window, 8 to max_position_embeddings. [default: 512]"),
            click.option("--seed", type=int, help="Which windows are drawn, 0 or more. [default: 0]"),
            click.option("--cover", is_flag=True, default=None, help="Choose windows so that no expert is short."),
            bos_option,
            click.option(
                "--recipe", "recipe_file", type=click.Path(path_type=Path), help="YAML file; options given here win."
            ),
        ],
    )


def read_recipe(recipe_file: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe of those options. Raises ConfigError."""
    from quantkit.recipe import Recipe

    fields = {key: value for key, value in options.items() if value not in (None, ())}
    return Recipe.read(recipe_file, fields) if recipe_file else Recipe.of(fields, "options")


def engine_options(function: F) -> F:
    """An engine, and how it would be run."""
    return _all(
        function,
        [
            click.option("--engine", metavar="NAME[==VERSION]", help="vllm, sglang or transformers."),
            click.option("--tp", default=1, show_default=True, help="Tensor parallel devices."),
            click.option("--ep", is_flag=True, help="Expert parallel: each device holds whole experts."),
            click.option("--pp", default=1, show_default=True, help="Pipeline stages."),
            click.option("--hardware", default="gpu", show_default=True, help="gpu, smNN, cpu (x86), amx or zen."),
            click.option("--eager", is_flag=True, help="Not compiled (vLLM's --enforce-eager)."),
            click.option("--kv-cache", default="auto", show_default=True, help="auto (as the checkpoint says) or fp8."),
        ],
    )


def deployment(options: dict[str, Any], needed_by: str | None = None) -> Deployment:
    """Take `engine_options` but the engine out of a command's options. needed_by: what none may be given without."""
    from quantkit.engines.held import Deployment

    devices = Deployment(**{name: options.pop(name) for name in ("tp", "ep", "pp", "hardware", "eager", "kv_cache")})
    if needed_by and devices != Deployment():
        raise ConfigError(f"--tp, --hardware and their like say how an engine would run: {devices}", f"give {needed_by} too")
    return devices


def served_by(engine: str | None, options: dict[str, Any], model: str) -> Served | None:
    """Take `engine_options` out of a command's options: the engine, and how it would run MODEL. Raises ConfigError."""
    if engine is None:
        deployment(options, needed_by="--engine")
        return None
    from quantkit.allocate.engine import Served
    from quantkit.checkpoint.folder import find_model
    from quantkit.checkpoint.reader import load_json
    from quantkit.engines.registry import engine_named

    return Served(engine_named(engine), deployment(options), load_json(find_model(model) / "config.json"))


def fitting(recipe: Recipe, served: Served | None) -> Recipe:
    """The recipe in the largest groups that the engine loads, where it names none."""
    if served is None:
        return recipe
    from quantkit.allocate.engine import with_groups

    return with_groups(served, recipe)


def task_options(function: F) -> F:
    """Which benchmark tasks are run, and how."""
    number = click.IntRange(min=1)
    return _all(
        function,
        [
            click.option("--tasks", metavar="NAME,...", help="Benchmark tasks to run on both models too: docs/tasks.md."),
            click.option("--suite", metavar="NAME", help="All benchmarks of a suite: hunyuan-large, ruler."),
            click.option(
                "--data-dir",
                type=click.Path(path_type=Path, file_okay=False),
                help="Items as NAME.jsonl, instead of the hub's.",
            ),
            click.option("--limit", type=number, help="At most so many items of a task."),
            click.option("--shots", type=click.IntRange(min=0), help="Examples before each question."),
            click.option(
                "--items",
                type=click.Path(path_type=Path, dir_okay=False),
                help="Both answers, by item. [QUANTIZED/eval/items.jsonl]",
            ),
            click.option("--unsafe-code", is_flag=True, help="Allow tasks that run code which the model wrote."),
            click.option("--chat-template", is_flag=True, help="Ask tasks through the model's chat template."),
            click.option("--max-new-tokens", type=number, help="Upper bound on what a task lets the model write."),
            click.option(
                "--ruler-length", type=number, metavar="N", help="Tokens of RULER's texts (niah_...). [default: 4096]"
            ),
            click.option("--batch-size", type=number, help="Task items at once. [default: 4096 tokens]"),
            click.option("--task-kernels", default="auto", show_default=True, type=click.Choice(KERNELS)),
        ],
    )


def read_tasks(options: dict[str, Any], items: Path | None, device: str, kv_cache: str | None) -> Plan | None:
    """Take `task_options` but --items out of a command's options; None when no task is asked for. Raises ConfigError, also
    where an option says how to run tasks and none is."""
    tasks, suite, kernels = options.pop("tasks"), options.pop("suite"), options.pop("task_kernels")
    same = ("data_dir", "limit", "shots", "unsafe_code", "chat_template", "max_new_tokens", "ruler_length", "batch_size")
    settings = {key: options.pop(key) for key in same}
    if tasks is None and suite is None and settings["data_dir"] is None:
        how = {**settings, "items": items, "task_kernels": kernels if kernels != "auto" else None}
        if idle := [f"--{key.replace('_', '-')}" for key, value in how.items() if value is not None and value is not False]:
            raise ConfigError(
                f"{', '.join(idle)} without tasks to run", "add --tasks NAME,... or --suite NAME, or leave out"
            )
        return None
    from quantkit.tasks.tasks import Options, plan_tasks

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    run = Options(**settings, kernels=kernels, kv_cache=kv_cache or "bf16", device=device, add_bos=options.get("add_bos"))
    return plan_tasks(names, suite, run)
