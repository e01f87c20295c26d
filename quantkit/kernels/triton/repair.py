"""GPTQ's inner loop as one launch: a block of columns is rounded one after the other, and the block's later ones repaired.

Done with torch it is some 27 small operations a column. Here a program keeps its rows of the block in registers, and the
arithmetic is that of `quantkit.quant.gptq`, step by step and without contraction, so that the codes are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.checks import check, cut
from quantkit.kernels.triton.activation import to_float8
from quantkit.kernels.triton.lang import kernel_of, on_device, tl
from quantkit.scheme import Grid, Kind

__all__ = ["MOST", "repair", "repair_kernel"]

MOST = 128  # columns of a block
ROWS = 16  # of a program: 16 values of the block a thread, with 128 threads


@kernel_of("START", "WIDTH")
def repair_kernel(
    weight: tl.tensor,
    factor: tl.tensor,
    step: tl.tensor,
    offset: tl.tensor,
    codes: tl.tensor,
    errors: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    START: tl.tensor,
    WIDTH: tl.tensor,
    DOWN: tl.tensor,
    ALONG: tl.tensor,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FLOAT: tl.constexpr,
    ASYM: tl.constexpr,
) -> None:
    """weight, step, offset, codes [N, K] and factor [K, K] (its strides are DOWN and ALONG) at the columns START to
    START + WIDTH; errors [N, WIDTH]."""
    row, at = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    live, column = row < N, START + at.to(tl.int64)
    line = tl.minimum(row, N - 1).to(tl.int64) * K
    left = tl.load(weight + line[:, None] + column[None, :], mask=(at < WIDTH)[None, :], other=0.0)
    for i in range(WIDTH):
        here = START + tl.cast(i, tl.int64)
        w = tl.sum(tl.where((at == i)[None, :], left, 0.0), 1)
        s = tl.load(step + line + here)
        if FLOAT:
            # The value is not read back from the code: on an H100 Triton 3.6 gives half of the rows another one.
            y = to_float8(tl.minimum(tl.maximum(tl.div_rn(w, s), LOW), HIGH))
            code, value = y.to(tl.float8e4nv), y * s
        else:
            # Adding 1.5 * 2^23 rounds; what is far beyond the grid is cut before, where that would not be exact.
            y = (tl.minimum(tl.maximum(tl.div_rn(w, s), -4096.0), 4096.0) + 12582912.0) - 12582912.0
            z = tl.load(offset + line + here) if ASYM else 0.0
            y = tl.minimum(tl.maximum(y + z, LOW), HIGH)
            code, value = y.to(tl.int8), (y - z) * s
        tl.store(codes + line + here, code, mask=live)
        e = tl.div_rn(w - value, tl.load(factor + here * (DOWN + ALONG)))
        u = tl.load(factor + here * DOWN + column * ALONG, mask=(at >= i) & (at < WIDTH), other=0.0)
        left -= e[:, None] * u[None, :]
        tl.store(errors + row.to(tl.int64) * WIDTH + i, e, mask=live)


def repair(
    weight: Tensor, factor: Tensor, step: Tensor, offset: Tensor | None, codes: Tensor, start: int, stop: int, grid: Grid
) -> Tensor:
    """Rounds the columns from start to stop, at most MOST, into `codes`; their errors, float32 [out, stop - start].

    weight, step, offset: float32 [out, in]. factor: float32 [in, in], upper. codes: int8 or float8_e4m3fn [out, in]. All in
    the order in which columns are visited. weight is not changed. Raises ValueError.
    """
    rows, columns = weight.shape
    check(0 < stop - start <= MOST and stop <= columns, f"columns {start} to {stop} are no block of {columns}")
    inputs = [t for t in (weight, factor, step, offset) if t is not None]
    check(all(t.dtype is torch.float32 for t in inputs), f"inputs are {sorted({str(t.dtype) for t in inputs})}, not float32")
    check(factor.shape == (columns, columns), f"the factor is {tuple(factor.shape)}, not [{columns}, {columns}]")
    check(all(t.shape == (rows, columns) for t in (codes, step)), "codes or step do not fit the weight")
    on_device(weight, step, offset, codes)  # the factor comes transposed out of its factorisation
    check(factor.device == weight.device, f"the factor lies on {factor.device}, the weight on {weight.device}")
    errors = torch.empty(rows, stop - start, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(weight):
        repair_kernel[(cut(rows, ROWS),)](
            *(weight, factor, step, step if offset is None else offset, codes, errors),
            *(rows, columns, start, stop - start, *factor.stride()),
            BN=ROWS,
            BK=MOST,
            LOW=float(grid.qmin),
            HIGH=float(grid.qmax),
            FLOAT=grid.kind is Kind.FLOAT,
            ASYM=offset is not None,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return errors
