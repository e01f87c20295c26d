"""Write what each recipe loses on the bundled model, from what `bench/accuracy.py` measured: the table of docs/accuracy.md,
and two columns of the README's table of schemes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured import ROOT, between, read

BASE, RECOMMENDED = "W4A16 RTN", "experts W4A16 GPTQ, attention and shared W8A16"
# The README's row: scheme, weights, activations, default method; and the run that shows it, if there is one.
SCHEMES = (
    ("`W4A16`", "INT4, a scale per 128 (`--group-size`)", "as they are", "GPTQ", "W4A16 GPTQ"),
    ("`W4A16_ASYM`", "the same, with zero points", "as they are", "GPTQ", "W4A16_ASYM GPTQ"),
    ("**experts `W4A16`, the rest `W8A16`**", "recommended", "as they are", "GPTQ, rounding", RECOMMENDED),
    ("`W4AFP8`", "INT4, a scale per 128", "E4M3 per token", "GPTQ", None),
    ("`W8A16`", "INT8, a scale per 128", "as they are", "rounding", "W8A16"),
    ("`W8A8`", "INT8, a scale per row", "INT8 per token", "rounding", "W8A8"),
    ("`FP8_DYNAMIC`", "E4M3, a scale per row", "E4M3 per token", "rounding", "FP8_DYNAMIC"),
    ("`FP8`", "E4M3, one scale", "E4M3, calibrated scale", "rounding", "FP8 (static)"),
    ("`FP8_BLOCK`", "E4M3, a scale per 128 x 128", "E4M3 per 128 of a token", "rounding", "FP8_BLOCK"),
)


def _mean(rows: list[dict[str, Any]]) -> float:
    """The median of the seeds."""
    return statistics.median(run["kl_mean"] for run in rows)


def _size(rows: list[dict[str, Any]]) -> str:
    return f"{rows[0]['output_bytes'] / 1e6:.1f} MB"


def table(runs: dict[str, Any]) -> str:
    """Markdown: a row for each run; the KL is the median of the seeds, all else of the first."""
    lines = [
        "| | size | mean KL | of INT4 RTN | KL p99 | perplexity | top-1 | router |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in runs.items():
        first = rows[0]
        cells = [_size(rows), f"{_mean(rows):.4f}", f"{_mean(rows) / _mean(runs[BASE]):.2f}"]
        cells += [f"{first['kl_p99']:.3f}", f"{first['perplexity']['quantized']:.2f}"]
        cells += [f"{100 * first[key]:.1f} %" for key in ("top1_agreement", "router_agreement")]
        lines.append(f"| {f'**{name}**' if name == RECOMMENDED else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def schemes(runs: dict[str, Any]) -> str:
    """Markdown: a row for each scheme, with its size and mean KL."""
    lines = ["| scheme | weights | activations | method | size | mean KL |", "|---|---|---|---|---|---|"]
    for *cells, run in SCHEMES:
        measured = [_size(runs[run]), f"{_mean(runs[run]):.4f}"] if run else ["", ""]
        lines.append(f"| {' | '.join([*cells, *measured])} |")
    return "\n".join([*lines, "| `BF16` | kept | | | | |"])


# Page: the mark that its table stands behind, and what makes it.
PAGES: dict[Path, tuple[str, Callable[[dict[str, Any]], str]]] = {
    ROOT / "README.md": ("schemes", schemes),
    ROOT / "docs" / "accuracy.md": ("accuracy", table),
}


def written(page: Path, results: dict[str, Any]) -> str:
    """The page with its table made anew. Raises SystemExit when it has no place for one."""
    mark, make = PAGES[page]
    begin, end = f"<!-- {mark}: scripts/accuracy_table.py -->", f"<!-- end of {mark} -->"
    return between(page.read_text("utf-8"), begin, end, [make(results["runs"])])


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page, read("accuracy")), "utf-8")
