"""Evaluation as a report, gates and their exit codes, the page: on small windows of the bundled model, evaluated once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

import quantkit
from quantkit.calib import tokens
from quantkit.calib.documents import read_documents
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.measure.evaluate import Extent, measure
from quantkit.model.cache import KVFormat
from quantkit.model.forward import forward
from quantkit.recipe import Recipe
from quantkit.report.gates import decide, parse_gate
from quantkit.report.html import html
from quantkit.report.metrics import metrics, worst_expert
from quantkit.report.report import read_report
from quantkit.report.schema import Report, Run
from scripts.report_schema import TARGET, text
from tests.conftest import CONFIG, random_weights, write_checkpoint
from tests.helpers.commands import cli
from tests.helpers.edits import rescaled
from tests.helpers.pages import parsed
from tests.helpers.paths import ROOT

MODEL = ROOT / "examples" / "tiny-hunyuan"
EXTENT = Extent(seq_len=96, windows=16, samples=1)
DAMAGED = "model.layers.2.mlp.experts.5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good`: the bundled model in INT8, evaluated. `bad`: the same with one expert's scales doubled, evaluated."""
    root = tmp_path_factory.mktemp("report")
    quantkit.quantize(MODEL, root / "good", Recipe(scheme="W8A16"))
    rescaled(root / "good", root / "bad", DAMAGED + ".", 2)
    for name in ("good", "bad"):
        report = measure(root / name, MODEL, extent=EXTENT)
        (root / name / "eval").mkdir()
        (root / name / "eval" / "report.json").write_text(report.model_dump_json())
    return root


@pytest.fixture(scope="module")
def good(folder: Path) -> Report:
    return read_report(folder / "good" / "eval" / "report.json")


def test_default_gates_pass_a_sound_model_and_fail_a_damaged_one_at_its_expert(folder: Path) -> None:
    sound = cli("report", folder / "good")
    assert sound.exit_code == 0, sound.stdout
    damaged = cli("report", folder / "bad", "--json", "--junit", folder / "bad.xml")
    assert damaged.exit_code == 1
    (run,) = json.loads(damaged.stdout)["runs"]
    why = {row["metric"]: row["reason"] for row in run["gates"] if row["status"] == "fail"}
    assert "layer 2, expert 5" in why["mlp.output_error.max"] and DAMAGED in why["weights.error.max"]
    suite = ElementTree.parse(folder / "bad.xml").getroot()[0]
    assert suite.get("failures") == str(len(why)) and suite.get("tests") == str(len(run["gates"]))
    assert {case.get("name") for case in suite if case.find("failure") is not None} >= {"mlp.output_error.max < 0.15"}
    report = read_report(folder / "bad" / "eval" / "report.json")
    assert worst_expert(report)[0] == "layer 2, expert 5"  # type: ignore[index]
    errors = np.array([[f.value if f else 0 for f in layer.output_error] for layer in report.moe.layers])
    others = np.delete(errors.flatten(), 2 * 16 + 5)
    assert errors[2, 5] > 1 and others.max() < 0.01  # later layers' experts are not blamed for what reaches them


def test_one_scale_of_one_matrix_is_found(folder: Path) -> None:
    """Also in attention, and also where it halves."""
    for prefix, factor in ((f"{DAMAGED}.up_proj", 0.5), ("model.layers.1.self_attn.o_proj", 2.0)):
        rescaled(folder / "good", folder / "one", prefix, factor)
        report = decide(measure(folder / "one", MODEL, extent=Extent(seq_len=64, windows=6, samples=0)))
        assert report.verdict.status == "fail" and any(prefix in reason for reason in report.verdict.reasons)
        shutil.rmtree(folder / "one")


def test_output_error_against_a_direct_computation(good: Report, folder: Path) -> None:
    """One expert of layer 0: its inputs there are the baseline's, so both models can be run apart."""
    base, quant = (quantkit.load(path, kernels="reference") for path in (MODEL, folder / "good"))
    data = tokens.evaluation_set(load_text_tokenizer(MODEL), read_documents("stdlib-held-out"), 96, 16)
    scored = (torch.arange(data.ids.shape[1])[None, :] < data.lengths[:, None] - 1).flatten()
    expert, read = base.spec.layers[0].mlp.experts[3], list[torch.Tensor]()  # type: ignore[union-attr]
    real, routed = base.weights.mlp, list[torch.Tensor]()
    base.weights.mlp = lambda spec, x: read.append(x) or real(spec, x) if spec is expert else real(spec, x)  # type: ignore[method-assign, func-returns-value]
    with torch.inference_mode():
        trace = next(forward(base.spec, base.weights, data.ids))
        assert trace.routing is not None
        routed.append((trace.routing.experts == 3).any(-1).nonzero().flatten())
        x = read[0][scored[routed[0]]]
        before, after = base.weights.mlp(expert, x).double(), quant.weights.mlp(expert, x).double()
    expected = ((after - before).square().sum() / before.square().sum()).item()
    assert good.moe.layers[0].output_error[3].value == pytest.approx(expected, rel=1e-3)  # type: ignore[union-attr]
    assert good.moe.layers[0].evaluated_tokens[3] == len(x)


def test_kl_and_forced_routing_against_whole_logits(good: Report, folder: Path) -> None:
    base, quant = (quantkit.load(path, kernels="reference") for path in (MODEL, folder / "good"))
    data = tokens.evaluation_set(load_text_tokenizer(MODEL), read_documents("stdlib-held-out"), 96, 16)
    scored = torch.arange(data.ids.shape[1])[None, :] < data.lengths[:, None] - 1
    p, q = (model.logits(data.ids)[scored].double().log_softmax(-1) for model in (base, quant))
    kl = (p.exp() * (p - q)).sum(-1)
    assert good.divergence is not None and good.probe is not None and good.probe.forced_routing is not None
    assert good.divergence.kl["mean"].value == pytest.approx(kl.mean().item(), rel=1e-3)
    assert good.divergence.kl["p99"].value == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
    assert good.probe.windows == 16 and good.probe.kl.value == pytest.approx(good.divergence.kl["mean"].value)
    assert good.probe.forced_routing.value < good.probe.kl.value  # of an INT8 model most KL is flips of routing ties
    assert 0 < good.probe.floor.value < 0.01
    assert good.probe.excess.value == pytest.approx(good.probe.kl.value - good.probe.floor.value)
    assert sum(row.tokens for row in good.divergence.by_unit) == len(kl) == good.provenance.tokens
    assert sum(good.divergence.histogram.counts) + good.divergence.histogram.below == len(kl)
    wrong = (p.argmax(-1) == data.ids.roll(-1, 1)[scored]) & (q.argmax(-1) != data.ids.roll(-1, 1)[scored])
    assert good.divergence.right_to_wrong.value == pytest.approx(wrong.double().mean().item())
    assert good.worst_tokens[0].kl == pytest.approx(kl.max().item(), rel=1e-3)


def test_cached_baseline_gives_the_same(good: Report, folder: Path) -> None:
    extent = Extent(seq_len=96, windows=16, samples=0, cache=folder / "cache")
    first, second = (measure(folder / "good", MODEL, extent=extent) for _ in range(2))
    files = list((folder / "cache").rglob("*.safetensors"))
    assert len(files) == 1 and first.divergence == second.divergence == good.divergence
    assert first.layers == second.layers and first.moe == second.moe
    files[0].write_bytes(files[0].read_bytes()[:-9])
    how = ("--seq-len", 96, "--windows", 16, "--cache", folder / "cache", "--save", folder / "elsewhere")
    found = cli("eval", folder / "good", "--baseline", MODEL, *how)
    assert found.exit_code == 2 and "is damaged" in found.stderr


def test_exit_codes(folder: Path, good: Report) -> None:
    assert good.divergence is not None
    value = good.divergence.kl["mean"].value
    run = folder / "good"
    assert cli("report", run, "--gate", "kl.mean<1", "--gate", "top1_agreement > 0.5").exit_code == 0
    assert cli("report", run, "--gate", "kl.mean<1", "--gate", "kl.mean > 1").exit_code == 1
    undecided = cli("report", run, "--gate", f"kl.mean<{value:.9f}", "--junit", folder / "u.xml")
    assert undecided.exit_code == 3 and "undecided" in undecided.stdout
    assert ElementTree.parse(folder / "u.xml").getroot()[0].get("errors") == "1"
    gates = folder / "gates.yaml"
    gates.write_text(yaml.safe_dump({"gates": ["kl.mean < 1", "fallbacks.count <= 0"]}))
    assert cli("report", run, "--gates", gates).exit_code == 0
    assert cli("report", run, folder / "bad", "--gates", gates, "--gate", "weights.error.max<0.5").exit_code == 1


BAD_GATES: dict[str, tuple[str, ...]] = {
    "kl.meen<0.1": ("did you mean kl.mean?",),
    "kl.mean": ("is not understood", "kl.mean<0.02"),
    "kl.mean<nan": ("is not understood",),
    "kl.mean<1e999": ("is not understood",),
    "kl.mean=<1": ("is not understood",),
    "kl.max<1": ("no interval", "kl.p999"),
    "tasks.gsm8k.recovery>=0.99": ("was not measured", "--tasks"),
    "context.perplexity_ratio<1.1": ("was not measured", "--context"),
    "nothing<1": ("names no metric", "kl.mean"),
}


@pytest.mark.parametrize("gate", BAD_GATES)
def test_a_gate_that_cannot_be_decided_is_refused(gate: str, folder: Path) -> None:
    found = cli("report", folder / "good", "--gate", gate)
    assert found.exit_code == 2 and found.stderr.count("error:") == 1 and "Fix:" in found.stderr
    assert all(part in found.stderr for part in BAD_GATES[gate]), found.stderr


def test_bad_input(folder: Path, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    def refused(*arguments: object) -> str:
        found = cli(*arguments)
        assert found.exit_code == 2 and found.stderr.count("error:") == 1 and "Fix:" in found.stderr, found.stderr
        return found.stderr

    data = json.loads((folder / "good" / "eval" / "report.json").read_text())
    assert "holds no evaluation" in refused("report", tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({**data, "schema_version": 9}))
    assert "schema version 9" in refused("report", tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({**data, "finite": {"tokens": "x", "of": 1}}))
    assert "finite.tokens" in refused("report", tmp_path)
    (tmp_path / "report.json").write_text("{")
    assert "cannot be read as JSON" in refused("report", tmp_path)
    (tmp_path / "gates.yaml").write_text("kl.mean: 0.02\n")
    assert "no list of gates" in refused("report", folder / "good", "--gates", tmp_path / "gates.yaml")
    assert ".html" in refused("report", folder / "good", "-o", tmp_path / "page")
    (tmp_path / "empty.txt").write_text("")
    good = ("eval", folder / "good", "--save", tmp_path / "elsewhere", "--baseline")
    assert "no document" in refused(*good, MODEL, "--text", tmp_path / "empty.txt")
    assert "different vocabularies" in refused(*good, make_model())
    short = ("--text", tmp_path / "short.jsonl", "--context", 2048)
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "x = 1\n" * 9}))
    assert "windows of 2048" in refused(*good, MODEL, *short)


def test_against_a_previous_report(folder: Path, tmp_path: Path) -> None:
    worse = cli("report", folder / "bad", "--against", folder / "good", "--json", "-o", tmp_path / "page.html")
    (run,) = json.loads(worse.stdout)["runs"]
    regressed = {row["metric"] for row in run["changes"] if row["regression"]}
    assert {"kl.mean", "mlp.output_error.max"} <= regressed and "size.bytes" not in regressed
    assert "regression" in (tmp_path / "page.html").read_text() and "regression" in (tmp_path / "page.md").read_text()
    better = json.loads(cli("report", folder / "good", "--against", folder / "bad", "--json").stdout)["runs"][0]
    assert not any(row["regression"] for row in better["changes"])
    assert cli("report", folder / "good", "--against", folder / "bad", "--gate", "change.kl.mean<0").exit_code == 0
    data = json.loads((folder / "good" / "eval" / "report.json").read_text())
    for change, word in (
        ({"metrics_version": 9}, "metric version"),
        (
            {"provenance": {**data["provenance"], "text_digest": "0" * 64}},
            "windows of 96 tokens (000000000000), this report's",
        ),
        (
            {"provenance": {**data["provenance"], "text_digest": "0", "text": "chat.jsonl", "windows": 9}},
            "its evaluation text is chat.jsonl, 9 windows of 96 tokens, this report's is stdlib-held-out, 16 windows of",
        ),
    ):
        (tmp_path / "old.json").write_text(json.dumps({**data, **change}))
        refused = cli("report", folder / "good", "--against", tmp_path / "old.json")
        assert refused.exit_code == 2 and word in refused.stderr


def test_logits_that_are_not_finite_fail_and_say_where(folder: Path) -> None:
    """Scales so large that layer 2's expert 5 overflows float32; every stored value is finite."""
    broken = rescaled(folder / "good", folder / "broken", DAMAGED + ".", 1e20)
    found = cli("eval", broken, "--baseline", MODEL, "--seq-len", 96, "--windows", 16, "--samples", 1, "--gate", "kl.mean<9")
    assert found.exit_code == 1 and "begins in layer 2" in found.stderr
    report = read_report(broken / "eval" / "report.json")
    assert report.finite.layer == 2 and 0 < report.finite.tokens < report.finite.of
    assert {row.status for row in report.gates} == {"fail"}
    assert "begins in layer 2" in (broken / "eval" / "report.html").read_text()


HOSTILE = "<script>alert('x')</script>\"'><img src=http://evil.example/x onerror=alert(1)>${{ 7*7 }} | `a`"


def hostile(report: Report) -> Report:
    data: dict[str, Any] = json.loads(report.model_dump_json())

    def spoil(value: Any) -> Any:
        if isinstance(value, str):
            return HOSTILE + value
        if isinstance(value, list):
            return [spoil(x) for x in value]
        return {k: spoil(x) for k, x in value.items()} if isinstance(value, dict) else value

    for part in ("provenance", "samples", "worst_tokens", "notes", "linears"):
        data[part] = spoil(data[part])
    return Report.model_validate(data)


def test_page_escapes_everything_and_loads_nothing(good: Report) -> None:
    plain = html([Run(name="x", report=decide(good))])
    spoiled = decide(hostile(good).model_copy(update={"notes": [HOSTILE]}), [parse_gate("kl.mean<9")])
    for runs in (
        [Run(name=HOSTILE, report=spoiled)],
        [Run(name=HOSTILE, report=spoiled), Run(name="$x_1$", report=decide(good))],
    ):
        page = html(runs)
        found = parsed(page)
        assert not found.open and "script" not in found.tags and "img" not in found.tags
        assert all(load.startswith(("#", "data:")) for load in found.loads), found.loads
        assert len(found.ids) == len(set(found.ids))
        assert {load[1:] for load in found.loads if load.startswith("#")} <= set(found.ids)
        assert "&lt;script&gt;alert" in page and "${{ 7*7 }}" in page
        assert not re.search(r"url\((?!#)", page) and "default-src 'none'" in page
    known = parsed(plain)
    assert known.tags["svg"] == 4 and known.tags["h1"] == 1 and known.tags["main"] == 1
    order = [plain.index(f">{name}</h2>") for name in (
        "Gates", "Provenance", "Divergence", "Tasks", "Layers and roles", "Experts", "Fallbacks", "Size and speed",
        "KV cache and long context", "Worst tokens", "Side by side",
    )]  # fmt: skip
    assert order == sorted(order) and plain.index("PASS") < order[0]
    assert "<strong>0 of 216</strong> quantized linears did not get" in plain


def test_markdown_is_escaped(good: Report) -> None:
    from quantkit.report.markdown import markdown

    found = markdown([Run(name="x", report=decide(hostile(good)))])
    assert "<script" not in found.split("To reproduce")[0] and "\\|" in found
    assert all(line.startswith("| ") and line.endswith(" |") for line in found.splitlines() if line.startswith("|"))


def test_eval_writes_reports_and_quantize_does_with_held_out_text(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIG, random_weights(CONFIG))
    held_out = tmp_path / "t.jsonl"
    held_out.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(9)))
    made = cli("quantize", model, "-o", tmp_path / "out", "--scheme", "W8A16", "--group-size", 32, "--held-out", held_out)
    assert made.exit_code == 0, made.stderr
    names = {"report.html", "report.json", "report.md"}
    assert {p.name for p in (tmp_path / "out" / "eval").iterdir()} == names
    quantkit.evaluate(tmp_path / "out", model, str(held_out), seq_len=16)  # a library call writes nothing
    found = cli(
        *(
            "eval",
            tmp_path / "out",
            "--baseline",
            model,
            "--text",
            held_out,
            "--save",
            tmp_path / "saved",
            "--kv-cache",
            "fp8",
        ),
        *("--context", 64, "--seq-len", 48, "--samples", 2, "--json"),
    )
    assert found.exit_code == 0 and json.loads(found.stdout)["kl"]["mean"] > 0
    assert {p.name for p in (tmp_path / "saved").iterdir()} == names
    report = read_report(tmp_path / "saved" / "report.json")
    assert report.kv is not None and report.kv.added.value == pytest.approx(
        report.kv.kl_with.value - report.kv.kl_without.value
    )
    assert report.context is not None and report.context.kv_cache == "fp8" and len(report.context.needles) == 3
    assert report.samples and report.provenance.overlap.note and report.provenance.command.startswith("quantkit eval ")
    assert cli("quantize", model, "-o", tmp_path / "x", "--held-out", tmp_path / "none.txt").exit_code == 2
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_overlap_of_calibration_and_evaluation_text(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIG, random_weights(CONFIG))
    seen, fresh = tmp_path / "seen.txt", tmp_path / "fresh.txt"
    generator = np.random.default_rng(0)
    for path in (seen, fresh):
        path.write_text("".join(map(chr, generator.integers(97, 123, 1200))))
    recipe = Recipe(calibration=str(seen), samples=16, seq_len=64, group_size=32)
    quantkit.quantize(model, tmp_path / "out", recipe)
    shares = [
        measure(tmp_path / "out", model, str(path), Extent(seq_len=64, samples=0)).provenance.overlap.share
        for path in (seen, fresh)
    ]
    assert shares[0] is not None and shares[0] > 0.7 and shares[1] == 0
    seen.write_text("changed " * 400)
    gone = measure(tmp_path / "out", model, str(fresh), Extent(seq_len=64, samples=0)).provenance.overlap
    assert gone.share is None and "not what it was" in gone.note


def test_long_context_in_pieces_equals_one_pass_and_needles_are_recalled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.calib import streams
    from quantkit.measure import context
    from quantkit.run.model import Model

    models = [Model(path, torch.device("cpu")) for path in (MODEL, folder / "good")]
    texts = read_documents("stdlib-held-out")
    monkeypatch.setattr(streams, "_BATCH_TOKENS", 128)
    monkeypatch.setattr(streams, "_LONGEST_WHOLE", 128)
    ids = tokens.calibration_windows(load_text_tokenizer(MODEL), texts, 6, 420, 0)
    found = context.long_context(models, ids, KVFormat.FLOAT32)
    p = [model.logits(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double() for model in models]
    for bucket in found.positions:
        assert bucket.perplexity_baseline == pytest.approx(
            float((-p[0][:, bucket.start : bucket.stop].mean()).exp()), rel=1e-4
        )
    assert found.positions[-1].stop == 419 and found.last_ratio.low is not None
    assert [needle.depth for needle in found.needles] == [0.1, 0.5, 0.9]
    assert all(0 <= needle.quantized <= 1 for needle in found.needles)
    ruined = context.long_context([models[0], _Forgetful(models[1])], ids[:, :128], KVFormat.FLOAT32)  # type: ignore[list-item]
    assert ruined.needles[0].quantized < 0.01 and ruined.last_ratio.value > 2


class _Forgetful:
    """A model whose head has lost everything."""

    def __init__(self, model: Any) -> None:
        self.spec, self.weights, self.device = model.spec, model.weights, model.device

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*hidden.shape[:-1], self.spec.vocab)


def test_schema_file_is_current() -> None:
    assert TARGET.read_text() == text(), "run: python -m scripts.report_schema"


def test_metrics_are_documented(good: Report) -> None:
    page = (ROOT / "docs" / "report.md").read_text()
    for name in metrics(good):
        group, _, leaf = name.partition(".")
        assert name in page or f"`.{leaf}`" in page and f"`{group}." in page, name
