"""Independent checks of a checkpoint on disk: what was written is read again.

Shares no code with the writer, the walk or the algorithms: only the reader, and the definition of the format.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.atomic import sha256
from quantkit.checkpoint.by_name import NamedSpec, spec_of
from quantkit.checkpoint.coverage import bystanders
from quantkit.checkpoint.faithful import (
    OWN,
    config_differences,
    file_differences,
    is_source,
    settings_unknown,
    statement_problems,
)
from quantkit.checkpoint.opened import format_of, misfits, schemes_of
from quantkit.checkpoint.origin import RECORD, STATEMENT, SUMS, read_statement
from quantkit.checkpoint.reader import CheckpointReader, load_json
from quantkit.checkpoint.share import share
from quantkit.checkpoint.verify_linears import Found, check_linears
from quantkit.dtypes import FLOATS, raw
from quantkit.errors import CheckpointError, ConfigError, VerificationError, counted, shown
from quantkit.formats import compressed_tensors
from quantkit.host import every, plain_arithmetic
from quantkit.model.spec import ModelSpec
from quantkit.scheme import Scheme

__all__ = ["SUMS", "VerifyReport", "check_hashes", "damaged", "stated", "verify"]

_UNSUMMED = {SUMS, RECORD}
_BYTES = 1 << 20  # of a tensor that are compared together
_OWN_FOLDER = "eval"  # what `eval` writes into an OUT


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at. errors: by role, the mean and worst ||W - Q|| / ||W||, when a source was given. bf16_share: see
    `kept.share`.

    not_checked: what could not be, in words. Only where it is empty is the checkpoint known to be what it should be.
    """

    files: int
    tensors: int
    linears: int
    errors: dict[str, dict[str, float]]
    bf16_share: dict[str, float]
    not_checked: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": True,
            "files": self.files,
            "tensors": self.tensors,
            "linears": self.linears,
            "errors": self.errors,
            "not_checked": list(self.not_checked),
            "bf16_share": self.bf16_share,
        }


@plain_arithmetic()
def verify(folder: Path, source: Path | None = None) -> VerifyReport:
    """Re-read a quantized checkpoint: hashes, names, dtypes, shapes, finite values; with `source` also its config.json, the
    files that it carries, and of each weight whether its scales, codes and error are what the method makes of the source.

    Raises VerificationError listing what is wrong, CheckpointError when nothing was seen to be wrong but something could not
    be read, or ConfigError for a source of another architecture.
    """
    problems: list[str] = []
    files = check_hashes(folder, problems)
    intact = not problems
    reader = CheckpointReader(folder)
    spec, statement = spec_of(reader), read_statement(folder)
    schemes = schemes_of(reader)
    original = CheckpointReader(source) if source else None
    if original and isinstance(spec, ModelSpec) and intact:  # the config that the spec is from is as it was written
        _check_source(original, spec, folder)
    problems += misfits(reader, spec, schemes)
    problems += _said(reader, spec, schemes, statement)
    if original:
        problems += _beside(reader, original, spec, schemes)
    linears, whole = Found(), not problems
    if whole:
        rows = statement["linears"] if statement else {}
        linears = check_linears(reader, original, spec, schemes, rows)
        problems += linears.problems
        _check_kept(reader, original, _kept(reader, spec, schemes), problems, linears.unread)
    if original and intact and problems:
        _blame_source(folder, original, statement, problems)
    if all_problems := problems + linears.unread:
        listed = f"{folder}: {counted(len(all_problems), 'problem')}:\n  " + "\n  ".join(all_problems[:10])
        raise (VerificationError if problems else CheckpointError)(listed, "quantize again, or copy the files again")
    summary = {role: {"mean": sum(v) / len(v), "max": max(v)} for role, v in linears.errors.items()}
    unchecked = tuple(_not_checked(original, statement, linears))
    return VerifyReport(files, len(reader.entries), len(schemes), summary, share(reader, spec, schemes), unchecked)


def _said(
    reader: CheckpointReader,
    spec: ModelSpec | NamedSpec,
    schemes: dict[str, Scheme | None],
    statement: dict[str, Any] | None,
) -> list[str]:
    """What config.json and quantkit.json say of the linears that is not so."""
    problems: list[str] = []
    quantization = reader.config.get("quantization_config")
    if quantization and format_of(reader) is compressed_tensors.FORMAT:  # other formats name no linears
        problems += compressed_tensors.inexact(quantization, _stored(reader, spec, schemes), *bystanders(spec))
        problems += settings_unknown(quantization) if statement else []
    return problems + (statement_problems(statement, schemes) if statement else [])


def _beside(
    reader: CheckpointReader, original: CheckpointReader, spec: ModelSpec | NamedSpec, schemes: dict[str, Scheme | None]
) -> list[str]:
    """What is not as it is in the source: config.json, names of tensors that were kept, and files."""
    problems = config_differences(reader.config, original.config)
    quantized = {ref.weight for ref in spec.linears() if schemes[ref.key]}
    differing = (original.entries.keys() - quantized) ^ _kept(reader, spec, schemes)
    problems += [f"tensor '{key}' is in one of source and output" for key in sorted(differing)]
    names = stated(reader.folder).keys() - {*OWN, *reader.shards}
    present = {name: digest for name, digest in stated(reader.folder).items() if name in names}
    return problems + file_differences(present, original.folder, original.config)


def _kept(reader: CheckpointReader, spec: ModelSpec | NamedSpec, schemes: dict[str, Scheme | None]) -> set[str]:
    """Tensors that belong to no quantized linear."""
    layout = format_of(reader)
    planned = (layout.planned(ref, scheme) for ref in spec.linears() if (scheme := schemes[ref.key]))
    return reader.entries.keys() - {tensor.name for tensors in planned for tensor in tensors}


def _not_checked(original: CheckpointReader | None, statement: dict[str, Any] | None, linears: Found) -> list[str]:
    if original is None:
        return ["config.json, files and weights against the model that it was made from: give --source"]
    missing = []
    if linears.unstated:
        why = f"has no {STATEMENT}" if statement is None else f"{STATEMENT} does not say how they were made"
        missing.append(f"{counted(linears.unstated, 'linear')} by more than a general bound: it {why}")
    if linears.unscaled:
        missing.append(f"{counted(linears.unscaled, 'input scale')}, which came from calibration text")
    return missing


def _stored(
    reader: CheckpointReader, spec: ModelSpec | NamedSpec, schemes: dict[str, Scheme | None]
) -> dict[str, Scheme | None]:
    """What the config says of each linear, except that one which lies there as plain floats is kept, whatever it says."""

    def plain(weight: str) -> bool:
        return weight in reader.entries and reader.entries[weight].dtype in FLOATS

    return {ref.key: None if plain(ref.weight) else schemes[ref.key] for ref in spec.linears()}


def stated(folder: Path) -> dict[str, str]:
    """The hash of each file that SHA256SUMS lists, by name; empty without one."""
    path = folder / SUMS
    lines = path.read_text("utf-8", errors="replace").splitlines() if os.path.isfile(path) else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}


def damaged(folder: Path) -> dict[str, str]:
    """What is wrong with each file that is missing or not what SHA256SUMS states, by name; empty without SHA256SUMS."""
    problems = {}
    for name, digest in stated(folder).items():
        if Path(name).name != name or not os.path.isfile(folder / name):
            problems[name] = f"{shown(name)} is listed in {SUMS} but missing"
        elif sha256(folder / name) != digest:
            problems[name] = f"{shown(name)} does not have the hash that {SUMS} states"
    return problems


def check_hashes(folder: Path, problems: list[str]) -> int:
    """How many files SHA256SUMS lists; what does not agree with it is added to `problems`."""
    if not os.path.isfile(folder / SUMS):
        problems.append(f"no {SUMS}: this is not a finished quantkit output")
        return 0
    listed = stated(folder)
    problems += damaged(folder).values()
    present = [path for path in sorted(folder.iterdir()) if path.name not in _UNSUMMED]
    problems += [
        f"{shown(path.name)} is not listed in {SUMS}" for path in present if path.is_file() and path.name not in listed
    ]
    folders = [path.name for path in present if path.is_dir() and path.name != _OWN_FOLDER and path.name[0] != "."]
    problems += [f"folder {shown(name)} holds what {SUMS} does not list" for name in folders]
    return len(listed)


def _check_source(original: CheckpointReader, spec: ModelSpec, folder: Path) -> None:
    """Refuse a source that is not of the output's architecture: nothing that differs from it would say anything."""
    if problems := misfits(original, spec, {ref.key: None for ref in spec.linears()}):
        raise ConfigError(
            f"{original.folder} seems not to be the model that {folder} was made from: {problems[0]}",
            "give the unquantized model that it was made from as --source",
        )


def _blame_source(folder: Path, original: CheckpointReader, statement: dict[str, Any] | None, problems: list[str]) -> None:
    """Raise VerificationError where something differs and OUT, whose files are as they were written, is of other weights."""
    if is_source(statement, original) is not False:
        return
    record = load_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    made_from = f"; run.json records {record['model']}" if "model" in record else ""
    raise VerificationError(
        f"{original.folder} seems not to be the model that {folder} was made from: {STATEMENT} states other weights"
        f"{made_from}; {counted(len(problems), 'difference')}, the first: {problems[0]}",
        "give the model that it was made from as --source",
    )


def _check_kept(
    reader: CheckpointReader, original: CheckpointReader | None, keys: set[str], problems: list[str], unread: list[str]
) -> None:
    """Tensors that were carried over: finite, and equal to the source's, bit by bit."""

    def same(key: str) -> bool | str:
        try:
            return _same(reader, original, key)
        except CheckpointError as broken:
            return broken.problem

    for key, answer in zip(sorted(keys), every(same, sorted(keys)), strict=True):
        if isinstance(answer, str):
            unread.append(answer)
        elif not answer:
            problems.append(f"tensor '{key}' should be unchanged but differs from the source")


def _same(reader: CheckpointReader, original: CheckpointReader | None, key: str) -> bool:
    """Whether a tensor is the source's; without one, that it is finite, which reading asks."""
    mine = reader.entry(key)
    at_once = mine.rows_in(_BYTES)
    if original is None:
        return all(part is not None for part in reader.rows(key, at_once))
    theirs = original.entry(key)
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return False
    both = zip(reader.rows(key, at_once), original.rows(key, at_once), strict=True)
    return all([raw(a).equal(raw(b)) for a, b in both])
