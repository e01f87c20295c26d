"""The harness's model type on tiny checkpoints, against the harness's own `hf` model on transformers; then whole runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import random_weights, write_checkpoint
from tests.helpers.architectures import TINY
from tests.helpers.tokenizer_layouts import MESSAGES, write_tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: make tasks-test")
transformers = pytest.importorskip("transformers")

from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from quantkit.errors import ConfigError  # noqa: E402
from quantkit.tasks.harness import QuantkitLM  # noqa: E402

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
NEAR = 1e-3  # nats of a whole continuation: float32 sums in another order


def checkpoint(folder: Path, name: str = "llama tied, transformers 5", **config: Any) -> Path:
    made = {**TINY[name], "eos_token_id": 0, **config}
    write_checkpoint(folder, made, random_weights(made))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE})
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def ours(folder: Path) -> QuantkitLM:
    return QuantkitLM(folder, kernels="reference", kv_cache="float32")


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=arg) for arg in args]


PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a long answer of many tokens"),
    ("The capital of France is", "x"),
    ("Ends with spaces  ", "x"),
    ("", "no context"),
    ("", "\n"),
    ("A longer context. " * 30, " beyond the model's length"),
    ("x" * 300, "y" * 20),
    ("中文", "的字"),
]


def test_loglikelihood_is_hf_s(ours: QuantkitLM, hf: Any) -> None:
    theirs = hf.loglikelihood(requests(*PAIRS))
    for (mine, greedy), (value, their_greedy) in zip(ours.loglikelihood(requests(*PAIRS)), theirs, strict=True):
        assert mine == pytest.approx(value, abs=NEAR)
        assert greedy == their_greedy


def test_greedy_continuations_are_found(ours: QuantkitLM) -> None:
    written = ours.generate_until(requests(("abc", {"until": [], "max_gen_toks": 4})))[0]
    ids = ours.tok_encode("abc")
    (_, greedy), (_, other) = ours._loglikelihood_tokens([(None, ids, _greedy(ours, ids, 3)), (None, ids, [5, 6])])
    assert greedy and not other and len(written) > 0


def _greedy(model: QuantkitLM, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model.model.logits(torch.tensor([ids]))[0, -1].argmax())]
    return ids[-count:]


def test_padding_and_batches_change_nothing(folder: Path, ours: QuantkitLM) -> None:
    one_by_one = QuantkitLM(folder, kernels="reference", batch_size=1)
    for a, b in zip(ours.loglikelihood(requests(*PAIRS)), one_by_one.loglikelihood(requests(*PAIRS)), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_rolling_is_hf_s(ours: QuantkitLM, hf: Any) -> None:
    texts = ["short", "a text that is longer than the window of this model " * 12, "中文"]
    for mine, theirs in zip(
        ours.loglikelihood_rolling(requests(*((t,) for t in texts))),
        hf.loglikelihood_rolling(requests(*((t,) for t in texts))),
        strict=True,
    ):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=NEAR)


def test_generation_is_hf_s(ours: QuantkitLM, hf: Any) -> None:
    prompts = ["def main(", "The capital of", "x" * 280, "y"]
    for wish in ({"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}, {"until": "e", "max_gen_toks": 24}):
        asked = requests(*((prompt, wish) for prompt in prompts))
        assert ours.generate_until(asked) == hf.generate_until(asked)


def test_a_stop_string_ends_the_text_and_the_work(folder: Path) -> None:
    model = QuantkitLM(folder, kernels="reference", kv_cache="float32")
    free = model.generate_until(requests(("def", {"until": [], "max_gen_toks": 40})))[0]
    stop = free[5:8]
    steps = 0
    stream = model.model.stream

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        for tokens in stream(*args, **kwargs):
            steps += 1
            yield tokens

    model.model.stream = counted  # type: ignore[method-assign]
    assert model.generate_until(requests(("def", {"until": [stop], "max_gen_toks": 40})))[0] == free.partition(stop)[0]
    assert steps < 40


def test_what_does_not_fit_is_counted(folder: Path) -> None:
    model = QuantkitLM(folder, kernels="reference", max_length=16)
    model.loglikelihood(requests(("x" * 30, "y"), ("x", "y")))
    model.generate_until(requests(("x" * 30, {"until": [], "max_gen_toks": 4}), ("x", {"until": [], "max_gen_toks": 4})))
    assert model.truncated == 2


def test_chat_template(ours: QuantkitLM, hf: Any) -> None:
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat) == hf.apply_chat_template(chat) == "[user]hello\n[bot]"
    partial = [*chat, {"role": "assistant", "content": "I"}]
    assert ours.apply_chat_template(partial, add_generation_prompt=False) == "[user]hello\n[assistant]I"


def test_the_beginning_of_text_is_written_once(tmp_path: Path) -> None:
    model = QuantkitLM(checkpoint(tmp_path / "bos", bos_token_id=7), kernels="reference", add_bos=True)
    first = model.encoder.decode([7])
    assert model.tok_encode("ab")[0] == 7 and model.tok_encode(first + "ab").count(7) == 1
    assert model.prefix_token_id == 7


def test_ids_are_transformers_s_with_and_without_the_template(tmp_path: Path) -> None:
    """Through a template none is added, also not where the template writes no beginning of text."""
    for layout in ("llama-3", "deepseek"):
        folder = write_tokenizer(checkpoint(tmp_path / layout, vocab_size=258), layout)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
        model, theirs = QuantkitLM(folder, kernels="reference"), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        bos = theirs.bos_token_id
        assert model.ends == {0, 3, 4} and model.prefix_token_id == bos
        assert model.tok_encode("ab") == [bos, *theirs.encode("ab", add_special_tokens=False)]
        assert model.chat_template(True) == theirs.chat_template
        text = model.apply_chat_template(MESSAGES)
        assert model.tok_encode(text) == theirs.apply_chat_template(MESSAGES, tokenize=True)["input_ids"]
        context, continuation = model._encode_pair(text, "yes")
        assert context + continuation == theirs.encode(text + "yes", add_special_tokens=False)
        model.chat_template(False)
        assert model.tok_encode("ab")[0] == bos
    with pytest.raises(ConfigError, match="generation_config.json"):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [[3]]}))
        QuantkitLM(folder, kernels="reference")


def local_task(folder: Path, count: int = 12) -> Path:
    """A multiple-choice and a generating task of our own, with local data."""
    folder.mkdir()
    rows = [{"q": f"{i} and {i + 1}", "options": [str(i), str(i + 1), "none"], "answer": i % 3} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "Which of {{q}}?",
    }
    choice = {"task": "own_choice", "output_type": "multiple_choice", "doc_to_choice": "{{options}}"}
    write = {"task": "own_write", "output_type": "generate_until", "doc_to_target": "e", "metric_list": [exact_match()]}
    for task in (
        {**choice, "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        {**write, "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}},
    ):
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))
    return folder


def exact_match() -> dict[str, Any]:
    return {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}


def test_a_task_has_hf_s_metrics(tmp_path: Path, ours: QuantkitLM, hf: Any) -> None:
    manager = TaskManager(include_path=str(local_task(tmp_path / "tasks")), include_defaults=False)
    mine, theirs = (evaluate(lm, manager.load(["own_choice", "own_write"]), bootstrap_iters=0) for lm in (ours, hf))
    for task in ("own_choice", "own_write"):
        for a, b in zip(mine["samples"][task], theirs["samples"][task], strict=True):
            assert a["arguments"] == b["arguments"]
        figures = [{k: v for k, v in r["results"][task].items() if k.startswith(("acc", "exact"))} for r in (mine, theirs)]
        assert figures[0] == figures[1] and figures[0]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_harness_s_command_line(tmp_path: Path, name: str) -> None:
    """`--model quantkit` as a user would call it, in another process."""
    made = checkpoint(tmp_path / "model", name)
    command = [sys.executable, "-m", "quantkit.tasks.harness", "run", "--model", "quantkit", "--tasks", "own_choice"]
    command += [
        "--model_args",
        f"pretrained={made},kernels=reference",
        "--include_path",
        str(local_task(tmp_path / "tasks")),
    ]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "own_choice" in done.stdout and "acc_norm" in done.stdout


def test_the_entry_point_names_the_class() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="lm_eval.models", name="quantkit")
    assert found.load() is QuantkitLM
