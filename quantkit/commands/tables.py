"""What people see: one line per layer while work runs, and tables of results. The only module besides cli that prints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from quantkit.checkpoint.share import share_line
from quantkit.commands.allocation_tables import allocation_table, cost_table
from quantkit.errors import counted, shown_lines
from quantkit.report.words import size

if TYPE_CHECKING:
    from quantkit.job.pipeline import Step

__all__ = [
    "bench_table",
    "clock",
    "console",
    "engine_table",
    "eval_table",
    "inspect_table",
    "kernel_table",
    "layer_line",
    "plan_table",
    "print_tables",
    "size",
    "verdict_tables",
]


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def layer_line(step: Step) -> str:
    """`layer 3  [4/64]  error -28.1 dB  coverage 3.4  1:02  ETA 15:31  peak 812.0 MB`."""
    parts = [f"layer {step.layer}", f"[{step.done}/{step.total}]"]
    if step.error is not None:
        parts.append(f"error {10 * math.log10(max(step.error, 1e-12)):.1f} dB")
    if step.least_coverage is not None:
        parts.append(f"coverage {step.least_coverage:.1f}")
    if step.learned is not None:
        parts.append(f"learned {step.learned:+.0%}")
    if step.fallbacks:
        parts.append(counted(step.fallbacks, "fallback"))
    parts += [clock(step.seconds), f"ETA {clock(step.eta_seconds)}", f"peak {size(step.peak_memory_bytes)}"]
    return "  ".join(parts)


def plan_table(plan: dict[str, Any]) -> Table | Group:
    """What a run would do: by role the scheme and bits per weight, then sizes; then an engine's answer, if one was asked."""
    table = Table(title=f"{plan['architecture']}, {counted(plan['layers'], 'layer')}, {plan['parameters']:,} parameters")
    for name in ("role", "scheme", "linears", "weights", "bits/weight"):
        table.add_column(name, justify="left" if name in ("role", "scheme") else "right")
    for role, row in plan["roles"].items():
        cells = [
            ", ".join(row["schemes"]),
            f"{row['linears']:,}",
            f"{row['weights']:,}",
            f"{row['bits_per_weight']:.3f}",
        ]
        table.add_row(role, *cells)
    table.caption = (
        f"{size(plan['source_bytes'])} -> {size(plan['output_bytes'])} in {counted(plan['shards'], 'shard')}; "
        f"scratch disk {size(plan['tape_bytes'])}"
        + ("" if plan["calibrated"] else "; no calibration needed")
        + (f"\n{_learning(plan['learning'])}" if "learning" in plan else "")
        + (f"\n{_tuning(plan['tuning'])}" if "tuning" in plan else "")
        + "".join(f"\n{line}" for line in (share_line(plan["bf16_share"]), *plan["notes"]))
    )
    sections = {"allocation": allocation_table, "measuring": cost_table, "engine": engine_table}
    parts = [render(plan[name]) for name, render in sections.items() if name in plan]
    return Group(table, *parts) if parts else table


def _learning(learning: dict[str, Any]) -> str:
    """`learned: 216 linears in 200 steps on 399,360 tokens (1.0 times), judged by 26,624; ...`."""
    reads = f"{learning['fisher_tokens']:,} tokens backward first; " if learning["fisher_tokens"] else ""
    linears, steps = counted(learning["linears"], "linear"), counted(learning["steps"], "step")
    return (
        f"learned: {linears} in {steps} on {learning['tokens']:,} tokens ({learning['epochs']:.1f} times), judged by "
        f"{learning['apart']:,}; {reads}all tokens pass each layer {learning['passes']:.1f} times, weights are read "
        f"{learning['source_reads']} times"
    )


def _tuning(tuning: dict[str, Any]) -> str:
    """`tuned: scales in 29 steps on 59,392 tokens, which read 342 MB of codes`."""
    steps, codes = counted(tuning["steps"], "step"), size(tuning["codes_read"])
    return f"tuned: scales in {steps} on {tuning['tokens']:,} tokens, which read {codes} of codes"


def engine_table(assessment: dict[str, Any]) -> Group:
    """What an engine would do with each kind of weight; then why not and what would work, a line each."""
    table = Table(title=_served(assessment), box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("role", "weight", "scheme", "layers", "on a device", "verdict"):
        table.add_column(name, no_wrap=name in ("layers", "on a device"))
    for row in assessment["weights"]:
        rows, columns = row["on_device"]["rows"], row["on_device"]["columns"]
        shape = f"{'+'.join(str(r) for r in rows)} x {columns}".replace("None", "?")
        table.add_row(row["role"], row["weight"], row["scheme"], _ranges(row["layers"]), shape, row["verdict"])
    lines = [*_findings(assessment)]
    instead = {row["role"]: row["instead"] for row in assessment["weights"] if row["instead"]}
    lines += [f"{role} would load with {', or '.join(words)}" for role, words in instead.items()]
    lines += [f"{problem['verdict']} [{problem['kind']}] {problem['problem']}" for problem in assessment.get("problems", [])]
    more = sum(assessment.get("counts", {}).values()) - len(assessment.get("problems", []))
    lines += [f"and {counted(more, 'more problem')}"] if more > 0 else []
    return Group(table, *lines, f"{assessment['name']} {assessment['version']}: {assessment['verdict']}")


def _findings(assessment: dict[str, Any]) -> list[str]:
    """A paragraph for each rule that has something to say: verdict, what the engine does, and where that was seen."""
    paragraphs: dict[tuple[str, str], dict[str, None]] = {}
    places = [("", finding) for finding in assessment["model"]]
    places += [(f"{row['role']} {row['weight']}: ", finding) for row in assessment["weights"] for finding in row["findings"]]
    for place, finding in places:
        head = f"{finding['verdict']} [{finding['rule']}] {finding['says']}"
        fix = f" Fix: {finding['fix']}." if finding["fix"] else ""
        paragraphs.setdefault((head, fix), {})[place + finding["why"]] = None
    return [f"{head} Here: {'; '.join(where)}.{fix}" for (head, fix), where in paragraphs.items()]


def _served(assessment: dict[str, Any]) -> str:
    parallel = "".join(f", {name} {assessment[name]}" for name in ("tp", "pp") if assessment[name] > 1) + (
        ", ep" if assessment["ep"] else ""
    )
    return f"{assessment['name']} {assessment['version']} on {assessment['hardware']}{parallel}"


def _ranges(numbers: list[int]) -> str:
    """Layer numbers for people: `0-3, 7`, or `0, 2, .. 62` where every second one is meant."""
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, .. {numbers[-1]}"
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def inspect_table(summary: dict[str, Any]) -> Table:
    counts = f"{counted(summary['layers'], 'layer')}, {counted(summary['shards'], 'shard')}"
    table = Table(title=f"{summary['path']}: {summary['architecture']}, {counts}")
    for name in ("role", "scheme", "tensors", "weights", "bytes", "bits/weight"):
        table.add_column(name, justify="left" if name in ("role", "scheme") else "right")
    for role, row in [*summary["roles"].items(), ("total", summary["total"])]:
        scheme = ", ".join(row.get("schemes", []))
        cells = [f"{row['tensors']:,}", f"{row['weights']:,}", size(row["bytes"]), f"{row['bits_per_weight']:.3f}"]
        table.add_row(role, scheme, *cells, style="bold" if role == "total" else None)
    table.caption = "\n".join([share_line(summary["bf16_share"]), *summary["notes"]])
    return table


def kernel_table(choices: dict[str, Any]) -> Table:
    names = ("role", "scheme", "linears", "kernel", "why", "elsewhere")
    table = Table(title=f"{choices['path']} on this machine")
    for name in names:
        table.add_column(name, justify="right" if name == "linears" else "left")
    for row in choices["kernels"]:
        table.add_row(*(str(row[name]) for name in names))
    table.add_section()
    for row in choices["decoding"]:
        table.add_row(f"decoding: {row['half']}", "", f"{row['layers']} layers", row["kernel"], row["why"], "")
    return table


def bench_table(benchmark: dict[str, Any]) -> Group:
    """One section for each matrix; the kernels that served them stand below."""
    table = Table(title=benchmark["title"], box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("matrix", "shape", "tokens", "us (p20..p80)", "GB/s", "TFLOP/s", "roofline", "BF16"):
        table.add_column(name, justify="left" if name == "matrix" else "right")
    last = ("", "")
    for row in benchmark["rows"]:
        time, (out, inputs) = row["microseconds"], row["shape"]
        name, shape = row["matrix"], f"{out}x{inputs}"
        if any(last) and (name, shape) != last:
            table.add_section()
        cells = [
            str(row["tokens"]),
            f"{time['median']:.0f} ({time['p20']:.0f}..{time['p80']:.0f})",
            f"{row['gb_per_s']:.1f}",
        ]
        cells += [f"{row['tflop_per_s']:.2f}", f"{row['of_roofline']:.0%}", f"{row['of_bf16']:.2f}x"]
        table.add_row(*((name, shape) if (name, shape) != last else ("", "")), *cells)
        last = name, shape
    kernels = sorted({f"{row['scheme']} by {row['kernel']}" for row in benchmark["rows"]})
    table.caption = f"{', '.join(kernels)}; share of the roofline measured here, speed-up over BF16"
    return Group(table, *([_generation_table(benchmark["generation"])] if benchmark["generation"] else []))


def _generation_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("positions", "prefill, tokens/s", "decode, tokens/s"):
        table.add_column(name, justify="right")
    for row in rows:
        speeds = (f"{row[name]:.1f}" for name in ("prefill_tokens_per_s", "decode_tokens_per_s") if name in row)
        table.add_row(str(row["positions"]), *((row["skipped"], "") if "skipped" in row else speeds))
    return table


def eval_table(result: dict[str, Any]) -> Table:
    """Figures with their 95 % intervals."""
    table = Table(
        title=f"{result['quantized']} against {result['baseline']}, {result['tokens']:,} tokens of {result['text']}"
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column(f"95 % interval ({result['units']} {result['bootstrap_unit']}s)", justify="right")
    rows: list[tuple[str, str, float]] = [
        ("perplexity, baseline", "perplexity.baseline", result["perplexity"]["baseline"]),
        ("perplexity, quantized", "perplexity.quantized", result["perplexity"]["quantized"]),
        ("perplexity ratio", "perplexity.ratio", result["perplexity"]["ratio"]),
        *((f"KL {name}, nats", f"kl.{name}", value) for name, value in result["kl"].items()),
        *([("KL, noise floor, nats", "kl.floor", result["noise_floor"])] if result["noise_floor"] is not None else []),
        ("top-1 agreement", "top1_agreement", result["top1_agreement"]),
        ("router agreement", "router_agreement", result["router_agreement"]),
    ]
    for label, key, value in rows:
        interval = result["ci95"].get(key)
        table.add_row(label, _five(value), f"{_five(interval[0])} .. {_five(interval[1])}" if interval else "")
    errors = [(row["hidden_error"], row["layer"]) for row in result["layers"]]
    if broken := [layer for error, layer in errors if error is None]:
        table.caption = f"not finite after layer {broken[0]}"
    else:
        error, layer = max(errors)
        table.caption = f"largest error of a hidden state: {error:.2e} of its energy, after layer {layer}"
    return table


def _five(x: float) -> str:
    """Five digits after the point, unless a broken model makes that hundreds before it."""
    return f"{x:.5f}" if x < 1e9 else f"{x:.5g}"


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        """Every line, title and cell passes here: what a file holds must not move the cursor or turn the writing."""
        return super().render_str(shown_lines(text), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # the library would exit with 1, which is a verdict of some commands


def console(stderr: bool = False) -> Console:
    return _Console(stderr=stderr, highlight=False, markup=False, emoji=False)  # a path may hold brackets


_FOLDED = 8  # columns that a text column keeps on a narrow terminal
_UNBOUNDED = 10_000


def print_tables(renderable: RenderableType, screen: Console) -> None:
    """Print tables, alone or in groups, so that no number is cut: what is aligned right, or not wrapped, stays whole.

    Text is folded where a terminal is narrow; a file or a pipe has no width, and gets each row on one line.
    """
    texts = []
    for table in _tables_in(renderable):
        table.title_justify = table.caption_justify = "left"
        for column in table.columns:
            column.width = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
            if column.justify != "right" and not column.no_wrap:
                column.overflow, column.width = "fold", min(column.width, _FOLDED)
                texts.append(column)
    unbounded = screen.options.update(max_width=_UNBOUNDED)
    least = Measurement.get(screen, unbounded, renderable).minimum
    for column in texts:
        column.width = None
    natural = Measurement.get(screen, unbounded, renderable).maximum
    screen.width = max(screen.width, least) if screen.is_terminal else natural
    screen.print(renderable)


def _tables_in(renderable: RenderableType) -> Iterator[Table]:
    if isinstance(renderable, Table):
        yield renderable
    elif isinstance(renderable, Group):
        for part in renderable.renderables:
            yield from _tables_in(part)


def verdict_tables(data: dict[str, Any]) -> Group:
    """For each run its gates under its verdict, and what changed where it was compared."""
    tables = []
    for run in data["runs"]:
        table = Table("gate", "decision", "why", title=f"{run['verdict']['status'].upper()}: {run['run']}", box=box.SIMPLE)
        for row in run["gates"]:
            table.add_row(row["gate"], row["status"], row["reason"])
        tables.append(table)
        if run["changes"]:
            changes = Table(title="changes", box=box.SIMPLE)
            for name in ("metric", "before", "now", ""):
                changes.add_column(name, justify="right" if name in ("before", "now") else "left")
            for row in run["changes"]:
                cells = (f"{row[side]['value']:.5g}" for side in ("previous", "current"))
                changes.add_row(row["metric"], *cells, "regression" if row["regression"] else "")
            tables.append(changes)
    return Group(*tables)
