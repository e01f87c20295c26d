"""GPTQ's inner loop as one launch: a block of columns is rounded one after the other, and the block's later ones repaired.

Done with torch it is a dozen small operations a column. Here a program keeps its rows of the block in registers, and the
arithmetic is that of `quantkit.quant.loops`, step by step and without contraction, so that the codes are the same.
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


@kernel_of("WIDTH")
def repair_kernel(
    left: tl.tensor,
    weight: tl.tensor,
    ratios: tl.tensor,
    squares: tl.tensor,
    step: tl.tensor,
    offset: tl.tensor,
    codes: tl.tensor,
    errors: tl.tensor,
    lost: tl.tensor,
    N: tl.tensor,
    WIDTH: tl.tensor,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FLOAT: tl.constexpr,
    ASYM: tl.constexpr,
) -> None:
    """left, weight, step, offset, codes, errors [WIDTH, N]; ratios [WIDTH, WIDTH]; squares [WIDTH]; lost [N]."""
    row, at = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    live = row < N
    row = tl.minimum(row, N - 1).to(tl.int64)
    block = tl.load(left + at[None, :].to(tl.int64) * N + row[:, None], mask=(at < WIDTH)[None, :], other=0.0)
    sum = tl.zeros([BN], tl.float32)
    for done in range(WIDTH):
        i = WIDTH - 1 - done
        here = tl.cast(i, tl.int64) * N + row
        w = tl.sum(tl.where((at == i)[None, :], block, 0.0), 1)
        s = tl.load(step + here)
        if FLOAT:
            # The value is not read back from the code: on an H100 Triton 3.6 gives half of the rows another one.
            y = to_float8(tl.minimum(tl.maximum(tl.div_rn(w, s), LOW), HIGH))
            code, value = y.to(tl.float8e4nv), y * s
        else:
            # Adding 1.5 * 2^23 rounds; what is far beyond the grid is cut before, where that would not be exact.
            y = (tl.minimum(tl.maximum(tl.div_rn(w, s), -4096.0), 4096.0) + 12582912.0) - 12582912.0
            z = tl.load(offset + here) if ASYM else 0.0
            y = tl.minimum(tl.maximum(y + z, LOW), HIGH)
            code, value = y.to(tl.int8), (y - z) * s
        tl.store(codes + here, code, mask=live)
        tl.store(left + here, w, mask=live)
        e, r = tl.load(weight + here) - value, w - value
        sum += (r * r) * tl.load(squares + i)
        block += tl.load(ratios + at * WIDTH + i, mask=at < i, other=0.0)[None, :] * e[:, None]
        tl.store(errors + here, e, mask=live)
    tl.store(lost + row, sum, mask=live)


def repair(
    left: Tensor, weight: Tensor, factor: Tensor, step: Tensor, offset: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantkit.quant.loops.repair` of at most MOST columns: codes, errors and lost; left becomes what was rounded.

    left, weight, step, offset: float32 [columns, rows], contiguous. factor: float32 [columns, columns], upper. Raises
    ValueError.
    """
    columns, rows = left.shape
    check(0 < columns <= MOST and rows > 0, f"{columns} columns of {rows} rows are no block: it has 1 to {MOST}")
    inputs = [t for t in (left, weight, factor, step, offset) if t is not None]
    check(all(t.dtype is torch.float32 for t in inputs), f"inputs are {sorted({str(t.dtype) for t in inputs})}, not float32")
    check(factor.shape == (columns, columns), f"the factor is {tuple(factor.shape)}, not [{columns}, {columns}]")
    check(all(t.shape == left.shape for t in inputs if t is not factor), "step, offset or weight do not fit what is left")
    diagonal = factor.diagonal()
    ratios, squares = factor / diagonal[:, None], diagonal * diagonal
    on_device(left, weight, step, offset, ratios, squares)
    codes = torch.empty(left.shape, dtype=torch.float8_e4m3fn if grid.kind is Kind.FLOAT else torch.int8, device=left.device)
    errors, lost = torch.empty_like(left), left.new_empty(rows)
    with torch.cuda.device_of(left):
        repair_kernel[(cut(rows, ROWS),)](
            *(left, weight, ratios, squares, step, step if offset is None else offset, codes, errors, lost, rows, columns),
            BN=ROWS,
            BK=MOST,
            LOW=float(grid.qmin),
            HIGH=float(grid.qmax),
            FLOAT=grid.kind is Kind.FLOAT,
            ASYM=offset is not None,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return codes, errors, lost
