"""`--tune`: scales end to end, once all units are committed; then each unit's shards again, with the same codes.

What was learned is durable before any shard is written, and a unit's new shards before its journal line: after a kill either
the old ones count, or the new ones take their place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.atomic import disk_errors, fsync_folder, sha256
from quantkit.calib.extent import STEP_TOKENS
from quantkit.calib.fisher import FisherPass
from quantkit.calib.fit import ReadOnce, windows_apart
from quantkit.calib.streams import Place as StreamPlace
from quantkit.calib.tape import Tape
from quantkit.calib.tune import Tuned, TunedWeights, Tuner, rescaled, tunable
from quantkit.checkpoint.writer import ShardWriter
from quantkit.formats import compressed_tensors
from quantkit.job.journal import Journal
from quantkit.job.placement import Unit
from quantkit.job.unit import Place, UnitRun
from quantkit.model.spec import Layer, Linear
from quantkit.qtensor import QuantizedTensor
from quantkit.quant.method import STEPS
from quantkit.stats import weight_error

__all__ = ["FOLDER", "put_in_place", "rewrite", "tune"]

FOLDER = "tune"  # in the job's own
_CHANGES = "changes.safetensors"
_FEW = 2**30  # bytes of a quantized model whose codes are held
_RATE = 1e-3  # of the relative change of a scale, falling to 0
Line = dict[str, Any]


def tune(place: Place, key: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The changes of scales by key (none: nothing is to change), and what to record. Interrupted, it begins anew; done, it
    gives that again."""
    folder = place.work / FOLDER
    journal = Journal(folder, key)
    try:
        line = journal.units.get(0)
        if line is None or not (folder / _CHANGES).is_file() or sha256(folder / _CHANGES) != line["changes"]:
            tuned = _run(place, folder)
            changes = {name: change.cpu() for name, change in tuned.changes.items()} if tuned.kept else {}
            with disk_errors(folder / _CHANGES):
                save_file(changes, folder / _CHANGES)
            fsync_folder(folder)
            line = {"changes": sha256(folder / _CHANGES), "record": _record(tuned)}
            journal.commit(0, line)
    finally:
        journal.close()
    return load_file(folder / _CHANGES), line["record"]


def _record(tuned: Tuned) -> dict[str, Any]:
    fields = ("kept", "steps", "before", "after", "stopped")
    return {name: getattr(tuned, name) for name in fields}


def _run(place: Place, folder: Path) -> Tuned:
    plan, ids, device = place.plan, place.ids, place.device
    assert ids is not None
    target = _answers(place, ids, folder)
    runs = {layer.index: UnitRun(place, unit, lambda *_: None) for unit in plan.units for layer in unit.layers}
    of_linear = {ref.key: runs[layer.index] for layer in plan.model.layers for ref in layer.linears()}
    changes = {
        ref.key: torch.zeros(scheme.weight.scale_shape(ref.out_features, ref.in_features), device=device)
        for ref in plan.model.linears()
        if (scheme := plan.schemes[ref.key]) is not None and tunable(scheme)
    }
    weights = TunedWeights(
        place.tensor, lambda ref: of_linear[ref.key].written(ref), plan.schemes, changes, plan.output_bytes <= _FEW
    )
    apart = windows_apart(len(ids))
    tuner = Tuner(plan.model, weights, ids, target, apart, device, _RATE)
    order = np.random.default_rng([plan.recipe.seed, 1]).permutation(int((~apart).sum()))
    windows = (~apart).nonzero().flatten()[torch.from_numpy(order)]
    each = max(1, STEP_TOKENS // ids.shape[1])
    try:
        return tuner.run([part for part in windows.split(each) if len(part) == each][:STEPS] or [windows])
    finally:
        target.remove()
        place.pair.release()


def _answers(place: Place, ids: Tensor, folder: Path) -> Tape:
    """What the BF16 model's head reads, of all windows."""
    spec = place.plan.model
    weights = ReadOnce(lambda name: place.reader.tensor(name).to(place.device))
    walk = FisherPass(StreamPlace(spec, place.device, folder), ids, weights, 0)
    target = Tape.create(folder / "answers.f32", ids.numel(), spec.hidden)
    walk.forward((), None, target)
    for layers in spec.groups():
        walk.forward(layers, target, target)
    return target


def rewrite(place: Place, unit: Unit, line: Line, changes: Mapping[str, Tensor]) -> Line:
    """A unit's shards with other scales, in the job's own folder; the journal line that makes them count."""
    run, rows = UnitRun(place, unit, lambda *_: None), dict(line["linears"])
    with ExitStack() as stack:
        run.writers = [stack.enter_context(ShardWriter(place.work / FOLDER, shard)) for shard in unit.shards]
        rescaled = dict[str, Tensor]()
        for ref in (ref for layer in unit.layers if isinstance(layer, Layer) for ref in layer.linears()):
            if ref.key in changes:
                tensors, rows[ref.key] = _rescaled(place, run, ref, rows[ref.key], changes[ref.key])
                rescaled |= tensors
        for name in run.shard_of:
            run.store(name, rescaled[name] if name in rescaled else run.stored(name))
    shards = {shard.file: sha256(place.work / FOLDER / shard.file) for shard in unit.shards}
    untuned = {"shards": line["shards"], "linears": line["linears"]}
    return {**line, "shards": shards, "linears": rows, "untuned": untuned}


def _rescaled(
    place: Place, run: UnitRun, ref: Linear, row: dict[str, Any], change: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    q, scheme = run.written(ref), place.plan.schemes[ref.key]
    assert isinstance(q, QuantizedTensor) and scheme is not None
    q = rescaled(q, change.to(q.scale.device))
    error = weight_error(place.reader.tensor(ref.weight).to(place.device).float(), q.dequantize())
    return compressed_tensors.encode(ref, scheme, q), {**row, "method": "tuned", "weight_error": error}


def put_in_place(partial: Path, work: Path, line: Line) -> Line:
    """Of a unit whose line says that it was tuned: move its new shards to where they belong. Where one is lost, the line of
    the old ones, if those are there."""
    if "untuned" not in line:
        return line
    for name, digest in line["shards"].items():
        new = work / FOLDER / name
        if new.is_file() and not new.is_symlink() and sha256(new) == digest:
            with disk_errors(partial / name):
                os.replace(new, partial / name)
                fsync_folder(partial)
    old = {key: value for key, value in line.items() if key != "untuned"} | line["untuned"]
    there = {name: sha256(partial / name) if (partial / name).is_file() else "" for name in line["shards"]}
    return old if there == old["shards"] else line
