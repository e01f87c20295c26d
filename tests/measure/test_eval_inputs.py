"""What `eval` and `quantize --held-out` refuse before any work, and what they say after it."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import quantkit
from quantkit.calib import tokens
from quantkit.calib.documents import read_documents
from quantkit.calib.lockstep import Track
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.cli import main
from quantkit.commands import evaluate as cli_eval
from quantkit.errors import NotFiniteError
from quantkit.measure import evaluate
from quantkit.measure.evaluate import Extent, measure
from quantkit.measure.run import Evaluation
from quantkit.measure.sides import side_by_side
from quantkit.model.spec import Layer
from quantkit.recipe import Recipe
from quantkit.report.gates import decide
from quantkit.report.html import html
from quantkit.report.markdown import markdown
from quantkit.report.report import read_report
from quantkit.report.schema import Report, Run
from quantkit.report.words import number
from quantkit.tasks import run_code, tasks
from quantkit.tasks.tasks import Options, Plan
from tests.conftest import CONFIG, SMALL, random_weights, write_checkpoint
from tests.helpers.commands import cli
from tests.helpers.edits import rescaled
from tests.helpers.evaluations import EXTENT, SHORT, both, flip


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any) -> None:
        raise AssertionError("the models ran")

    monkeypatch.setattr("quantkit.measure.evaluate.side_by_side", run)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("kl.meen<1", "did you mean kl.mean?"),
        ("kl.max<1", "no interval"),
        ("context.perplexity_ratio<1", "it needs quantkit eval --context"),
        ("kv_cache.added_kl<1", "it needs quantkit eval --kv-cache fp8"),
        ("tasks.piqa.recovery>0.9", "it needs quantkit eval --tasks"),
        ("change.kl.mean<0", "it needs quantkit report --against"),
    ],
)
def test_a_gate_on_nothing_is_refused_at_once(
    pair: tuple[Path, Path], tmp_path: Path, no_work: None, gate: str, message: str
) -> None:
    found = cli("eval", pair[0], "--baseline", pair[1], *SHORT, "--gate", gate, "--save", tmp_path)
    assert found.exit_code == 2 and message in found.stderr


def test_a_gate_that_only_the_model_refuses_costs_no_work(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dense = {**CONFIG, "num_experts": 1, "use_mixed_mlp_moe": False}
    base = write_checkpoint(tmp_path / "dense", dense, random_weights(dense))
    quantkit.quantize(base, tmp_path / "out", Recipe(scheme="W8A16", **SMALL))  # type: ignore[arg-type]
    found = cli("eval", tmp_path / "out", "--baseline", base, *SHORT, "--gate", "router_agreement>0.5")
    assert found.exit_code == 2 and "router_agreement" in found.stderr
    written = read_report(tmp_path / "out" / "eval" / "report.json")
    assert written.divergence is not None and written.verdict.status == "undecided"


def test_overlap_is_looked_at_before_the_work(pair: tuple[Path, Path], out: Path, no_work: None) -> None:
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "calibration_tokens": 9, "recipe": {"scheme": "NOPE"}}))
    assert cli("eval", out, "--baseline", pair[1], *SHORT).exit_code == 2


@pytest.mark.parametrize(
    "option",
    [
        ("--limit", 5), ("--shots", 0), ("--unsafe-code",), ("--chat-template",), ("--max-new-tokens", 4),
        ("--batch-size", 2), ("--task-kernels", "reference"), ("--items", "x.jsonl"),
    ],
)  # fmt: skip
def test_options_of_tasks_without_tasks_are_refused(tmp_path: Path, option: tuple[object, ...]) -> None:
    found = cli("eval", tmp_path / "none", "--baseline", tmp_path / "none", *option)
    assert found.exit_code == 2 and f"{option[0]} without tasks to run" in found.stderr


def test_a_command_says_all_that_was_asked(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    command = cli_eval._command(*pair, "t.txt", Extent(samples=5, speed=True), "cpu", None)
    assert "--samples 5" in command and "--speed" in command


@pytest.mark.parametrize(
    "option", ["--junit", "--junit FILE/x.xml", "--cache FILE", "--cache FILE/x", "--gates", "--save FILE"]
)
def test_a_folder_for_a_file_or_a_file_for_a_folder_is_refused_at_once(
    pair: tuple[Path, Path], out: Path, tmp_path: Path, no_work: None, option: str
) -> None:
    """Before the earlier evaluation is put away."""
    (out / "eval").mkdir()
    (out / "eval" / "report.json").write_text("{}")
    (tmp_path / "file").touch()
    name, _, place = option.partition(" ")
    where = tmp_path if not place else Path(place.replace("FILE", str(tmp_path / "file")))
    found = cli("eval", out, "--baseline", pair[1], *SHORT, name, where)
    assert found.exit_code == 2 and found.stderr.lower().count("error:") == 1 and str(tmp_path) in found.stderr
    assert (out / "eval" / "report.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == ["file"]


@pytest.mark.parametrize("option", [("--junit", ""), ("-o", "x.html/y.html"), ("-o", "x.txt")])
def test_report_looks_where_it_writes_before_it_reads(tmp_path: Path, option: tuple[str, str]) -> None:
    (tmp_path / "x.html").touch()
    found = cli("report", tmp_path / "none", option[0], tmp_path / option[1])
    assert found.exit_code == 2 and "holds no evaluation" not in found.stderr


@pytest.mark.parametrize(("swapped", "unmeasured"), [(False, []), (True, ["weights.error.max"])])
def test_a_baseline_that_is_quantized_is_named(
    pair: tuple[Path, Path], tmp_path: Path, swapped: bool, unmeasured: list[str]
) -> None:
    """INT4 against INT8; or the BF16 model, where the two folders were given in the wrong order."""
    quantized = pair[1] if swapped else tmp_path / "int4"
    if not swapped:
        quantkit.quantize(pair[1], quantized, Recipe(scheme="W4A16", **SMALL))  # type: ignore[arg-type]
    found = cli("eval", quantized, "--baseline", pair[0], *SHORT, "--save", tmp_path / "saved")
    said = f"the baseline {pair[0]} is itself quantized (W8A16)"
    assert f"warning: {said}" in found.stderr
    report = read_report(tmp_path / "saved" / "report.json")
    assert any(said in note for note in report.notes) and "is itself quantized" in markdown([Run(name="x", report=report)])
    assert [gate.metric for gate in report.gates if gate.status == "not measured"] == unmeasured
    errors = [row.weight_error for row in report.linears if row.weight_error is not None]
    assert swapped or 0.02 < min(errors) < max(errors) < 0.3


def test_what_makes_figures_doubtful_is_said_before_the_models_run(
    pair: tuple[Path, Path], tmp_path: Path, no_work: None
) -> None:
    """A shard that has changed since it was written, and a text that the calibration has read."""
    text, out = tmp_path / "seen.txt", tmp_path / "out"
    text.write_text("\n".join(f"def f{i}(x): return x + {i}" for i in range(200)))
    quantkit.quantize(pair[1], out, Recipe(scheme="W4A16", calibration=str(text), **SMALL))  # type: ignore[arg-type]
    shard = flip(out)
    found = CliRunner().invoke(main, ["eval", str(out), "--baseline", str(pair[1]), "--text", str(text), *map(str, SHORT)])
    assert "AssertionError: the models ran" in found.stderr
    changed, seen = (line for line in found.stderr.splitlines() if line.startswith("warning: "))
    assert changed == f"warning: {out}: {shard.name} does not have the hash that SHA256SUMS states"
    assert "% of the evaluation text stands in the calibration text" in seen


# quantize --held-out


def test_quantize_says_the_verdict_on_held_out_text(pair: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(9)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    how = ("--scheme", "W8A16", "--group-size", 32, "--samples", 8, "--held-out", tmp_path / "t.jsonl")
    made = cli("quantize", pair[1], "-o", tmp_path / "made", *how)
    status = read_report(tmp_path / "made" / "eval" / "report.json").verdict
    assert made.exit_code == 0 and f"{status.status.upper()}: {status.reasons[0]}" in made.stderr


@pytest.mark.parametrize("text", ["", "x"])
def test_held_out_text_without_a_window_is_refused_before_quantizing(
    pair: tuple[Path, Path], tmp_path: Path, text: str
) -> None:
    (tmp_path / "t.txt").write_text(text)
    how = ("--scheme", "W8A16", "--group-size", 32, "--samples", 8, "--held-out", tmp_path / "t.txt")
    for more in ((), ("--dry-run",)):
        made = cli("quantize", pair[1], "-o", tmp_path / "made", *how, *more)
        assert made.exit_code == 2 and "no document of two tokens" in made.stderr and made.stdout == ""
    assert not list(tmp_path.glob("made*"))


def test_held_out_windows_are_no_longer_than_the_model_reads(make_model: Callable[..., Path]) -> None:
    assert cli_eval.held_out_text("stdlib-held-out", str(make_model(max_position_embeddings=64))).extent.seq_len == 64
    assert cli_eval.held_out_text("stdlib-held-out", str(make_model("other"))).extent.seq_len == 512


# Logits that are not finite


def test_the_first_broken_layer_is_that_of_all_batches(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    models = both(pair)
    data = tokens.evaluation_set(load_text_tokenizer(pair[1]), read_documents("stdlib-held-out"), 32, 4)
    real = Track.done

    def broken(self: Track, layer: Layer) -> None:
        """The second window's hidden states break after layer 3, the third's after layer 1."""
        rows, length = self.stream.target, self.ids.shape[1]
        for window, first in ((1, 3), (2, 1)):
            if self.looks_at is not None and layer.index == first:
                rows.write(window * length, torch.full((length, rows.shape[1]), float("nan")))
        real(self, layer)

    monkeypatch.setattr(Track, "done", broken)
    run = Evaluation(models[0].spec, data, 2, models[0].folder)
    side_by_side(models, [run])
    assert run.broken_at == 1


def test_a_model_without_one_finite_logit_fails_in_words_and_in_json(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bad = rescaled(pair[0], tmp_path / "bad", "model.layers.0.mlp", 1e30)
    found = cli("eval", bad, "--baseline", pair[1], *SHORT, "--json")
    said = json.loads(found.stdout)
    assert found.exit_code == 1 and said["verdict"]["status"] == "fail" and said["finite"]["layer"] == 0
    assert "kl" not in said and "FAIL" in found.stderr


def test_weights_that_overflow_fail_their_gate(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A scale is finite as it is stored; times its codes it is not."""
    large = rescaled(pair[0], tmp_path / "large", "model.layers.1.self_attn.o_proj", 1e38)
    bad = rescaled(large, tmp_path / "bad", "model.layers.1.self_attn.o_proj", 300)
    found = cli("eval", bad, "--baseline", pair[1], *SHORT)
    assert found.exit_code == 1
    (row,) = (gate for gate in read_report(bad / "eval" / "report.json").gates if gate.metric == "weights.error.max")
    assert row.status == "fail" and row.measured is not None and row.measured.value >= 1e30


def test_numbers_of_a_broken_model_can_be_read() -> None:
    assert [number(x) for x in (1e304, 1234567.0, 12345.6, 0.01843)] == ["1e+304", "1,234,567", "12,346", "0.0184"]


def test_probed_variants_that_are_not_finite_are_counted(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Evaluation._score

    def score(self: Evaluation, name: str, *args: Any, **kwargs: Any) -> Any:
        scores = real(self, name, *args, **kwargs)
        if name == "floor":
            scores.kl[:3] = np.nan
        return scores

    monkeypatch.setattr(Evaluation, "_score", score)
    found = decide(measure(*pair, extent=EXTENT))
    assert found.finite.tokens == 3 == found.finite.probe["floor"] and found.finite.probe["forced"] == 0
    assert found.verdict.status == "fail" and not found.finite.head
    assert "only in a variant that the probe runs" in found.gates[0].reason
    assert any("3 tokens of the probe's variants" in note for note in found.notes)


@pytest.mark.parametrize("place", ["samples", "benchmark tasks"])
def test_an_answer_without_finite_logits_fails_and_keeps_what_was_measured(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    broken = [pair[0]]

    def answer(*args: Any, **kwargs: Any) -> None:
        raise NotFiniteError(broken[0], "the logits of new token 3 are not finite")

    def measured() -> Report:
        if place == "samples":
            return measure(*pair, extent=dataclasses.replace(EXTENT, samples=1))
        plan = Plan(("gsm8k",), (), (), None, Options(), {})
        return cli_eval._with_tasks(measure(*pair, extent=EXTENT), *pair, plan, None, pair[0] / "items", lambda line: None)

    monkeypatch.setattr(evaluate, "generations", answer)
    monkeypatch.setattr(tasks, "evaluate_tasks", answer)
    found = decide(measured())
    assert found.divergence is not None and found.verdict.status == "fail" and found.finite.elsewhere[place] == 1
    assert f"1 of {found.finite.of:,} tokens have logits that are not finite: in {place}" in found.gates[1].reason
    assert any("the logits of new token 3 are not finite" in note for note in found.notes)
    assert f"tokens without finite logits: in {place}" in html([Run(name="x", report=found)])
    broken[0] = pair[1]
    with pytest.raises(NotFiniteError):
        measured()


# Code that a model wrote


def test_only_code_that_reaches_its_end_passes() -> None:
    assert run_code.passes("x = 1\nassert x == 1")
    assert not run_code.passes("assert False")
    for early in ("exit()", "import os\nos._exit(0)", "raise SystemExit"):
        assert not run_code.passes(f"{early}\nassert False")
    assert run_code.passes("def open(x):\n    return x\nimport os\nassert os.listdir() == []")
    assert not run_code.passes("import sys\nsys.exit(0)")


def test_what_code_prints_is_not_kept() -> None:
    tracemalloc.start()
    assert run_code.passes("for _ in range(50):\n    print('x' * 1_000_000)")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
