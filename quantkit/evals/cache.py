"""The baseline's results on disk, so that many candidates are compared with it for the price of one run.

Kept for each batch: the hidden state after the last layer (float32 [tokens, hidden]; the head gives back the very logits,
in a twentieth of their size at usual vocabularies) and the experts chosen in each layer (int16 [tokens, k]).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from quantkit.errors import CheckpointError
from quantkit.evals.schema import METRICS_VERSION
from quantkit.formats.atomic import disk_errors, write_bytes
from quantkit.journal import code_digest

__all__ = ["BaselineCache", "BaselineRun"]


@dataclass
class BaselineRun:
    """The baseline on the scored tokens of one batch: hidden float32 [n, hidden]; experts int64 [n, k] by MoE layer."""

    hidden: Tensor
    experts: dict[int, Tensor]


class BaselineCache:
    """Batches under folder/key. The key holds all that decides the numbers: weights and windows, by digest, the split,
    versions, quantkit's own code, the device."""

    def __init__(self, folder: Path, model: str, windows: str, batch: int, device: torch.device) -> None:
        said = f"{model} {windows} {batch} {METRICS_VERSION} {code_digest()} {torch.__version__} {device}"
        said += f" {torch.get_num_threads()}"
        self.folder, self.device = folder / hashlib.sha256(said.encode()).hexdigest()[:24], device
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, start: int) -> Path:
        return self.folder / f"windows-{start:06d}.safetensors"

    def get(self, start: int) -> BaselineRun | None:
        """The batch that begins with window `start`, if it is there. Raises CheckpointError when it is damaged."""
        path = self._path(start)
        if not path.is_file():
            return None
        try:
            tensors = load_file(path, device=str(self.device))
            hidden = tensors.pop("hidden")
            return BaselineRun(hidden, {int(name): experts.long() for name, experts in tensors.items()})
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"cached baseline {path} is damaged: {error}", f"remove {self.folder}") from error

    def put(self, start: int, run: BaselineRun) -> None:
        tensors = {str(layer): experts.short().cpu().contiguous() for layer, experts in run.experts.items()}
        write_bytes(self._path(start), save({"hidden": run.hidden.cpu().contiguous(), **tensors}))

    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
