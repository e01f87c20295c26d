"""`quantkit bench`: how fast this machine's kernels multiply a model's matrices, beside BF16 and beside the roofline.

The roofline is measured in the same run: the bandwidth of summing a buffer larger than any cache, and the arithmetic of a
large BF16 product. A kernel cannot be faster than the longer of (bytes / bandwidth) and (operations / arithmetic). A weight
that fits a cache may stay in it between its turns, and then beat this; matrices of the large models do not fit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from quantkit.errors import ConfigError
from quantkit.host import pick_device
from quantkit.kernels import dispatch
from quantkit.kernels.reference import linear
from quantkit.qtensor import QuantizedTensor
from quantkit.run.model import Model
from quantkit.scheme import Kind, Scheme, scheme_named

__all__ = ["SHAPES", "Matrix", "bench", "counts", "matrices_of", "random_weight", "roofline", "selected", "timed"]


@dataclass(frozen=True)
class Matrix:
    """One kind of linear: what it is, [out_features, in_features], and its scheme."""

    name: str
    out_features: int
    in_features: int
    scheme: Scheme


SHAPES: dict[str, list[tuple[str, int, int]]] = {
    "hunyuan-large": [("q, o", 6400, 6400), ("gate, up", 18304, 6400), ("down", 6400, 18304)],
    "hunyuan-a13b": [("q, o", 4096, 4096), ("gate, up", 3072, 4096), ("down", 4096, 3072)],
    "mixtral-8x22b": [("q, o", 6144, 6144), ("gate, up", 16384, 6144), ("down", 6144, 16384)],
    "deepseek-v2": [("o", 5120, 16384), ("gate, up", 1536, 5120), ("down", 5120, 1536)],
}


def random_weight(scheme: Scheme, rows: int, inputs: int, device: torch.device | str = "cpu") -> QuantizedTensor:
    """Random codes [rows, inputs] and scales: time does not depend on them."""
    grid = scheme.weight
    shape = grid.scale_shape(rows, inputs)
    low, high = int(grid.qmin), int(grid.qmax) + 1
    codes = torch.randint(low, high, (rows, inputs), dtype=torch.int16, device=device)
    typed = codes.float().to(torch.float8_e4m3fn) if grid.kind is Kind.FLOAT else codes.to(torch.int8)
    scale = torch.rand(shape, device=device).add_(0.5).bfloat16()
    zero = None if grid.symmetric else torch.randint(low, high, shape, dtype=torch.int8, device=device)
    input_scale = torch.full((1,), 0.01, device=device).bfloat16() if scheme.static else None
    return QuantizedTensor(typed, scale, zero, grid, input_scale)


def matrices_of(model: Model) -> list[Matrix]:
    """The different quantized matrices of a checkpoint, by role, name, shape and scheme."""
    matrices: dict[Matrix, None] = {}
    for ref in model.spec.linears():
        scheme = model.weights.schemes[ref.key]
        if scheme is not None:
            name = f"{ref.role.value} {ref.key.rsplit('.', 1)[-1]}"
            matrices[Matrix(name, ref.out_features, ref.in_features, scheme)] = None
    return list(matrices)


def timed(
    run: Mapping[str, Callable[[int], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of each contender in each round, which all get in random order, so that load from elsewhere meets all alike.

    A turn is two calls, with the numbers 2 * round and 2 * round + 1, and the second counts: by then the threads of the
    contender before have gone to sleep, and its own are awake, as they are while a model runs.
    """
    order, names = random.Random(0), list(run)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        order.shuffle(names)
        for name in names:
            run[name](2 * i)
            start = clock()
            run[name](2 * i + 1)
            measured[name].append(clock() - start)
    return {name: np.array(values) for name, values in measured.items()}


def _finish(device: torch.device, call: Callable[[], object], _: int) -> None:
    """Call, and wait until the device has done it."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def roofline(rounds: int, device: torch.device) -> tuple[float, float]:
    """(bytes per second read from memory, BF16 operations per second) of this device now."""
    size = 2048 if device.type == "cpu" else 8192
    buffer, square = torch.ones(2**26, dtype=torch.int64, device=device), torch.randn(size, size, device=device).bfloat16()
    run: dict[str, Callable[[], object]] = {"read": buffer.sum, "multiply": lambda: square @ square}
    seconds = timed({name: partial(_finish, device, call) for name, call in run.items()}, rounds)
    return buffer.numel() * 8 / float(seconds["read"].min()), 2 * size**3 / float(seconds["multiply"].min())


def selected(path: Path | None, shape: str | None, scheme: str | None) -> list[Matrix]:
    """The matrices of a checkpoint, or of a known model in a scheme (W4A16 unless told). Raises ConfigError."""
    if path is not None:
        if shape is not None or scheme is not None:
            raise ConfigError(
                f"{path} has shapes and schemes of its own", "leave out --shape and --scheme, or the checkpoint"
            )
        return matrices_of(Model(path, torch.device("cpu")))
    if shape not in SHAPES:
        problem = "nothing to measure is given" if shape is None else f"unknown --shape '{shape}'"
        raise ConfigError(problem, f"give a checkpoint, or --shape with one of {', '.join(SHAPES)}")
    preset = scheme_named(scheme or "W4A16")
    if preset is None:
        raise ConfigError("--scheme BF16 has no kernel to measure", "choose another scheme")
    return [Matrix(name, out, inputs, preset) for name, out, inputs in SHAPES[shape]]


def counts(option: str, text: str) -> list[int]:
    """The numbers of an option with commas between. Raises ConfigError."""
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal() and int(part) > 0]
    if len(numbers) != text.count(",") + 1:
        raise ConfigError(f"{option} {text!r}", "give positive numbers with commas between, such as 1,16,256")
    return numbers


def bench(
    matrices: Iterable[Matrix], tokens: list[int], rounds: int = 20, device: str = "cpu", kernels: str = "auto"
) -> list[dict[str, Any]]:
    """One row for each matrix and token count: the kernel that dispatch chooses beside BF16, microseconds and ratios.

    kernels: as for `runtime.load`. Raises ConfigError when there is nothing to measure or a matrix does not fit its scheme.
    """
    place = pick_device(device)
    bandwidth, arithmetic = roofline(rounds, place)
    rows = []
    for matrix in matrices:
        if problem := matrix.scheme.misfit(matrix.out_features, matrix.in_features):
            raise ConfigError(f"{matrix.name} cannot take {matrix.scheme.name}: {problem}", "choose another scheme")
        shape = matrix.out_features, matrix.in_features
        q = random_weight(matrix.scheme, *shape, place)
        choice = dispatch.choose(matrix.scheme, shape, place, dispatch.OPTIONS[kernels])
        activation = matrix.scheme.activation
        product = (
            choice.backend.linear(q, matrix.scheme) if choice.backend else partial(linear, weight=q, activation=activation)
        )
        plain = torch.randn(shape, device=place).bfloat16()
        size = matrix.scheme.bits_per_weight(*q.shape) / 8 * q.codes.numel()
        for count in tokens:
            x = torch.randn(count, matrix.in_features, device=place).bfloat16()
            run = {"kernel": partial(product, x), "bf16": partial(F.linear, x, plain)}
            seconds = timed({name: partial(_finish, place, call) for name, call in run.items()}, rounds)
            operations = 2.0 * count * q.codes.numel()
            rows.append(_row(matrix, choice.kernel, count, seconds, size, operations, bandwidth, arithmetic))
    if not rows:
        raise ConfigError("there is no quantized linear to measure", "give a quantized checkpoint, or --shape")
    return rows


def _row(
    matrix: Matrix,
    kernel: str,
    tokens: int,
    seconds: dict[str, np.ndarray[Any, Any]],
    size: float,
    operations: float,
    bandwidth: float,
    arithmetic: float,
) -> dict[str, Any]:
    p20, median, p80 = np.quantile(seconds["kernel"], (0.2, 0.5, 0.8))
    return {
        "matrix": matrix.name,
        "shape": [matrix.out_features, matrix.in_features],
        "scheme": matrix.scheme.name,
        "kernel": kernel,
        "tokens": tokens,
        "microseconds": {"median": median * 1e6, "p20": p20 * 1e6, "p80": p80 * 1e6},
        "gb_per_s": size / median / 1e9,
        "tflop_per_s": operations / median / 1e12,
        "of_roofline": max(size / bandwidth, operations / arithmetic) / median,
        "of_bf16": float(np.median(seconds["bf16"])) / median,
    }
