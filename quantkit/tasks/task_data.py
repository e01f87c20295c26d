"""Benchmark items from local files: which file, which of the harness's tasks a row belongs to, in the shape of its data."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import ConfigError
from quantkit.tasks.suite import ALIASES

__all__ = ["LocalData", "local_files", "read_local"]

Row = dict[str, Any]


@dataclass(frozen=True)
class LocalData:
    """What a task is asked: for each of the harness's tasks its rows, and rows that are never asked, for examples."""

    file: Path
    asked: dict[str, list[Row]]
    examples: dict[str, list[Row]]


def local_files(folder: Path, name: str) -> list[Path]:
    """The .jsonl files of a benchmark: NAME.jsonl, or NAME, one of `_ . -`, and anything: NAME_test.100.jsonl.

    A file belongs to the longest name that it begins with: mmlu_pro.jsonl is none of mmlu's. Raises ConfigError.
    """
    if not folder.is_dir():
        raise ConfigError(f"--data-dir {folder} is not a folder", "give one that holds a .jsonl file for each task")
    names = sorted({*ALIASES, name}, key=len, reverse=True)
    files = sorted(path for path in folder.glob("*.jsonl") if "fewshot" not in path.name)
    return [path for path in files if next((n for n in names if _begins(path, n)), None) == name]


def _the_file(folder: Path, name: str) -> Path:
    files = local_files(folder, name)
    if len(files) != 1:
        actual = f"{len(files)} files, {', '.join(p.name for p in files)}," if files else "no file"
        raise ConfigError(
            f"--data-dir {folder} holds {actual} for task '{name}'",
            f"put its items into one file {name}.jsonl, or {name}_WHATEVER.jsonl, in the form of the task's data set",
        )
    return files[0]


def _begins(path: Path, name: str) -> bool:
    return re.match(rf"{re.escape(name)}[._-]", path.name) is not None


def read_local(folder: Path, name: str, task: str, leaves: Sequence[str], shots: int, limit: int | None) -> LocalData:
    """A benchmark's items, at most `limit`, and `shots` examples for each of its tasks.

    leaves: the harness's tasks of this benchmark: itself, or one a subject. Examples come from NAME_fewshot.jsonl if there
    is one; else the file's last rows are kept for them, and never asked. Of the same subject first. Raises ConfigError.
    """
    file = _the_file(folder, name)
    shape = _SHAPES.get(name, lambda row: (task, row))
    rows = [_shaped(row, shape, file, number) for number, row in _read(file)]
    extra = folder / f"{name}_fewshot.jsonl"
    if extra.is_file():
        pool = [_shaped(row, shape, extra, number) for number, row in _read(extra)]
    else:
        reserved = min(shots, len(rows) - 1)
        rows, pool = rows[: len(rows) - reserved], rows[len(rows) - reserved :]
    if shots > len(pool):
        raise ConfigError(
            f"{file}: {len(rows)} items to ask leave {len(pool)} of the {shots} examples that are to stand before each",
            f"add {extra.name}, more items, or lower --shots",
        )
    items: dict[str, list[Row]] = defaultdict(list)
    for leaf, row in rows[:limit]:
        items[leaf].append(row)
    if unknown := sorted(items.keys() - set(leaves)):
        raise ConfigError(f"{file} has items of '{unknown[0]}', which is none of {task}'s tasks", "check their subject")
    examples = {leaf: _nearest(pool, leaf, shots) for leaf in items}
    if name == "mmlu_pro":  # the harness drops rows of another category
        examples = {leaf: [{**row, "category": items[leaf][0]["category"]} for row in rs] for leaf, rs in examples.items()}
    return LocalData(file, dict(items), examples)


def _nearest(pool: list[tuple[str, Row]], leaf: str, shots: int) -> list[Row]:
    """Examples of a task itself first, then of the benchmark's others."""
    return [row for _, row in sorted(pool, key=lambda item: item[0] != leaf)][:shots]


def _read(path: Path) -> list[tuple[int, Row]]:
    rows = []
    try:
        for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
            if line.strip():
                rows.append((number, json.loads(line)))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}", "give JSON objects, one a line") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} line {number} is not JSON: {error}", "one JSON object a line") from error
    if wrong := next((number for number, row in rows if not isinstance(row, dict)), None):
        raise ConfigError(f"{path} line {wrong} is not a JSON object", "one JSON object a line")
    if not rows:
        raise ConfigError(f"{path} is empty", "one JSON object a line")
    return rows


def _shaped(row: Row, shape: Callable[[Row], tuple[str, Row]], path: Path, number: int) -> tuple[str, Row]:
    try:
        return shape(row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__} {error}; it has {', '.join(row)}"
        raise ConfigError(f"{path} line {number} is no item of this task: {problem}", "check the file") from error


def _by(prefix: str, field: str, cut: str = "") -> Callable[[Row], tuple[str, Row]]:
    """Rows that name their subject, where the harness has a task for each."""
    return lambda row: (prefix + str(row[field]).removesuffix(cut).replace(" ", "_"), row)


def _arc(row: Row) -> tuple[str, Row]:
    if "choices" in row:
        return "arc_challenge", row
    # The other common form: `...: QUESTION\n\nAnswer1: A Answer2: B ...`, and the answer as "answer2".
    question, _, options = row["instruction"].partition("\n\nAnswer1: ")
    texts = re.split(r" Answer\d: ", options.partition("\n\nAnswer format:")[0])
    labels = [str(i + 1) for i in range(len(texts))]
    answer = row["answer"].removeprefix("answer")
    labels.index(answer)
    shaped = {"question": question.partition(": ")[2], "choices": {"text": texts, "label": labels}, "answerKey": answer}
    return "arc_challenge", shaped


def _boolq(row: Row) -> tuple[str, Row]:
    return "boolq", {**row, "label": row["label"] if "label" in row else int(row["answer"])}


def _cmath(row: Row) -> tuple[str, Row]:
    return "cmath", {"question": row["question"] if "question" in row else row["input"], "golden": str(row["golden"])}


def _drop(row: Row) -> tuple[str, Row]:
    if "validated_answers" in row:
        return "drop", row
    none = {"day": "", "month": "", "year": ""}
    answers = [{"number": "", "date": none, "spans": [str(text) for text in spans]} for spans in row["answers"]]
    columns = {key: [answer[key] for answer in answers[1:]] for key in ("number", "date", "spans")}
    fields = {key: row[key] for key in ("query_id", "passage", "question")}
    return "drop", {**fields, "answer": answers[0], "validated_answers": columns}


_MATH = {"Counting & Probability": "counting_and_prob", "Number Theory": "num_theory", "Precalculus": "precalc"}


def _math(row: Row) -> tuple[str, Row]:
    subject = _MATH.get(row["type"], row["type"].lower().replace(" ", "_"))
    return f"hendrycks_math_{subject}", {key: row[key] for key in ("problem", "solution", "level", "type")}


def _mmlu_pro(row: Row) -> tuple[str, Row]:
    # Rows without a worked answer can still be examples: they show the form of an answer.
    worked = row.get("cot_content") or f"A: Let's think step by step. The answer is ({row['answer']})."
    return "mmlu_pro_" + row["category"].replace(" ", "_"), {**row, "cot_content": worked}


# By name of the suite: a row -> (the harness's task it belongs to, the row as that task's data set has it).
_SHAPES: dict[str, Callable[[Row], tuple[str, Row]]] = {
    "arc_challenge": _arc,
    "bbh": _by("bbh_cot_fewshot_", "task"),
    "boolq": _boolq,
    "ceval": _by("ceval-valid_", "subject", "_val"),
    "cmath": _cmath,
    "cmmlu": _by("cmmlu_", "subject"),
    "drop": _drop,
    "math": _math,
    "mmlu": _by("mmlu_", "subject"),
    "mmlu_pro": _mmlu_pro,
}
