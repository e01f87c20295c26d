"""`convert`: a quantized checkpoint in another format, with the same codes, scales and zero points, or dequantized to BF16.

Nothing is quantized again. What the other format cannot hold exactly is refused, and what was written is read again and
compared with the source, bit by bit, before OUT appears.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import quantkit
from quantkit.atomic import sha256
from quantkit.checkpoint.fingerprint import Watch
from quantkit.checkpoint.folder import complete, find_model, watched, write_json
from quantkit.checkpoint.opened import format_of, misfits, schemes_of
from quantkit.checkpoint.origin import STATEMENT, DigestingReader, content_digest, read_statement, tensor_digest
from quantkit.checkpoint.published import published_config, published_files, published_notes
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.sets import weight_sets
from quantkit.checkpoint.verify import check_hashes, damaged
from quantkit.checkpoint.writer import ShardPlan, ShardWriter
from quantkit.choices import TARGETS
from quantkit.dtypes import TensorPlan, raw
from quantkit.errors import CheckpointError, ConfigError, OutputError, VerificationError, counted
from quantkit.formats.base import KV_SCALE, Format, Schemes
from quantkit.formats.table import FORMATS
from quantkit.host import code_digest, peak_memory, plain_arithmetic
from quantkit.job.journal import Journal
from quantkit.job.partial import (
    RECORD,
    WORK,
    drop_orphans,
    finished,
    keep_failed,
    partial_of,
    publish,
    refuse_others,
    set_aside_damaged,
    shortage,
)
from quantkit.job.placement import in_shards, shard_name
from quantkit.model.registry import build_spec
from quantkit.model.spec import HEAD, Linear, ModelSpec
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Scheme

__all__ = ["TARGETS", "convert"]

BF16 = "bf16"
# Modules whose code decides the bytes of OUT.
DECISIVE = ("checkpoint", "dtypes", "formats", "job.conversion", "job.placement", "model", "qtensor", "scheme")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Piece:
    """What is written at once: a quantized linear with its scheme, or (no linear) a tensor that is carried over."""

    key: str
    ref: Linear | None
    scheme: Scheme | None
    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True)
class _Plan:
    """A conversion of which everything that headers say is checked. after: None where a linear is kept or dequantized."""

    reader: DigestingReader
    source: Format
    target: Format | None
    before: Schemes
    after: Schemes
    shards: tuple[tuple[ShardPlan, tuple[_Piece, ...]], ...]
    config: dict[str, Any]
    changed: dict[str, bytes | None]  # of `published_files`
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        return sum(shard.nbytes for shard, _ in self.shards)


@plain_arithmetic()
def convert(model: str | Path, out: str | Path, to: str, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the quantized checkpoint `model` to the new folder `out` in the format `to`; returns what run.json there says.

    Memory is bounded by one linear. Interrupted, the same call resumes. progress is called with (shards done, shards in
    all). Raises a QuantkitError, and leaves no `out`, when `to` cannot hold the same values or anything else is wrong.
    """
    start, target = time.monotonic(), Path(out)
    source = find_model(model)
    refuse_others(target)
    for name, problem in damaged(source).items():
        # New hashes over damage would call it sound; an edited config is read and checked.
        if name.endswith(".safetensors") or name == STATEMENT:
            raise CheckpointError(f"{source}: {problem}", "copy the files again, or quantize again")
    plan = _plan(DigestingReader(source), to)
    watch, partial = Watch(source, plan.reader.shards, watched(source, plan.changed)), partial_of(target)
    code = f"{quantkit.__version__} {code_digest(DECISIVE)[:16]}"
    key = {"source": watch.fingerprint, "convert to": to, "quantkit": code}
    if (record := finished(target, key)) is not None:
        return record
    if lacking := shortage(target, plan.output_bytes):
        raise OutputError(lacking, "free space, or choose another OUT")
    journal = Journal(partial / WORK, key)
    try:
        rounded = _write_shards(plan, target, journal, watch, progress or (lambda done, total: None))
        _prove(plan, partial)
        watch.check()
        record = {**_record(plan, to, rounded, time.monotonic() - start), "job": key}
        write_json(partial / RECORD, record)
        publish(partial, target)
    except ConfigError:
        shutil.rmtree(partial)  # resuming would only meet the same again
        raise
    except VerificationError as error:
        if damage := set_aside_damaged(target, {unit["shard"]: unit["sha256"] for unit in journal.units.values()}):
            raise VerificationError("\n  ".join([error.problem, *damage]), "repeat the command; check the disk") from error
        failed = keep_failed(partial, target)
        raise VerificationError(f"{error.problem}\nWhat was written is kept as {failed}", error.fix) from error
    finally:
        journal.close()
    return record


def _plan(reader: DigestingReader, to: str) -> _Plan:
    if to not in TARGETS:
        raise ConfigError(f"unknown format '{to}'", f"use one of {', '.join(TARGETS)}")
    where = reader.folder / "config.json"
    spec, before, source = build_spec(reader.config, str(where)), schemes_of(reader), format_of(reader)
    if not any(before.values()):
        raise ConfigError(f"{where} says the model is not quantized", "use 'quantkit quantize'")
    if problems := misfits(reader, spec, before):
        raise ConfigError(
            f"{reader.folder}: {counted(len(problems), 'tensor')} not as config.json says: {problems[0]}", "fetch both again"
        )
    target = FORMATS.get(to)
    if source is target:
        others = ", ".join(name for name in TARGETS if name != to)
        raise ConfigError(f"{reader.folder} is {to} already", f"keep it, or give --to another of {others}")
    after: Schemes = {key: target.target(scheme) if target and scheme else None for key, scheme in before.items()}
    routers = [moe.router.key for moe in spec.moes()]
    config = published_config(reader.config, target.config(after, routers) if target else None)
    shards = _shards(_pieces(reader, spec, target, before, after))
    changed, notes = published_files(reader.folder, reader.config), tuple(_notes(reader, before, after, target))
    return _Plan(reader, source, target, before, after, shards, config, changed, notes)


def _pieces(
    reader: CheckpointReader, spec: ModelSpec, target: Format | None, before: Schemes, after: Schemes
) -> list[_Piece]:
    """In the order of the model; tensors around its layers and KV scales come last."""
    pieces = []
    converted = set()
    for ref in spec.linears():
        if before[ref.key] is None:
            continue
        scheme = after[ref.key]
        plain = TensorPlan(ref.weight, "BF16", (ref.out_features, ref.in_features))
        tensors = target.planned(ref, scheme) if target and scheme else [plain]
        pieces.append(_Piece(ref.key, ref, scheme, tuple(tensors)))
        converted.add(ref.weight)
    rest = {*spec.tensors(), HEAD} - converted
    copied = [key for key in reader.entries if key in rest or KV_SCALE.match(key)]
    for key in copied:
        entry = reader.entries[key]
        pieces.append(_Piece(key, None, None, (TensorPlan(key, entry.dtype, entry.shape),)))
    return pieces


def _shards(pieces: list[_Piece]) -> tuple[tuple[ShardPlan, tuple[_Piece, ...]], ...]:
    """Pieces in shards, no piece split."""
    parts = in_shards(pieces, lambda piece: sum(tensor.nbytes for tensor in piece.tensors))
    names = [shard_name(number, len(parts)) for number in range(1, len(parts) + 1)]
    return tuple(
        (ShardPlan(name, [tensor for piece in part for tensor in piece.tensors]), tuple(part))
        for name, part in zip(names, parts, strict=True)
    )


def _notes(reader: CheckpointReader, before: Schemes, after: Schemes, target: Format | None) -> list[str]:
    pairs = {(old, after[key]) for key, old in before.items() if old is not None}
    notes = [*weight_sets(reader.folder), *published_notes(reader.folder, reader.config)]
    if target is None and (rounding := sorted({old.name for old, _ in pairs if old.activation})):
        notes.append(f"{', '.join(rounding)} rounds inputs; in BF16 they stay as they are")
    if any(new and old.weight.symmetric and not new.weight.symmetric for old, new in pairs):
        notes.append("symmetric weights are stored with zero points that are all in the middle")
    if any(KV_SCALE.match(key) for key in reader.entries):
        notes.append("scales of the K/V cache are carried over under their own names; an engine may want its own option")
    return notes


def _write_shards(plan: _Plan, target: Path, journal: Journal, watch: Watch, progress: Progress) -> int:
    """What is not yet written of the folder but run.json; how many weights had to be rounded to BF16."""
    partial = partial_of(target)
    for index, unit in list(journal.units.items()):
        if set_aside_damaged(target, {unit["shard"]: unit["sha256"]}):
            del journal.units[index]
    drop_orphans(partial, {unit["shard"] for unit in journal.units.values()})
    for index, (shard, pieces) in enumerate(plan.shards):
        if index in journal.units:
            continue
        rounded = _write(plan, partial, shard, pieces)
        digest, source = sha256(partial / shard.file), _digests(plan, pieces)
        watch.check()
        journal.commit(index, {"shard": shard.file, "sha256": digest, "rounded": rounded, "source": source})
        progress(index + 1, len(plan.shards))
    hashes = {unit["shard"]: unit["sha256"] for unit in journal.units.values()}
    statement, shards = _made(plan, journal), (shard for shard, _ in plan.shards)
    complete(partial, plan.reader.folder, plan.config, shards, hashes, plan.changed, statement)
    return sum(unit["rounded"] for unit in journal.units.values())


def _digests(plan: _Plan, pieces: tuple[_Piece, ...]) -> dict[str, str]:
    """The digests of the tensors of the source that the pieces were made from."""
    digests, names = plan.reader.digests, set[str]()
    for piece in pieces:
        scheme = plan.before[piece.key] if piece.ref else None
        planned = [t.name for t in plan.source.planned(piece.ref, scheme)] if piece.ref and scheme else [piece.key]
        names |= digests.keys() & planned
    return {name: digests[name] for name in sorted(names)}


def _made(plan: _Plan, journal: Journal) -> dict[str, Any]:
    """What quantkit.json says: what it says in the source, since the weights are the same, or what is known without that.
    A weight in BF16 may have been rounded once more, and has no record."""
    statement = read_statement(plan.reader.folder)
    if statement is None:
        digests = {name: digest for unit in journal.units.values() for name, digest in unit["source"].items()}
        for name in plan.reader.entries.keys() - digests.keys():  # which no value depends on
            digests[name] = tensor_digest(plan.reader.tensor(name))
        statement = {"source": {"digest": content_digest(plan.reader.entries, digests)}, "recipe": None, "linears": {}}
    linears = statement["linears"] if plan.target else {}
    converted = {"from": plan.source.name, "to": plan.target.name if plan.target else BF16}
    return {"source": statement["source"], "recipe": statement["recipe"], "linears": linears, "converted": converted}


def _write(plan: _Plan, partial: Path, shard: ShardPlan, pieces: tuple[_Piece, ...]) -> int:
    """One shard; how many dequantized weights had to be rounded to BF16."""
    rounded = 0
    with ShardWriter(partial, shard) as writer:
        for piece in pieces:
            if piece.ref is None:
                writer.write(piece.key, plan.reader.tensor(piece.key))
                continue
            q = _decode(plan, piece.ref)
            if plan.target is None or piece.scheme is None:
                value, lost = _dequantized(q)
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


def _dequantized(q: QuantizedTensor) -> tuple[Tensor, int]:
    """The weight in BF16, and how many of its values are not exactly what the codes and scales say."""
    exact = q.dequantize()
    value = exact.bfloat16()
    return value, int((value.float() != exact).sum())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal values. Zero points that are missing are all 0; dtypes may differ where both hold the value."""
    if a is None or b is None:
        return not (a is not None and a.any()) and not (b is not None and b.any())
    return a.shape == b.shape and a.double().equal(b.double())


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
                same = raw(plan.reader.tensor(piece.key)).equal(raw(written.tensor(piece.key)))
            elif (scheme := schemes[piece.key]) is None:
                same = _dequantized(_decode(plan, piece.ref))[0].equal(written.tensor(piece.ref.weight))
            else:
                a, b = _decode(plan, piece.ref), layout.decode(piece.ref, scheme, written.tensors())
                codes = raw(a.codes).equal(raw(b.codes))
                same = codes and _same(a.scale, b.scale) and _same(a.zero, b.zero) and _same(a.input_scale, b.input_scale)
                same = same and scheme == piece.scheme
            if not same:
                problems.append(f"'{piece.key}' is not what it was in {plan.reader.folder}")
    if problems:
        raise VerificationError(
            f"{partial}: {counted(len(problems), 'problem')}: {problems[0]}", "report this: it is a bug of quantkit"
        )


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
