"""Two checkpoints on disk, side by side through the one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from quantkit.calib.lockstep import Lockstep, Observer, Pair
from quantkit.run.model import Model

__all__ = ["side_by_side"]


@torch.inference_mode()
def side_by_side(
    models: Sequence[Model], observers: Sequence[Observer], progress: Callable[[int, int], None] | None = None
) -> None:
    """models: baseline, quantized; each of their weights is read once. progress: (layers done, layers in all)."""
    base, quant = models

    def release() -> None:
        for model in models:
            model.weights.release()

    pair = Pair(base.spec, base.weights, quant.weights, quant.weights.schemes, base.device, release)
    with TemporaryDirectory(prefix="quantkit-eval-") as folder:
        lockstep = Lockstep(pair, Path(folder), observers)
        lockstep.embed()
        for layers in base.spec.groups():
            lockstep.run(layers)
            if progress:
                progress(layers[-1].index + 1, len(base.spec.layers))
        lockstep.finish()
