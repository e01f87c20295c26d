"""Names from a file cannot forge a message, move the cursor, turn the writing or fill the screen, wherever they stand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.table import Table
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import INDEX, CheckpointReader
from quantkit.cli import main
from quantkit.commands.tables import console, print_tables
from quantkit.errors import CheckpointError, QuantkitError, shown
from quantkit.report.gates import _printable as in_junit
from quantkit.report.html import _printable as in_page
from quantkit.report.markdown import _safe as in_markdown
from tests.conftest import CONFIG, write_checkpoint
from tests.helpers.commands import refused

ANSI, BIDI = "\x1b[2J\x1b]0;owned\x07", "\u202eexe.cod\u202c\u200b"
EVIL = f"[red]{ANSI}\r\nFix: run rm -rf /\n{BIDI}\ud800[/red]" + "x" * 5000


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text) and len(text) < 4000 and "\nFix: run rm" not in text


def test_what_is_shown() -> None:
    assert shown("model.layers.0.mlp") == "model.layers.0.mlp" and shown("模型 é") == "模型 é"
    assert shown("a\x1b[1m\n\u202e\ud800") == r"a\x1b[1m\n\u202e\ud800"
    assert len(shown("a" + "b" * 1000 + "c", 60)) < 70 and shown("a" + "b" * 1000 + "c").endswith("c")
    assert harmless(shown(EVIL)) and "\n" not in shown(EVIL)
    assert shown(shown("\x1b")) == shown("\x1b")


def test_a_message_may_have_lines_and_nothing_else() -> None:
    text = str(QuantkitError(f"one\n  two {ANSI}{BIDI}", "fix\r"))
    assert text.split("\n")[0] == "one" and harmless(text)


@pytest.mark.parametrize("put", [in_junit, in_page, in_markdown], ids=["junit", "html", "markdown"])
def test_pages(put: Callable[[str], str]) -> None:
    text = put(f"[red]{ANSI}{BIDI}<b>\x00")
    assert text.isprintable() and "red" in text


def test_tables() -> None:
    """Neither markup nor control characters of a name work in a title, a cell, a caption or a line."""
    screen = console()
    screen.file = io.StringIO()
    table = Table("name", title=f"[red]{ANSI}", caption=f"[bold]{BIDI}")
    table.add_row(f"[red]a[/red]{ANSI}:smile:")
    print_tables(table, screen)
    screen.print(f"[red]line {ANSI}")
    said = screen.file.getvalue()
    assert harmless(said) and said.count("[red]") == 3 and "[/red]" in said and ":smile:" in said and "[bold]" in said


def shard(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a model's only shard, and the index with them."""
    (path,) = model.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, path.name)}))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", CONFIG, {"a.weight": torch.ones(2, 3)}, shards=1)


@pytest.mark.parametrize("name", [ANSI, BIDI, "a\nFix: b", "\x85", "n" * 600], ids=["ansi", "bidi", "line", "C1", "long"])
def test_names_of_tensors(name: str, small: Path) -> None:
    """No model has a name that does not print: such a shard is refused, so nothing later need escape it."""
    shard(small, lambda tensors: tensors.update({name: torch.ones(1)}))
    for command in (("inspect",), ("verify",), ("plan",), ("quantize", "-o", small.parent / "out")):
        message = refused(*command, small)
        assert harmless(message) and "is no name of a tensor" in message and len(message) < 1000, message


def in_config(**values: object) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").write_text(json.dumps({**CONFIG, **values}))


def in_index(**places: object) -> Callable[[Path], object]:
    return lambda model: (model / INDEX).write_text(json.dumps({"weight_map": places}))


def quantized(**values: Any) -> Callable[[Path], object]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": None, "strategy": "channel", **values}}
    settings = {"quant_method": "compressed-tensors", "config_groups": {EVIL: group}}
    return in_config(quantization_config={**settings, "ignore": [EVIL]})


PLACES: dict[str, Callable[[Path], object]] = {
    "key of the index": in_index(**{EVIL: "model-00001-of-00001.safetensors"}),
    "shard of the index": in_index(a=f"{EVIL}.safetensors"),
    "shard that does not print": in_index(a=f"{ANSI}.safetensors"),
    "shard of a number": in_index(a=[EVIL]),
    "model_type": in_config(model_type=EVIL),
    "a value": in_config(hidden_act=EVIL),
    "a size": in_config(hidden_size=EVIL),
    "rope": in_config(rope_scaling={"type": EVIL}),
    "dtype": in_config(torch_dtype=EVIL),
    "method": in_config(quantization_config={"quant_method": EVIL}),
    "group": quantized(num_bits=EVIL),
    "group of another size": quantized(group_size=EVIL),
    "ignored": quantized(type="int"),
    "no object": lambda model: (model / "config.json").write_text(json.dumps(EVIL)),
    "dtype of a tensor": lambda model: header(model, {"a": {"dtype": EVIL, "shape": [1], "data_offsets": [0, 4]}}),
    "row of a tensor": lambda model: header(model, {"a": EVIL}),
    "metadata": lambda model: header(model, {"__metadata__": {EVIL: 1}}),
}


def header(model: Path, fields: dict[str, Any]) -> None:
    text = json.dumps(fields).encode()
    (model / "model-00001-of-00001.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))


@pytest.mark.parametrize("place", PLACES)
def test_other_names(place: str, small: Path) -> None:
    PLACES[place](small)
    for command in ("inspect", "verify", "plan") if place != "ignored" else ("verify", "plan"):
        message = refused(command, small)
        assert harmless(message), message


def test_names_that_are_accepted(small: Path) -> None:
    """An architecture that is unknown is shown in the tables of a run by name."""
    in_config(model_type=EVIL)(small)
    said = CliRunner().invoke(main, ["plan", str(small), "--linears", "*", "--scheme", "W8A8"])
    assert said.exit_code == 0 and harmless(said.stdout) and "[red]" in said.stdout


def test_reader_names_are_checked_once(small: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor 'a\\x1b'"):
        CheckpointReader(small).tensor("a\x1b")
