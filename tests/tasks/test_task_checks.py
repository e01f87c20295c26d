"""Tasks through the harness: what is no answer, and what is refused before a model runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.errors import CheckpointError, ConfigError
from tests.helpers.commands import cli

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: make tasks-test")

from quantkit.tasks.harness import QuantkitLM
from quantkit.tasks.tasks import Options, plan_tasks


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"goal": f"goal {i}", "sol1": f"do {i}", "sol2": f"leave {i}", "label": i % 2} for i in range(6)]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_likelihood_that_is_not_a_number_is_no_answer(pair: tuple[Path, Path]) -> None:
    model = QuantkitLM(pair[1], kernels="reference")
    pairs = [(("the first", " x"), [5, 6], [7]), (("the second", " y"), [5, 6, 7, 8], [9])]
    assert len(model._loglikelihood_tokens(pairs)) == 2
    head = model.model.head
    model.model.head = lambda hidden: head(hidden) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"request 1 of 2 \(...'the first', then ' x'\) is not finite"):
        model._loglikelihood_tokens(pairs)


def test_text_drawn_from_logits_that_are_not_finite_is_no_answer(pair: tuple[Path, Path]) -> None:
    model = QuantkitLM(pair[1], kernels="reference")
    head = model.model.head
    model.model.head = lambda hidden: head(hidden) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="the logits of new token 1 are not finite"):
        model.generate_until([SimpleNamespace(args=("a question", {"until": [], "max_gen_toks": 4}))])


def test_a_task_that_is_named_beside_a_suite_is_not_dropped(data: Path) -> None:
    for options in (Options(data_dir=data), Options()):
        with pytest.raises(ConfigError, match="task 'humaneval' runs code that the model wrote"):
            plan_tasks(["humaneval"], "hunyuan-large", options)
    with pytest.raises(ConfigError, match="holds no file for task 'boolq'"):
        plan_tasks(["boolq"], "hunyuan-large", Options(data_dir=data))
    plan = plan_tasks(["piqa"], "hunyuan-large", Options(data_dir=data))
    assert [one.name for one in plan.chosen] == ["piqa"] and plan.words()[:2] == ["--tasks", "piqa"]


def test_tasks_are_prepared_before_the_text_is_read(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("couldn't reach the hub")

    def run(*args: Any) -> None:
        raise AssertionError("the models ran")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("quantkit.measure.evaluate.side_by_side", run)
    found = cli("eval", pair[0], "--baseline", pair[1], "--tasks", "piqa", "--save", tmp_path / "saved")
    assert found.exit_code == 2 and "task 'piqa' cannot be prepared" in found.stderr


def test_answers_go_into_a_new_folder(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    items = tmp_path / "new" / "deep" / "items.jsonl"
    how = ("--tasks", "piqa", "--data-dir", data, "--task-kernels", "reference", "--items", items, "--samples", 0)
    found = cli("eval", pair[0], "--baseline", pair[1], *how, "--windows", 4, "--seq-len", 32, "--save", tmp_path / "saved")
    assert found.exit_code == 0, found.stderr
    assert len(items.read_text().splitlines()) == 6
