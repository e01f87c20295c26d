"""Hidden states between units: what each stream leaves for the next unit, durable before the journal says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from quantkit.calib.tape import Tape
from quantkit.errors import OutputError
from quantkit.job.journal import Journal

__all__ = ["Passage", "Tapes"]

Again = Callable[[str, int, "Passage"], None]
Passage = tuple[Tape | None, Tape]  # what a unit reads (None where texts begin) and what it leaves


class Tapes:
    """kinds: of streams, by the field of a journal line that holds a tape's digest. again: passes a stream of that kind
    through a committed unit once more."""

    def __init__(self, journal: Journal, kinds: Sequence[str], rows: int, width: int, again: Again) -> None:
        self.journal, self.kinds, self.shape, self.again = journal, kinds, (rows, width), again
        self._sound: dict[str, dict[int, Tape]] = {kind: {} for kind in kinds}  # by the unit that reads it

    @property
    def files(self) -> list[str]:
        return [tape.path.name for tapes in self._sound.values() for tape in tapes.values()]

    def find(self) -> None:
        """Those that an earlier process left, if they are still what it has written."""
        for kind, tapes in self._sound.items():
            for index, unit in self.journal.units.items():
                if unit[kind] and (tape := Tape.found(self._path(kind, index + 1), *self.shape, unit[kind])):
                    tapes[index + 1] = tape

    def _path(self, kind: str, index: int) -> Path:
        return self.journal.folder / f"{kind}-{index}.f32"

    def passages(self, index: int) -> dict[str, Passage]:
        """Of unit `index`. A tape that is lost is made again from the last one that is not, through what is committed."""
        return {kind: (self._input(kind, index), self._create(kind, index + 1)) for kind in self.kinds}

    def _create(self, kind: str, index: int) -> Tape:
        return Tape.create(self._path(kind, index), *self.shape)

    def _input(self, kind: str, index: int) -> Tape | None:
        tapes = self._sound[kind]
        start = max((number for number in tapes if number <= index), default=0)
        for number in range(start, index):
            following = self._create(kind, number + 1)
            self.again(kind, number, (tapes.get(number), following))
            if following.sync() != self.journal.units[number][kind]:
                partial = self.journal.folder.parent
                problem = f"{partial}: the hidden states after unit {number} cannot be computed again as they were"
                raise OutputError(problem, f"remove {partial} and repeat the command")
            if number in tapes:
                tapes.pop(number).remove()
            tapes[number + 1] = following
        return tapes.get(index)

    def committed(self, index: int, passages: Mapping[str, Passage]) -> None:
        """Unit `index` is: what was before it is not needed any more."""
        for kind, tapes in self._sound.items():
            for number in [number for number in tapes if number <= index]:
                tapes.pop(number).remove()
            tapes[index + 1] = passages[kind][1]
