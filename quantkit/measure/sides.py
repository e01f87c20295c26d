"""Two checkpoints on disk, side by side through the one loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import torch

from quantkit.calib.lockstep import Lockstep, Observer, Pair
from quantkit.errors import OutputError
from quantkit.run.model import Model

__all__ = ["side_by_side"]


@contextmanager
def _names_the_folder() -> Iterator[None]:
    try:
        yield
    except OutputError as error:
        fix = f"free space, or set TMPDIR to a folder on a larger disk (now {gettempdir()})"
        raise OutputError(error.problem, fix) from error


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
    with TemporaryDirectory(prefix="quantkit-eval-") as folder, _names_the_folder():
        lockstep = Lockstep(pair, Path(folder), observers)
        lockstep.embed()
        for layers in base.spec.groups():
            lockstep.run(layers)
            if progress:
                progress(layers[-1].index + 1, len(base.spec.layers))
        lockstep.finish()
