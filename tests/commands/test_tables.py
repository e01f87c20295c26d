"""Tables that people read: at any width of a terminal, and in a pipe, every number stands whole on one line."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from quantkit.commands.tables import (
    bench_table,
    eval_table,
    inspect_table,
    kernel_table,
    plan_table,
    print_tables,
    verdict_tables,
)
from quantkit.commands.task_tables import suite_table, task_table
from quantkit.tasks.suite import SUITES

ROLE = {"schemes": ["FP8_DYNAMIC"], "tensors": 12_288, "weights": 377_487_360_000, "bytes": 189_999_999_999}
TASK = {
    "name": "mmlu", "metric": "exact_match", "n": 14_042, "baseline": 0.884, "quantized": 0.8799, "recovery": 0.99536,
    "ci95": (0.99121, 1.00057), "right_to_wrong": 214, "wrong_to_right": 178, "mcnemar_p": 0.07712,
}  # fmt: skip
TASKS = {
    "tasks": [TASK],
    "task_run": {
        "suite": "hunyuan-large", "benchmarks": [{"name": "mmlu", "shots": 5}], "harness": "0.4.13", "limit": None,
        "max_new_tokens": None, "items": None, "truncated": {"baseline": 0, "quantized": 0},
        "left_out": [{"name": row.name, "why": "no file"} for row in SUITES["hunyuan-large"]],
    },
}  # fmt: skip


SHARE = {"of_all": 0.123, "of_matrices_in_layers": 0.0456}


def plan(roles: dict[str, Any]) -> RenderableType:
    row = {
        "role": "shared_experts", "weight": "gate_up_proj", "scheme": "FP8_DYNAMIC", "layers": [0, 1, 2, 3, 9],
        "on_device": {"rows": [18_304, 18_304], "columns": 6400}, "verdict": "does not load", "findings": [], "instead": [],
    }  # fmt: skip
    engine = {
        "name": "vllm", "version": "0.32", "hardware": "gpu", "tp": 8, "pp": 1, "ep": True, "model": [],
        "verdict": "does not load", "weights": [row],
    }  # fmt: skip
    return plan_table(
        {
            "architecture": "hunyuan_large", "layers": 64, "parameters": 389_000_000_000, "roles": roles, "source_bytes": 1,
            "output_bytes": 1, "shards": 80, "tape_bytes": 1, "calibrated": True, "notes": [], "engine": engine,
            "bf16_share": SHARE,
        }
    )  # fmt: skip


def evaluated() -> RenderableType:
    kl = {"mean": 0.01843, "p999": 0.39804}
    names = ("perplexity.baseline", "perplexity.quantized", "perplexity.ratio", "kl.mean")
    return eval_table(
        {
            "quantized": "OUT", "baseline": "MODEL", "tokens": 4088, "text": "held_out.jsonl", "units": 64, "kl": kl,
            "bootstrap_unit": "document", "noise_floor": 0.00015, "top1_agreement": 0.9, "router_agreement": 0.9,
            "perplexity": {"baseline": 1234.58523, "quantized": 1.014232e304, "ratio": 1.0092},
            "ci95": dict.fromkeys(names, (1015.60774, 1030.3089)), "layers": [{"hidden_error": 0.0123, "layer": 3}],
        }
    )  # fmt: skip


def judged() -> RenderableType:
    gates = [{"gate": "mlp.output_error.max < 0.15", "status": "undecided", "reason": "0.0208, 95 % interval 0.0179 to 0.2"}]
    change = {"metric": "mlp.output_error.max", "previous": {"value": 0.0010001}, "current": {"value": 0.0010002}}
    run = {"run": "OUT", "verdict": {"status": "undecided"}, "gates": gates, "changes": [{**change, "regression": True}]}
    return verdict_tables({"runs": [run]})


def kernels() -> RenderableType:
    row = {"role": "shared_experts", "scheme": "W4A16", "linears": 61_440, "kernel": "cpu-avx512"}
    return kernel_table(
        {"path": "OUT", "kernels": [{**row, "why": "by table " * 9, "elsewhere": "triton " * 9}], "decoding": []}
    )


def benched() -> RenderableType:
    generated = {"positions": 131072, "prefill_tokens_per_s": 12345.67, "decode_tokens_per_s": 123.45}
    row = {
        "matrix": "experts.gate_up_proj", "shape": (36_608, 6400), "tokens": 16_384, "gb_per_s": 1234.5,
        "microseconds": {"median": 123_456, "p20": 120_001, "p80": 130_009}, "of_roofline": 0.97, "of_bf16": 12.34,
        "tflop_per_s": 567.89,
        "scheme": "W4A16", "kernel": "triton",
    }  # fmt: skip
    return bench_table({"title": "hunyuan-large", "rows": [row], "generation": [generated]})


def inspected() -> RenderableType:
    row = {**ROLE, "bits_per_weight": 4.127}
    return inspect_table({
        "path": "OUT", "architecture": "hunyuan_large", "layers": 64, "shards": 80, "total": row,
        "roles": {"shared_experts": row}, "notes": [], "bf16_share": SHARE,
    })  # fmt: skip


SHOWN = {
    "plan": (
        lambda: plan({"shared_experts": {**ROLE, "linears": 61_440, "bits_per_weight": 4.125}}),
        ("61,440", "377,487,360,000", "4.125", "18304+18304 x 6400", "0-3, 9"),
    ),
    "inspect": (inspected, ("12,288", "377,487,360,000", "190.0 GB", "4.127")),
    "inspect --kernels": (kernels, ("61440",)),
    "eval": (evaluated, ("1234.58523", "1.0142e+304", "1015.60774 .. 1030.30890", "0.01843", "0.39804", "0.00015")),
    "report": (judged, ("0.15", "0.0208,", "0.0179", "0.0010001", "0.0010002")),
    "bench": (
        benched,
        (
            "36608x6400",
            "16384",
            "123456 (120001..130009)",
            "1234.5",
            "567.89",
            "97%",
            "12.34x",
            "131072",
            "12345.7",
            "123.5",
        ),
    ),
    "tasks": (
        lambda: task_table(TASKS),
        ("14042", "88.4%", "88.0%", "99.5%", "99.1%..100.1%", "214/178", "0.077"),
    ),
    "suite": (lambda: suite_table(TASKS), ("14042", "89.9", "99.1%..100.1%", "214/178", "0.077")),
}


def lines(shown: RenderableType, width: int | None) -> list[str]:
    """As on a terminal of that width, or in a pipe."""
    file = io.StringIO()
    screen = Console(file=file, force_terminal=width is not None, width=width, color_system=None, markup=False, _environ={})
    print_tables(shown, screen)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, None], ids=lambda w: str(w) if w else "pipe")
@pytest.mark.parametrize("name", SHOWN)
def test_numbers_are_never_cut(name: str, width: int | None) -> None:
    make, numbers = SHOWN[name]
    found = lines(make(), width)
    assert not "".join(found).count("…")
    for number in numbers:
        assert any(number in line for line in found), (number, "\n".join(found))


@pytest.mark.parametrize("name", ["report", "inspect --kernels"])
def test_a_pipe_gets_each_row_on_one_line(name: str) -> None:
    make, _ = SHOWN[name]
    whole = "0.0208, 95 % interval 0.0179 to 0.2" if name == "report" else ("by table " * 9).strip()
    assert any(whole in line for line in lines(make(), None))
    assert not any(whole in line for line in lines(make(), 60))


@pytest.mark.parametrize("name", ["eval", "report", "plan", "inspect"])
def test_tables_of_usual_size_fit_80_columns(name: str) -> None:
    make, _ = SHOWN[name]
    assert max(map(len, lines(make(), 80))) <= 80
