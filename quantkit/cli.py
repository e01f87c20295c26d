"""The command line. Results go to standard output (a table, or JSON with --json), progress and errors to standard error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from quantkit import __version__
from quantkit.choices import KERNELS, TARGETS, Kernels, KVFormat
from quantkit.commands import allocation as cli_allocation
from quantkit.commands import evaluate as cli_eval
from quantkit.commands.command import Main, as_json, command, show
from quantkit.commands.options import bos_option, deployment, engine_options, fitting, read_recipe, recipe_options, served_by

__all__ = ["main"]

kernels_option = click.option(
    "--kernels",
    default="auto",
    show_default=True,
    type=click.Choice(KERNELS),
    help="auto: this machine's; w4a8: INT4 weights by INT8 inputs, faster on a CPU; reference: float32.",
)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Quantize Mixture-of-Experts language models to INT4 or FP8, and measure what that costs.

    Schemes: W4A16, W4A16_ASYM, W4AFP8, W8A16, W8A8, FP8_DYNAMIC, FP8 (static), FP8_BLOCK; BF16 keeps a role as it is.
    """


@main.command()
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder for the result.")
@recipe_options
@cli_allocation.target_options
@cli_allocation.extent_options
@engine_options
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.", show_default=True)
@click.option("--held-out", metavar="FILE|NAME", help="Evaluate on this text in the same pass; see OUT/eval/report.html.")
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan, write nothing.")
@as_json
@click.option("--quiet", is_flag=True, help="No progress.")
@command
def quantize(
    model: str,
    out: Path,
    device: str,
    recipe_file: Path | None,
    engine: str | None,
    held_out: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Quantize MODEL, a local folder in Hugging Face layout or a hub name, into a new folder.

    Interrupted, the same command resumes and ends with the same bytes. The verdict on --held-out text is printed; it does
    not change the exit code.

    \b
    quantkit quantize MODEL -o OUT
    quantkit quantize MODEL -o OUT --target-bits 4.5 --engine vllm --tp 8
    quantkit quantize UNKNOWN -o OUT --linears 'encoder.*.fc?' --linears '*_proj' --scheme FP8_DYNAMIC
    """
    from quantkit.checkpoint.folder import find_model, without_tokenizer
    from quantkit.checkpoint.sets import weight_sets
    from quantkit.checkpoint.share import share_line
    from quantkit.commands.tables import console, layer_line, plan_table, size
    from quantkit.errors import ConfigError, counted
    from quantkit.job import pipeline

    request, served = cli_allocation.asked_for(options), served_by(engine, options, model)
    recipe = fitting(read_recipe(recipe_file, options), served)
    screen = console(stderr=True)
    if held_out and recipe.linears:
        raise ConfigError("--held-out needs an architecture that quantkit knows", "leave out --linears or --held-out")
    riding = cli_eval.held_out_text(held_out, model, recipe.add_bos) if held_out else None
    choice = cli_allocation.found(model, recipe, request, served, None if dry_run else out, device, quiet)
    recipe = choice.recipe
    if dry_run:
        show({**pipeline.describe(model, out, recipe, device), **choice.shown()}, plan_table, as_json)
        return
    for note in weight_sets(find_model(model)):
        click.echo(f"warning: {note}", err=True)
    progress = None if quiet else lambda step: screen.print(layer_line(step), soft_wrap=True)
    beside = [riding.evaluation] if riding else []
    record = pipeline.quantize(
        model, out, recipe, device=device, progress=progress, beside=beside, allocation=choice.allocation
    )
    for line in record["recovered"]:
        click.echo(f"warning: {line}", err=True)
    if lost := record.get("learning", {}).get("overflowed"):
        click.echo(f"warning: {lost:,} gradients overflowed, and were left out of the metric of learning", err=True)
    if stopped := record.get("tuning", {}).get("stopped"):
        click.echo(f"warning: tuning ended early: {stopped}", err=True)
    if not recipe.linears and (missing := without_tokenizer(out)):
        click.echo(f"warning: {missing}", err=True)
    if skipped := (record["calibration_text"] or {}).get("skipped_rows"):
        click.echo(f"note: of {recipe.calibration}, rows were skipped: {json.dumps(skipped)}", err=True)
    if held_out and riding:
        cli_eval.say_verdict(cli_eval.evaluate_and_write(out, model, held_out, device, riding.extent, ran=riding.evaluation))
    if as_json:
        click.echo(json.dumps(record, indent=2))
    elif not quiet:
        saved, learned = record["source_bytes"] / record["output_bytes"], record.get("learning")
        tuned = record.get("tuning")
        change = f"tuned: KL {tuned['before']:.4f} -> {tuned['after']:.4f} on text apart; " if tuned else ""
        as_learned = f"{learned['kept']} of {counted(learned['linears'], 'linear')} as learned; " if learned else ""
        console().print(
            f"{out}: {size(record['source_bytes'])} -> {size(record['output_bytes'])} ({saved:.2f}x smaller), verified; "
            f"{counted(len(record['fallbacks']), 'fallback')}, {counted(record['lent_tokens'], 'linear')} with lent tokens; "
            f"{as_learned}{change}{share_line(record['bf16_share'])}",
            soft_wrap=True,
        )


@main.command()
@click.argument("model")
@recipe_options
@cli_allocation.target_options
@cli_allocation.extent_options
@engine_options
@as_json
@command
def plan(model: str, recipe_file: Path | None, engine: str | None, as_json: bool, **options: Any) -> None:
    """Show what quantizing MODEL would give, from its headers alone, and whether an engine will load that.

    Exit code 0: it loads, 1: it does not, or computes something else, 3: nobody looked, 2: bad input.

    \b
    quantkit plan MODEL --experts W4A16 --engine vllm --tp 8 --ep
    """
    from quantkit.checkpoint.folder import find_model
    from quantkit.checkpoint.reader import CheckpointReader
    from quantkit.commands.tables import plan_table
    from quantkit.errors import ConfigError
    from quantkit.job.plan import make_plan, summary

    request, served = cli_allocation.asked_for(options), served_by(engine, options, model)
    recipe = fitting(read_recipe(recipe_file, options), served)
    if served and recipe.linears:
        raise ConfigError("--engine needs an architecture that quantkit knows", "leave out --linears or --engine")
    choice = cli_allocation.found(model, recipe, request, served, None)
    reader = CheckpointReader(find_model(model))
    planned = make_plan(reader, choice.recipe)
    data = {**summary(planned), **choice.shown()}
    if served:
        from quantkit.engines.assess import assess

        how = served.engine, planned.model, reader.config, planned.schemes, planned.written, served.deployment
        assessment = assess(*how)
        data["engine"] = assessment.as_dict()
        show(data, plan_table, as_json)
        sys.exit(assessment.verdict.exit_code)
    show(data, plan_table, as_json)


@main.command()
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder for the result.")
@click.option("--to", required=True, metavar="FORMAT", help=f"{', '.join(TARGETS)}.")
@as_json
@click.option("--quiet", is_flag=True, help="No progress.")
@command
def convert(model: str, out: Path, to: str, as_json: bool, quiet: bool) -> None:
    """Write the quantized checkpoint MODEL in another format: the same codes, scales and zero points, or a refusal.

    bf16 holds the dequantized values, and counts those that it has to round.
    """
    from quantkit.commands.tables import console, size
    from quantkit.job.conversion import convert as run

    screen = console(stderr=True)
    progress = None if quiet else lambda done, total: screen.print(f"shard {done} of {total}")
    record = run(model, out, to, progress=progress)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    elif not quiet:
        lost = f"{record['rounded_weights']:,} weights rounded to BF16" if record["rounded_weights"] else "lossless"
        sizes = f"{size(record['source_bytes'])} -> {size(record['output_bytes'])}"
        notes = "".join(f"\n  {note}" for note in record["notes"])
        console().print(f"{out}: {record['from']} -> {to}, {sizes}, {lost}, verified{notes}", soft_wrap=True)


main.add_command(cli_allocation.sensitivity)
main.add_command(cli_eval.evaluate)
main.add_command(cli_eval.report)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", required=True, multiple=True, help="Text to continue; given again, a batch.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(min=0, max=1, min_open=True))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1))
@click.option("--kv-cache", default="bf16", show_default=True, type=click.Choice([kind.value for kind in KVFormat]))
@bos_option
@kernels_option
@click.option("--device", default="cpu", show_default=True)
@command
def generate(
    path: Path,
    prompts: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    kv_cache: str,
    add_bos: bool | None,
    kernels: Kernels,
    device: str,
) -> None:
    """Continue a prompt with a checkpoint, quantized or not, printing text as it comes; tokens per second go to stderr.

    Several prompts are continued together and printed when all are done.
    """
    import quantkit
    from quantkit.checkpoint.sets import weight_sets
    from quantkit.commands.tables import console
    from quantkit.errors import ConfigError
    from quantkit.run.sampling import Sampling
    from quantkit.run.speed import Speed
    from quantkit.run.text import complete, stream_text

    if any("\ud800" <= character <= "\udfff" for prompt in prompts for character in prompt):  # could not be decoded
        raise ConfigError("the prompt is not valid UTF-8", "check the terminal's encoding")
    with console(stderr=True).status("loading") as status:
        model = quantkit.load(
            path,
            device,
            kernels,
            progress=lambda done, total: status.update(f"loading, {done} of {total} layers"),
        )
    for note in weight_sets(path):
        click.echo(f"warning: {note}", err=True)
    speed = Speed()
    how = Sampling(temperature, top_p, seed), KVFormat(kv_cache), add_bos, speed
    if len(prompts) > 1:
        for prompt, text in zip(prompts, complete(model, prompts, max_tokens, *how), strict=True):
            click.echo(f"{prompt}{text}\n")
        click.echo(speed, err=True)
        return
    pieces = stream_text(model, prompts[0], max_tokens, *how)  # which refuses before the prompt is shown
    click.echo(prompts[0], nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
    click.echo(speed, err=True)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--kernels", is_flag=True, help="Show which kernel would serve each role here instead, and why.")
@as_json
@command
def inspect(path: Path, kernels: bool, as_json: bool) -> None:
    """Show what is in a checkpoint: by role the scheme, bits per weight and bytes."""
    from quantkit.commands.tables import inspect_table, kernel_table

    if kernels:
        import torch

        from quantkit.run.model import Model

        model = Model(path, torch.device("cpu"), kernels="auto")
        kernels_here = {"path": str(path), "kernels": model.explain(), "decoding": model.explain_decoding()}
        show(kernels_here, kernel_table, as_json)
        return
    from quantkit.checkpoint.inspect import inspect as run

    show(run(path), inspect_table, as_json)


@main.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--shape", help="Instead of a checkpoint: hunyuan-large, hunyuan-a13b, mixtral-8x22b or deepseek-v2.")
@click.option("--scheme", help="With --shape. [default: W4A16]")
@click.option("--tokens", default="1,4,16,64,256", show_default=True, help="Token counts, with commas.")
@click.option("--positions", default="32,512,1500", show_default=True, help="Lengths of prompts to generate after.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(min=1))
@kernels_option
@click.option("--device", default="cpu", show_default=True)
@as_json
@command
def bench(
    path: Path | None,
    shape: str | None,
    scheme: str | None,
    tokens: str,
    positions: str,
    rounds: int,
    kernels: Kernels,
    device: str,
    as_json: bool,
) -> None:
    """Time this machine's kernels on the matrices of a checkpoint or of a known model, beside BF16 and the roofline.

    Of a checkpoint also how many tokens a second it reads and writes, after prompts of several lengths.
    """
    import quantkit
    from quantkit.commands.tables import bench_table
    from quantkit.run.bench import bench as run
    from quantkit.run.bench import counts, selected
    from quantkit.run.speed import generation

    numbers, lengths = counts("--tokens", tokens), counts("--positions", positions)
    rows = run(selected(path, shape, scheme), numbers, rounds, device, kernels)
    generated = [] if path is None else generation(quantkit.load(path, device, kernels), lengths)
    show({"title": str(path or shape), "rows": rows, "generation": generated}, bench_table, as_json)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="The model it was made from: checks every weight's error.")
@engine_options
@as_json
@command
def verify(out: Path, source: Path | None, engine: str | None, as_json: bool, **options: Any) -> None:
    """Re-read a quantized checkpoint independently: hashes, names, shapes, finite values, dequantized error.

    With --engine instead: replay that engine's loading on the headers. Exit code 0: it loads, 1: it does not, or computes
    something else, 3: nobody looked.
    """
    from quantkit.errors import ConfigError, counted

    if engine:
        from quantkit.commands.tables import engine_table
        from quantkit.engines.registry import engine_named
        from quantkit.engines.replay import replay
        from quantkit.engines.rules import Verdict

        if source:
            raise ConfigError("--engine and --source check different things", "run verify once with each")
        assessment = replay(out, engine_named(engine), deployment(options))
        show(assessment, engine_table, as_json)
        sys.exit(Verdict(assessment["verdict"]).exit_code)

    from quantkit.checkpoint.share import share_line
    from quantkit.checkpoint.verify import verify as run

    deployment(options, needed_by="--engine")
    report = run(out, source)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    totals = {"file": report.files, "tensor": report.tensors, "linear": report.linears}
    counts = ", ".join(counted(number, thing) for thing, number in totals.items())
    errors = "".join(f"\n  {role}: error mean {e['mean']:.2%}, worst {e['max']:.2%}" for role, e in report.errors.items())
    unknown = "".join(f"\n  not checked: {words}" for words in report.not_checked)
    verdict = "nothing wrong was seen" if unknown else "sound"
    click.echo(f"{out}: {verdict}. {counts}; {share_line(report.bf16_share)}.{errors}{unknown}")


if __name__ == "__main__":
    main()
