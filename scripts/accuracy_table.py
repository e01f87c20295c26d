"""Write the README's table of what each recipe loses on the bundled model, from what `bench/accuracy.py` measured."""

from __future__ import annotations

import statistics
from typing import Any

from measured import README, between, read

START, END = "<!-- accuracy: scripts/accuracy_table.py -->", "<!-- end of accuracy -->"
BASE, RECOMMENDED = "W4A16 RTN", "experts W4A16 GPTQ, attention and shared W8A16"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each run; the KL is the median of the seeds, all else of the first."""
    runs = results["runs"]
    mean = {name: statistics.median(run["kl_mean"] for run in rows) for name, rows in runs.items()}
    lines = [
        "| | size | mean KL | of INT4 RTN | KL p99 | perplexity | top-1 | router |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in runs.items():
        first = rows[0]
        cells = [f"{first['output_bytes'] / 1e6:.1f} MB", f"{mean[name]:.4f}", f"{mean[name] / mean[BASE]:.2f}"]
        cells += [f"{first['kl_p99']:.3f}", f"{first['perplexity']['quantized']:.2f}"]
        cells += [f"{100 * first[key]:.1f} %" for key in ("top1_agreement", "router_agreement")]
        lines.append(f"| {f'**{name}**' if name == RECOMMENDED else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(readme: str, results: dict[str, Any]) -> str:
    """The README with its table made anew."""
    return between(readme, START, END, [table(results)])


if __name__ == "__main__":
    README.write_text(written(README.read_text("utf-8"), read("accuracy")), "utf-8")
