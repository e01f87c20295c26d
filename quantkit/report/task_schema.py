"""How benchmark tasks were run: what report.json keeps beside their scores."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["LeftOut", "TaskRun", "TaskSource"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskSource(_Part):
    """task: the harness's name. shots: examples before each question. filter: of answers. data: a file or hub."""

    name: str
    task: str
    shots: int
    filter: str
    data: str


class LeftOut(_Part):
    """A benchmark of a suite that was not run, and why."""

    name: str
    why: str


class TaskRun(_Part):
    """limit: items; max_new_tokens: upper bound; null where there is none. truncated: texts of which the end alone
    fitted, by model. harness: version of lm-evaluation-harness. items: the file of both answers to every item."""

    suite: str | None
    benchmarks: list[TaskSource]
    left_out: list[LeftOut]
    limit: int | None
    max_new_tokens: int | None
    chat_template: bool
    kernels: str
    kv_cache: str
    truncated: dict[str, int]
    harness: str
    items: str | None
    seconds: float
