"""Sampling, and text that streams from a quantized checkpoint."""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import quantkit
from quantkit.calib.tokenizer import load_tokenizer
from quantkit.cli import main
from quantkit.errors import ConfigError, NotFiniteError
from quantkit.kernels.cpu import build
from quantkit.model.cache import KV, Cache, KVFormat
from quantkit.model.gqa import GroupedQuery
from quantkit.recipe import Recipe
from quantkit.run.sampling import Sampling, sample
from quantkit.run.speed import Speed
from quantkit.run.text import complete, stream_text
from quantkit.run.weights import Kernels
from tests.conftest import byte_tokenizer, random_weights, write_checkpoint
from tests.helpers.architectures import TINY as CONFIGS
from tests.helpers.counting import ran
from tests.helpers.paths import ROOT

TINY = ROOT / "examples" / "tiny-hunyuan"
PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])


def draws(temperature: float, top_p: float, count: int = 4000) -> torch.Tensor:
    logits = PROBABILITIES.log().expand(count, 4)
    tokens = sample(logits, Sampling(temperature, top_p), torch.Generator().manual_seed(0))
    assert tokens.shape == (count, 1) and tokens.dtype is torch.int64
    return torch.bincount(tokens[:, 0], minlength=4) / count


def test_sampling_follows_the_distribution() -> None:
    assert draws(0.0, 1.0).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(draws(1.0, 1.0), PROBABILITIES, atol=0.03, rtol=0)
    torch.testing.assert_close(draws(0.5, 1.0), PROBABILITIES**2 / (PROBABILITIES**2).sum(), atol=0.03, rtol=0)
    torch.testing.assert_close(draws(1.0, 0.8), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    assert draws(1.0, 1e-6).tolist() == [1, 0, 0, 0]
    assert draws(1e-40, 1.0).tolist() == [1, 0, 0, 0]
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ConfigError, match="temperature"):
            Sampling(bad)


def test_without_top_p_no_token_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over a large vocabulary reaches 1 in float32 long before its last token."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: seen.append(p) or p.argmax(-1, keepdim=True))
    sample(torch.randn(1, 129024) * 3, Sampling(1.0), torch.Generator())
    assert bool((seen[0] > 0).all())


def test_one_group_of_layers_holds_its_keys(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache, keys and values of earlier layers are let go."""
    model, alive, plain = quantkit.load(make_model(), kernels="reference"), [], GroupedQuery.kept

    def watched(*given: Any) -> KV | None:
        kv = plain(*given)
        if kv is not None:
            alive.append(weakref.ref(kv[0]))
        return kv

    monkeypatch.setattr(GroupedQuery, "kept", watched)
    for _ in model.layers(torch.arange(1, 13).view(2, 6)):
        assert sum(ref() is not None for ref in alive) == 1
    assert len(alive) > 1


def test_generation_with_the_cache_is_greedy_decoding_without(model: Path, tmp_path: Path) -> None:
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32))
    quant, ids = quantkit.load(tmp_path / "out", kernels="reference"), torch.arange(1, 13).view(2, 6)
    generated = quant.generate(ids, 8, kv_format=KVFormat.FLOAT32)
    assert generated.shape == (2, 14) and torch.equal(generated[:, :6], ids)
    assert torch.equal(generated[:, 6:], quant.logits(generated)[:, 5:-1].argmax(-1))
    warm = [quant.generate(ids, 8, Sampling(2.0, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(warm[0], warm[1]) and not torch.equal(warm[0], warm[2])
    with pytest.raises(ConfigError, match="top_p"):
        Sampling(top_p=0.0)


def test_text_is_what_was_drawn(model: Path) -> None:
    loaded = quantkit.load(model)
    pieces = list(stream_text(loaded, "def 人", 24, Sampling(1.0, seed=3)))
    prompt = torch.tensor([byte_tokenizer().encode("def 人").ids])
    drawn = [int(t) for t in islice(loaded.stream(prompt, Sampling(1.0, seed=3)), 24)]
    assert "".join(pieces) and byte_tokenizer().decode(drawn).startswith("".join(pieces))


def test_text_streams_in_whole_characters_until_the_end_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ids = quantkit.load(model), byte_tokenizer().encode("a人b").ids
    loaded.config["eos_token_id"] = [0, 5]
    monkeypatch.setattr(loaded, "stream", lambda *_, **__: (torch.tensor([[i]]) for i in [*ids, 5, *ids]))
    assert list(stream_text(loaded, "x", 99)) == ["a", "人", "b"]  # the three bytes of 人 come as one piece
    assert list(stream_text(loaded, "x", 3)) == ["a"]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_prompts_of_different_lengths_go_as_one_batch(kernels: Kernels) -> None:
    model = quantkit.load(TINY, kernels=kernels)
    prompts = ["import os\nimport ", "def f(x", "class Parser:\n    def __init__(self, text):\n        self."]
    alone = ["".join(stream_text(model, prompt, 12, kv_format=KVFormat.FLOAT32)) for prompt in prompts]
    together = complete(model, prompts, 12, kv_format=KVFormat.FLOAT32)
    assert len(set(alone)) == 3
    # Sums of another batch end in other last bits, which may turn one near tie: the texts agree up to there.
    for one, other in zip(alone, together, strict=True):
        assert other[: len(one) * 2 // 3].startswith(one[: len(one) // 2])
    logits = [model.logits(torch.tensor([ids])) for ids in ([5, 6, 7], [9, 8, 5, 6, 7])]
    padded = model.logits(torch.tensor([[9, 8, 5, 6, 7]] * 2), Cache(padding=torch.tensor([2, 0])))
    torch.testing.assert_close(padded[0, 2:], logits[0][0], atol=0.1 if kernels == "auto" else 1e-4, rtol=0)
    torch.testing.assert_close(padded[1], logits[1][0], atol=0.1 if kernels == "auto" else 1e-4, rtol=0)
    assert (padded[0, 2:] - padded[1, 2:]).abs().max() > 0.5
    with pytest.raises(ConfigError, match="padding"):
        next(model.stream(torch.ones(2, 3, dtype=torch.int64), padding=torch.tensor([0, 3])))


def test_no_token_is_drawn_from_logits_that_are_not_finite(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = quantkit.load(model)
    monkeypatch.setattr(loaded, "head", lambda hidden: hidden.new_full((*hidden.shape[:-1], 257), float("inf")))
    with pytest.raises(NotFiniteError, match="the logits of new token 1 are not finite"):
        loaded.generate(torch.tensor([[1, 2]]), 3)


@pytest.mark.skipif(isinstance(build.load(), str), reason="no CPU kernels here")
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_a_token_takes_few_operations(name: str, tmp_path: Path) -> None:
    """Of torch, at most four for each half of a layer and twenty around them: in single calls it was 210 a layer."""
    source = write_checkpoint(tmp_path / "model", CONFIGS[name], random_weights(CONFIGS[name]))
    quantkit.quantize(source, tmp_path / "out", Recipe(method="rtn", group_size=32))
    model, checked = quantkit.load(tmp_path / "out"), []
    check = model._check
    model._check = lambda ids: checked.append(ids) or check(ids)  # type: ignore[method-assign,func-returns-value]
    stream = model.stream(torch.arange(1, 21)[None], new_tokens=9)
    [next(stream) for _ in range(3)]
    calls = [ran(lambda: next(stream)).calls for _ in range(3)]
    assert calls[0] == calls[1] == calls[2] <= 20 + 8 * len(model.spec.layers)
    assert len(checked) == 1  # ids that the model drew are its own


def test_speed_counts_what_is_made_and_not_what_is_done_with_it() -> None:
    def made() -> Iterator[torch.Tensor]:
        for seconds in (0.05, 0.01, 0.01, 0.01):
            time.sleep(seconds)
            yield torch.zeros(2, 1)

    speed = Speed()
    assert speed.prefill is None and speed.decode is None and str(speed) == "prompt: 0 tokens; new: 0 tokens"
    for _ in speed.watch(30, made()):
        time.sleep(0.02)
    assert len(speed.seconds) == 4 and speed.prefill == 30 / speed.seconds[0]
    assert speed.decode == 6 / sum(speed.seconds[1:]) and sum(speed.seconds) >= 0.08


def test_generate_command(model: Path) -> None:
    arguments = ["generate", str(model), "--prompt", "import os", "--max-tokens", "5"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout.startswith("import os")
    assert re.fullmatch(r"(warning.*\n)*prompt: 9 tokens, [\d.]+ a second; new: 5 tokens, [\d.]+ a second\n", result.stderr)
    other = CliRunner().invoke(main, [*arguments, "--kernels", "reference"], catch_exceptions=False)
    assert other.stdout == result.stdout  # nothing is quantized: the same numbers
    batch = CliRunner().invoke(main, [*arguments, "--prompt", "x"], catch_exceptions=False)
    assert batch.exit_code == 0 and batch.stdout.startswith("import os") and "\nx" in batch.stdout
    assert "prompt: 10 tokens" in batch.stderr and "new: 10 tokens" in batch.stderr
    empty = CliRunner().invoke(main, ["generate", str(model), "--prompt", ""])
    assert empty.exit_code == 2 and "no token" in empty.stderr


def test_generate_refuses_before_it_prints(make_model: Callable[..., Path]) -> None:
    model = make_model(max_position_embeddings=16)
    for prompts, words in (
        (["abcdef"], "Fix: ask for 10 new tokens or fewer"),
        (["a", "abcdef"], "Fix: ask for 10 new tokens or fewer"),
        (["a" * 16], "Fix: give a prompt of fewer than 16 tokens"),
    ):
        given = [part for prompt in prompts for part in ("--prompt", prompt)]
        result = CliRunner().invoke(main, ["generate", str(model), "--max-tokens", "11", *given])
        assert result.exit_code == 2 and result.stdout == "" and words in result.stderr
    assert CliRunner().invoke(main, ["generate", str(model), "--max-tokens", "10", "--prompt", "abcdef"]).exit_code == 0
    with pytest.raises(ConfigError, match="max_position_embeddings is 16"):
        quantkit.load(model).generate(torch.ones(1, 6, dtype=torch.int64), 11)
    (model / "tokenizer.json").unlink()
    result = CliRunner().invoke(main, ["generate", str(model), "--prompt", "a"])
    assert result.exit_code == 2 and result.stdout == "" and "tokenizer.json" in result.stderr


@pytest.mark.parametrize(
    ("scheme", "bounds"), [("W4A16", {"auto": 5e-4, "w4a8": 5e-3}), ("FP8_DYNAMIC", {"auto": 5e-4})], ids=["INT4", "FP8"]
)
def test_generated_text_has_the_references_probabilities(scheme: str, bounds: dict[Kernels, float], tmp_path: Path) -> None:
    """The bundled model on this machine's kernels, and the reference model on the same dequantized weights in float32.

    bfloat16 keeps 8 bits of each input: log-probabilities move by about 0.01, and KL by its square. Rounding inputs to
    INT8 moves more, and quantization itself much more, or this test could not tell.
    """
    quantkit.quantize(TINY, tmp_path / "out", Recipe(scheme=scheme, method="rtn"))
    exact, base = (quantkit.load(path, kernels="reference") for path in (tmp_path / "out", TINY))
    prompt = load_tokenizer(TINY).encode("def main(argv):\n    ").ids
    for kernels, bound in bounds.items():
        model = quantkit.load(tmp_path / "out", kernels=kernels)
        ids = model.generate(torch.tensor([prompt]), 48)
        here, there, other = (m.logits(ids)[:, :-1].log_softmax(-1) for m in (model, exact, base))
        moved = (here - there).gather(-1, ids[:, 1:, None]).abs()
        assert moved.mean() < 0.05 and divergence(there, here) < bound
        assert divergence(other, there) > 3 * bound
    pieces = "".join(stream_text(model, "def main(argv):\n    ", 24))
    assert load_tokenizer(TINY).decode(ids[0, len(prompt) : len(prompt) + 24].tolist()).startswith(pieces)


def divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL in nats of log-probabilities [.., vocab]."""
    return float((base.exp() * (base - other)).sum(-1).mean())
