"""Folders: where a model is, what in it goes along with the weights, and whether OUT may be written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import quantkit
from quantkit.atomic import disk_errors, sha256, write_bytes
from quantkit.checkpoint.origin import RECORD, STATEMENT, SUMS
from quantkit.checkpoint.reader import INDEX
from quantkit.checkpoint.writer import ShardPlan
from quantkit.errors import ConfigError, OutputError

__all__ = [
    "CARRIED",
    "CODE",
    "carried",
    "complete",
    "find_model",
    "refuse_present",
    "watched",
    "without_tokenizer",
    "write_json",
]

TOKENIZERS = ("tokenizer.json", "*.tiktoken", "*.model", "vocab.*")  # what an engine could make one from
CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py")
# What goes from the source folder to OUT beside the weights.
CARRIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model"),
    *("generation_config.json", "chat_template*", "*.jinja", "LICENSE*", "NOTICE*"),
    *CODE,
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
    with disk_errors(partial):
        empty = partial.is_dir() and not any(partial.iterdir())
        ours = not partial.is_symlink() and ((partial / ".work").is_dir() or empty)
    if os.path.lexists(partial) and not ours:
        raise OutputError(
            f"{partial}, where the work would go, exists and is not quantkit's", "move it, or choose another OUT"
        )


def without_tokenizer(folder: Path) -> str | None:
    """What to say of a language model's folder that holds no tokenizer."""
    if any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        return None
    return f"no tokenizer (none of {', '.join(TOKENIZERS)}) in {folder}: engines cannot serve the result"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_bytes(path, json.dumps(data, indent=2).encode() + b"\n")


def carried(source: Path, changed: Mapping[str, bytes | None]) -> list[Path]:
    """The files that go from the source folder to OUT as they are. changed: those that something stands for.

    Raises ConfigError for a link to nothing, as a cache that was cleared leaves, and for a link out of the folder: OUT is
    given to others, and a link may point to what is none of theirs. A hub snapshot's links to its blobs are its files.
    """
    home = source.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    paths = []
    for path in sorted(source.iterdir()):
        matches = path.name not in changed and any(fnmatchcase(path.name, pattern) for pattern in CARRIED)
        if matches and path.is_symlink() and not path.exists():
            raise ConfigError(f"{path} is a link to {os.readlink(path)}, which is not there", "fetch the model again")
        if matches and path.name.isprintable() and path.is_file():  # SHA256SUMS has a line for each name
            if path.is_symlink() and path.resolve().parent not in (home, blobs):
                raise ConfigError(f"{path} is a link to {path.resolve()}, outside the model", "copy that file there instead")
            paths.append(path)
    return paths


def watched(source: Path, changed: Mapping[str, bytes | None]) -> list[str]:
    """Names of the files beside the weights that OUT is made from. Raises as `carried` does."""
    made_from = [name for name in changed if (source / name).is_file()]
    return [*(path.name for path in carried(source, changed)), *made_from]


def complete(
    partial: Path,
    source: Path,
    config: Mapping[str, Any],
    shards: Iterable[ShardPlan],
    hashes: Mapping[str, str],
    changed: Mapping[str, bytes | None],
    statement: Mapping[str, Any],
) -> None:
    """Write what goes beside the shards: the index, config.json, what is carried over from the source, quantkit.json and
    SHA256SUMS.

    hashes: sha256 of each shard, by name. changed: what stands for a file of the source; None: it is not carried over.
    statement: what quantkit.json says (see `origin`), but for the files of the source.
    """
    tensors = [(tensor, shard.file) for shard in shards for tensor in shard.tensors]
    total, places = sum(tensor.nbytes for tensor, _ in tensors), {tensor.name: file for tensor, file in tensors}
    write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    write_json(partial / "config.json", config)
    files = {}
    for path in carried(source, changed):
        write_bytes(partial / path.name, data := path.read_bytes())
        files[path.name] = hashlib.sha256(data).hexdigest()
    for name, content in changed.items():
        if content is not None:
            write_bytes(partial / name, content)
    origin = {"config_sha256": sha256(source / "config.json"), **statement["source"], "files": files}
    write_json(partial / STATEMENT, {"quantkit": quantkit.__version__, **statement, "source": origin})
    sums = dict(hashes)
    for path in partial.iterdir():
        if path.is_file() and path.name not in (RECORD, SUMS, *hashes):
            sums[path.name] = sha256(path)
    write_bytes(partial / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode())
