"""Independent checks of a checkpoint on disk: `verify` re-reads what was written, `inspect` says what is in it.

Shares no code with the writer, the walk or the algorithms: only the reader, and the definition of the format.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.coverage import bystanders
from quantkit.errors import CheckpointError, ConfigError, QuantkitError, VerificationError, counted
from quantkit.formats import compressed_tensors
from quantkit.formats.atomic import sha256
from quantkit.formats.dtypes import FLOATS
from quantkit.formats.reader import CheckpointReader, load_json
from quantkit.formats.sets import weight_sets
from quantkit.kept import share
from quantkit.model.by_name import NamedSpec, spec_of
from quantkit.model.spec import Linear, ModelSpec
from quantkit.model.stored import head_problem
from quantkit.runtime import format_of, misfits, schemes_of
from quantkit.scheme import Kind, Scheme

__all__ = ["SUMS", "VerifyReport", "check_hashes", "damaged", "inspect", "stated", "verify"]

SUMS = "SHA256SUMS"
_UNSUMMED = {SUMS, "run.json"}
# ||W - Q|| / ||W|| that no sound rounding reaches on a weight of any usual distribution, and every wrong layout exceeds.
_WORST_ERROR = {(Kind.INT, 4): 0.5, (Kind.INT, 8): 0.1, (Kind.FLOAT, 8): 0.1}


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at. errors: by role, the mean and worst ||W - Q|| / ||W||, when a source was given. bf16_share: see
    `kept.share`."""

    files: int
    tensors: int
    linears: int
    errors: dict[str, dict[str, float]]
    bf16_share: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": True,
            "files": self.files,
            "tensors": self.tensors,
            "linears": self.linears,
            "errors": self.errors,
            "bf16_share": self.bf16_share,
        }


def verify(folder: Path, source: Path | None = None) -> VerifyReport:
    """Re-read a quantised checkpoint: hashes, names, dtypes, shapes, finite values, and with `source` the error of each.

    Raises VerificationError listing what is wrong, CheckpointError when nothing was seen to be wrong but something could not
    be read, or ConfigError for a source of another architecture.
    """
    problems: list[str] = []
    unread: list[str] = []
    files = check_hashes(folder, problems)
    reader = CheckpointReader(folder)
    spec = spec_of(reader)
    schemes = schemes_of(reader)
    original = CheckpointReader(source) if source else None
    if original and isinstance(spec, ModelSpec) and not problems:  # the config that the spec is from is as it was written
        _check_source(original, spec, folder)
    problems += misfits(reader, spec, schemes)
    quantization = reader.config.get("quantization_config")
    if quantization and format_of(reader) is compressed_tensors.FORMAT:  # other formats name no linears
        problems += compressed_tensors.inexact(quantization, _stored(reader, spec, schemes), *bystanders(spec))
    if original and isinstance(spec, NamedSpec):  # what should be there, only the source can say
        differing = original.entries.keys() ^ spec.tensors().keys()
        problems += [f"tensor '{key}' is in one of source and output" for key in sorted(differing)]
    whole = not problems
    errors = _check_linears(reader, original, spec, schemes, problems, unread) if whole else {}
    if whole:
        quantized = {ref.weight for ref in spec.linears() if schemes[ref.key]}
        _check_kept(reader, original, spec.tensors().keys() - quantized, problems, unread)
        if original and problems:
            _blame_source(folder, original, problems)
    if found := problems + unread:
        shown = f"{folder}: {counted(len(found), 'problem')}:\n  " + "\n  ".join(found[:10])
        raise (VerificationError if problems else CheckpointError)(shown, "quantise again, or copy the files again")
    summary = {role: {"mean": sum(v) / len(v), "max": max(v)} for role, v in errors.items()}
    return VerifyReport(files, len(reader.entries), len(schemes), summary, share(reader, spec, schemes))


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
            problems[name] = f"{name} is listed in {SUMS} but missing"
        elif sha256(folder / name) != digest:
            problems[name] = f"{name} does not have the hash that {SUMS} states"
    return problems


def check_hashes(folder: Path, problems: list[str]) -> int:
    """How many files SHA256SUMS lists; what does not agree with it is added to `problems`."""
    if not os.path.isfile(folder / SUMS):
        problems.append(f"no {SUMS}: this is not a finished quantkit output")
        return 0
    listed = stated(folder)
    problems += damaged(folder).values()
    present = {p.name for p in folder.iterdir() if p.is_file()} - _UNSUMMED
    problems += [f"{name} is not listed in {SUMS}" for name in sorted(present - listed.keys())]
    return len(listed)


def _check_source(original: CheckpointReader, spec: ModelSpec, folder: Path) -> None:
    """Refuse a source that is not of the output's architecture: nothing that differs from it would say anything."""
    if problems := misfits(original, spec, {ref.key: None for ref in spec.linears()}):
        raise ConfigError(
            f"{original.folder} seems not to be the model that {folder} was made from: {problems[0]}",
            "give the unquantised model that it was made from as --source",
        )


def _blame_source(folder: Path, original: CheckpointReader, problems: list[str]) -> None:
    """Raise VerificationError where files are as they were written, weights differ, and run.json records another source."""
    record = load_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    job = record.get("job")
    if isinstance(job, dict) and job.get("source") not in (None, original.fingerprint()):
        raise VerificationError(
            f"{original.folder} seems not to be the model that {folder} was made from: run.json records "
            f"{record.get('model')}; {counted(len(problems), 'difference')}, the first: {problems[0]}",
            "give the model that it was made from as --source",
        )


def _check_linears(
    reader: CheckpointReader,
    original: CheckpointReader | None,
    spec: ModelSpec | NamedSpec,
    schemes: dict[str, Scheme | None],
    problems: list[str],
    unread: list[str],
) -> dict[str, list[float]]:
    """The errors of all linears against the source, by role."""
    errors: dict[str, list[float]] = {}
    for ref in spec.linears():
        try:
            error = _check_linear(reader, original, ref, schemes[ref.key])
        except CheckpointError as broken:
            unread.append(broken.problem)
            continue
        except QuantkitError as broken:
            problems.append(broken.problem)
            continue
        if error is not None:
            errors.setdefault(ref.role.value, []).append(error)
    return errors


def _check_linear(
    reader: CheckpointReader, original: CheckpointReader | None, ref: Linear, scheme: Scheme | None
) -> float | None:
    """Decode one linear; its relative error against the source. Raises VerificationError, CheckpointError."""
    if scheme is None:
        return None
    q = format_of(reader).decode(ref, scheme, reader.tensors())
    if not (q.scale.float() > 0).all():
        raise VerificationError(f"'{ref.key}' has scales that are not positive")
    if q.input_scale is not None and not (q.input_scale.float() > 0).all():
        raise VerificationError(f"'{ref.key}' has an input scale that is not positive")
    stored = reader.entries.get(f"{ref.key}.weight_shape")
    if stored and reader.tensor(f"{ref.key}.weight_shape").tolist() != [ref.out_features, ref.in_features]:
        raise VerificationError(f"'{ref.key}.weight_shape' is not {[ref.out_features, ref.in_features]}")
    if original is None:
        return None
    weight = original.tensor(ref.weight).float()
    error = float((q.dequantize() - weight).norm() / weight.norm().clamp(min=1e-30))
    if error > _WORST_ERROR[scheme.weight.kind, scheme.weight.bits]:
        raise VerificationError(f"'{ref.key}' differs from its source by {error:.1%}: more than {scheme.name} can lose")
    return error


def _check_kept(
    reader: CheckpointReader, original: CheckpointReader | None, keys: set[str], problems: list[str], unread: list[str]
) -> None:
    """Tensors that were carried over: finite, and equal to the source's, bit by bit."""
    for key in sorted(keys & reader.entries.keys()):
        try:
            kept = reader.tensor(key)
            same = original is None or _identical(kept, original.tensor(key))
        except CheckpointError as broken:
            unread.append(broken.problem)
            continue
        if not same:
            problems.append(f"tensor '{key}' should be unchanged but differs from the source")


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # a scalar has no axis to view otherwise


def inspect(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds: per role the schemes, linears, weights, bytes and bits per weight; the same in total."""
    reader = CheckpointReader(folder)
    spec = spec_of(reader)
    schemes, layout = schemes_of(reader), format_of(reader)
    roles: dict[str, dict[str, Any]] = {}
    counted = 0

    def count(role: str, scheme: str, weights: int, size: int) -> None:
        row = roles.setdefault(role, {"schemes": [], "tensors": 0, "weights": 0, "bytes": 0})
        row["schemes"] += [scheme] if scheme not in row["schemes"] else []
        row["tensors"] += 1
        row["weights"] += weights
        row["bytes"] += size

    for ref in spec.linears():
        scheme = schemes[ref.key]
        names = [t.name for t in layout.planned(ref, scheme) if t.name in reader.entries] if scheme else [ref.weight]
        size = sum(reader.entry(name).nbytes for name in names)
        label = scheme.name if scheme else reader.entry(ref.weight).dtype
        count(ref.role.value, label, ref.out_features * ref.in_features, size)
        counted += size
    others = spec.tensors().keys() - {ref.weight for ref in spec.linears()}
    for key in sorted({*others, "lm_head.weight"} & reader.entries.keys()):
        entry = reader.entries[key]
        role = "norms and router" if isinstance(spec, ModelSpec) else "others"
        role = "embedding and head" if key in (*spec.around()[:1], "lm_head.weight") else role
        count(role, entry.dtype, torch.Size(entry.shape).numel(), entry.nbytes)
        counted += entry.nbytes
    for row in roles.values():
        row["bits_per_weight"] = round(8 * row["bytes"] / row["weights"], 3)
    total = {key: sum(row[key] for row in roles.values()) for key in ("tensors", "weights", "bytes")}
    differing = head_problem(reader, spec) if isinstance(spec, ModelSpec) else None
    return {
        "path": str(folder),
        "architecture": spec.architecture,
        "layers": len(spec.layers),
        "quantized": any(schemes.values()),
        "format": layout.name if any(schemes.values()) else None,
        "shards": len(reader.shards),
        "roles": roles,
        "total": {**total, "bits_per_weight": round(8 * total["bytes"] / total["weights"], 3)},
        "bf16_share": share(reader, spec, schemes),
        "notes": [*weight_sets(folder), *([differing] if differing else [])],
        "unknown_bytes": sum(entry.nbytes for entry in reader.entries.values()) - counted,
    }
