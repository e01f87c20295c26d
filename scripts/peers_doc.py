"""The measured part of docs/peers.md, from bench/results: python scripts/peers_doc.py writes it, --check only compares."""

from __future__ import annotations

from typing import Any

from measured import read, write

OURS = ("quantkit", "gptq")
METHODS = {
    ("llm-compressor", "gptq"): "GPTQ, its defaults",
    ("llm-compressor", "gptq+imatrix"): "GPTQ, observer imatrix_mse",
    ("gptqmodel", "gptq"): "GPTQ, its defaults",
    ("auto-round", "50"): "50 iterations",
    ("auto-round", "200"): "200 iterations, its default",
    ("quantkit", "rtn"): "rounding",
    ("quantkit", "gptq"): "GPTQ, its default",
    ("quantkit", "gptq, attention FP8"): "GPTQ, attention FP8_DYNAMIC",
}


def cells(row: dict[str, Any], base: dict[str, Any], text: str) -> list[str]:
    found = row["texts"][text]
    low, high = found["kl_mean_ci95"]
    return [
        f"{found['kl_mean']:.4f} ({low:.4f} to {high:.4f})",
        f"{found['kl_mean'] / base['texts'][text]['kl_mean']:.2f}",
        f"{found['top1_agreement']:.1%}",
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['cpu_seconds']:.0f}",
        f"{row['peak_mb']:.0f}",
    ]


def table(found: Any) -> list[str]:
    (text,) = found["texts"]
    base = next(row for row in found["runs"] if (row["tool"], row["method"]) == OURS)
    lines = [
        f"{found['samples']} x {found['seq_len']} calibration tokens of `{found['calibration']}`, "
        f"{found['windows']} held-out windows of `{text}`, {found['threads']} threads:",
        "",
        "| tool | method | mean KL | of quantkit's GPTQ | top-1 | MB | CPU seconds | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found["runs"], key=lambda row: -row["texts"][text]["kl_mean"] if "texts" in row else -1e9):
        tool = f"{row['tool']} {found['versions'][row['tool']]}" if row["tool"] != "quantkit" else "**quantkit**"
        method = METHODS[row["tool"], row["method"]]
        said = cells(row, base, text) if "texts" in row else [f"fails: {row['error']}", *[""] * 5]
        lines.append(f"| {tool} | {method} | {' | '.join(said)} |")
    return lines


def refusals(found: Any) -> list[str]:
    """What the tools make of the bundled model, whose cross-layer attention transformers does not know."""
    lines = ["The bundled model, of Hunyuan-Large's architecture:", ""]
    for row in found["runs"]:
        made = f"KL {next(iter(row['texts'].values()))['kl_mean']:.4f}" if "texts" in row else f"fails: {row['error']}"
        lines.append(f"* {row['tool']}, {METHODS[row['tool'], row['method']]}: {made}")
    return lines


def linears(found: Any) -> list[str]:
    """GPTQ of one linear by each tool."""
    lines = [
        "GPTQ of one linear at true width (`python -m bench.gptq`): CPU seconds of one thread for the statistics of the",
        "tokens and the solve, peak memory of the process, and the error on tokens that no tool saw.",
        "",
        "| out x in | tokens | tool | statistics | solve | in all, of quantkit's | peak GB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = {row["shape"]: row["statistics"] + row["solve"] for row in found["runs"] if row["tool"] == "quantkit"}
    for row in found["runs"]:
        ratio = (row["statistics"] + row["solve"]) / ours[row["shape"]]
        seconds = f"{row['statistics']:.1f} | {row['solve']:.1f} | {ratio:.1f}"
        begins = f"| {row['shape']} | {row['tokens']:,} | {row['tool']}"
        lines.append(f"{begins} | {seconds} | {row['peak_gb']:.2f} | {row['error']:.2e} |")
    return lines


if __name__ == "__main__":
    tables = [*table(read("peers_tiny-qwen3-moe")), "", *refusals(read("peers_tiny-hunyuan"))]
    write("peers", [*tables, "", *linears(read("gptq"))])
