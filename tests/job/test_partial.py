"""OUT.partial, the same for a quantization and a conversion: what is removed from it, the room it needs, its shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantkit.job import placement
from quantkit.job.journal import Journal
from quantkit.job.partial import WORK, drop_orphans, partial_of, shortage
from quantkit.job.placement import in_shards, shard_name


def test_only_what_a_journal_line_vouches_for_stays(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (partial / WORK / "folder").mkdir(parents=True)
    journal = Journal(partial / WORK, {"job": "this"})
    for name in ("shard-1", "shard-2", f"{WORK}/tape-1", f"{WORK}/tape-2"):
        (partial / name).write_bytes(b"x")
    (partial / "strange").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (partial / "link").symlink_to(tmp_path / "elsewhere")
    drop_orphans(partial, {"shard-1", "tape-2"})
    journal.close()
    assert {path.name for path in partial.iterdir()} == {WORK, "shard-1"} and (tmp_path / "elsewhere").is_dir()
    assert {path.name for path in (partial / WORK).iterdir()} == {"journal", "lock", "tape-2"}
    assert Journal(partial / WORK, {"job": "this"}).units == {}


def test_room_is_counted_without_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
    target = tmp_path / "deep" / "out"
    assert shortage(target, 100) is None
    assert shortage(target, 1101) == f"{tmp_path} has 100 bytes free, and 1,101 are needed"
    (partial_of(target) / WORK).mkdir(parents=True)
    (partial_of(target) / WORK / "tape").write_bytes(bytes(1001))
    assert shortage(target, 1101) is None
    assert shortage(target, 1102) == f"{partial_of(target)} has 100 bytes free, and 101 are needed"


def test_shards_are_as_full_as_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "MAX_SHARD_BYTES", 10)
    assert in_shards([4, 6, 1, 30, 10, 5, 5, 5], lambda size: size) == [[4, 6], [1], [30], [10], [5, 5], [5]]
    assert shard_name(3, 12) == "model-00003-of-00012.safetensors"
