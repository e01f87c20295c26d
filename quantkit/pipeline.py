"""`quantize`: plan, open, walk, commit, verify, publish. OUT exists only when it is complete and verified."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import quantkit
from quantkit.calib import tokens
from quantkit.calib.documents import read_documents
from quantkit.calib.tape import Tape
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.calib.walk import Apply, Walk, embed, walk_layer
from quantkit.coverage import reconcile
from quantkit.errors import CalibrationError, ConfigError, OutputError, VerificationError
from quantkit.formats import compressed_tensors
from quantkit.formats.atomic import sha256
from quantkit.formats.folder import complete, find_model, publish, refuse_present, write_json
from quantkit.formats.reader import CheckpointReader
from quantkit.formats.writer import ShardWriter
from quantkit.host import peak_memory, pick_device
from quantkit.journal import Journal, code_digest
from quantkit.kernels.reference import round_activation
from quantkit.model.by_name import Part
from quantkit.model.spec import Layer, Linear
from quantkit.plan import Plan, Unit, make_plan, needs_tokens, summary
from quantkit.quant.solve import solve
from quantkit.scheme import Recipe, Scheme
from quantkit.stats import LinearStats
from quantkit.verify import verify

__all__ = ["Progress", "RunRecord", "Step", "describe", "quantize"]


@dataclass(frozen=True)
class Step:
    """Progress: `done` of `total` layers are quantised. error: the mean relative output error of this layer's linears."""

    layer: int
    done: int
    total: int
    seconds: float
    eta_seconds: float
    peak_memory_bytes: int
    error: float | None
    least_coverage: float | None
    fallbacks: int


Progress = Callable[[Step], None]
RunRecord = dict[str, Any]


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> RunRecord:
    """Quantise the checkpoint `model` into the new folder `out`; returns what run.json there says.

    Interrupted, the same call resumes and ends with the same bytes. Raises a QuantkitError, and leaves no `out`, when
    anything is wrong.
    """
    ready = _prepare(model, out, recipe or Recipe(), device)
    if shortage := ready.shortage():
        raise OutputError(shortage, "free space, or choose another OUT")
    job = _Job(ready)
    try:
        return job.run(progress or (lambda step: None))
    finally:
        job.journal.close()


def describe(model: str | Path, out: str | Path, recipe: Recipe, device: str) -> dict[str, Any]:
    """What `quantize` would do (--dry-run). Raises whatever it would refuse before its first layer, except that a disk
    without enough space is a note: the plan may be for another machine."""
    ready = _prepare(model, out, recipe, device)
    plan, shortage = ready.plan, ready.shortage()
    return {**summary(plan), "notes": [*plan.notes, *ready.text_notes, *([shortage] if shortage else [])]}


@dataclass(frozen=True)
class _Ready:
    """A run of which everything is checked and nothing is written. ids: int64 [windows, seq_len] if it is calibrated; text:
    what they were made of (`tokens.beginning`)."""

    reader: CheckpointReader
    plan: Plan
    ids: Tensor | None
    text: dict[str, Any] | None
    text_notes: tuple[str, ...]
    target: Path
    device: torch.device
    start: float

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    def shortage(self) -> str | None:
        """What to say when there is not enough room for what is still to be written."""
        folder = next(p for p in (self.partial, *self.partial.absolute().parents) if p.exists())
        present = sum(f.stat().st_size for f in self.partial.rglob("*") if f.is_file()) if self.partial.exists() else 0
        needed, free = self.plan.output_bytes + self.plan.tape_bytes - present, shutil.disk_usage(folder).free
        return f"{folder} has {free:,} bytes free, and {needed:,} are needed" if free < needed else None

    def key(self) -> dict[str, str]:
        """All that decides the bytes of the result."""
        return {
            "source": self.reader.fingerprint(),
            "recipe": self.plan.recipe.model_dump_json(),
            "tokens": tokens.digest(self.ids) if self.ids is not None else "",
            "quantkit": code_digest(),
            "torch": torch.__version__,
            "device": str(self.device),
            "threads": str(torch.get_num_threads()),  # how a sum is split decides its last bits
        }


def _prepare(model: str | Path, out: str | Path, recipe: Recipe, device: str) -> _Ready:
    start, place, target = time.monotonic(), pick_device(device), Path(out)
    source = find_model(model)
    refuse_present(target)
    reader = CheckpointReader(source)
    plan = make_plan(reader, recipe)
    ids, text, notes = _calibration(reader, plan) if plan.calibrated else (None, None, ())
    return _Ready(reader, plan, ids, text, notes, target, place, start)


def _calibration(reader: CheckpointReader, plan: Plan) -> tuple[Tensor, dict[str, Any], tuple[str, ...]]:
    """Windows, what they were made of, and what to tell of it."""
    recipe = plan.recipe
    tokenizer, texts = load_text_tokenizer(reader.folder, recipe.add_bos), read_documents(recipe.calibration)
    ids = tokens.calibration_windows(tokenizer, texts, recipe.samples, recipe.seq_len, recipe.seed, recipe.calibration)
    if int(ids.max()) >= plan.model.vocab:
        raise ConfigError(
            f"the tokenizer in {reader.folder} gives id {int(ids.max())}, but the vocabulary ends at {plan.model.vocab - 1}",
            "use the tokenizer that belongs to this model",
        )
    note = texts.note(recipe.calibration)
    return ids, tokens.beginning(tokenizer, texts), (note,) if note else ()


class _Job:
    def __init__(self, ready: _Ready) -> None:
        self.start, self.device, self.target = ready.start, ready.device, ready.target
        self.reader, self.plan, self.ids, self.ready = ready.reader, ready.plan, ready.ids, ready
        self.partial, self.work, self.key = ready.partial, ready.partial / ".work", ready.key()
        self.journal = Journal(self.work, self.key)
        self.resumed_at, self.layers_done = len(self.journal.units), 0

    def run(self, progress: Progress) -> RunRecord:
        units = self.plan.units
        self._drop_orphans()
        tape = self._input_tape(len(self.journal.units))
        for index in range(len(self.journal.units), len(units)):
            begun = time.monotonic()
            following = self._tape(index + 1, create=True) if self.plan.calibrated else None
            outcomes = _UnitRun(self, units[index], progress).run(tape, following)
            if following is not None:
                following.sync()
            hashes = {shard.file: sha256(self.partial / shard.file) for shard in units[index].shards}
            seconds = time.monotonic() - begun
            self.journal.commit({"unit": index, "shards": hashes, "linears": outcomes, "seconds": round(seconds, 3)})
            if tape is not None:
                tape.remove()
            tape = following
        return self._publish()

    def _drop_orphans(self) -> None:
        """Remove what a killed run left behind and no journal line vouches for."""
        kept = {name: digest for unit in self.journal.units for name, digest in unit["shards"].items()}
        for name, digest in kept.items():
            if not (self.partial / name).is_file() or sha256(self.partial / name) != digest:
                raise OutputError(
                    f"{self.partial / name} is no longer what was written", f"remove {self.partial} and repeat the command"
                )
        tape = f"tape-{len(self.journal.units)}.f32"
        for path in [*self.partial.iterdir(), *self.work.iterdir()]:
            if path.is_file() and path.name not in {*kept, "journal", "lock", tape}:
                path.unlink()

    def _tape(self, index: int, create: bool) -> Tape:
        assert self.ids is not None
        path, rows = self.work / f"tape-{index}.f32", self.ids.numel()
        return (Tape.create if create else Tape)(path, rows, self.plan.model.hidden)

    def _input_tape(self, index: int) -> Tape | None:
        """The tape that unit `index` reads: none for unit 0 and without calibration."""
        return self._tape(index, create=False) if self.plan.calibrated and 0 < index < len(self.plan.units) else None

    def step(self, layer: Layer | Part, outcomes: dict[str, dict[str, Any]]) -> Step:
        """What to tell about a layer that has just been quantised."""
        elapsed, total = time.monotonic() - self.start, len(self.plan.spec.layers)
        of_layer = [outcomes[ref.key] for ref in layer.linears() if ref.key in outcomes]
        covered = [o["coverage"] for o in of_layer if o["coverage"] is not None]
        self.layers_done += 1
        return Step(
            layer=layer.index,
            done=layer.index + 1,
            total=total,
            seconds=elapsed,
            eta_seconds=elapsed / self.layers_done * (total - layer.index - 1),
            peak_memory_bytes=peak_memory(),
            error=sum(o["error"] for o in of_layer) / len(of_layer) if of_layer else None,
            least_coverage=min(covered) if covered else None,
            fallbacks=sum(bool(o["fallback"]) for o in of_layer),
        )

    def _publish(self) -> RunRecord:
        config = {**self.reader.config, "quantization_config": self.plan.quantization_config}
        hashes = {name: digest for unit in self.journal.units for name, digest in unit["shards"].items()}
        shards = (shard for unit in self.plan.units for shard in unit.shards)
        complete(self.partial, self.reader.folder, config, shards, hashes)
        try:
            verify(self.partial, self.reader.folder)
            coverage = reconcile(self.plan.coverage, CheckpointReader(self.partial))
        except VerificationError:
            shutil.rmtree(self.partial)  # resuming would only meet the same bytes again; what cannot be read may be, later
            raise
        record = self._record(coverage)
        for tape in self.work.glob("tape-*.f32"):  # as large as all hidden states: not to be left in OUT by a kill
            tape.unlink()
        write_json(self.partial / "run.json", record)
        publish(self.partial, self.target)
        shutil.rmtree(self.target / ".work")
        return record

    def _record(self, coverage: dict[str, Any]) -> RunRecord:
        linears = {key: outcome for unit in self.journal.units for key, outcome in unit["linears"].items()}
        fallbacks = {key: o["fallback"] for key, o in linears.items() if o["fallback"]}
        return {
            "schema_version": 1,
            "quantkit": quantkit.__version__,
            "job": self.key,
            "model": str(self.reader.folder),
            "recipe": self.plan.recipe.model_dump(),
            "calibration_tokens": 0 if self.ids is None else self.ids.numel(),
            "calibration_text": self.ready.text,
            "roles": self.plan.by_role(),
            "coverage": coverage,
            "source_bytes": self.plan.source_bytes,
            "output_bytes": self.plan.output_bytes,
            "fallbacks": fallbacks,
            "lent_tokens": sum(o["lent"] > 0 for o in linears.values()),
            "linears": linears,
            "resumed_at_unit": self.resumed_at,
            "seconds": round(sum(unit["seconds"] for unit in self.journal.units), 2),
            "wall_seconds_of_last_run": round(time.monotonic() - self.start, 2),
            "peak_memory_bytes": peak_memory(),
            "notes": [*self.plan.notes, *self.ready.text_notes],
        }


class _UnitRun:
    """One unit: its shards open for writing, its layers walked or simply rounded."""

    def __init__(self, job: _Job, unit: Unit, progress: Progress) -> None:
        self.job, self.unit, self.plan, self.progress = job, unit, job.plan, progress
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.shard_of = {t.name: i for i, shard in enumerate(unit.shards) for t in shard.tensors}

    def run(self, tape: Tape | None, following: Tape | None) -> dict[str, dict[str, Any]]:
        with ExitStack() as stack:
            self.writers = [stack.enter_context(ShardWriter(self.job.partial, s)) for s in self.unit.shards]
            for key in self.unit.kept:
                self._write(key, self.job.reader.tensor(key))
            if following is None:
                for layer in self.unit.layers:
                    for group in layer.same_input():
                        self.quantise(group, None)
                    self.progress(self.job.step(layer, self.outcomes))
            else:
                self._walk(tape, following)
        return self.outcomes

    def _walk(self, tape: Tape | None, following: Tape) -> None:
        ids = self.job.ids
        assert ids is not None
        walk = Walk(
            spec=self.plan.model,
            weights=self.job.reader,
            windows=(ids.shape[0], ids.shape[1]),
            device=self.job.device,
            scratch=self.job.work,
            quantise=self.quantise,
            wants=self.wants,
        )
        if tape is None:
            embed(walk, ids, following)
            return
        kv = walk.tape("kv", self.plan.model.layers[0].attention.kv_width)
        for layer in self.unit.layers:
            assert isinstance(layer, Layer)
            walk_layer(walk, layer, tape, following, kv)
            self.progress(self.job.step(layer, self.outcomes))
            tape = following
        kv.remove()

    def _write(self, name: str, tensor: Tensor) -> None:
        self.writers[self.shard_of[name]].write(name, tensor)

    def wants(self, refs: Sequence[Linear]) -> bool | None:
        """What statistics these linears need: none (None), the range (False), or the Hessian too (True)."""
        scheme = self.plan.schemes[refs[0].key]
        if scheme is None or not needs_tokens(self.plan.recipe, scheme):
            return None
        return self.plan.recipe.method_of(scheme) == "gptq"

    @torch.inference_mode()
    def quantise(self, refs: Sequence[Linear], stats: LinearStats | None) -> list[Apply]:
        """Quantise linears that read one input, write them, and return how to apply each as an engine would."""
        scheme = self.plan.schemes[refs[0].key]
        if stats is not None and not math.isfinite(max(stats.amax, stats.lent_amax)):
            seen = f"the input of '{refs[0].key}' is not finite on the calibration text"
            raise CalibrationError(seen, "check the source model: its hidden states overflow before this layer")
        stored = [self.job.reader.tensor(ref.weight) for ref in refs]
        weights = [weight.to(self.job.device).float() for weight in stored]
        if scheme is None:
            for ref, weight in zip(refs, stored, strict=True):
                self._write(ref.weight, weight)
            return [_apply(weight, None, None) for weight in weights]
        applies = []
        for ref, (q, outcome) in zip(refs, solve(weights, scheme, self.plan.recipe.method_of(scheme), stats), strict=True):
            for name, tensor in compressed_tensors.encode(ref, scheme, q).items():
                self._write(name, tensor)
            self.outcomes[ref.key] = {"scheme": scheme.name, **asdict(outcome)}
            applies.append(_apply(q.dequantize(), scheme, q.input_scale))
        return applies


def _apply(weight: Tensor, scheme: Scheme | None, input_scale: Tensor | None) -> Apply:
    activation = scheme.activation if scheme else None

    def run(x: Tensor) -> Tensor:
        return F.linear(x if activation is None else round_activation(x, activation, input_scale), weight)

    return run
