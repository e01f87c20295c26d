"""From text to ids through whole commands: what is recorded of it, what ends it, and that no more is read than is used."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import quantkit
from quantkit.calib.documents import Conversation
from quantkit.calib.tokenizer import TextTokenizer, load_text_tokenizer
from quantkit.calib.tokens import calibration_windows, evaluation_set
from quantkit.cli import main
from quantkit.errors import ConfigError
from quantkit.measure.evaluate import Extent, read_text
from quantkit.measure.samples import generations
from quantkit.run.sampling import Sampling
from quantkit.run.text import complete, stream_text
from tests.conftest import byte_tokenizer
from tests.helpers.commands import not_quantized, refused
from tests.helpers.tokenizer_layouts import LAYOUTS, MESSAGES, write_tokenizer

QUICK = ("--group-size", "32", "--samples", "4", "--seq-len", "16", "--quiet")


def run(*arguments: object) -> Any:
    found = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert found.exit_code == 0, found.stderr
    return found


@pytest.fixture
def llama(make_model: Callable[..., Path]) -> Path:
    """A model whose tokenizer adds BOS to raw text, and whose template writes it."""
    return write_tokenizer(make_model(vocab_size=258), "llama-3")


def test_conversations_through_quantize_and_eval(llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": MESSAGES}, {"messages": None}, {"messages": []}, {"messages": MESSAGES[1:]}]
    path, out = tmp_path / "chat.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("quantize", llama, "-o", out, "--calibration", path, *QUICK)
    assert "rows were skipped" in done.stderr and '"null": 1' in done.stderr
    said = json.loads((out / "run.json").read_text())["calibration_text"]
    assert said.pop("profile")["scripts"].keys() == {"Latin", "Han"}
    assert (said["documents"], said["conversations"], said["skipped_rows"]) == (2, 2, {"empty": 1, "null": 1})
    assert said["first_ids"] == load_text_tokenizer(llama).encode_document(Conversation(MESSAGES))[:8]
    assert said["first_tokens"][:3] == ["<|begin_of_text|>", "<", "s"]
    assert said["bos_added"] is False and "chat template" in said["bos_why"]
    done = run("eval", out, "--baseline", llama, "--text", path, "--seq-len", 16, "--samples", 1)
    assert "2 rows skipped (1 empty and 1 null), 2 used" in done.stderr
    report = json.loads((out / "eval" / "report.json").read_text())
    assert report["provenance"]["text_tokens"] == said and report["provenance"]["overlap"]["share"]
    assert any("2 rows skipped" in note for note in report["notes"])
    for page in ("report.html", "report.md"):
        text = (out / "eval" / page).read_text()
        assert "the chat template writes" in text and str(said["first_ids"][0]) in text


def test_raw_text_and_the_option(llama: Path, tmp_path: Path) -> None:
    """The option reaches calibration, evaluation (as a command and as a call) and generation."""
    path = tmp_path / "a.txt"
    path.write_text("some words " * 50)
    bos, began = load_text_tokenizer(llama).bos.id, {}
    for name, option in (("default", ()), ("without", ("--no-add-bos",))):
        run("quantize", llama, "-o", tmp_path / name, "--calibration", path, *QUICK, *option)
        record = json.loads((tmp_path / name / "run.json").read_text())
        began[name] = record["calibration_text"]["first_ids"]
        run("eval", tmp_path / name, "--baseline", llama, "--text", path, "--seq-len", 16, "--windows", 2, *option)
        report = json.loads((tmp_path / name / "eval" / "report.json").read_text())
        assert report["provenance"]["text_tokens"]["first_ids"] == began[name]
        assert ("--no-add-bos" in report["provenance"]["command"]) == bool(option)
        assert report["provenance"]["overlap"]["share"] is not None  # it draws the windows as the recipe says
    assert began["default"] == [bos, *began["without"][:7]] and record["recipe"]["add_bos"] is False
    figures = [
        quantkit.evaluate(tmp_path / "default", llama, str(path), seq_len=16, windows=2, add_bos=add)
        for add in (None, True, False)
    ]
    assert figures[0]["text_digest"] == figures[1]["text_digest"] != figures[2]["text_digest"]
    model, seen = quantkit.load(llama), []
    stream = model.stream

    def spied(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(ids[0].tolist())
        return stream(ids, *args, **kwargs)

    model.stream = spied  # type: ignore[method-assign]
    for add in (None, False):
        list(stream_text(model, "a", 1, add_bos=add))
        complete(model, ["a", "b"], 1, add_bos=add)
    assert seen[0] == seen[1] == [bos, *seen[2]] and seen[2] == seen[3]


def test_a_template_beyond_its_limits_is_refused(llama: Path, tmp_path: Path) -> None:
    (llama / "chat_template.jinja").write_text("{{ 'x' * 10**10 }}")
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}))
    message = not_quantized(llama, "--calibration", path, *QUICK)
    assert f"{path} line 1: the chat template of {llama} wants more memory" in message


def test_bos_that_the_model_lacks_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no BOS token"):
        quantkit.quantize(model, tmp_path / "out", quantkit.Recipe(add_bos=True, group_size=32))
    for command in (("eval", model, "--baseline", model), ("generate", model, "--prompt", "a")):
        assert "names no BOS token" in refused(*command, "--add-bos")


def test_text_ends_at_the_end_tokens_of_both_files(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ids = quantkit.load(model), byte_tokenizer().encode("a人b").ids
    loaded.config["eos_token_id"] = 0
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    monkeypatch.setattr(loaded, "stream", lambda *_, **__: (torch.tensor([[i], [i]]) for i in [*ids, 7, *ids]))
    assert complete(loaded, ["x", "yy"], 99) == ["a人b", "a人b"]
    monkeypatch.setattr(loaded, "stream", lambda *_, **__: (torch.tensor([[i]]) for i in [*ids, 5, *ids]))
    assert "".join(stream_text(loaded, "x", 99, Sampling())) == "a人b"
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": {"a": 1}}))
    assert "generation_config.json: eos_token_id is" in refused("generate", model, "--prompt", "a")


def test_samples_end_at_an_end_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TextTokenizer(byte_tokenizer())
    data = evaluation_set(tokenizer, ["a" * 80], 80, 1)
    loaded = [quantkit.load(model), quantkit.load(model)]
    texts = ["same b", "same quant"]
    for one, text in zip(loaded, texts, strict=True):
        drawn = [*tokenizer.encode(text), 0, *tokenizer.encode("behind it" * 9)]
        monkeypatch.setattr(one, "stream", lambda *_, drawn=drawn, **__: (torch.tensor([[i]]) for i in drawn))
    (sample,) = generations(loaded, data, tokenizer, 1, None, frozenset({0}))
    assert (sample.common, sample.baseline, sample.quantized) == ("same ", "b<|end|>", "quant<|end|>")
    assert (sample.same, sample.of) == (5, 11)


# Only what is used


class Counting(TextTokenizer):
    """Counts the characters that the library is given."""

    read = 0

    def _raw(self, text: str) -> list[int]:
        self.read += len(text)
        return super()._raw(text)


def test_of_a_long_text_only_the_windows_are_encoded(tmp_path: Path, model: Path) -> None:
    text = "".join(f"sentence {i} of a long text.\n" for i in range(100_000))
    tokenizer = Counting(byte_tokenizer())
    data = evaluation_set(tokenizer, [text], 64, 8)
    assert data.ids.flatten().tolist() == tokenizer.encode(text[:512]) and tokenizer.read < 40_000 < len(text) / 50
    tokenizer.read = 0
    assert calibration_windows(tokenizer, [text], 8, 64, 0, each=1024).shape == (8, 64) and tokenizer.read < 40_000
    (tmp_path / "a.txt").write_text(text)
    found = read_text(model, {}, str(tmp_path / "a.txt"), Extent(seq_len=64, windows=8, context=128))
    assert torch.equal(found.data.ids, data.ids) and found.long_ids is not None and found.long_ids.shape == (8, 128)


def test_documents_in_turn_are_those_of_whole_documents() -> None:
    rng = random.Random(0)
    tokenizer = TextTokenizer(byte_tokenizer())
    for most in (1, 3, 7, 20, 999):
        texts = ["".join(rng.choices("ab \n人", k=rng.choice([0, 1, 2, 9, 40, 41, 2000]))) for _ in range(9)]
        cuts = [[ids[i : i + 20] for i in range(0, len(ids), 20)] for ids in map(tokenizer.encode, texts)]
        order = sorted((w, d) for d, one in enumerate(cuts) for w in range(len(one)) if len(one[w]) >= 2)[:most]
        if order:
            data = evaluation_set(tokenizer, texts, 20, most)
            rows = zip(data.ids.tolist(), data.lengths.tolist(), strict=True)
            assert [row[:length] for row, length in rows] == [cuts[d][w] for d, w in sorted((d, w) for w, d in order)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_ids_are_those_of_the_whole_text(layout: str, tmp_path: Path) -> None:
    tokenizer, rng = load_text_tokenizer(write_tokenizer(tmp_path / "model", layout)), random.Random(1)
    for _ in range(5):
        text = "".join(rng.choices(["hi", " ", "  ", "[INST]", "\n", "人", "é", "</s>", "a"], k=6000))
        for encode in (tokenizer.encode, tokenizer.encode_written):
            whole = encode(text)
            for limit in (1, 7, 300, len(whole) + 5):
                assert encode(text, limit) == whole[:limit]
