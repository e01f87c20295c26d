"""The baseline's results on disk, so that many candidates are compared with it for the price of one run.

Kept for each batch: the hidden state after the last layer (float32 [tokens, hidden]; the head gives back the very logits,
in a twentieth of their size at usual vocabularies) and the experts chosen in each layer (int16 [tokens, k]). A manifest
beside them holds the digest of each batch; one that it does not name counts as not written.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from quantkit.atomic import disk_errors, write_bytes
from quantkit.checkpoint.reader import load_json
from quantkit.errors import CheckpointError
from quantkit.host import arithmetic, code_digest
from quantkit.report.schema import METRICS_VERSION

__all__ = ["BaselineCache", "BaselineRun"]

# Modules whose code decides the baseline's hidden states.
DECISIVE = (
    *("calib.lockstep", "calib.streams", "checkpoint", "dtypes", "formats", "host", "kernels.reference", "measure.run"),
    *("model", "qtensor", "run", "scheme"),
)


@dataclass
class BaselineRun:
    """The baseline on the scored tokens of one batch: hidden float32 [n, hidden]; experts int64 [n, k] by MoE layer."""

    hidden: Tensor
    experts: dict[int, Tensor]


class BaselineCache:
    """Batches under folder/key. The key holds all that decides the numbers: weights and windows, by digest, the split, the
    code, the machine's arithmetic and its threads."""

    def __init__(self, folder: Path, model: str, windows: str, batch: int, device: torch.device) -> None:
        key = [model, windows, batch, METRICS_VERSION, code_digest(DECISIVE), arithmetic(device), torch.get_num_threads()]
        self.folder, self.device = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24], device
        self._manifest = self.folder / "manifest.json"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def _name(self, start: int) -> str:
        return f"windows-{start:06d}.safetensors"

    def _known(self) -> dict[str, str]:
        """sha256 of each batch, by name."""
        try:
            return load_json(self._manifest) if self._manifest.exists() else {}
        except CheckpointError as error:
            raise CheckpointError(f"cached baseline: {error.problem}", f"remove {self.folder}") from error

    def has(self, start: int) -> bool:
        """Whether the batch that begins with window `start` is there."""
        return self._name(start) in self._known() and (self.folder / self._name(start)).is_file()

    def get(self, start: int) -> BaselineRun | None:
        """The batch that begins with window `start`, if it is there. Raises CheckpointError when it is damaged."""
        path, digest = self.folder / self._name(start), self._known().get(self._name(start))
        if digest is None or not path.is_file():
            return None
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"cached baseline {path} is damaged: it is no longer what was written", f"remove {path}")
        tensors = {name: tensor.to(self.device) for name, tensor in load(data).items()}
        hidden = tensors.pop("hidden")
        return BaselineRun(hidden, {int(name): experts.long() for name, experts in tensors.items()})

    def put(self, start: int, run: BaselineRun) -> None:
        tensors = {str(layer): experts.short().cpu().contiguous() for layer, experts in run.experts.items()}
        data = save({"hidden": run.hidden.cpu().contiguous(), **tensors})
        write_bytes(self.folder / self._name(start), data)
        # Another evaluation that writes here too may overwrite this entry with one like it; a lost one is computed again.
        hashes = {**self._known(), self._name(start): hashlib.sha256(data).hexdigest()}
        write_bytes(self._manifest, json.dumps(hashes, indent=1).encode() + b"\n")

    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
