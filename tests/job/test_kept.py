"""Known architectures: what stays in BF16 is shown, and no run leaves more than 5 % there that nothing names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import quantkit
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.cli import main
from quantkit.errors import ConfigError
from quantkit.job.plan import make_plan
from quantkit.recipe import Recipe
from tests.conftest import random_weights, write_checkpoint
from tests.helpers.architectures import TINY
from tests.helpers.commands import not_quantized, run

ROUND = ("--group-size", "32", "--method", "rtn")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheme", "BF16", "--experts", "W8A8"), ("--attention BF16", "--shared-experts BF16")),
        (
            ("--scheme", "BF16", "--experts", "W8A8", "--attention", "W8A8"),
            ("shared_mlp.down_proj", "--shared-experts BF16"),
        ),
        (("--scheme", "BF16", "--experts", "W8A8", "--shared-experts", "W8A8"), ("self_attn.q_proj", "--attention BF16")),
    ],
)
def test_the_general_scheme_names_nothing(options: tuple[str, ...], words: tuple[str, ...], model: Path) -> None:
    message = not_quantized(model, *options, *ROUND)
    assert "would stay in BF16, and nothing says that they should" in message and all(word in message for word in words)


def test_named_it_may_stay(model: Path, tmp_path: Path) -> None:
    for number, fields in enumerate(
        [
            {"scheme": "W8A8", "attention": "BF16"},
            {"scheme": "W8A8", "shared_experts": "BF16"},
            {"scheme": "BF16", "experts": "W8A8", "attention": "BF16", "shared_experts": "BF16"},
            {"scheme": "W8A8", "keep": ["*.self_attn.*"]},
            {"scheme": "BF16", "experts": "W8A8", "keep": ["*.self_attn.*", "*.shared_mlp.*"]},
        ]
    ):
        record = quantkit.quantize(model, tmp_path / f"out{number}", Recipe.of(fields))
        assert 0.05 < record["bf16_share"]["of_matrices_in_layers"] < 0.5


def test_dense_layers_have_an_option_too(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "llama", TINY["llama"], random_weights(TINY["llama"]))
    message = not_quantized(folder, "--scheme", "BF16", "--attention", "W8A8")
    assert message.endswith("say that it is meant: --mlp BF16\n") and "'model.layers.*.mlp.down_proj' with " in message
    for number, said in enumerate((("--keep", "*.mlp.*"), ("--mlp", "BF16"))):
        options = ("--scheme", "BF16", "--attention", "W8A8", *said)
        assert run("quantize", folder, "-o", tmp_path / str(number), *options)["bf16_share"]["of_matrices_in_layers"] > 0.5


def test_a_little_may_stay_unsaid(make_model: Callable[..., Path]) -> None:
    """Below 5 % nothing has to be said: here attention beside wide experts."""
    reader = CheckpointReader(make_model(intermediate_size=4096, use_cla=False, num_shared_expert=0))
    recipe = Recipe.of({"scheme": "BF16", "experts": "W8A8"})
    plan = make_plan(reader, recipe)
    assert 0 < plan.kept_share["of_matrices_in_layers"] < 0.05
    narrow = CheckpointReader(make_model("narrow", intermediate_size=512, use_cla=False, num_shared_expert=0))
    with pytest.raises(ConfigError, match="nothing says that they should"):
        make_plan(narrow, recipe)


def test_the_share_is_shown(model: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--scheme", "W8A8", "--attention", "BF16")
    quantized, linears, around = 0, 0, 0
    for name, entry in CheckpointReader(model).entries.items():
        quantized += entry.nbytes if "_mlp." in name or ".experts." in name else 0
        linears += entry.nbytes if "self_attn" in name and "_proj" in name or ".gate.wg" in name else 0
        around += entry.nbytes
    share = {"of_all": 1 - quantized / around, "of_matrices_in_layers": linears / (linears + quantized)}
    line = (
        f"in BF16 stayed {share['of_all']:.1%} of the source's bytes, and {share['of_matrices_in_layers']:.1%} of those of"
    )

    def printed(*arguments: object) -> str:
        result = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return " ".join(result.stdout.split())

    assert line in printed("plan", model, *options)
    assert line in printed("quantize", model, "-o", out, *options)
    assert line in printed("inspect", out) and line in printed("verify", out)
    assert run("verify", out)["bf16_share"] == pytest.approx(share) == run("inspect", out)["bf16_share"]
    assert run("inspect", model)["bf16_share"] == {"of_all": 1.0, "of_matrices_in_layers": 1.0}


def test_keep_comes_before_rules() -> None:
    recipe = Recipe.of({"keep": ["a*"], "rules": [{"match": "*", "scheme": "W8A8"}]})
    assert [(rule.match, rule.scheme) for rule in recipe.rules] == [("a*", "BF16"), ("*", "W8A8")]
    with pytest.raises(ConfigError, match="keep is 'a'"):
        Recipe.of({"keep": "a"})
