"""Calibration from several texts, what kind of text it is, and how much of it a model needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.calib.covering import chosen_windows, lacking, routed_tokens
from quantkit.calib.documents import Conversation
from quantkit.calib.mixture import Source, read_mixture, short_name, sources_of
from quantkit.calib.profile import Profile, one_kind, profile_of, unlike
from quantkit.calib.tokenizer import TextTokenizer
from quantkit.calib.tokens import calibration_windows
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import CalibrationError
from quantkit.job.forecast import forecast, windows_for
from quantkit.model.registry import build_spec
from quantkit.run.model import Model
from tests.conftest import CONFIG, byte_tokenizer
from tests.helpers.architectures import RELEASED, SMALLER
from tests.helpers.commands import cli, refused, run

ENGLISH = "The weather was fine that morning, and they went down to the river together.\n" * 40
CHINESE = "那天早上天气很好，他们一起走到河边去。\n" * 80
CODE = "def f(x):\n    y = x + 1\n    return [y]\n" * 60


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.txt" for name in ("en", "zh", "code")}
    for path, text in zip(paths.values(), (ENGLISH, CHINESE, CODE), strict=True):
        path.write_text(text)
    return paths


def test_sources_and_shares(tmp_path: Path) -> None:
    assert sources_of("a.txt=2+b.jsonl+O/N:train=0.5") == (Source("a.txt", 2.0), Source("b.jsonl"), Source("O/N:train", 0.5))
    assert sources_of("stdlib") == (Source("stdlib"),) and sources_of("owner/name") == (Source("owner/name"),)
    odd = tmp_path / "c++=2.txt"
    odd.write_text("x")
    assert sources_of(str(odd)) == (Source(str(odd)),)  # a name that is a file is that file
    assert short_name(f"{tmp_path}/a.txt=2+{tmp_path}/b.txt") == "a.txt=2+b.txt=1" and short_name("/x/y.txt") == "y.txt"
    for text, problem in {
        "a.txt++b.txt": "source ''",
        "a.txt=0+b.txt": "source 'a.txt' with share 0",
        "a.txt+a.txt": "'a.txt' twice",
    }.items():
        with pytest.raises(CalibrationError, match=f"the mixture .* has {problem}"):
            sources_of(text)


def test_windows_are_each_sources_own(texts: dict[str, Path]) -> None:
    tokenizer = TextTokenizer(byte_tokenizer())
    mixture = read_mixture(f"{texts['en']}=2+{texts['zh']}+{texts['code']}")
    assert mixture.counts(8) == [4, 2, 2] and mixture.counts(7) == [3, 2, 2] and sum(mixture.counts(1)) == 1
    ids = mixture.windows(tokenizer, 8, 32, 0)
    alone = [calibration_windows(tokenizer, list(own), n, 32, 0) for own, n in zip(mixture.texts, (4, 2, 2), strict=True)]
    assert torch.equal(ids, torch.cat(alone))
    texts["en"].write_text(" ".join(str(i) for i in range(2000)))  # no window is like another
    single = read_mixture(str(texts["en"]))
    rows, spare = single.windows(tokenizer, 4, 48, 0), single.spare(tokenizer, 4, 3, 48, 0)
    assert spare.shape == (3, 48) and len({tuple(row) for row in torch.cat((rows, spare)).tolist()}) == 7
    with pytest.raises(CalibrationError, match="windows beside those of the calibration are needed"):
        single.spare(tokenizer, 4, 999, 48, 0)


def test_profiles_know_scripts_and_code() -> None:
    english, chinese, code = (profile_of([text]) for text in (ENGLISH, CHINESE, CODE))
    assert english.scripts == {"Latin": 1.0} and chinese.scripts == {"Han": 1.0}
    assert english.code == chinese.code == 0.0 and code.code == 1.0
    said = [{"role": "user", "content": "Привет, как дела"}, {"role": "assistant", "content": None}]
    chat = profile_of([Conversation(said)])
    assert chat.scripts == {"Cyrillic": 1.0} and Profile.of(json.loads(json.dumps(chat.as_dict()))) == chat
    mixed = profile_of([ENGLISH, CHINESE * 3, CODE])
    assert one_kind("x", mixed) is None
    assert "100% of its letters are Latin, and 100% of its lines look like code" in str(one_kind("x", code))
    assert not unlike(mixed, english) and len(unlike(english, chinese)) == 1
    assert "100% of the evaluation text's letters are Han, and 0% of the calibration text's" in unlike(english, chinese)[0]
    assert len(unlike(code, chinese)) == 2


@pytest.mark.parametrize(
    ("name", "tokens", "per_feature"),
    [("hunyuan-large", 586_000, 0.22), ("mixtral-8x22b", 131_072, 1.0), ("qwen3-30b-a3b", 65_536, 2.0)],
)
def test_how_much_a_model_needs(name: str, tokens: int, per_feature: float) -> None:
    """128 x 512 tokens leave Hunyuan-Large's down_proj 0.22 for an input; the default gives two."""
    spec = build_spec({**RELEASED, **SMALLER}[name], "test")
    before, now = forecast(spec, 128 * 512), forecast(spec, windows_for(spec, 512) * 512)
    assert before and now and before.per_feature == pytest.approx(per_feature, rel=0.03)
    assert windows_for(spec, 512) * 512 == pytest.approx(tokens, rel=0.01) and now.per_feature >= 1.99
    assert (before.note() is None) == (per_feature >= 1) and now.note() is None
    assert windows_for(build_spec(CONFIG, "test"), 512) == 128


def test_from_the_command_line(make_model: Callable[..., Path], texts: dict[str, Path], tmp_path: Path) -> None:
    """Of a mixture, run.json says how many windows are whose; an evaluation of another language says so."""
    model = make_model()
    sources = f"{texts['en']}=3+{texts['code']}"
    options = ("--samples", 8, "--seq-len", 32, "--group-size", 32, "--calibration", sources)
    record = run("quantize", model, "-o", tmp_path / "out", *options)
    assert record["calibration_text"]["windows"] == {str(texts["en"]): 6, str(texts["code"]): 2}
    assert any("all of one kind: 100% of its letters are Latin" in note for note in record["notes"])
    done = cli("eval", tmp_path / "out", "--baseline", model, "--text", texts["zh"], "--seq-len", 32, "--windows", 4)
    assert "letters are Han, and 0% of the calibration text's" in " ".join(done.stderr.split())
    report = json.loads((tmp_path / "out" / "eval" / "report.json").read_text())
    assert any("letters are Han" in note for note in report["notes"])
    assert report["provenance"]["overlap"]["share"] == 0.0  # the mixture was drawn again and found to be the same
    plan = run("plan", model, "--group-size", 32, "--samples", 2, "--seq-len", 32)
    assert plan["coverage_forecast"] == {"tokens": 64, "per_expert": 16, "features": 128, "tokens_per_feature": 0.125}
    assert any("64 calibration tokens give each routed expert about 16 for 128 inputs" in note for note in plan["notes"])


def test_windows_are_chosen_for_experts_that_lack_tokens() -> None:
    """The greedy choice against the best of all, and that what is rare is taken."""
    counts = torch.zeros(12, 3, dtype=torch.int32)
    counts[:, 0] = 16  # an expert that every window feeds
    counts[5, 1], counts[9, 2], counts[2, 2] = 8, 6, 2
    need = torch.tensor([20, 8, 8])
    chosen = chosen_windows(counts, 3, need)
    assert chosen.tolist() == [2, 5, 9] and lacking(counts[chosen], need) == 0
    assert lacking(counts[:3], need) == 2 and len(chosen_windows(counts, 12, need)) == 12


def test_cover_from_the_command_line(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """No more experts are short than without; the same command finds the choice again, and an evaluation the windows."""
    model = make_model()
    options = ("--samples", 6, "--seq-len", 32, "--group-size", 32, "--cover")
    given = ("quantize", model, "-o", tmp_path / "out", *options)
    assert any("passes 4 times 192 tokens" in note for note in run(*given, "--dry-run")["notes"])
    record = run(*given)
    cover = record["calibration_text"]["cover"]
    assert len(cover["chosen"]) == 6 and cover["short"] <= cover["short_without"] <= cover["experts"] == 16
    assert record["recipe"]["cover"] and run(*given) == record and not list(tmp_path.glob(".out-coverage*"))
    assert cli("eval", tmp_path / "out", "--baseline", model, "--seq-len", 32, "--windows", 4).exit_code == 0
    report = json.loads((tmp_path / "out" / "eval" / "report.json").read_text())
    assert report["provenance"]["overlap"]["share"] is not None
    dense = make_model("dense", num_experts=1, num_shared_expert=0, use_mixed_mlp_moe=False)
    assert "the model has none" in refused("quantize", dense, "-o", tmp_path / "d", *options)


def test_counts_are_the_models_routing(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model()
    reader, spec = CheckpointReader(folder), build_spec(CONFIG, "test")
    ids = torch.randint(0, 257, (5, 24), generator=torch.Generator().manual_seed(0))
    counts = routed_tokens(reader, spec, ids, torch.device("cpu"), tmp_path)
    traces = Model(folder, torch.device("cpu")).layers(ids)
    expected = [
        torch.stack([torch.bincount(row.flatten(), minlength=4) for row in trace.routing.experts.view(5, -1)])
        for trace in traces
        if trace.routing is not None
    ]
    assert torch.equal(counts.long(), torch.cat(expected, dim=1)) and (counts.sum(1) == 24 * 4).all()
