"""Local items: which file a task reads, what of it is asked, and each benchmark's shape; the suite and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import ConfigError
from quantkit.tasks import run_code
from quantkit.tasks.suite import ALIASES, HUNYUAN_LARGE, RULER
from quantkit.tasks.task_data import _SHAPES, _read, local_files, read_local
from quantkit.tasks.task_data import LocalData as Data
from scripts import tasks_doc
from tests.helpers.paths import ROOT

SUBSETS = ROOT.parent / "shared" / "bench-subsets"


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, name: str = "gsm8k", leaves: tuple[str, ...] = ("gsm8k",), shots: int = 0, limit: int = 99) -> Data:
    return read_local(folder, name, leaves[0], leaves, shots, limit)


ROWS = [{"question": str(i), "answer": str(i)} for i in range(10)]


def test_examples_are_never_asked(tmp_path: Path) -> None:
    write(tmp_path, "gsm8k.jsonl", ROWS)
    data = read(tmp_path, shots=4)
    asked, examples = data.asked["gsm8k"], data.examples["gsm8k"]
    assert asked == ROWS[:6] and examples == ROWS[6:]
    assert len(read(tmp_path, shots=4, limit=2).asked["gsm8k"]) == 2
    with pytest.raises(ConfigError, match="1 items to ask leave 9 of the 10 examples"):
        read(tmp_path, shots=10)


def test_a_file_of_examples(tmp_path: Path) -> None:
    write(tmp_path, "gsm8k_test.jsonl", ROWS)
    write(tmp_path, "gsm8k_fewshot.jsonl", [{"question": "e", "answer": "e"}])
    data = read(tmp_path, shots=1)
    assert data.asked["gsm8k"] == ROWS and data.examples["gsm8k"] == [{"question": "e", "answer": "e"}]


def test_examples_of_the_same_subject_come_first(tmp_path: Path) -> None:
    rows = [
        {"question": str(i), "subject": "anatomy" if i % 2 else "sociology", "choices": [], "answer": 0} for i in range(8)
    ]
    write(tmp_path, "mmlu_test.jsonl", rows)
    data = read(tmp_path, "mmlu", ("mmlu_anatomy", "mmlu_sociology"), shots=4)
    assert [row["subject"] for row in data.examples["mmlu_anatomy"]] == ["anatomy"] * 2 + ["sociology"] * 2
    assert {row["subject"] for row in data.asked["mmlu_anatomy"]} == {"anatomy"}


def test_the_longest_name_owns_a_file(tmp_path: Path) -> None:
    write(tmp_path, "mmlu_pro_test.100.jsonl", ROWS)
    write(tmp_path, "mmlu.jsonl", ROWS)
    assert [p.name for p in local_files(tmp_path, "mmlu")] == ["mmlu.jsonl"]
    assert [p.name for p in local_files(tmp_path, "mmlu_pro")] == ["mmlu_pro_test.100.jsonl"]
    assert local_files(tmp_path, "some_task_of_the_harness") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gsm8k.jsonl", "", "is empty"),
        ("gsm8k.jsonl", "{", "line 1 is not JSON"),
        ("gsm8k.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("boolq.jsonl", '{"question": "x"}\n', "line 1 is no item of this task: KeyError 'answer'; it has question"),
        ("mmlu.jsonl", '{"subject": "alchemy"}\n', "items of 'mmlu_alchemy'"),
        ("other.jsonl", "{}\n", "holds no file for task 'gsm8k'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    asked = name.removesuffix(".jsonl")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, asked if asked in ALIASES else "gsm8k", ("mmlu_anatomy",) if asked == "mmlu" else (asked,))


def test_two_files_or_no_folder(tmp_path: Path) -> None:
    write(tmp_path, "gsm8k.jsonl", ROWS)
    write(tmp_path, "gsm8k_test.jsonl", ROWS)
    with pytest.raises(ConfigError, match="holds 2 files, gsm8k.jsonl, gsm8k_test.jsonl"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        read(tmp_path / "none")


@pytest.mark.skipif(not SUBSETS.is_dir(), reason="needs 100 items of each benchmark in ../shared/bench-subsets")
@pytest.mark.parametrize(
    ("name", "leaf", "expected"),
    [
        ("arc_challenge", "arc_challenge", {"question", "choices", "answerKey"}),
        ("bbh", "bbh_cot_fewshot_ruin_names", {"input", "target"}),
        ("boolq", "boolq", {"passage", "question", "label"}),
        ("ceval", "ceval-valid_logic", {"question", "A", "B", "C", "D", "answer"}),
        ("cmath", "cmath", {"question", "golden"}),
        ("cmmlu", "cmmlu_chinese_driving_rule", {"Question", "A", "Answer"}),
        ("drop", "drop", {"passage", "question", "answer", "validated_answers"}),
        ("math", "hendrycks_math_counting_and_prob", {"problem", "solution"}),
        ("mmlu", "mmlu_business_ethics", {"question", "choices", "answer"}),
        ("mmlu_pro", "mmlu_pro_computer_science", {"question", "options", "answer", "cot_content"}),
    ],
)
def test_shapes_of_the_benchmarks(name: str, leaf: str, expected: set[str]) -> None:
    shaped = [_SHAPES[name](row) for _, row in _read(local_files(SUBSETS, name)[0])]
    rows = [row for one, row in shaped if one == leaf]
    assert rows and all(expected <= row.keys() for row in rows)


def test_an_option_list_is_taken_apart() -> None:
    text = "Please choose the correct answer to the question: Why: because?\n\nAnswer1: a b Answer2: c"
    _, row = _SHAPES["arc_challenge"]({"instruction": text + "\n\nAnswer format: answer1/answer2", "answer": "answer2"})
    assert row == {"question": "Why: because?", "choices": {"text": ["a b", "c"], "label": ["1", "2"]}, "answerKey": "2"}


def test_generated_code_is_judged_by_its_tests() -> None:
    doc = {"prompt": "def f(x):\n", "test": "def check(g):\n    assert g(2) == 4", "entry_point": "f"}
    assert run_code.humaneval(doc, ["    return 2 * x"]) == {"pass@1": 1.0}
    assert run_code.humaneval(doc, ["    return 3 * x"]) == {"pass@1": 0.0}
    assert run_code.humaneval(doc, ["    return ("]) == {"pass@1": 0.0}
    assert run_code.mbpp({"test_list": ["assert f(1) == 1"]}, ["def f(x): return x"]) == {"pass@1": 1.0}
    assert not run_code.passes("import sys; sys.exit(1)") and not run_code.passes("x = '\0'")


def test_code_that_never_ends_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_code, "_SECONDS", 0.5)
    assert not run_code.passes("while True: pass")


def test_the_suite_names_every_benchmark_of_the_card() -> None:
    titles = (
        "MMLU MMLU-Pro BBH HellaSwag CommonsenseQA WinoGrande PIQA SIQA NaturalQuestions BoolQ DROP ARC-C TriviaQA CMMLU "
        "C-Eval C3 GSM8K MATH CMATH HumanEval MBPP GPQA_diamond AlignBench MT-Bench"
    )
    assert [row.title for row in HUNYUAN_LARGE] == [*titles.split(" "), "IFEval strict-prompt"]
    assert len(ALIASES) == len(HUNYUAN_LARGE) + len(RULER)


def test_the_page_is_what_the_script_writes() -> None:
    assert tasks_doc.TARGET.read_text("utf-8") == tasks_doc.text(), "run: python scripts/tasks_doc.py"
