"""Attention of one new position over a long cache, in the cache's dtype: grouped queries, and latents with absorbed kv_b.

Positions are cut into spans, each a program for one key head with all query heads that share it; what they leave is merged
(flash decoding, Dao et al. 2023). How many positions are held is read on the device, so that a captured graph serves every
length of its bucket. A cache's FP8 scale belongs to a position, so it multiplies scores and probabilities, never elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.checks import check, cut
from quantkit.kernels.triton.lang import OPTIONS, jit, kernel_of, on_device, simulated, tl

__all__ = ["SPAN", "by_torch", "decode_attention", "merge_kernel", "span_kernel", "warps"]

SPAN = 256  # positions of a program
_STEP = 32  # of them read at once
_ROWS = 16  # query heads of a program: the smallest operand of a tensor core


@jit
def _dot(a: tl.tensor, b: tl.tensor, SIM: tl.constexpr) -> Any:
    """a times codes b, in float32 sums; products of bfloat16 but in the interpreter, and where b is float32."""
    if SIM or b.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))


@kernel_of("ROOM", "KV", "SPANS", "ROWS")
def span_kernel(
    q: tl.tensor,
    key: tl.tensor,
    key_scale: tl.tensor,
    value: tl.tensor,
    value_scale: tl.tensor,
    q_more: tl.tensor,
    key_more: tl.tensor,
    more_scale: tl.tensor,
    padding: tl.tensor,
    length: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    ROOM: tl.tensor,
    KV: tl.tensor,
    SPANS: tl.tensor,
    ROWS: tl.tensor,
    D: tl.constexpr,
    DV: tl.constexpr,
    DM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    LONG: tl.constexpr,
    SCALED: tl.constexpr,
    PADDED: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """q [groups, ROWS, D] and, where DM, q_more [groups, ROWS, DM], times the scale; key [groups, ROOM, D], value [groups,
    ROOM, DV], key_more [groups, ROOM, DM]; scales [groups, ROOM]. groups are batch * KV. Leaves sums [groups, SPANS, ROWS,
    DV], and [groups, SPANS, ROWS] of the largest score and the total."""
    group, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.program_id(2) * BR + tl.arange(0, BR)
    d, v, m = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BM)
    positions = tl.load(length)
    begin = tl.load(padding + group // KV).to(tl.int32) if PADDED else 0
    begin = tl.minimum(begin, positions - 1)  # a padded position still sees itself
    rows = (group * ROWS + row)[:, None]
    live = (row < ROWS)[:, None]
    of_q = tl.load(q + rows * D + d[None, :], mask=live & (d < D)[None, :], other=0.0)
    if DM:
        of_more = tl.load(q_more + rows * DM + m[None, :], mask=live & (m < DM)[None, :], other=0.0)
    top = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BV), tl.float32)
    for start in range(span * LONG, tl.minimum((span + 1) * LONG, positions), BN):
        at = start + tl.arange(0, BN)
        there, visible = at < positions, (at < positions) & (at >= begin)
        place = group * ROOM + at
        keys = tl.load(key + place[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        scores = _dot(of_q, tl.trans(keys), SIM)
        if SCALED:
            scores *= tl.load(key_scale + place, mask=there, other=0.0).to(tl.float32)[None, :]
        if DM:
            more = tl.load(key_more + place[:, None] * DM + m[None, :], mask=there[:, None] & (m < DM)[None, :], other=0.0)
            other = _dot(of_more, tl.trans(more), SIM)
            if SCALED:
                other *= tl.load(more_scale + place, mask=there, other=0.0).to(tl.float32)[None, :]
            scores += other
        scores = tl.where(visible[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp(scores - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(p, 1)
        if SCALED:
            p *= tl.load(value_scale + place, mask=there, other=0.0).to(tl.float32)[None, :]
        values = tl.load(value + place[:, None] * DV + v[None, :], mask=there[:, None] & (v < DV)[None, :], other=0.0)
        acc = acc * shrink[:, None] + _dot(p, values, SIM)
        top = highest
    out = (group * SPANS + span) * ROWS + row
    tl.store(sums + out[:, None] * DV + v[None, :], acc, mask=live & (v < DV)[None, :])
    tl.store(tops + out, top, mask=row < ROWS)
    tl.store(totals + out, total, mask=row < ROWS)


@kernel_of("SPANS", "ROWS")
def merge_kernel(
    sums: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    length: tl.tensor,
    out: tl.tensor,
    SPANS: tl.tensor,
    ROWS: tl.tensor,
    DV: tl.constexpr,
    BV: tl.constexpr,
    LONG: tl.constexpr,
) -> None:
    """One program a row of out [groups, ROWS, DV]: the spans that hold something, weighted by what they saw."""
    group, row, v = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BV)
    spans = (tl.load(length) + LONG - 1) // LONG
    top = float("-inf")
    for span in range(spans):
        top = tl.maximum(top, tl.load(tops + (group * SPANS + span) * ROWS + row))
    total = 0.0
    acc = tl.zeros((BV,), tl.float32)
    for span in range(spans):
        at = (group * SPANS + span) * ROWS + row
        share = tl.exp(tl.load(tops + at) - top)
        total += share * tl.load(totals + at)
        acc += share * tl.load(sums + at * DV + v, mask=v < DV, other=0.0)
    tl.store(out + (group * ROWS + row) * DV + v, acc / total, mask=v < DV)


def decode_attention(
    q: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    length: Tensor,
    scale: float,
    padding: Tensor | None = None,
    more: tuple[Tensor, Sequence[Tensor]] | None = None,
    bucket: int | None = None,
) -> Tensor:
    """Softmax attention of one position, the last of those held: float32 [batch, heads, width of value].

    q: float [batch, heads, d]. key, value: a cache's codes [batch, kv_heads, room, width] in float32, bfloat16 or E4M3, and
    for the last scales [batch, kv_heads, room, 1]. length: int32 [1] on the device, positions held. padding: int64 [batch].
    more: a second part of query and key, whose products are added (latent attention's rotated part). bucket: positions that
    the launch is made for, at most the room; length must not be above it. Raises ValueError.
    """
    (codes, *scales), (values, *value_scales) = key, value
    batch, heads, d = q.shape
    kv_heads, room, dv = codes.shape[1], codes.shape[2], values.shape[3]
    rows, bucket = heads // kv_heads, room if bucket is None else bucket
    check(heads % kv_heads == 0 and codes.shape[3] == d, f"q {tuple(q.shape)} does not fit keys {tuple(codes.shape)}")
    check(bucket <= room, f"a bucket of {bucket} positions is above the room for {room}")
    check(
        length.dtype is torch.int32 and length.numel() == 1, f"length is {length.dtype} {tuple(length.shape)}, not int32 [1]"
    )
    type_of_q = torch.float32 if simulated() or codes.dtype is torch.float32 else torch.bfloat16

    def ready(part: Tensor) -> Tensor:
        return (part.float() * scale).to(type_of_q).contiguous()

    q_more, (more_codes, *more_scales) = (q, key) if more is None else more
    of_q, of_more = ready(q), ready(q_more)
    on_device(of_q, of_more, codes, values, more_codes, length, *scales, *value_scales, *more_scales)
    spans, groups = cut(bucket, SPAN), batch * kv_heads
    sums = torch.empty(groups, spans, rows, dv, dtype=torch.float32, device=q.device)
    tops, totals = (torch.empty(groups, spans, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty(batch, heads, dv, dtype=torch.float32, device=q.device)
    wide, narrow = _power(dv), 0 if more is None else more_codes.shape[3]
    scaled = [(part or [codes])[0] for part in (scales, value_scales, more_scales)]
    widths = {"D": d, "DV": dv, "DM": narrow, "BD": _power(d), "BV": wide, "BM": _power(max(narrow, 1))}
    flags = {"SCALED": bool(scales), "PADDED": padding is not None, "SIM": simulated()}
    at_once = {"BR": _ROWS, "BN": _STEP, "LONG": SPAN}
    cached = of_q, codes, scaled[0], values, scaled[1], of_more, more_codes, scaled[2]
    left = sums, tops, totals
    with torch.cuda.device_of(q):
        span_kernel[(groups, spans, cut(rows, _ROWS))](
            *(*cached, length if padding is None else padding, length, *left, room, kv_heads, spans, rows),
            **widths,
            **at_once,
            **flags,
            num_warps=warps(wide),
            **OPTIONS,
        )
        merge_kernel[(groups, rows)](*left, length, out, spans, rows, DV=dv, BV=wide, LONG=SPAN, num_warps=4, **OPTIONS)
    return out


def warps(wide: int) -> int:
    """Of a program whose sums are so wide: those of latents would not fit the registers of four."""
    return 8 if wide > 256 else 4


def _power(size: int) -> int:
    """The next power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


def by_torch(
    q: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    length: int,
    scale: float,
    padding: Tensor | None = None,
    more: tuple[Tensor, Sequence[Tensor]] | None = None,
) -> Tensor:
    """The specification of `decode_attention`, in q's dtype."""

    def held(parts: Sequence[Tensor]) -> Tensor:
        codes = parts[0][:, :, :length].to(q.dtype)
        return codes * parts[1][:, :, :length].to(q.dtype) if len(parts) > 1 else codes

    def scores(query: Tensor, parts: Sequence[Tensor]) -> Tensor:
        keys = held(parts)
        product: Tensor = query.unflatten(1, (keys.shape[1], -1)) @ keys.transpose(-1, -2)
        return product

    products = scores(q, key) + (scores(*more) if more is not None else 0)
    if padding is not None:
        at = torch.arange(length, device=q.device)
        hidden = (at < padding[:, None]) & (at < length - 1)
        products = products.masked_fill(hidden[:, None, None], -torch.inf)
    mixed: Tensor = (products * scale).softmax(-1) @ held(value)
    return mixed.flatten(1, 2)
