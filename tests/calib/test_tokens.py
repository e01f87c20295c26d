"""Text in all its file formats to calibration windows and evaluation windows."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path

import pytest
import torch

from quantkit.calib import corpus
from quantkit.calib.tokenizer import TextTokenizer, load_tokenizer
from quantkit.calib.tokens import calibration_windows, digest, evaluation_set
from quantkit.checkpoint import hy_tiktoken
from quantkit.errors import CalibrationError, CheckpointError
from tests.conftest import byte_tokenizer

TEXTS = ["def f(x):\n    return x\n", "The quick brown fox.", "人人生而自由"]


def test_calibration_and_held_out_modules_do_not_overlap() -> None:
    calibration = set(corpus.stdlib_files(corpus.CALIBRATION))
    held_out = corpus.held_out_files()
    assert len(calibration) > 100 and len(held_out) > 25 and not calibration & held_out
    assert len(corpus.named_documents("stdlib-held-out")) == len(held_out)


def test_calibration_windows_are_full_distinct_and_seeded() -> None:
    texts = [f"document {i}: " + "words and words " * (i + 3) for i in range(40)]
    windows = [calibration_windows(TextTokenizer(byte_tokenizer()), texts, 16, 32, seed) for seed in (0, 0, 1)]
    assert windows[0].shape == (16, 32) and windows[0].dtype is torch.int64
    assert torch.equal(windows[0], windows[1]) and not torch.equal(windows[0], windows[2])
    assert digest(windows[0]) == digest(windows[1]) != digest(windows[2])
    every = "".join(texts)
    text = byte_tokenizer().decode(windows[0][0].tolist())
    assert all(part in every for part in text.split("document")[1:-1])
    with pytest.raises(CalibrationError, match=r"windows of 500, and 100 are asked for"):
        calibration_windows(TextTokenizer(byte_tokenizer()), texts, 100, 500, 0)


def test_evaluation_takes_documents_in_turn_and_pads() -> None:
    tokenizer = TextTokenizer(byte_tokenizer())
    texts = ["a" * 25, "b" * 7, "", "c", "d" * 40]
    data = evaluation_set(tokenizer, texts, seq_len=10, max_windows=5)
    # first windows of a, b and d, then the second ones; documents of fewer than two tokens cannot be scored
    assert data.unit.tolist() == [0, 0, 1, 4, 4] and data.lengths.tolist() == [10, 10, 7, 10, 10]
    assert data.ids.shape == (5, 10) and data.ids[2, 7:].tolist() == [0, 0, 0]
    one = evaluation_set(tokenizer, ["x" * 35], seq_len=10, max_windows=9)
    assert one.unit_name == "window" and one.unit.tolist() == [0, 1, 2, 3] and one.lengths.tolist() == [10, 10, 10, 5]
    with pytest.raises(CalibrationError, match="two tokens"):
        evaluation_set(tokenizer, ["", "x"], seq_len=10, max_windows=5)


def test_padding_does_not_change_a_score(model: Path, tmp_path: Path) -> None:
    import quantkit

    quantkit.quantize(model, tmp_path / "out", quantkit.Recipe(scheme="W4A16", method="rtn", group_size=32))
    lines = [json.dumps({"text": "x = [1, 2, 3]; y = x[0]"}), json.dumps({"text": "print('no')" * 9})]
    (tmp_path / "a.jsonl").write_text(lines[0])
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    alone = quantkit.evaluate(tmp_path / "out", model, str(tmp_path / "a.jsonl"), seq_len=23)
    padded = quantkit.evaluate(tmp_path / "out", model, str(tmp_path / "a.jsonl"), seq_len=64)
    assert alone["kl"]["mean"] == pytest.approx(padded["kl"]["mean"], rel=1e-4) and alone["tokens"] == padded["tokens"]
    both = quantkit.evaluate(tmp_path / "out", model, str(tmp_path / "b.jsonl"), seq_len=64)
    assert both["tokens"] == alone["tokens"] + 63 + 34


def test_tokenizer_round_trip(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer.encode(TEXTS[2]).ids) == TEXTS[2]


def test_hunyuans_own_tokenizer_file(model: Path) -> None:
    """Ids are those of tiktoken with the same ranks and pattern; specials follow the last rank."""
    tiktoken = pytest.importorskip("tiktoken")
    merges = [b"th", b"the", b" t", b" the", b"in", b"ing", "人".encode()[:2], "人".encode(), b"\n\n", b"  ", b"re", b" 1"]
    ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in range(255, -1, -1)), *merges])}
    path = model / "hy.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} 7\n" for t in ranks))  # the second column is not used
    (model / "tokenizer.json").unlink()
    ours = load_tokenizer(model)
    specials = {name: len(ranks) + i for i, name in enumerate(hy_tiktoken.special_tokens({}))}
    theirs = tiktoken.Encoding("hy", pat_str=hy_tiktoken.PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    for text in ["the thing is in\n\n  the 1234 re-ring", "人人生而自由 the人's", "e\u0301 the<|bos|>in", "\t\r\n  x  "]:
        nfc = unicodedata.normalize("NFC", text)
        assert ours.encode(text).ids == theirs.encode(nfc, allowed_special="all"), text
    assert len(ours.encode("<|extra_203|>").ids) == 1 and max(specials.values()) == ours.encode("<|extra_203|>").ids[0]
    for broken in ("$$$ 1\n", base64.b64encode(b"a").decode() + " 0\n"):
        path.write_text(broken)
        with pytest.raises(CheckpointError, match=r"hy\.tiktoken"):
            load_tokenizer(model)
