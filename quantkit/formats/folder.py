"""Folders: where a model is, what in it goes along with the weights, and whether OUT may be written."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.errors import ConfigError, OutputError
from quantkit.formats.reader import INDEX

__all__ = ["CARRIED", "find_model", "refuse_present"]

# What goes from the source folder to OUT beside the weights.
CARRIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model"),
    *("generation_config.json", "chat_template*", "*.jinja", "LICENSE*", "NOTICE*"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py"),
)


def find_model(model: str | Path) -> Path:
    """A local folder, or a Hugging Face hub name, whose files are downloaded (into the hub's cache). Raises ConfigError."""
    path = Path(model)
    if path.exists() or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=["config.json", "*.safetensors", INDEX, *CARRIED]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"'{model}' is no local folder, and the hub did not give it: {error}".splitlines()[0],
            "check the name, log in with 'hf auth login', or give a local folder",
        ) from error


def refuse_present(target: Path) -> None:
    """Raise OutputError when OUT is there (even as a link to nothing), or OUT.partial is somebody else's."""
    if os.path.lexists(target) or not target.name or target.name == "..":
        raise OutputError(f"{target} exists", "remove it, or choose another OUT")
    partial = target.with_name(target.name + ".partial")
    if (
        os.path.lexists(partial)
        and not (partial / ".work").is_dir()
        and not (partial.is_dir() and not any(partial.iterdir()))
    ):
        raise OutputError(
            f"{partial}, where the work would go, exists and is not quantkit's", "move it, or choose another OUT"
        )
