"""Write docs/tasks.md from the suite and the measured results: `python scripts/tasks_doc.py`. A test holds that it is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.tasks.suite import HUNYUAN_LARGE, RULER, Benchmark

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "tasks.md"
RESULTS = ROOT / "bench" / "results" / "tasks_smollm2.json"
HEAD = """# Benchmark tasks

    pip install 'quantkit[tasks]'
    quantkit eval OUT --baseline MODEL --tasks gsm8k,piqa --limit 200
    quantkit eval OUT --baseline MODEL --suite hunyuan-large --data-dir ITEMS
    quantkit eval OUT --baseline MODEL --suite ruler --ruler-length 16384 --limit 50 --kv-cache fp8

Tasks are asked by [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) and answered by quantkit's
own runtime, once by the baseline and once by the quantized model, on the same items. NAME is one of the tables below or
any task, group or tag of the harness that scores an item between 0 and 1. The extra brings about 0.7 GB of packages
beside torch, so it is not part of the tests that `make test` runs; `make tasks-test` installs it and runs them.

JSON key `tasks` holds a row for each: `name`, `metric`, `baseline` and `quantized` (means, 0..1), `recovery` (their
ratio; null where the baseline has nothing right), `ci95` of the recovery, `right_to_wrong` and `wrong_to_right` (an item
is right from 0.5 on), `mcnemar_p` (exact, two-sided), `n`. `task_run` says how: shots, filters, data, limit, and how many
texts did not fit the model. The interval is Bonett and Price's for the ratio of paired proportions (Statistics in
Medicine 25, 2006), which does not shrink to nothing where no item flipped; for scores that are not 0 or 1 it is a
bootstrap over items, null for fewer than 20. Both answers to every item go into a .jsonl file
(`--items`), with the log-likelihood of each option or the text that was written. Logits that are not finite are no
answer: of the baseline they end the run, of the quantized model they end the tasks and the verdict is fail.

`--chat-template` asks through the model's own template; without it text begins with BOS as the model was trained
(`--add-bos`). `--shots` sets the examples before each question; without it a suite has the published number and a single
task its own. Prompts are the harness's, which the card's authors did not use:
compare the two models measured here, not a score with the card's.

## Data

With a network the harness fetches each data set from the hub. `--data-dir DIR` takes items from local files instead and
needs no network: `DIR/NAME.jsonl`, or NAME, one of `_ . -`, and anything (`gsm8k_test.100.jsonl`), one JSON object a line
with the fields of the task's data set. Benchmarks that have a task for each subject read one file, whose rows name
theirs. Examples come from `NAME_fewshot.jsonl`; without it the last rows of the file are kept for them and never asked.
`--limit` counts items of the benchmark; with data from the hub, of each of its tasks.

## Needles

RULER's tasks ([Hsieh et al. 2024](https://arxiv.org/abs/2404.06654)) hide something in a long text and ask for it. The
harness makes the texts: 500, each of at most `--ruler-length` tokens of the baseline's tokenizer (4096 without it, and no
more than the model reads), of which 128 are for the answer; `--limit` takes the first. A score is the share of what was
hidden that stands in the answer, and the figure's name is the length. `--suite ruler` runs the eight tasks of the table;
RULER's others (`ruler_vt`, `ruler_cwe`, `ruler_fwe`, `ruler_qa_squad`, `ruler_qa_hotpot`, all as `ruler`) go by their names.

NEEDLES
Those in essays fetch `baber/paul_graham_essays` from the hub and nltk's `punkt_tab`; with `--data-dir`, which stands for a
run without a network, they are refused, and a suite lists them as left out. The three others need neither, though
the harness looks for `punkt_tab` first. Before the first text it sorts millions of words, which takes a while. It would load
the model's tokenizer with `trust_remote_code`; quantkit gives it a copy of tokenizer.json that has no code beside it.

The needle that rides along with `--context` ([reports](report.md#what-is-measured)) is another thing: it asks nothing and
writes nothing.

## The harness's own command line

    python -m quantkit.tasks.harness run --model quantkit --model_args pretrained=OUT --tasks gsm8k

It is `lm_eval` with quantkit's model type registered. Version 0.4.13 of the harness does not look for model types in
other packages; later ones do, by the entry point `lm_eval.models`, and there `lm_eval --model quantkit` is enough.
Arguments: `pretrained`, `kernels` (auto, w4a8, reference), `kv_cache` (bf16, fp8, float32), `max_length`,
`max_new_tokens`, `batch_size`, `add_bos`. On tiny checkpoints its log-likelihoods are those of the harness's `hf` model
within 0.001 and its texts and metrics equal.

## Hunyuan-Large's model card

Shots: as section 4.1 of the [report](https://arxiv.org/abs/2411.02265) states for the pre-trained model; 0 where it
states none. Scores: the card's, in BF16. Tasks in bold come with quantkit, since the harness has none or one that needs a
network to score.

| benchmark | `--tasks` | task | shots | figure | pretrained | instruct | |
|---|---|---|---|---|---|---|---|
"""
LEFT_OUT = """
What needs a judge model cannot be run. What runs generated code is refused without `--unsafe-code`: each program has an
empty folder, a bare environment, a process group that is killed with it, 10 s and limits on memory and files, and that is
no sandbox. A program passes when it reaches its end; `exit()` before the tests does not count. The harness's own evaluator
(`code_eval` of Hugging Face's `evaluate`) is not used for HumanEval and MBPP: its metric is a script from the hub, it hands
on the environment, and what a program forked outlives it. Other tasks that run code (`humaneval_plus`, `mbpp_plus`) do use
it, and need `HF_ALLOW_CODE_EVAL=1` besides. In a suite such
rows are listed with the reason, and refused where `--tasks` names them. IFEval needs nltk's `punkt_tab`, which the harness
downloads. GPQA's data set is behind a form on the hub. C3 is asked for as CLUE ships it. The hub's copies of C3 and CMATH
could not be tried; their fields are those of the published data.
"""


def row(benchmark: Benchmark) -> str:
    task = "none" if benchmark.task is None else f"`{benchmark.task}`"
    task = f"**{task}**" if benchmark.task and not benchmark.folder else task
    scores = ["" if score is None else f"{score:.1f}" for score in (benchmark.pretrained, benchmark.instruct)]
    note = {"code": "off by default: ", "judge": "off: "}.get(benchmark.needs, "") + benchmark.note
    cells = [benchmark.title, f"`{benchmark.name}`", task, str(benchmark.shots), benchmark.metric, *scores, note]
    return f"| {' | '.join(cells)} |"


NEEDLES = """| `--tasks` | what is hidden | in essays from the hub |
|---|---|---|
"""


def needle(benchmark: Benchmark) -> str:
    return f"| `{benchmark.name}` | {benchmark.title} | {'yes' if benchmark.needs == 'essays' else ''} |\n"


SMOLLM2 = """
## SmolLM2-135M-Instruct

`bench/tasks_smollm2.py`: at most LIMIT items a task, no examples, on this machine's kernels, groups of 64, 32 windows for
calibration. The weights come from a 4-bit file, so what W4A16 loses is not typical. Read the intervals: a hundred items
cannot show a point of difference. On commonsense_qa the model answers A throughout, so nothing can flip there.

| scheme | task | n | BF16 | quantized | recovery | 95 % interval | lost, gained | p |
|---|---|---|---|---|---|---|---|---|
"""


def measured(results: dict[str, Any]) -> str:
    """SmolLM2's table, from what the bench wrote."""
    lines = []
    for run in results["runs"]:
        for task in run["tasks"]:
            (low, high), flips = task["ci95"], f"{task['right_to_wrong']}, {task['wrong_to_right']}"
            cells = [run["scheme"], task["name"], str(task["n"]), f"{task['baseline']:.1%}", f"{task['quantized']:.1%}"]
            cells += [f"{task['recovery']:.1%}", f"{low:.1%} .. {high:.1%}", flips, f"{task['mcnemar_p']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |\n")
    return SMOLLM2.replace("LIMIT", str(results["limit"])) + "".join(lines)


def text() -> str:
    table = "\n".join(row(benchmark) for benchmark in HUNYUAN_LARGE) + "\n"
    results = measured(json.loads(RESULTS.read_text("utf-8"))) if RESULTS.exists() else ""
    needles = NEEDLES + "".join(map(needle, RULER))
    return HEAD.replace("NEEDLES\n", f"{needles}\n") + table + LEFT_OUT + results


if __name__ == "__main__":
    TARGET.write_text(text(), "utf-8")
