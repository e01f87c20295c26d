"""`convert`: a quantised checkpoint in another format, with the same codes, scales and zero points, or dequantised to BF16.

Nothing is quantised again. What the other format cannot hold exactly is refused, and what was written is read again and
compared with the source, bit by bit, before OUT appears.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantkit
from quantkit.errors import CheckpointError, ConfigError, OutputError, VerificationError, counted
from quantkit.formats.atomic import sha256
from quantkit.formats.base import KV_SCALE, Format, Schemes
from quantkit.formats.dtypes import TensorPlan
from quantkit.formats.folder import complete, find_model, publish, refuse_present, write_json
from quantkit.formats.reader import CheckpointReader
from quantkit.formats.sets import weight_sets
from quantkit.formats.table import FORMATS
from quantkit.formats.writer import MAX_SHARD_BYTES, ShardPlan, ShardWriter
from quantkit.host import peak_memory
from quantkit.journal import Journal, code_digest
from quantkit.model.registry import build_spec
from quantkit.model.spec import Linear, ModelSpec
from quantkit.qtensor import QuantizedTensor
from quantkit.runtime import format_of, misfits, schemes_of
from quantkit.scheme import Scheme
from quantkit.verify import check_hashes, damaged

__all__ = ["TARGETS", "convert"]

BF16 = "bf16"
TARGETS = (*FORMATS, BF16)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Piece:
    """What is written at once: a quantised linear with its scheme, or (no linear) a tensor that is carried over."""

    key: str
    ref: Linear | None
    scheme: Scheme | None
    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True)
class _Plan:
    """A conversion of which everything that headers say is checked. after: None where a linear is kept or dequantised."""

    reader: CheckpointReader
    source: Format
    target: Format | None
    before: Schemes
    after: Schemes
    shards: tuple[tuple[ShardPlan, tuple[_Piece, ...]], ...]
    config: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        return sum(shard.nbytes for shard, _ in self.shards)


def convert(model: str | Path, out: str | Path, to: str, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the quantised checkpoint `model` to the new folder `out` in the format `to`; returns what run.json there says.

    Memory is bounded by one linear. Interrupted, the same call resumes. progress is called with (shards done, shards in
    all). Raises a QuantkitError, and leaves no `out`, when `to` cannot hold the same values or anything else is wrong.
    """
    start, target = time.monotonic(), Path(out)
    source = find_model(model)
    refuse_present(target)
    for name, problem in damaged(source).items():
        if name.endswith(".safetensors"):  # new hashes over damage would call it sound; an edited config is read and checked
            raise CheckpointError(f"{source}: {problem}", "copy the files again, or quantise again")
    plan = _plan(CheckpointReader(source), to)
    partial = target.with_name(target.name + ".partial")
    _check_space(plan, partial)
    key = {"source": plan.reader.fingerprint(), "convert to": to, "quantkit": code_digest(), "torch": torch.__version__}
    journal = Journal(partial / ".work", key)
    try:
        rounded = _write_shards(plan, partial, journal, progress or (lambda done, total: None))
        _prove(plan, partial)
        record = _record(plan, to, rounded, time.monotonic() - start)
        write_json(partial / "run.json", record)
        publish(partial, target)
        shutil.rmtree(target / ".work")
    except (ConfigError, VerificationError):
        shutil.rmtree(partial)  # resuming would only meet the same again
        raise
    finally:
        journal.close()
    return record


def _plan(reader: CheckpointReader, to: str) -> _Plan:
    if to not in TARGETS:
        raise ConfigError(f"unknown format '{to}'", f"use one of {', '.join(TARGETS)}")
    where = reader.folder / "config.json"
    spec, before, source = build_spec(reader.config, str(where)), schemes_of(reader), format_of(reader)
    if not any(before.values()):
        raise ConfigError(f"{where} says the model is not quantised", "use 'quantkit quantize'")
    if problems := misfits(reader, spec, before):
        raise ConfigError(
            f"{reader.folder}: {counted(len(problems), 'tensor')} not as config.json says: {problems[0]}", "fetch both again"
        )
    target = FORMATS.get(to)
    if source is target:
        others = ", ".join(name for name in TARGETS if name != to)
        raise ConfigError(f"{reader.folder} is {to} already", f"keep it, or give --to another of {others}")
    after: Schemes = {key: target.target(scheme) if target and scheme else None for key, scheme in before.items()}
    config = {key: value for key, value in reader.config.items() if key != "quantization_config"}
    routers = [moe.router.key for moe in spec.moes()]
    if target:
        config["quantization_config"] = target.config(after, routers)
    shards = _shards(_pieces(reader, spec, target, before, after))
    return _Plan(reader, source, target, before, after, shards, config, tuple(_notes(reader, before, after, target)))


def _pieces(
    reader: CheckpointReader, spec: ModelSpec, target: Format | None, before: Schemes, after: Schemes
) -> list[_Piece]:
    """In the order of the model; tensors around its layers and KV scales come last."""
    pieces = []
    taken = set()
    for ref in spec.linears():
        if before[ref.key] is None:
            continue
        scheme = after[ref.key]
        plain = TensorPlan(ref.weight, "BF16", (ref.out_features, ref.in_features))
        tensors = target.planned(ref, scheme) if target and scheme else [plain]
        pieces.append(_Piece(ref.key, ref, scheme, tuple(tensors)))
        taken.add(ref.weight)
    wanted = {*spec.tensors(), "lm_head.weight"} - taken
    kept = [key for key in reader.entries if key in wanted or KV_SCALE.match(key)]
    for key in kept:
        entry = reader.entries[key]
        pieces.append(_Piece(key, None, None, (TensorPlan(key, entry.dtype, entry.shape),)))
    return pieces


def _shards(pieces: list[_Piece]) -> tuple[tuple[ShardPlan, tuple[_Piece, ...]], ...]:
    """Pieces in shards of at most MAX_SHARD_BYTES, no piece split."""
    parts: list[list[_Piece]] = [[]]
    size = 0
    for piece in pieces:
        wide = sum(tensor.nbytes for tensor in piece.tensors)
        if parts[-1] and size + wide > MAX_SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += wide
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    return tuple(
        (ShardPlan(name, [tensor for piece in part for tensor in piece.tensors]), tuple(part))
        for name, part in zip(names, parts, strict=True)
    )


def _notes(reader: CheckpointReader, before: Schemes, after: Schemes, target: Format | None) -> list[str]:
    pairs = {(old, after[key]) for key, old in before.items() if old is not None}
    notes = weight_sets(reader.folder)
    if target is None and (rounding := sorted({old.name for old, _ in pairs if old.activation})):
        notes.append(f"{', '.join(rounding)} rounds inputs; in BF16 they stay as they are")
    if any(new and old.weight.symmetric and not new.weight.symmetric for old, new in pairs):
        notes.append("symmetric weights are stored with zero points that are all in the middle")
    if any(KV_SCALE.match(key) for key in reader.entries):
        notes.append("scales of the K/V cache are carried over under their own names; an engine may want its own option")
    return notes


def _check_space(plan: _Plan, partial: Path) -> None:
    folder = next(path for path in (partial, *partial.absolute().parents) if path.exists())
    present = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    if (free := shutil.disk_usage(folder).free) < (needed := plan.output_bytes - present):
        raise OutputError(
            f"{folder} has {free:,} bytes free, and {needed:,} are needed", "free space, or choose another OUT"
        )


def _write_shards(plan: _Plan, partial: Path, journal: Journal, progress: Progress) -> int:
    """What is not yet written of the folder but run.json; how many weights had to be rounded to BF16."""
    _drop_orphans(partial, {unit["shard"] for unit in journal.units})
    for index in range(len(journal.units), len(plan.shards)):
        shard, pieces = plan.shards[index]
        rounded = _write(plan, partial, shard, pieces)
        journal.commit({"shard": shard.file, "sha256": sha256(partial / shard.file), "rounded": rounded})
        progress(index + 1, len(plan.shards))
    hashes = {unit["shard"]: unit["sha256"] for unit in journal.units}
    complete(partial, plan.reader.folder, plan.config, (shard for shard, _ in plan.shards), hashes)
    return sum(unit["rounded"] for unit in journal.units)


def _drop_orphans(partial: Path, committed: set[str]) -> None:
    """Remove what a killed run left behind and no journal line vouches for."""
    for path in partial.iterdir():
        if path.is_file() and path.name not in committed:
            path.unlink()


def _write(plan: _Plan, partial: Path, shard: ShardPlan, pieces: tuple[_Piece, ...]) -> int:
    """One shard; how many dequantised weights had to be rounded to BF16."""
    rounded = 0
    with ShardWriter(partial, shard) as writer:
        for piece in pieces:
            if piece.ref is None:
                writer.write(piece.key, plan.reader.tensor(piece.key))
                continue
            q = _decode(plan, piece.ref)
            if plan.target is None or piece.scheme is None:
                value, lost = _dequantised(q)
                writer.write(piece.ref.weight, value)
                rounded += lost
                continue
            for name, tensor in plan.target.encode(piece.ref, piece.scheme, q).items():
                writer.write(name, tensor)
    return rounded


def _decode(plan: _Plan, ref: Linear) -> QuantizedTensor:
    scheme = plan.before[ref.key]
    assert scheme is not None
    return plan.source.decode(ref, scheme, plan.reader.tensors())


def _dequantised(q: QuantizedTensor) -> tuple[Tensor, int]:
    """The weight in BF16, and how many of its values are not exactly what the codes and scales say."""
    exact = q.dequantize()
    value = exact.bfloat16()
    return value, int((value.float() != exact).sum())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal values. Zero points that are missing are all 0; dtypes may differ where both hold the value."""
    if a is None or b is None:
        return not (a is not None and a.any()) and not (b is not None and b.any())
    return a.shape == b.shape and torch.equal(a.double(), b.double())


def _prove(plan: _Plan, partial: Path) -> None:
    """Read what was written as any reader would, and compare it with the source bit by bit. Raises VerificationError."""
    problems: list[str] = []
    check_hashes(partial, problems)
    written = CheckpointReader(partial)
    spec, schemes, layout = build_spec(written.config, str(partial)), schemes_of(written), format_of(written)
    problems += misfits(written, spec, schemes)
    for _, pieces in plan.shards if not problems else ():
        for piece in pieces:
            if piece.ref is None:
                same = torch.equal(_bytes(plan.reader.tensor(piece.key)), _bytes(written.tensor(piece.key)))
            elif (scheme := schemes[piece.key]) is None:
                same = torch.equal(_dequantised(_decode(plan, piece.ref))[0], written.tensor(piece.ref.weight))
            else:
                a, b = _decode(plan, piece.ref), layout.decode(piece.ref, scheme, written.tensors())
                codes = torch.equal(_bytes(a.codes), _bytes(b.codes))
                same = codes and _same(a.scale, b.scale) and _same(a.zero, b.zero) and _same(a.input_scale, b.input_scale)
                same = same and scheme == piece.scheme
            if not same:
                problems.append(f"'{piece.key}' is not what it was in {plan.reader.folder}")
    if problems:
        raise VerificationError(
            f"{partial}: {counted(len(problems), 'problem')}: {problems[0]}", "report this: it is a bug of quantkit"
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _record(plan: _Plan, to: str, rounded: int, seconds: float) -> dict[str, Any]:
    quantized = [scheme.name for scheme in plan.before.values() if scheme is not None]
    return {
        "schema_version": 1,
        "quantkit": quantkit.__version__,
        "command": "convert",
        "model": str(plan.reader.folder),
        "from": plan.source.name,
        "to": to,
        "linears": {name: quantized.count(name) for name in sorted(set(quantized))},
        "kept_linears": len(plan.before) - len(quantized),
        "lossless": plan.target is not None or not rounded,
        "rounded_weights": rounded,
        "source_bytes": sum(entry.nbytes for entry in plan.reader.entries.values()),
        "output_bytes": plan.output_bytes,
        "notes": list(plan.notes),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
    }
