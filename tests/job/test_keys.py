"""What a job key and the key of cached results hold: what decides the numbers, all of it and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.errors import CheckpointError
from quantkit.host import arithmetic, code_digest, instructions
from quantkit.job import conversion, pipeline
from quantkit.measure import cache
from quantkit.measure.cache import BaselineCache, BaselineRun
from tests.helpers.modules import MODULES, imports, within

# Modules that a run imports and that decide no byte of OUT: they check, they keep books, they say.
CHECKS = ("atomic", "choices", "errors", "extras", "kernels", "owned")


def reached(module: str) -> set[str]:
    found, open_ = set[str](), [module]
    while open_:
        if (name := open_.pop()) not in found:
            found.add(name)
            open_ += [other for other in imports(name) if other in MODULES]
    return found


@pytest.mark.parametrize("part", [pipeline, conversion])
def test_each_module_of_a_run_is_in_the_key_or_known_to_decide_nothing(part: object) -> None:
    decisive = part.DECISIVE  # type: ignore[attr-defined]
    assert all(any(within(module, name) for module in MODULES) for name in decisive)
    start = part.__name__.removeprefix("quantkit.")  # type: ignore[attr-defined]
    others = (*CHECKS, *(("host", "stats", "rowwise", "job.journal", "job.partial") if part is conversion else ()))
    known = {module for module in MODULES if any(within(module, name) for name in (*decisive, *others))}
    assert not reached(start) - known
    assert not any(within("report.html", name) for name in decisive)


def test_code_is_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment or a docstring may change under a run, a number not; the report's code may change as it likes."""
    copy = shutil.copytree(Path(quantkit.__file__).parent, tmp_path / "quantkit", ignore=shutil.ignore_patterns("*.pyc"))
    monkeypatch.setattr(quantkit, "__file__", str(copy / "__init__.py"))
    before, path = code_digest(pipeline.DECISIVE), copy / "quant" / "gptq.py"
    text = path.read_text()
    path.write_text(text.replace('"""GPTQ (Frantar', '"""Another (Frantar') + "\n# a comment\n")
    (copy / "report" / "html.py").write_text("")
    assert code_digest(pipeline.DECISIVE) == before
    path.write_text(text.replace("_BLOCK = 128", "_BLOCK = 64"))
    assert code_digest(pipeline.DECISIVE) != before


def test_the_machine_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another vector width sums in another order, and so does another GPU; nothing else of a machine is told apart."""
    for flags in ("fpu avx avx2 fma", "fpu avx avx2 fma avx512f"):
        (tmp_path / flags[-4:]).write_text(f"processor: 0\nvendor_id\t: GenuineIntel\nflags\t\t: {flags}\n\nprocessor: 1\n")
    said = [instructions(tmp_path / name) for name in (" fma", "512f", "none")]
    assert said == ["GenuineIntel avx avx2 fma", "GenuineIntel avx avx2 avx512f fma", ""]
    here = arithmetic(torch.device("cpu"))
    assert here["torch"] == torch.__version__ and torch.backends.cpu.get_cpu_capability() in here["device"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    names = iter(("H100", "H200"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    gpus = [arithmetic(torch.device("cuda", index)) for index in (0, 1)]
    assert [found["device"] for found in gpus] == ["H100, sm_90", "H200, sm_90"]


def test_a_flipped_bit_in_cached_results_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = torch.device("cpu")
    store = BaselineCache(tmp_path, "model", "windows", 8, place)
    run = BaselineRun(torch.randn(5, 8), {1: torch.randint(4, (5, 2))})
    store.put(0, run)
    store.put(8, run)
    found = store.get(0)
    assert found and torch.equal(found.hidden, run.hidden) and torch.equal(found.experts[1], run.experts[1])
    path = store.folder / "windows-000000.safetensors"
    for at in (30, -5):  # of the header: another layer's name, say; and of the data
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="no longer what was written"):
            store.get(0)
        path.write_bytes(bytes(data[:at] + bytes([data[at] ^ 1]) + data[at:][1:]))
        assert store.get(0) is not None
    assert store.get(8) is not None and store.get(16) is None
    (store.folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="manifest.json is not readable"):
        store.get(8)
    monkeypatch.setattr(cache, "arithmetic", lambda device: {"device": "another"})
    assert BaselineCache(tmp_path, "model", "windows", 8, place).folder != store.folder
