"""Files are read plainly, never mapped: what is larger than memory, fails or shrinks is a message with the file's name; and
everything is read, parsed and hashed once."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantkit
from quantkit import atomic
from quantkit.calib.tape import Tape
from quantkit.checkpoint import finite, folder, reader, shard
from quantkit.checkpoint import verify as verify_module
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.shard import OpenShard
from quantkit.checkpoint.verify import verify
from quantkit.errors import CheckpointError, OutputError
from quantkit.job import pipeline
from quantkit.kernels.cpu import build
from quantkit.qtensor import QuantizedTensor
from quantkit.recipe import Recipe
from tests.conftest import CONFIG, random_weights, write_checkpoint
from tests.helpers import sparse
from tests.helpers.architectures import TINY
from tests.helpers.commands import QUICK, accepted, refused
from tests.helpers.edits import SHARD

HUGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}


def test_a_file_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """31 GB in one file, where no more than 2 GB of addresses are left: headers are all that a plan needs."""
    monkeypatch.setattr(sparse, "MAX_SHARD_BYTES", 10**12)
    config = {**TINY["llama"], **HUGE, "vocab_size": 32000, "num_hidden_layers": 18, "head_dim": 128}
    assert sparse.write_sparse(tmp_path / "model", config) > 31 * 10**9
    (tmp_path / "model" / "model-00001-of-00001.safetensors").rename(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10**9, hard))
    try:
        accepted("plan", tmp_path / "model", "--scheme", "W8A8")
        assert not CheckpointReader(tmp_path / "model").tensor("model.norm.weight").any()
        with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'x' needs 4,000,000,000,000 bytes of memory"):
            OpenShard(tmp_path / "model" / "model.safetensors").read(0, 4 * 10**12, "tensor 'x'")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EACCES], ids=lambda e: errno.errorcode[e])
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_shard_that_the_system_does_not_give(call: str, error: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = getattr(os, call)

    def fails(what: Any, *arguments: Any) -> Any:
        if call == "preadv" or str(what).endswith(".safetensors"):
            raise OSError(error, os.strerror(error), *([str(what)] if call == "open" else []))
        return real(what, *arguments)

    monkeypatch.setattr(os, call, fails)
    for command in (
        ("plan",),
        ("inspect",),
        ("verify",),
        ("quantize", "-o", model.parent / "out", *QUICK),
        ("generate", "--prompt", "a"),
    ):
        message = refused(command[0], model, *command[1:])
        assert str(model / SHARD) in message and os.strerror(error) in message, message


def test_a_disk_that_fails_while_hashes_are_taken(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted("quantize", model, "-o", tmp_path / "out", *QUICK)

    def fails(file: Any, name: str) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hashlib, "file_digest", fails)
    message = refused("verify", tmp_path / "out")
    assert str(tmp_path / "out") in message and "cannot be read: Input/output error" in message


def test_a_source_that_shrinks_or_changes(model: Path) -> None:
    """Under a map this is SIGBUS."""
    opened = CheckpointReader(model)
    opened.tensor("model.embed_tokens.weight")
    for path in model.glob("*.safetensors"):
        os.truncate(path, 5000)
    for key in opened.entries:
        with pytest.raises(CheckpointError, match=r"model-0000\d-of-00002.safetensors has changed .* 5,000 now"):
            opened.tensor(key)
    with pytest.raises(CheckpointError, match=r"tensor 'a' cannot be read: the file ends at byte 5,000, before 9,000"):
        OpenShard(model / SHARD).read(0, 9000, "tensor 'a'")


def test_a_pipe_is_not_waited_for(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    os.mkfifo(model / "model.safetensors")
    assert "is not a file" in refused("plan", model)


def held(folder: Path) -> int:
    """How many files of a folder this process has open."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.islink(link))


def test_few_files_are_open(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    model = write_checkpoint(tmp_path / "model", CONFIG, weights, shards=12)
    opened = CheckpointReader(model)
    assert held(model) == 0
    for _ in range(2):
        for key in opened.entries:
            assert torch.equal(opened.tensor(key), weights[key])
            assert held(model) <= 4
    del opened
    gc.collect()
    assert held(model) == 0


def test_every_dtype_and_shape_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    made = {
        name: torch.arange(24).to(dtype).reshape(shape)
        for name, dtype, shape in [
            ("a", torch.bfloat16, (2, 3, 4)), ("b", torch.float64, (24,)), ("c", torch.float8_e4m3fn, (4, 6)),
            ("d", torch.bool, (24, 1)), ("e", torch.int16, (3, 8)), ("f", torch.uint8, (1, 24)), ("g", torch.int64, (24,)),
        ]
    }  # fmt: skip
    made |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 7), "odd": torch.ones(3, dtype=torch.uint8)}
    model = write_checkpoint(tmp_path / "model", CONFIG, made, shards=1)
    opened, (path,) = CheckpointReader(model), model.glob("*.safetensors")
    for key, value in load_file(path).items():
        found = opened.tensor(key)
        assert found.dtype == value.dtype and found.shape == value.shape == opened.entries[key].shape
        assert torch.equal(found.double(), value.double())
    assert [*opened.entries] == sorted(made)


def test_the_tape_is_a_matrix(tmp_path: Path) -> None:
    tape, expected = Tape.create(tmp_path / "tape", 50, 7), torch.zeros(50, 7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows, values = torch.randperm(50, generator=generator)[:17], torch.randn(17, 7, generator=generator)
        tape.add(rows, values)
        expected[rows] += values
        start = int(rows[0])
        tape.write(start, values[: 50 - start])
        expected[start : start + 17] = values[: 50 - start]
        assert torch.equal(tape.gather(rows), expected[rows]) and torch.equal(tape.read(3, 41), expected[3:41])
    assert tape.gather(torch.empty(0, dtype=torch.int64)).shape == (0, 7)
    os.truncate(tmp_path / "tape", 100)
    for read in (
        lambda: tape.read(0, 50),
        lambda: tape.gather(torch.tensor([0, 49])),
        lambda: tape.add(torch.tensor([49]), values[:1]),
    ):
        with pytest.raises(OutputError, match="tape is shorter than it was"):
            read()


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_a_disk_that_fails_under_the_tape(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape.create(tmp_path / "tape", 4, 4)

    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OutputError, match=r"cannot (read|write) .*tape: Input/output error"):
        tape.add(torch.tensor([1]), torch.ones(1, 4))


class Counted:
    """How often each file is opened for tensors, parsed and hashed, and weights are dequantized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parsed, self.opened, self.hashed, self.dequantized = Counter[Path](), Counter[Path](), Counter[Path](), 0
        headers, opens, digest, dequantize = shard.read_header, OpenShard.__init__, atomic.sha256, QuantizedTensor.dequantize

        def parse(path: Path) -> Any:
            self.parsed[path] += 1
            return headers(path)

        def opening(file: OpenShard, path: Path) -> None:
            self.opened[path] += 1
            opens(file, path)

        def hashing(path: Path) -> str:
            self.hashed[path] += 1
            return digest(path)

        def value(q: QuantizedTensor) -> torch.Tensor:
            self.dequantized += 1
            return dequantize(q)

        monkeypatch.setattr(reader, "read_header", parse)
        monkeypatch.setattr(OpenShard, "__init__", opening)
        monkeypatch.setattr(QuantizedTensor, "dequantize", value)
        for module in (atomic, folder, verify_module, pipeline):
            monkeypatch.setattr(module, "sha256", hashing)


def test_verify_reads_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each header is parsed once, each file hashed once, each weight dequantized once; a shard is opened for its header, for
    its tensors, and not for each of them."""
    monkeypatch.setattr(build, "rowwise", lambda: "not here: it dequantizes within")
    record = quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32))
    counted = Counted(monkeypatch)
    report = verify(tmp_path / "out", model)
    shards = {*model.glob("*.safetensors"), *(tmp_path / "out").glob("*.safetensors")}
    assert counted.parsed == dict.fromkeys(shards, 1)
    assert {counted.opened[path] for path in shards} == {2}
    assert {path: n for path, n in counted.hashed.items() if path.parent != model} == {
        path: 1 for path in (tmp_path / "out").iterdir() if path.name not in ("run.json", "SHA256SUMS")
    }
    assert not {path for path in counted.hashed if path.parent == model and path.suffix == ".safetensors"}
    assert counted.dequantized == len(record["linears"]) == report.linears


def test_rounding_without_calibration_dequantizes_for_the_stated_error_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is hashed when it is committed and once more when it is read again to be verified."""
    monkeypatch.setattr(build, "rowwise", lambda: "not here: it dequantizes within")
    counted = Counted(monkeypatch)
    monkeypatch.setattr(pipeline, "verify", lambda *_: None)
    record = quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32))
    assert counted.dequantized == len(record["linears"]) > 0
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out")
    counted = Counted(monkeypatch)
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32))
    written = {path.name: n for path, n in counted.hashed.items() if path.suffix == ".safetensors"}
    assert len(written) == 3 and {*written.values()} == {2}


def test_a_tensor_is_looked_at_in_pieces(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its exponents, without a copy of an embedding in a wider dtype."""
    opened, sizes, plain = CheckpointReader(model), list[int](), torch.Tensor.amax
    monkeypatch.setattr(finite, "_AT_ONCE", 1000)
    monkeypatch.setattr(torch.Tensor, "amax", lambda x, **how: sizes.append(x.numel()) or plain(x, **how))
    embedding = opened.tensor("model.embed_tokens.weight")
    assert embedding.numel() == sum(sizes) > max(sizes) == 1000
