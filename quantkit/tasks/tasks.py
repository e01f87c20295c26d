"""Benchmark tasks through lm-evaluation-harness: baseline and quantized model on the same items, compared item by item."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from quantkit.atomic import write_bytes
from quantkit.checkpoint.folder import find_model
from quantkit.errors import ConfigError
from quantkit.extras import install, lacking
from quantkit.host import plain_arithmetic
from quantkit.report.task_stats import compare
from quantkit.tasks.needles import LENGTH, is_ruler, needle_settings
from quantkit.tasks.requirements import FILES, check_code, check_may_run, left_out_because
from quantkit.tasks.suite import ALIASES, SUITES
from quantkit.tasks.task_data import LocalData, read_local

__all__ = ["Chosen", "Options", "Plan", "evaluate_tasks", "plan_tasks", "prepared"]

_SEED = 1234
Sample = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How tasks are run. data_dir: local items instead of the hub's. limit: items of a benchmark with data_dir, else of each
    of the harness's tasks. shots: examples before each question; without it a suite's published number, else the task's
    own. max_new_tokens: an upper bound. ruler_length: tokens of RULER's texts; None: 4096. kv_cache: of the quantized model.
    The rest is `harness.QuantkitLM`'s."""

    data_dir: Path | None = None
    limit: int | None = None
    shots: int | None = None
    unsafe_code: bool = False
    chat_template: bool = False
    max_new_tokens: int | None = None
    ruler_length: int | None = None
    batch_size: int | None = None
    kernels: str = "auto"
    kv_cache: str = "bf16"
    device: str = "cpu"
    add_bos: bool | None = None


@dataclass(frozen=True)
class Chosen:
    """A benchmark to run. leaves: the harness's tasks it is made of; metric and filter: the task's first where None. length:
    of the texts that RULER makes."""

    name: str
    task: str
    leaves: tuple[str, ...]
    shots: int
    metric: str | None
    filter: str | None
    data: LocalData | None
    length: int | None = None


@dataclass(frozen=True)
class Plan:
    """What will be run, and what of a suite will not, with the reason. names: as asked for. index: of the harness, {name:
    entry}."""

    names: tuple[str, ...]
    chosen: tuple[Chosen, ...]
    left_out: tuple[tuple[str, str], ...]
    suite: str | None
    options: Options
    index: dict[str, Any]

    def words(self) -> list[object]:
        """The options that ask for the same again."""
        used = self.options
        options: list[object] = ["--tasks", ",".join(self.names)] if self.names else []
        options += ["--suite", self.suite] if self.suite else []
        for name in ("data_dir", "limit", "shots", "max_new_tokens", "ruler_length", "batch_size"):
            value = getattr(used, name)
            options += ["--" + name.replace("_", "-"), value] if value is not None else []
        options += [f"--{name.replace('_', '-')}" for name in ("unsafe_code", "chat_template") if getattr(used, name)]
        return options + (["--task-kernels", used.kernels] if used.kernels != "auto" else [])


def plan_tasks(names: Sequence[str], suite: str | None = None, options: Options | None = None) -> Plan:
    """Check everything that can be checked before a model is loaded or a hub asked. Reads local data.

    names: of the suite or of the harness. One that cannot be run is an error; of a suite it is left out, and said so.
    Raises ConfigError.
    """
    options = options or Options()
    if suite is not None and suite not in SUITES:
        raise ConfigError(f"no suite is called '{suite}'", f"give one of {', '.join(SUITES)}")
    rows = SUITES[suite] if suite else ()
    named = tuple(dict.fromkeys(names))
    extra = [name for name in named if name not in {row.name for row in rows}]
    if not rows and not extra:
        raise ConfigError("no task is given", "name some: --tasks gsm8k,piqa")
    if lacking("tasks"):
        unsure = [f"'{name}'" for name in extra if name not in ALIASES]
        hint = f"; docs/tasks.md does not name {', '.join(unsure)}, so it alone knows whether that exists" if unsure else ""
        raise ConfigError(f"tasks need lm-evaluation-harness, which is not installed{hint}", install("tasks"))
    for name in named:
        check_may_run(name, ALIASES.get(name), options)
    left_out = {row.name: why for row in rows if row.name not in named and (why := left_out_because(row, options))}
    selected = [row for row in rows if row.name not in left_out]
    index = _index({*extra, *(row.name for row in selected)})
    chosen = [_chosen(row.name, index, options, row.shots) for row in selected]
    chosen += [_chosen(name, index, options, None) for name in extra]
    if options.ruler_length and not any(one.length for one in chosen):
        raise ConfigError(
            "--ruler-length is given, and no task is RULER's", "add one (--tasks niah_single_1), or leave it out"
        )
    return Plan(named, tuple(chosen), tuple(left_out.items()), suite, options, index)


def _index(names: set[str]) -> dict[str, Any]:
    """The harness's tasks by name, of all its folders only if need be: there are thousands of files."""
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    home = Path(lm_eval.tasks.__file__).parent
    listed = names <= ALIASES.keys()
    folders = [home / ALIASES[name].folder for name in sorted(names) if ALIASES[name].folder] if listed else [home]
    return dict(lm_eval.tasks.TaskManager(include_path=[*folders, FILES], include_defaults=False).task_index)


def _chosen(name: str, index: dict[str, Any], options: Options, published: int | None) -> Chosen:
    row = ALIASES.get(name)
    task = row.task if row and row.task else name
    leaves = _leaves(task, index, name)
    check_code(name, [index[leaf].yaml_path for leaf in leaves if index[leaf].cfg.get("unsafe_code")], options)
    config = index[leaves[0]].cfg
    count = published if options.shots is None else options.shots
    shots = count if count is not None else config.get("num_fewshot") or 0
    data, length, metric = None, None, row.metric if row else None
    if is_ruler([index[leaf].yaml_path for leaf in leaves]):
        length = options.ruler_length or LENGTH
        metric = str(length)  # so the harness calls it
    if options.data_dir and not (row and row.needs == "words"):
        from_file = 0 if "samples" in (config.get("fewshot_config") or {}) else shots  # some bring their examples along
        data = read_local(options.data_dir, name, task, leaves, from_file, options.limit)
        leaves = tuple(data.asked)
    return Chosen(name, task, leaves, shots, metric, row.filter if row else None, data, length)


def _leaves(task: str, index: dict[str, Any], name: str) -> tuple[str, ...]:
    """The tasks that a task, group or tag of the harness is made of."""
    entry = index.get(task)
    if entry is None:
        near = difflib.get_close_matches(name, [*ALIASES, *index], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
        raise ConfigError(f"no task is called '{name}'", hint)
    if entry.kind.name == "TAG":
        members: list[Any] = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        members = entry.cfg["task"]
    elif entry.yaml_path is None or entry.kind.name == "PY_TASK":
        raise ConfigError(f"task '{name}' is a program, not a description", "run it with the harness itself")
    else:
        return (task,)
    if other := next((m for m in members if not isinstance(m, str)), None):
        raise ConfigError(f"group '{name}' changes its member {other}", "name its tasks one by one")
    return tuple(dict.fromkeys(leaf for member in members for leaf in _leaves(member, index, member)))


@plain_arithmetic()
def evaluate_tasks(
    quantized: str | Path,
    baseline: str | Path,
    plan: Plan,
    *,
    items: Path | None = None,
    manager: Any = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Both models on the same items. {"tasks": [a row for each benchmark], "task_run": how it was done}.

    items: a .jsonl file for every item's two answers. manager: of `prepared`, where other work came between. progress is
    called with a line. Raises QuantkitError.
    """
    begun = time.monotonic()
    answers: list[dict[str, list[Sample]]] = []
    truncated = {}
    with nullcontext(manager) if manager else prepared(plan, baseline) as ready:
        for label, path in (("baseline", baseline), ("quantized", quantized)):
            kv = plan.options.kv_cache if label == "quantized" else "bf16"
            samples, truncated[label] = _answers(path, ready, plan, kv, functools.partial(_say, progress, label))
            answers.append(samples)
    rows, records, details = [], [], []
    for one in plan.chosen:
        pairs, metric, which = _pairs(one, *answers)
        base, quant = (np.array([float(pair[i][metric]) for pair in pairs]) for i in (0, 1))
        rows.append({"name": one.name, "metric": metric, **compare(base, quant)})
        records += [_record(one, metric, *pair) for pair in pairs]
        source = str(one.data.file) if one.data else "made by the task" if one.length else "hub"
        details.append({"name": one.name, "task": one.task, "shots": one.shots, "filter": which, "data": source})
    if items:
        write_bytes(items, "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in records).encode())
    used = plan.options
    run = {
        "suite": plan.suite,
        "benchmarks": details,
        "left_out": [{"name": name, "why": why} for name, why in plan.left_out],
        "limit": used.limit,
        "max_new_tokens": used.max_new_tokens,
        "chat_template": used.chat_template,
        "kernels": used.kernels,
        "kv_cache": used.kv_cache,
        "truncated": truncated,
        "harness": importlib.metadata.version("lm_eval"),
        "items": str(items) if items else None,
        "seconds": round(time.monotonic() - begun, 2),
    }
    return {"tasks": rows, "task_run": run}


def _say(progress: Callable[[str], None] | None, label: str, done: int, total: int) -> None:
    if progress:
        progress(f"{label}, {done} of {total} requests")


@contextmanager
def prepared(plan: Plan, baseline: str | Path) -> Iterator[Any]:
    """The harness's manager of a plan's tasks, with all their data at hand. baseline: whose tokens RULER counts. Raises
    ConfigError."""
    with tempfile.TemporaryDirectory(prefix="quantkit-tasks-") as scratch:
        yield _manager(Path(scratch), plan, baseline)


def _manager(scratch: Path, plan: Plan, baseline: str | Path) -> Any:
    """The harness's manager of these tasks alone: each is the stock one, with other data or another number of examples.

    Loads them once, so that what is missing is said before a model runs. Raises ConfigError.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    for one in plan.chosen:
        for leaf in one.leaves:
            config = {"include": str(plan.index[leaf].yaml_path), "task": leaf, "num_fewshot": one.shots}
            if one.data:
                config |= _local(scratch, leaf, one.data)
            if one.length:
                config["metadata"] = needle_settings(scratch, find_model(str(baseline)), one.length)
            (scratch / f"{leaf}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8")
    manager = TaskManager(include_path=str(scratch), include_defaults=False)
    for one in plan.chosen:
        try:
            _load(manager, [one])
        except Exception as error:  # a task may import anything, and the hub's client has errors of its own
            local = f"give --data-dir with a file {one.name}.jsonl where there is no network"
            ruler = "needles in essays need a network, texts of RULER's some 200 tokens (--ruler-length)"
            fix = f"{ruler if one.length else local}; install what the task imports"
            raise ConfigError(f"task '{one.name}' cannot be prepared: {type(error).__name__}: {error}", fix) from error
    return manager


def _load(manager: Any, chosen: Sequence[Chosen]) -> Any:
    """The harness's tasks. What they print while they make or fetch their data does not belong among the results."""
    with redirect_stdout(sys.stderr):
        return manager.load([leaf for one in chosen for leaf in one.leaves])


def _local(scratch: Path, leaf: str, data: LocalData) -> dict[str, Any]:
    files = {}
    for split, rows in (("asked", data.asked[leaf]), ("examples", data.examples[leaf])):
        if rows:
            path = scratch / f"{leaf}.{split}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            files[split] = str(path)
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(scratch / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": "asked",
        "fewshot_split": "examples" if "examples" in files else None,
    }


def _answers(
    path: str | Path, manager: Any, plan: Plan, kv_cache: str, progress: Callable[[int, int], None]
) -> tuple[dict[str, list[Sample]], int]:
    """A model's samples by the harness's task, and how many texts did not fit into its length."""
    import torch
    from lm_eval.evaluator import evaluate

    from quantkit.tasks.harness import QuantkitLM

    options = plan.options
    model = QuantkitLM(
        path,
        device=options.device,
        kernels=options.kernels,
        kv_cache=kv_cache,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        add_bos=options.add_bos,
        progress=progress,
    )
    # As the harness's own entry does: tasks draw from these generators, and both models must be asked the same.
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    loaded = _load(manager, plan.chosen)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
    results = evaluate(
        lm=model,
        task_dict=loaded,
        limit=options.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=options.chat_template,
        fewshot_as_multiturn=options.chat_template,
        confirm_run_unsafe_code=options.unsafe_code,
    )
    return results["samples"], model.truncated


def _pairs(
    one: Chosen, base: dict[str, list[Sample]], quant: dict[str, list[Sample]]
) -> tuple[list[tuple[Sample, Sample]], str, str]:
    """The samples of both models, item by item, and the metric and filter that are compared. Raises ConfigError."""
    first = base[one.leaves[0]][0]
    metric, which = one.metric or first["metrics"][0], one.filter or first["filter"]
    pairs = []
    for leaf in one.leaves:
        ours, theirs = ([s for s in samples[leaf] if s["filter"] == which] for samples in (base, quant))
        pairs += list(zip(ours, theirs, strict=True))
    for a, b in pairs:
        if (a["doc_hash"], a["prompt_hash"]) != (b["doc_hash"], b["prompt_hash"]):
            raise ConfigError(f"task '{one.name}' asked both models different items", "it draws at random: leave it out")
        if any(not isinstance(s.get(metric), (bool, int, float)) or not 0 <= s[metric] <= 1 for s in (a, b)):
            raise ConfigError(
                f"task '{one.name}' has no score between 0 and 1 for an item: its {metric} is {a.get(metric)!r}",
                "only such tasks can be compared item by item; perplexity is what eval --text measures",
            )
    return pairs, metric, which


def _record(one: Chosen, metric: str, base: Sample, quant: Sample) -> dict[str, Any]:
    return {
        "name": one.name,
        "item": base["doc_id"],
        "doc": base["doc"],
        "target": base["target"],
        "baseline": _answer(base, metric),
        "quantized": _answer(quant, metric),
    }


def _answer(sample: Sample, metric: str) -> dict[str, Any]:
    """Generated text and what the task took from it; or each option's log-likelihood in nats."""
    answer: dict[str, Any] = {"score": float(sample[metric])}
    responses = [response[0] for response in sample["resps"]]
    if isinstance(responses[0], (tuple, list)):
        return {**answer, "loglikelihoods": [float(value[0]) for value in responses]}
    return {**answer, "text": responses[0], "taken": sample["filtered_resps"][0]}
