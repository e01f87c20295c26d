"""`quantkit eval --tasks`: whole runs on a tiny model with local items, and one clear message for each bad request."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import quantkit
from quantkit.cli import main
from quantkit.commands.task_tables import suite_table, task_table
from quantkit.errors import ConfigError
from quantkit.recipe import Recipe
from quantkit.tasks.tasks import Chosen, Options, _pairs, evaluate_tasks, plan_tasks
from tests.conftest import SMALL

HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness is an extra: make tasks-test")
MMLU = [
    {"question": f"Q{i}?", "subject": ("anatomy", "sociology")[i % 2], "choices": ["a", "b", "c", "d"], "answer": i % 4}
    for i in range(10)
]
FILES: dict[str, list[dict[str, Any]]] = {
    "piqa": [{"goal": f"goal {i}", "sol1": f"do {i}", "sol2": f"leave {i}", "label": i % 2} for i in range(12)],
    "gsm8k": [{"question": f"{i} + 1?", "answer": f"so #### {i + 1}"} for i in range(9)],
    "mmlu_test": MMLU,
    "c3_test": [
        {"context": ["甲：好。", "乙：不。"], "question": "谁？", "choice": ["好", "不"], "answer": "好"} for _ in range(5)
    ],
    "cmath_dev": [{"input": f"{i}加1等于几？", "golden": str(i + 1)} for i in range(6)],
    "humaneval": [
        {
            "prompt": "def f():\n",
            "test": "def check(g):\n    g()",
            "entry_point": "f",
            "canonical_solution": "    return 1\n",
            "task_id": "0",
        }
    ],
    "mt_bench": [{"turns": []}],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def pair(make_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    base = make_model(max_position_embeddings=512)
    quantkit.quantize(str(base), tmp_path / "out", Recipe(scheme="W4A16", method="rtn", **SMALL))  # type: ignore[arg-type]
    return tmp_path / "out", base


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, args)])


@needs_harness
def test_eval_tasks(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    quantized, base = pair
    items = tmp_path / "items.jsonl"
    how = ["--tasks", "piqa,gsm8k,mmlu,cmath", "--data-dir", data, "--max-new-tokens", "4", "--task-kernels", "reference"]
    few = ["--shots", "1", "--limit", "5", "--windows", "1", "--seq-len", "64", "--items", items, "--json"]
    result = run(quantized, "--baseline", base, *how, *few)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "kl" in found and [row["name"] for row in found["tasks"]] == ["piqa", "gsm8k", "mmlu", "cmath"]
    assert set(found["tasks"][0]) == {
        *("name", "metric", "baseline", "quantized", "recovery", "ci95"),
        *("right_to_wrong", "wrong_to_right", "mcnemar_p", "n"),
    }
    records = [json.loads(line) for line in items.read_text().splitlines()]
    for row in found["tasks"]:
        own = [record for record in records if record["name"] == row["name"]]
        assert row["n"] == len(own) == 5
        for side in ("baseline", "quantized"):
            assert np.mean([record[side]["score"] for record in own]) == pytest.approx(row[side])
        flips = [(record["baseline"]["score"], record["quantized"]["score"]) for record in own]
        assert (flips.count((1.0, 0.0)), flips.count((0.0, 1.0))) == (row["right_to_wrong"], row["wrong_to_right"])
    report = json.loads((quantized / "eval" / "report.json").read_text())
    assert report["tasks"] == found["tasks"] and report["task_run"]["benchmarks"][2]["task"] == "mmlu"
    assert "--tasks piqa,gsm8k,mmlu,cmath" in report["provenance"]["command"]
    assert "lm-evaluation-harness" in (quantized / "eval" / "report.html").read_text()
    likely = records[0]["baseline"]["loglikelihoods"]
    assert len(likely) == 2 and records[0]["quantized"]["loglikelihoods"] != likely
    assert {record["doc"]["goal"] for record in records if record["name"] == "piqa"} == {f"goal {i}" for i in range(5)}


@needs_harness
def test_a_model_against_itself_flips_nothing(pair: tuple[Path, Path], data: Path) -> None:
    plan = plan_tasks(["piqa", "c3"], options=Options(data_dir=data, kernels="reference"))
    result = evaluate_tasks(pair[1], pair[1], plan)
    for row in result["tasks"]:
        assert row["right_to_wrong"] == row["wrong_to_right"] == 0 and row["mcnemar_p"] == 1.0
    assert task_table(result).row_count == 2


@needs_harness
def test_a_suite_says_what_it_leaves_out(pair: tuple[Path, Path], data: Path) -> None:
    options = Options(data_dir=data, limit=2, shots=1, max_new_tokens=2, kernels="reference")
    plan = plan_tasks([], "hunyuan-large", options)
    assert [one.name for one in plan.chosen] == ["mmlu", "piqa", "c3", "gsm8k", "cmath"]
    why = dict(plan.left_out)
    assert why["mt_bench"] == "needs a judge model" and "--unsafe-code" in why["humaneval"]
    assert why["bbh"] == "no file in --data-dir"
    assert suite_table(evaluate_tasks(*pair, plan)).row_count == 25
    published = {one.name: one.shots for one in plan_tasks([], "hunyuan-large", Options(data_dir=data)).chosen}
    assert published == {"mmlu": 5, "piqa": 0, "c3": 0, "gsm8k": 4, "cmath": 3}


@needs_harness
def test_generated_code_runs_only_when_allowed(pair: tuple[Path, Path], data: Path) -> None:
    plan = plan_tasks(["humaneval"], options=Options(data_dir=data, unsafe_code=True, max_new_tokens=2, kernels="reference"))
    assert evaluate_tasks(pair[1], pair[1], plan)["tasks"][0]["metric"] == "pass@1"


@needs_harness
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "gsm8"], "no task is called 'gsm8'\nFix: did you mean gsm8k"),
        (["--tasks", "boolq"], "holds no file for task 'boolq'"),
        (["--tasks", "humaneval"], "task 'humaneval' runs code that the model wrote"),
        (["--tasks", "mt_bench"], "task 'mt_bench' needs a judge model"),
        (["--suite", "hunyuan"], "no suite is called 'hunyuan'\nFix: give one of hunyuan-large"),
        (["--tasks", ","], "no task is given"),
        (["--tasks", "gsm8k", "--shots", "9"], "items to ask leave"),
    ],
)
def test_bad_requests(data: Path, tmp_path: Path, args: list[str], message: str) -> None:
    """Said before a model is looked at: there is none."""
    result = run(tmp_path / "none", "--baseline", tmp_path / "none", *args, "--data-dir", data)
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.output


@needs_harness
def test_no_network_and_no_data(monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path]) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match="task 'piqa' cannot be prepared: ConnectionError.*\n.*--data-dir"):
        evaluate_tasks(*pair, plan_tasks(["piqa"]))


def test_perplexity_is_no_item_score() -> None:
    one = Chosen("wikitext", "wikitext", ("wikitext",), 0, None, None, None)
    sample = {"doc_id": 0, "doc_hash": "a", "prompt_hash": "b", "filter": "none", "metrics": ["word_perplexity"]}
    samples = {"wikitext": [{**sample, "word_perplexity": (-3.0, 1)}]}
    with pytest.raises(ConfigError, match="has no score between 0 and 1 for an item: its word_perplexity"):
        _pairs(one, samples, samples)
    other = {"wikitext": [{**samples["wikitext"][0], "prompt_hash": "c"}]}
    with pytest.raises(ConfigError, match="asked both models different items"):
        _pairs(one, samples, other)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "gsm8k"], "lm-evaluation-harness, which is not installed\nFix: pip install 'quantkit[tasks]'"),
        (["--tasks", "gsm8k,nope"], "does not name 'nope', so it alone knows whether that exists\nFix: pip install"),
        (["--suite", "hunyuan"], "no suite is called 'hunyuan'\nFix: give one of hunyuan-large"),
        (["--tasks", ","], "no task is given"),
    ],
)
def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, args: list[str], message: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(tmp_path / "none", "--baseline", tmp_path / "none", *args)
    assert result.exit_code == 2 and message in result.stderr
