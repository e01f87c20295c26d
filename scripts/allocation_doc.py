"""Write what allocations of bits lose, from what `bench/allocation.py` measured: the table of docs/allocation.md."""

from __future__ import annotations

from typing import Any

from measured import ROOT, read, write


def rows(result: dict[str, Any]) -> list[str]:
    base = result["runs"][0]["kl_mean"]
    lines = []
    for run in result["runs"]:
        low, high = run["kl_mean_ci95"] or (None, None)
        interval = f" ({low:.5f} to {high:.5f})" if low is not None else ""
        cells = [run["run"], f"{run['bytes'] / 1e6:.2f}", f"{run['kl_mean']:.5f}{interval}", f"{run['kl_mean'] / base:.2f}"]
        cells += [f"{run['predicted_kl']:.5f}", f"{run['predicted_kl'] / run['kl_mean']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        lines += [
            f"{result['model']}: sensitivities on {result['sample_tokens']:,} tokens of half of the documents of "
            f"`{result['text']}`, exponent {result['exponent']:.2f}; measured on {result['windows']} windows of the others:",
            "",
            "| run | MB | mean KL | of INT4 everywhere | predicted | predicted / measured |",
            "|---|---|---|---|---|---|",
            *rows(result),
            "",
        ]
    return lines[:-1]


if __name__ == "__main__":
    found = sorted((ROOT / "bench" / "results").glob("allocation_*.json"))
    write("allocation", page([read(path.stem) for path in found]))
