"""`quantize`: plan, open, walk, commit, verify, publish. OUT exists only when it is complete and verified."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantkit
from quantkit.atomic import sha256
from quantkit.calib import tokens
from quantkit.calib.covering import POOL
from quantkit.calib.lockstep import Lockstep, Observer
from quantkit.calib.mixture import read_mixture
from quantkit.calib.profile import one_kind, profile_of
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.checkpoint.by_name import Part
from quantkit.checkpoint.coverage import reconcile
from quantkit.checkpoint.fingerprint import Watch
from quantkit.checkpoint.folder import complete, find_model, watched, write_json
from quantkit.checkpoint.origin import DigestingReader, content_digest
from quantkit.checkpoint.published import published_config, published_files
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.verify import verify
from quantkit.errors import ConfigError, OutputError, QuantkitError, VerificationError
from quantkit.host import arithmetic, code_digest, peak_memory, pick_device, plain_arithmetic, using_threads
from quantkit.job.covered import chosen_file, covered
from quantkit.job.fisher import FOLDER as FISHER
from quantkit.job.fisher import fisher, windows_of
from quantkit.job.journal import Journal
from quantkit.job.partial import (
    RECORD,
    WORK,
    drop_orphans,
    finished,
    keep_failed,
    made_by,
    partial_of,
    publish,
    refuse_others,
    set_aside_damaged,
    shortage,
)
from quantkit.job.plan import Plan, make_plan, summary
from quantkit.job.tapes import Passage, Tapes
from quantkit.job.tuning import FOLDER as TUNE
from quantkit.job.tuning import put_in_place, rewrite, tune
from quantkit.job.unit import AHEAD, Place, UnitRun
from quantkit.model.spec import Layer
from quantkit.recipe import Recipe

__all__ = ["DECISIVE", "Progress", "RunRecord", "Step", "describe", "quantize"]


@dataclass(frozen=True)
class Step:
    """Progress: `done` of `total` layers are quantized. error: the mean relative output error of this layer's linears.

    learned: by how much learning has changed the loss of its parts on tokens apart, in the mean.
    """

    layer: int
    done: int
    total: int
    seconds: float
    eta_seconds: float
    peak_memory_bytes: int
    error: float | None
    least_coverage: float | None
    fallbacks: int
    learned: float | None = None


# Modules whose code decides the bytes of OUT.
DECISIVE = (
    *("calib", "checkpoint", "dtypes", "formats", "host", "job", "kernels.reference", "kernels.triton.activation"),
    *("kernels.cpu.build", "kernels.cpu.solve", "kernels.triton.repair", "model", "qtensor", "quant", "recipe", "rowwise"),
    *("scheme", "stats"),
)
Progress = Callable[[Step], None]
RunRecord = dict[str, Any]


@plain_arithmetic()
def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    beside: Sequence[Observer] = (),
    allocation: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Quantize the checkpoint `model` into the new folder `out`; returns what run.json there says.

    beside: what else passes through the layers while they are quantized, such as held-out text (`measure.run.Evaluation`);
    not called where OUT is there already. allocation: what the recipe was chosen by, for run.json; it decides nothing.

    Interrupted, the same call resumes and ends with the same bytes; finished, it returns that again. Raises a QuantkitError,
    and leaves no `out`, when anything is wrong.
    """
    ready = _prepare(model, out, recipe or Recipe(), device)
    if beside and ready.plan.recipe.tune:
        raise ConfigError(
            "text passes beside the weights before they are tuned", "leave out --held-out, and eval OUT afterwards"
        )
    key = ready.key()
    if (record := finished(ready.target, key)) is not None:
        return record
    if shortage := ready.shortage():
        raise OutputError(shortage, "free space, or choose another OUT")
    job = _Job(ready, key, beside, allocation)
    try:
        return job.run(progress or (lambda step: None))
    finally:
        job.journal.close()


@plain_arithmetic()
def describe(model: str | Path, out: str | Path, recipe: Recipe, device: str) -> dict[str, Any]:
    """What `quantize` would do (--dry-run). Raises whatever it would refuse before its first layer, except that a disk
    without enough space is a note: the plan may be for another machine."""
    ready = _prepare(model, out, recipe, device, dry=True)
    made_by(ready.target, ready.key())
    plan, shortage = ready.plan, ready.shortage()
    return {**summary(plan), "notes": [*plan.notes, *ready.text_notes, *([shortage] if shortage else [])]}


@dataclass(frozen=True)
class _Ready:
    """A run of which everything is checked and nothing is written. ids: int64 [windows, seq_len] if it is calibrated; text:
    what they were made of (`tokens.beginning`). changed: of `published_files`."""

    reader: DigestingReader
    source: Watch
    plan: Plan
    ids: Tensor | None
    text: dict[str, Any] | None
    text_notes: tuple[str, ...]
    changed: dict[str, bytes | None]
    target: Path
    device: torch.device
    start: float

    def shortage(self) -> str | None:
        """What to say when there is not enough room for what is still to be written."""
        return shortage(self.target, self.plan.output_bytes + self.plan.tape_bytes)

    def key(self) -> dict[str, str]:
        """All that decides the bytes of the result, and nothing else. The number of threads, which does too, is kept as it
        was when the job began."""
        recipe = {f"recipe.{name}": json.dumps(value) for name, value in self.plan.resolved.items()}
        return {
            "source": self.source.fingerprint,
            **recipe,
            "tokens": tokens.digest(self.ids) if self.ids is not None else "",
            "quantkit": f"{quantkit.__version__} {code_digest(DECISIVE)[:16]}",
            **arithmetic(self.device),
        }


def _prepare(model: str | Path, out: str | Path, recipe: Recipe, device: str, dry: bool = False) -> _Ready:
    start, place, target = time.monotonic(), pick_device(device), Path(out)
    folder = find_model(model)
    refuse_others(target)
    reader = DigestingReader(folder)
    changed = published_files(folder, reader.config)
    source = Watch(folder, reader.shards, watched(folder, changed))
    plan = make_plan(reader, recipe)
    ids, text, notes = _calibration(reader, plan, place, target, dry) if plan.calibrated else (None, None, ())
    return _Ready(reader, source, plan, ids, text, notes, changed, target, place, start)


def _calibration(
    reader: CheckpointReader, plan: Plan, device: torch.device, target: Path, dry: bool
) -> tuple[Tensor, dict[str, Any], tuple[str, ...]]:
    """Windows, what they were made of, and what to tell of it. dry: without a pass of the model that chooses them."""
    recipe = plan.recipe
    tokenizer, mixture = load_text_tokenizer(reader.folder, recipe.add_bos), read_mixture(recipe.calibration)
    choice, notes = dict[str, Any](), list(mixture.notes())
    if recipe.cover and (not dry or chosen_file(target).exists()):
        ids, choice = covered(reader, plan, tokenizer, mixture, device, target)
    else:
        ids = mixture.windows(tokenizer, plan.samples, recipe.seq_len, recipe.seed)
        if recipe.cover:
            notes.append(f"--cover passes {POOL} times {ids.numel():,} tokens through the BF16 model first, but not here")
    if int(ids.max()) >= plan.model.vocab:
        raise ConfigError(
            f"the tokenizer in {reader.folder} gives id {int(ids.max())}, but the vocabulary ends at {plan.model.vocab - 1}",
            "use the tokenizer that belongs to this model",
        )
    texts = mixture.documents
    profile, counts = profile_of(texts), mixture.counts(plan.samples)
    text = {**tokens.beginning(tokenizer, texts), "profile": profile.as_dict(), **({"cover": choice} if choice else {})}
    if len(counts) > 1:
        text["windows"] = {source.name: count for source, count in zip(mixture.sources, counts, strict=True)}
    kind = one_kind(recipe.calibration, profile)
    return ids, text, (*notes, *([kind] if kind else []))


class _Job:
    def __init__(
        self, ready: _Ready, key: dict[str, str], beside: Sequence[Observer], allocation: Mapping[str, Any] | None
    ) -> None:
        self.allocation = allocation
        self.start, self.target, self.source = ready.start, ready.target, ready.source
        self.reader, self.plan, self.ids, self.key, self.ready = ready.reader, ready.plan, ready.ids, key, ready
        self.partial = partial_of(ready.target)
        self.work = self.partial / WORK
        self.beside = beside
        self.place = Place(ready.reader, ready.plan, ready.ids, ready.device, self.partial, self.work, bool(beside))
        self.journal = Journal(self.work, key, {"threads": torch.get_num_threads()})
        self.threads = int(self.journal.begun["threads"])
        self.recovered: list[str] = []
        self.tuned: dict[str, Any] = {}
        kinds = () if ready.ids is None else ("tape", *((AHEAD,) if ready.plan.learned else ()))
        rows, width = (0, 0) if ready.ids is None else (ready.ids.numel(), ready.plan.model.hidden)
        self.tapes = Tapes(self.journal, kinds, rows, width, self._again)
        self.resumed_at, self.layers_done = len(self.journal.units), 0

    def run(self, progress: Progress) -> RunRecord:
        with using_threads(self.threads):
            self._take_stock()
            self._measure()
            lockstep = Lockstep(self.place.pair, self.work, self.beside) if self.beside else None
            for index, unit in enumerate(self.plan.units):
                if index not in self.journal.units:
                    self._commit(index, progress, lockstep)
                elif lockstep is not None:  # committed by an earlier process: what passes beside starts anew
                    UnitRun(self.place, unit, lambda *_: None).show(lockstep)
            self._tune()
            problem = self._finish(lockstep) if lockstep is not None else None
            record = self._publish()
            if problem is not None:  # what passed beside was not what it should be; what was quantized is
                raise problem
            return record

    def _measure(self) -> None:
        """The metrics by which rounding is learned, of layers that are still to come."""
        if self.plan.fisher_tokens and len(self.journal.units) < len(self.plan.units):
            assert self.ids is not None
            ids, read = windows_of(self.ids, self.plan.fisher_tokens), self.reader.tensor
            seed = self.plan.recipe.seed
            metrics = fisher(self.plan.model, ids, read, self.place.device, self.work, self.key, seed)
            self.place = dataclasses.replace(self.place, metrics=metrics)

    def _tune(self) -> None:
        if not self.plan.recipe.tune:
            return
        with torch.no_grad():
            changes, self.tuned = tune(self.place, self.key)
            for index, unit in enumerate(self.plan.units):
                if changes and unit.layers and "untuned" not in self.journal.units[index]:
                    self.journal.commit(index, rewrite(self.place, unit, self.journal.units[index], changes))
                    put_in_place(self.partial, self.work, self.journal.units[index])

    def _finish(self, lockstep: Lockstep) -> QuantkitError | None:
        """Let what passed beside say what it saw; what it raised, so that OUT does not wait for it."""
        try:
            with torch.inference_mode():
                lockstep.finish()
        except QuantkitError as error:
            return error
        return None

    def _take_stock(self) -> None:
        """Void units of which a shard is damaged; remove what a killed run left behind and no journal line vouches for."""
        for index, unit in sorted(self.journal.units.items()):
            self.journal.units[index] = unit = put_in_place(self.partial, self.work, unit)
            if damage := set_aside_damaged(self.target, unit["shards"]):
                self.recovered += [f"{problem}: unit {index} was quantized again" for problem in damage]
                del self.journal.units[index]
        self.tapes.find()
        written = [name for unit in self.journal.units.values() for name in unit["shards"]]
        drop_orphans(self.partial, [*written, *self.tapes.files, FISHER, TUNE])

    def _commit(self, index: int, progress: Progress, lockstep: Lockstep | None) -> None:
        begun, unit = time.monotonic(), self.plan.units[index]
        passages, last = self.tapes.passages(index), index + 1 == len(self.plan.units)
        done = UnitRun(self.place, unit, lambda layer, outcomes: progress(self.step(layer, outcomes)))
        outcomes = done.run(passages, lockstep)
        left = {kind: None if last else following.sync() for kind, (_, following) in passages.items()}
        self.source.check()
        hashes = {shard.file: sha256(self.partial / shard.file) for shard in unit.shards}
        digests = {name: self.reader.digests[name] for name in unit.source()}
        overflowed = {} if self.place.metrics is None else {"overflowed": self.place.metrics.overflowed}
        line = {"shards": hashes, "linears": outcomes, "source": digests, **left, **overflowed}
        self.journal.commit(index, {**line, "seconds": round(time.monotonic() - begun, 3)})
        self.tapes.committed(index, passages)

    def _again(self, kind: str, index: int, passage: Passage) -> None:
        run = UnitRun(self.place, self.plan.units[index], lambda *_: None)
        run.ahead_again(passage) if kind == AHEAD else run.again(passage)

    def step(self, layer: Layer | Part, outcomes: dict[str, dict[str, Any]]) -> Step:
        """What to tell about a layer that has just been quantized."""
        elapsed, total = time.monotonic() - self.start, len(self.plan.spec.layers)
        of_layer = [outcomes[ref.key] for ref in layer.linears() if ref.key in outcomes]
        changes = [o["learned"]["change"] for o in of_layer if "learned" in o]
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
            learned=sum(changes) / len(changes) if changes else None,
        )

    def _publish(self) -> RunRecord:
        config = published_config(self.reader.config, self.plan.quantization_config)
        hashes = {name: digest for unit in self.journal.units.values() for name, digest in unit["shards"].items()}
        shards = (shard for unit in self.plan.units for shard in unit.shards)
        complete(self.partial, self.reader.folder, config, shards, hashes, self.ready.changed, self._made())
        try:
            verify(self.partial, self.reader.folder)
            coverage = reconcile(self.plan.coverage, CheckpointReader(self.partial))
        except VerificationError as error:
            raise self._kept(error, hashes) from error
        self.source.check()
        record = self._record(coverage)
        for tape in self.work.rglob("*.f32"):  # as large as all hidden states: not to be left in OUT by a kill
            tape.unlink()
        write_json(self.partial / RECORD, record)
        publish(self.partial, self.target)
        return record

    def _kept(self, error: VerificationError, hashes: dict[str, str]) -> VerificationError:
        """What to say when the result is not sound. Nothing is thrown away. A shard that was damaged since it was written
        costs its unit, anything else all of them, since the same bytes would come again."""
        self.source.check()
        if damage := set_aside_damaged(self.target, hashes):
            fix = "repeat the command: it quantizes again only what lay in there; check the disk"
            return VerificationError("\n  ".join([error.problem, *damage]), fix)
        failed = keep_failed(self.partial, self.target)
        back = f"; or, if the source was wrong, put it right, move {failed} back to {self.partial}, and repeat the command"
        return VerificationError(f"{error.problem}\nWhat was written is kept as {failed}", f"{error.fix}{back}")

    def _made(self) -> dict[str, Any]:
        """What quantkit.json says."""
        digests = {name: digest for unit in self.journal.units.values() for name, digest in unit["source"].items()}
        linears = {key: outcome for unit in self.journal.units.values() for key, outcome in unit["linears"].items()}
        fields = ("scheme", "method", "weight_error", "input_scale")
        return {
            "source": {"digest": content_digest(self.reader.entries, digests)},
            "recipe": self.plan.resolved,
            "linears": {
                key: {name: linears[key][name] for name in fields if name in linears[key]} for key in sorted(linears)
            },
        }

    def _learning(self, linears: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """kept: of how many linears OUT holds what was learned. overflowed: gradients that the Fisher pass left out."""
        tried = [row["learned"] for row in linears.values() if "learned" in row]
        overflowed = max(unit.get("overflowed", 0) for unit in self.journal.units.values())
        return {"linears": len(tried), "kept": sum(row["kept"] > 0 for row in tried), "overflowed": overflowed}

    def _record(self, coverage: dict[str, Any]) -> RunRecord:
        linears = {key: outcome for unit in self.journal.units.values() for key, outcome in unit["linears"].items()}
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
            "bf16_share": self.plan.kept_share,
            "fallbacks": fallbacks,
            "lent_tokens": sum(o["lent"] > 0 for o in linears.values()),
            "linears": linears,
            **({"learning": self._learning(linears)} if self.plan.learned else {}),
            **({"tuning": self.tuned} if self.tuned else {}),
            "resumed_at_unit": self.resumed_at,
            "threads": self.threads,
            "recovered": self.recovered,
            "seconds": round(sum(unit["seconds"] for unit in self.journal.units.values()), 2),
            "wall_seconds_of_last_run": round(time.monotonic() - self.start, 2),
            "peak_memory_bytes": peak_memory(),
            "notes": [*self.plan.notes, *self.ready.text_notes],
            **({"allocation": dict(self.allocation)} if self.allocation else {}),
        }
