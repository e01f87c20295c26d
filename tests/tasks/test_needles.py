"""RULER's needles: what is refused before work, what the harness is given to make its texts, and a whole run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from quantkit.errors import ConfigError
from quantkit.tasks.needles import is_ruler, lacking, needle_settings
from quantkit.tasks.requirements import FILES, check_code
from quantkit.tasks.suite import ALIASES, RULER
from quantkit.tasks.tasks import Chosen, Options, Plan, evaluate_tasks, plan_tasks
from tests.helpers.paths import ROOT

MODEL = ROOT / "examples" / "tiny-hunyuan"
MADE_HERE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")
HARNESS = all(importlib.util.find_spec(name) for name in ("lm_eval", "wonderwords", "nltk"))
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness is an extra: make tasks-test")


def test_the_harness_counts_with_a_tokenizer_that_has_no_code(tmp_path: Path) -> None:
    """It would load any with trust_remote_code."""
    model, scratch = tmp_path / "model", tmp_path / "scratch"
    model.mkdir()
    scratch.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_bytes((MODEL / name).read_bytes())
    hostile = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(hostile))
    (model / "evil.py").write_text("raise SystemExit('the code of a model ran')")
    found = needle_settings(scratch, model, 1024)
    folder = Path(found["tokenizer"])
    assert found["max_seq_lengths"] == [1024] and folder.parent == scratch
    assert {p.name for p in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert "auto_map" not in (folder / "tokenizer_config.json").read_text()
    from transformers import AutoTokenizer

    counted = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    plain = AutoTokenizer.from_pretrained(str(MODEL))
    text = "One of the special magic numbers for a-b is: 12."
    assert counted(text).input_ids == plain(text).input_ids


def test_texts_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--ruler-length 4096 is longer than .* reads: its max_position_embeddings is 2048"
    ):
        needle_settings(tmp_path, MODEL, 4096)
    assert not any(tmp_path.iterdir())


def test_what_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "wonderwords" or None)
    assert lacking("words", False) == (
        "needs the library wonderwords, which is not installed",
        "pip install 'quantkit[tasks]'",
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert lacking("words", True) is None and lacking("essays", False) is None and lacking("punkt", True) is None
    problem, fix = lacking("essays", True) or ("", "")
    assert "fetches from the hub" in problem and all(name in fix for name in MADE_HERE)
    assert {row.name for row in RULER if row.needs == "words"} == set(MADE_HERE)


def test_the_length_is_asked_for_again() -> None:
    chosen = Chosen("niah_single_1", "niah_single_1", ("niah_single_1",), 0, "512", None, None, 512)
    plan = Plan(("niah_single_1",), (chosen,), (), None, Options(ruler_length=512), {})
    assert plan.words() == ["--tasks", "niah_single_1", "--ruler-length", 512]
    assert is_ruler([None, Path("tasks/ruler/vt.yaml")]) and not is_ruler([None, Path("tasks/piqa/piqa.yaml")])


@needs_harness
def test_needles_are_planned_without_a_network(tmp_path: Path) -> None:
    alone = Options(data_dir=tmp_path)
    for name in (row.name for row in RULER if row.needs == "essays"):
        with pytest.raises(ConfigError, match=f"task '{name}' hides needles in essays that the harness fetches"):
            plan_tasks([name], options=alone)
    plan = plan_tasks([], "ruler", alone)
    assert tuple(one.name for one in plan.chosen) == MADE_HERE and {one.metric for one in plan.chosen} == {"4096"}
    assert all("essays" in why for _, why in plan.left_out) and len(plan.left_out) == len(RULER) - len(MADE_HERE)
    assert all(ALIASES[name].folder == "ruler" for name in MADE_HERE)
    with pytest.raises(ConfigError, match="--ruler-length is given, and no task is RULER's"):
        plan_tasks(["gsm8k"], options=Options(ruler_length=1024))


@needs_harness
def test_needles_as_long_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """600 tokens is none of the lengths that the task's description lists."""
    options = Options(data_dir=tmp_path, limit=3, ruler_length=600, max_new_tokens=2, kernels="reference")
    found = evaluate_tasks(MODEL, MODEL, plan_tasks(["niah_single_1"], options=options), items=tmp_path / "items.jsonl")
    (row,) = found["tasks"]
    assert row["metric"] == "600" and row["n"] == 3 and row["baseline"] == row["quantized"]
    assert found["task_run"]["benchmarks"][0]["data"] == "made by the task"
    assert found["task_run"]["truncated"] == {"baseline": 0, "quantized": 0}
    docs = [json.loads(line)["doc"] for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert all(400 < doc["length"] <= 600 and doc["outputs"][0] in doc["input"] for doc in docs)
    assert capsys.readouterr().out == ""  # where --json writes
    short = plan_tasks(["niah_single_1"], options=Options(ruler_length=99))
    with pytest.raises(
        ConfigError, match="cannot be prepared: ValueError: Could not generate any sample.*\nFix: .*--ruler-length"
    ):
        evaluate_tasks(MODEL, MODEL, short)


def test_code_that_the_harness_runs_wants_its_own_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = [FILES / "humaneval.yaml"], [Path("tasks/humaneval/humaneval_plus.yaml")]
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    for running in (ours, theirs):
        with pytest.raises(ConfigError, match="task 'x' runs code that the model wrote"):
            check_code("x", running, Options())
    with pytest.raises(ConfigError, match="code_eval, which wants a consent of its own\nFix: set HF_ALLOW_CODE_EVAL=1"):
        check_code("x", theirs, Options(unsafe_code=True))
    check_code("x", ours, Options(unsafe_code=True))
    check_code("x", [], Options())
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    check_code("x", theirs, Options(unsafe_code=True))
