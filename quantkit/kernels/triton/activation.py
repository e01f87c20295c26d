"""Activations rounded to 8 bits, as quantkit.kernels.reference.round_activation defines them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.checks import check
from quantkit.kernels.triton.lang import OPTIONS, jit, on_device, simulated, tl
from quantkit.scheme import Activation, Kind, Strategy

__all__ = ["quantize", "quantize_kernel"]

REACH = {Kind.FLOAT: 448.0, Kind.INT: 127.0}


@jit
def to_float8(y: tl.tensor) -> Any:
    """float32 within +-448 -> the nearest value of float8 e4m3fn, ties to even, still float32: normal numbers by carrying
    into the 3 bits kept, the others (below 2^-6) to multiples of 2^-9."""
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(y) < 0.015625, (y + 24576.0) - 24576.0, normal)


@jit
def to_code(x: tl.tensor, scale: tl.tensor, REACH: tl.constexpr, FLOAT: tl.constexpr, SIM: tl.constexpr) -> Any:
    """float32 -> the nearest code, ties to even, saturated.

    The interpreter's float8 conversion loses the carry into the next power of two, so SIM rounds beforehand.
    """
    y = tl.minimum(tl.maximum(tl.div_rn(x, scale), -REACH), REACH)
    if FLOAT:
        if SIM:
            y = to_float8(y)
        code = y.to(tl.float8e4nv)
    else:
        code = ((y + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23 leaves no fraction bits: adding it rounds
    return code


@jit
def quantize_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    input_scales: tl.tensor,
    LENGTH: tl.tensor,
    TOPK: tl.tensor,
    REACH: tl.constexpr,
    FLOAT: tl.constexpr,
    STATIC: tl.constexpr,
    BK: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """One program a row of codes [rows, LENGTH]: the largest magnitude of row / TOPK of x (STATIC: input_scales [rows]),
    then its codes."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BK)
    x += row // TOPK * LENGTH
    if STATIC:
        scale = tl.load(input_scales + row)
    else:
        top = tl.zeros((BK,), tl.float32)
        for k in range(0, LENGTH, BK):
            v = tl.load(x + k + at, mask=k + at < LENGTH, other=0.0).to(tl.float32)
            top = tl.maximum(top, tl.abs(v))
        amax = tl.max(top, 0)
        scale = tl.where(amax > 0.0, tl.div_rn(amax, REACH), 1.0)
    tl.store(scales + row, scale)
    for k in range(0, LENGTH, BK):
        v = tl.load(x + k + at, mask=k + at < LENGTH, other=0.0).to(tl.float32)
        tl.store(codes + row * LENGTH + k + at, to_code(v, scale, REACH, FLOAT, SIM), mask=k + at < LENGTH)


def quantize(x: Tensor, activation: Activation, input_scales: Tensor | None = None, top_k: int = 1) -> tuple[Tensor, Tensor]:
    """x bfloat16 or float32 [tokens, in] -> codes [rows, in] and float32 scales [rows, 1 or in / group_size].

    Codes are float8_e4m3fn or int8. Dynamic: a row for each token, a scale for it or for each group of its features.
    Static: rows = tokens * top_k, each rounded with its own scale in input_scales, float32 [rows]. Raises ValueError.
    """
    check(x.ndim == 2, f"x is {tuple(x.shape)}, not [tokens, in]")
    check(x.dtype in (torch.bfloat16, torch.float32), f"x is {x.dtype}, not bfloat16 or float32")
    rows = x.shape[0] * top_k
    if activation.dynamic:
        check(input_scales is None and top_k == 1, "a dynamic activation has one scale of its own for each token")
    else:
        right = input_scales is not None and input_scales.shape == (rows,) and input_scales.dtype is torch.float32
        check(right, f"a static activation needs a float32 input scale for each of {rows} rows")
    floats = activation.kind is Kind.FLOAT
    length = activation.group_size if activation.strategy is Strategy.GROUP else x.shape[1]
    check(bool(length) and x.shape[1] % (length or 1) == 0, f"{x.shape[1]} features are not whole groups of {length}")
    assert length
    x = x.contiguous()
    on_device(x, input_scales)
    codes = torch.empty(rows, x.shape[1], dtype=torch.float8_e4m3fn if floats else torch.int8, device=x.device)
    scales = torch.empty(rows, x.shape[1] // length, dtype=torch.float32, device=x.device)
    if rows == 0:
        return codes, scales
    block = 128 if length <= 128 else 256 if simulated() else 1024
    with torch.cuda.device_of(x):
        quantize_kernel[(scales.numel(),)](
            *(x, codes, scales, scales if input_scales is None else input_scales, length, top_k),
            REACH=REACH[activation.kind],
            FLOAT=floats,
            STATIC=not activation.dynamic,
            BK=block,
            SIM=simulated(),
            num_warps=1 if block == 128 else 4,
            **OPTIONS,
        )
    return codes, scales
