"""The benchmarks of Hunyuan-Large's model card, each with the task that measures it, and RULER's needles: data, and nothing
else.

Scores are the card's own, BF16 (https://github.com/Tencent/Tencent-Hunyuan-Large, README.md), for the pre-trained and for
the instruct model. Shots are those of section 4.1.1 of the report (arXiv 2411.02265), which gives them for the pre-trained
model only.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALIASES", "HUNYUAN_LARGE", "RULER", "SUITES", "Benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """One row of a suite.

    name: as gates, --tasks and files of --data-dir call it (`NAME.jsonl`, `NAME_test.jsonl`, `NAME.100.jsonl`). title: as
    the card writes it. task: of lm-evaluation-harness 0.4.13, in its folder `folder`, or without one of `task_files/`; None
    where neither has one. shots: as published, else those that the task has. pretrained, instruct: the card's scores, 0..100
    (MT-Bench, AlignBench: 0..10). metric, filter: which of the task's figures is meant; of RULER's the name is
    the length of their texts. needs: "code", "judge", "punkt" (a file of nltk), "words" (texts that are made here), "essays"
    (texts that are made of fetched ones) or nothing.
    """

    name: str
    title: str
    task: str | None
    shots: int
    metric: str
    pretrained: float | None = None
    instruct: float | None = None
    filter: str = "none"
    needs: str = ""
    folder: str = ""
    note: str = ""


_UNPUBLISHED = "the card's text names it, its table does not"
_SHORT = "examples show answers, not the way to them"
_SECRET = "the validation split: the test's answers are secret"
_STRIP = "remove_whitespace"
_STRICT = "prompt_level_strict_acc"
_RUNS = "runs what the model wrote, with this user's rights, in a process of its own: --unsafe-code"
_JUDGE = "graded by another model, which neither the harness nor quantkit has"

HUNYUAN_LARGE: tuple[Benchmark, ...] = (
    Benchmark("mmlu", "MMLU", "mmlu", 5, "acc", 88.4, 89.9, folder="mmlu"),
    Benchmark("mmlu_pro", "MMLU-Pro", "mmlu_pro", 5, "exact_match", 60.2, filter="custom-extract", folder="mmlu_pro"),
    Benchmark("bbh", "BBH", "bbh", 3, "exact_match", 86.3, 89.5, filter="get-answer", folder="bbh"),
    Benchmark("hellaswag", "HellaSwag", "hellaswag", 10, "acc_norm", 86.8, 88.5, folder="hellaswag"),
    Benchmark("commonsense_qa", "CommonsenseQA", "commonsense_qa", 7, "acc", 92.9, folder="commonsense_qa"),
    Benchmark("winogrande", "WinoGrande", "winogrande", 5, "acc", 88.7, folder="winogrande"),
    Benchmark("piqa", "PIQA", "piqa", 0, "acc_norm", 88.3, folder="piqa"),
    Benchmark("siqa", "SIQA", "social_iqa", 0, "acc", note=_UNPUBLISHED, folder="siqa"),
    Benchmark("nq_open", "NaturalQuestions", "nq_open", 5, "exact_match", 52.8, filter=_STRIP, folder="nq_open"),
    Benchmark("boolq", "BoolQ", "boolq", 0, "acc", note=_UNPUBLISHED, folder="super_glue"),
    Benchmark("drop", "DROP", "drop", 3, "f1", 88.9, folder="drop"),
    Benchmark(
        "arc_challenge",
        "ARC-C",
        "arc_challenge",
        25,
        "acc_norm",
        95.0,
        94.6,
        note="options are scored by their text",
        folder="arc",
    ),
    Benchmark("triviaqa", "TriviaQA", "triviaqa", 0, "exact_match", 89.2, filter=_STRIP, folder="triviaqa"),
    Benchmark("cmmlu", "CMMLU", "cmmlu", 5, "acc", 90.2, 90.4, folder="cmmlu"),
    Benchmark(
        "ceval",
        "C-Eval",
        "ceval-valid",
        5,
        "acc",
        91.9,
        88.6,
        note=_SECRET,
        folder="ceval",
    ),
    Benchmark("c3", "C3", "c3", 0, "acc", 82.3),
    Benchmark("gsm8k", "GSM8K", "gsm8k", 4, "exact_match", 92.8, filter="flexible-extract", folder="gsm8k"),
    Benchmark(
        "math",
        "MATH",
        "hendrycks_math",
        4,
        "exact_match",
        69.8,
        77.4,
        note="examples show answers, not the way to them",
        folder="hendrycks_math",
    ),
    Benchmark("cmath", "CMATH", "cmath", 3, "exact_match", 91.3, filter="last-number"),
    Benchmark("humaneval", "HumanEval", "quantkit_humaneval", 0, "pass@1", 71.4, 90.0, needs="code", note=_RUNS),
    Benchmark("mbpp", "MBPP", "quantkit_mbpp", 3, "pass@1", 72.6, needs="code", note=_RUNS),
    Benchmark(
        "gpqa_diamond",
        "GPQA_diamond",
        "gpqa_diamond_zeroshot",
        0,
        "acc_norm",
        None,
        42.4,
        note="a gated data set",
        folder="gpqa",
    ),
    Benchmark("alignbench", "AlignBench", None, 0, "grade", None, 8.3, needs="judge", note=_JUDGE),
    Benchmark("mt_bench", "MT-Bench", None, 0, "grade", None, 9.4, needs="judge", note=_JUDGE),
    Benchmark(
        "ifeval", "IFEval strict-prompt", "ifeval", 0, "prompt_level_strict_acc", None, 85.0, needs="punkt", folder="ifeval"
    ),
)


def _needle(name: str, title: str, needs: str) -> Benchmark:
    return Benchmark(name, title, name, 0, "recall", needs=needs, folder="ruler")


# The needles of RULER: what is hidden, in what, under what key.
RULER: tuple[Benchmark, ...] = (
    _needle("niah_single_1", "a number in one repeated sentence", "words"),
    _needle("niah_single_2", "a number in essays", "essays"),
    _needle("niah_single_3", "a UUID in essays", "essays"),
    _needle("niah_multikey_1", "a number in essays, among 4 keys", "essays"),
    _needle("niah_multikey_2", "a number among as many others as fit", "words"),
    _needle("niah_multikey_3", "a UUID among as many others as fit", "words"),
    _needle("niah_multivalue", "4 numbers of one key in essays", "essays"),
    _needle("niah_multiquery", "the numbers of 4 keys in essays", "essays"),
)
SUITES: dict[str, tuple[Benchmark, ...]] = {"hunyuan-large": HUNYUAN_LARGE, "ruler": RULER}
# What --tasks takes besides the harness's own names.
ALIASES: dict[str, Benchmark] = {row.name: row for rows in SUITES.values() for row in rows}
