"""The measured part of docs/cpu.md, from bench/results: python scripts/cpu_doc.py writes it, --check only compares."""

from __future__ import annotations

from measured import read, write


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def matrix() -> list[str]:
    """One matrix at several numbers of tokens, two threads."""
    found = read("cpu_kernels_2_threads")
    lines = [
        f"One matrix, {found['rows']} x {found['inputs']}, {found['threads']} threads: how many times as fast as each peer.",
        "",
        "| tokens | weights | of torch BF16 | of torch INT4 | of onnxruntime INT4 x INT8 | GB/s | of read bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for tokens, rows in found["tokens"].items():
        for name in ("W4A16", "W4A8", "FP8_DYNAMIC"):
            row = rows[name]
            cells = times(row["times_bf16"]), times(row["times_torch_int4"]), times(row.get("times_onnxruntime"))
            speed = f"{row['weight_gb_per_s']:.0f}", f"{row['share_of_read_bandwidth']:.0%}"
            lines.append(f"| {tokens} | {name} | {' | '.join(cells)} | {' | '.join(speed if tokens == '1' else ('', ''))} |")
    return lines


def layer() -> list[str]:
    """A layer of experts."""
    found = read("cpu_moe")
    lines = [
        f"A layer of {found['experts']} experts top-{found['top_k']}, {found['inner']} x {found['hidden']}, "
        f"{found['threads']} threads: milliseconds, and how many times as fast as BF16 in the same runtime.",
        "",
        "| tokens | W4A16 | w4a8 | FP8_DYNAMIC | BF16 |",
        "|---|---|---|---|---|",
    ]
    for tokens, rows in found["tokens"].items():
        cells = [f"{rows[name]['ms']['median']:.1f} ({rows[name]['times_bf16']:.1f}x)" for name in rows]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    row = found["tokens"]["1"]["W4A16"]
    lines += [
        "",
        f"One token in W4A16 moves {row['gb_per_s']:.0f} GB/s, {row['of_read_bandwidth']:.0%} of the read bandwidth.",
    ]
    return lines


def generation() -> list[str]:
    """Tokens one after the other: INT4 and FP8 beside BF16, and beside vLLM."""
    own, vllm = read("generate"), read("vllm_generate")
    rows = {name.removeprefix("quantkit "): row for name, row in vllm["engines"].items()}
    ms = {name: f"{row['ms_per_token']:.1f}" for name, row in rows.items()}
    ratio = {name: f"{row['times_vllm']:.1f}" for name, row in rows.items()}
    return [
        f"Generating, one prompt: a model of Hunyuan-Large's shape, {own['weights_bytes'] / 1e9:.1f} GB in BF16, is "
        f"{own['of_bf16']['INT4']:.1f} times as fast in INT4 as in BF16, and {own['of_bf16']['FP8']:.1f} times in FP8.",
        f"One of Hunyuan-A13B's shape, {vllm['weights_bytes'] / 1e9:.1f} GB in BF16, takes {ms['w4a8']} ms a token",
        f"with w4a8 and {ms['auto']} without, where vLLM 0.32 (zentorch: INT4 x INT8) takes {ms['vLLM']}",
        "on the same checkpoint:",
        f"{ratio['w4a8']} and {ratio['auto']} times as fast.",
    ]


def beside_llama() -> list[str]:
    """One prompt of a small model, beside llama.cpp."""
    measured = read("llama_generate")
    clock = "processor time" if measured["clock"] == "cpu" else "by the clock"
    about = f" ({measured['about_peer']})" if measured["about_peer"] else ""
    where = f"{measured['threads']} thread(s) of another machine ({measured['processor'].split(',')[0]}), {clock}"
    lines = [
        f"SmolLM2-135M, {where}, beside llama.cpp{about}: tokens per second, and how many times as fast. "
        "llama.cpp reads Q4_1, quantkit the same weights in INT4 by groups of 64, and a BF16 head "
        "(`bench/llama_generate.py`).",
        "",
        "| engine | positions | prefill | decode | peak, of which runtime |",
        "|---|---|---|---|---|",
    ]
    for name, row in measured["engines"].items():
        memory = f"{row['peak_bytes'] / 1e6:.0f} MB, {row['runtime_bytes'] / 1e6:.0f} MB"
        for positions, speed in ((key, value) for key, value in row.items() if key.isdecimal()):
            cells = [
                f"{speed[f'{what}_tokens_per_s']:.0f} ({speed[f'{what}_times_llama']:.1f}x)"
                for what in ("prefill", "decode")
            ]
            lines.append(f"| {name} | {positions} | {' | '.join(cells)} | {memory} |")
            memory = ""
    return lines


if __name__ == "__main__":
    write("cpu", [*matrix(), "", *layer(), "", *generation(), "", *beside_llama()])
