"""The Fisher pass of a job: each group of layers a committed step, and its metrics files that a kill does not cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit.calib.extent import fisher_windows
from quantkit.calib.fisher import FisherPass, Metrics, factor
from quantkit.calib.fit import ReadOnce
from quantkit.calib.streams import Place
from quantkit.calib.tape import Tape
from quantkit.job.journal import Journal
from quantkit.model.spec import ModelSpec

__all__ = ["FOLDER", "LayerMetrics", "fisher", "windows_of"]

FOLDER = "fisher"  # in the job's own
_HALVES = ("attention", "mlp")


def windows_of(ids: Tensor, tokens: int) -> Tensor:
    """Some of int64 ids [windows, length], evenly apart, of so many tokens or one window."""
    count = fisher_windows(len(ids), ids.shape[1], tokens)
    return ids[torch.arange(count) * len(ids) // count]


class LayerMetrics:
    """The factors of each layer's metrics (`calib.fisher.factor`), read from files when they are wanted. overflowed: of how
    many tokens a gradient was left out."""

    def __init__(self, folder: Path, hidden: int, overflowed: int, device: torch.device) -> None:
        self.folder, self.hidden, self.overflowed, self.device = folder, hidden, overflowed, device

    def factor(self, layer: int, half: str) -> Tensor | None:
        tape = Tape(_file(self.folder, layer, half), self.hidden, self.hidden)
        return factor(tape.read(0, self.hidden).to(self.device))


def _file(folder: Path, layer: int, half: str) -> Path:
    return folder / f"{half}-{layer}.f32"


def fisher(
    spec: ModelSpec,
    ids: Tensor,
    read: Callable[[str], Tensor],
    device: torch.device,
    work: Path,
    key: dict[str, str],
    seed: int,
) -> LayerMetrics:
    """ids: int64 [windows, length], all of them read. read: a tensor of the source by name. key: of the job.

    Interrupted, the same call goes on after the last group of layers."""
    folder = work / FOLDER
    begin = partial(_Run, spec, ids, read, device, folder, key, seed)
    run = begin()
    try:
        if not run.sound():
            run.journal.close()
            shutil.rmtree(folder)
            run = begin()
        return run.finish()
    finally:
        run.journal.close()


class _Run:
    """Steps: the embedding and each group forward; the head; each group backward. A line names the files that count after
    it, with their digests."""

    def __init__(
        self,
        spec: ModelSpec,
        ids: Tensor,
        read: Callable[[str], Tensor],
        device: torch.device,
        folder: Path,
        key: dict[str, str],
        seed: int,
    ) -> None:
        self.spec, self.groups, self.folder, self.device = spec, spec.groups(), folder, device
        self.journal = Journal(folder, key)
        self.rows = ids.numel()
        weights = ReadOnce(lambda name: read(name).to(device))
        self.fisher = FisherPass(Place(spec, device, folder), ids, weights, seed)

    @property
    def _done(self) -> dict[int, dict[str, str]]:
        return {step: line["files"] for step, line in self.journal.units.items()}

    def sound(self) -> bool:
        """Whether all that the next steps read is there as it was written."""
        needed = dict[str, str]()
        for step, files in sorted(self._done.items()):
            needed |= files
            needed = {name: digest for name, digest in needed.items() if not self._spent(name, step)}
        steps = sorted(self._done)
        return steps == list(range(len(steps))) and all(
            Tape.found(self.folder / name, *self._shape(name), digest) is not None for name, digest in needed.items()
        )

    def _shape(self, name: str) -> tuple[int, int]:
        metric = name.startswith(_HALVES)
        return (self.spec.hidden if metric else self.rows), self.spec.hidden

    def _spent(self, name: str, step: int) -> bool:
        """Whether nothing after that step reads the file."""
        kind, _, number = name.removesuffix(".f32").partition("-")
        count = len(self.groups)
        passed = step - count - 1  # groups passed backward; below 0: the head was not yet
        if passed < 0 or kind in _HALVES:
            return False
        return int(number) >= count - passed if kind == "boundary" else int(number) != passed or passed == count

    def _tape(self, name: str, new: bool = False) -> Tape:
        path, shape = self.folder / f"{name}.f32", self._shape(name)
        return Tape.create(path, *shape) if new else Tape(path, *shape)

    def finish(self) -> LayerMetrics:
        count = len(self.groups)
        for step in range(len(self._done), 2 * count + 2):
            if step <= count:
                tapes, lost = self._forward(step), 0
            elif step == count + 1:
                gradient = self._tape("gradient-0", new=True)
                self.fisher.top(self._tape(f"boundary-{count}"), gradient)
                tapes, lost = [gradient], 0
            else:
                tapes, lost = self._backward(step - count - 2)
            self.journal.commit(step, {"files": {tape.path.name: tape.sync() for tape in tapes}, "overflowed": lost})
            for path in self.folder.glob("*.f32"):
                if self._spent(path.name, step):
                    path.unlink()
        overflowed = sum(line["overflowed"] for line in self.journal.units.values())
        return LayerMetrics(self.folder, self.spec.hidden, overflowed, self.device)

    def _forward(self, step: int) -> list[Tape]:
        target = self._tape(f"boundary-{step}", new=True)
        source = None if step == 0 else self._tape(f"boundary-{step - 1}")
        self.fisher.forward(() if step == 0 else self.groups[step - 1], source, target)
        return [target]

    def _backward(self, number: int) -> tuple[list[Tape], int]:
        group = len(self.groups) - 1 - number
        below = self._tape(f"gradient-{number + 1}", new=True)
        by_layer = self.fisher.backward(
            self.groups[group], self._tape(f"boundary-{group}"), self._tape(f"gradient-{number}"), below
        )
        tapes = [below]
        for layer, metrics in by_layer.items():
            tapes += [self._stored(layer, half, metrics) for half in _HALVES]
        return tapes, sum(metrics.overflowed for metrics in by_layer.values())

    def _stored(self, layer: int, half: str, metrics: Metrics) -> Tape:
        tape = Tape.create(_file(self.folder, layer, half), self.spec.hidden, self.spec.hidden)
        tape.write(0, getattr(metrics, half))
        return tape
