"""Flash decoding against its definition: every cache, grouped and latent attention, odd widths, padding, buckets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quantkit.kernels.triton.attention import by_torch, decode_attention
from quantkit.model.cache import KVFormat, kept
from tests.helpers.kernels import poison

FORMATS = [KVFormat.FLOAT32, KVFormat.BF16, KVFormat.FP8]
# batch, heads, key heads, width of keys, of values, positions held, room
SHAPES = [(1, 4, 4, 16, 16, 1, 32), (2, 6, 2, 20, 12, 70, 96), (1, 10, 1, 80, 80, 300, 520), (2, 34, 2, 64, 64, 257, 300)]


@pytest.fixture(autouse=True)
def poisoned(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    poison(monkeypatch)
    yield


def cached(how: KVFormat, *shape: int, held: int) -> list[Tensor]:
    """A cache's codes and scales, NaN beyond what is held."""
    parts = kept(torch.randn(shape), how)
    tensors = [parts.codes] if parts.scale is None else [parts.codes, parts.scale]
    for part in tensors:
        part[:, :, held:] = torch.full((), float("nan")).to(part.dtype)
    return tensors


def check(q: Tensor, key: list[Tensor], value: list[Tensor], held: int, **more: object) -> None:
    length = torch.tensor([held], dtype=torch.int32)
    scale = q.shape[-1] ** -0.5
    out = decode_attention(q, key, value, length, scale, **more)  # type: ignore[arg-type]
    more.pop("bucket", None)
    double = {k: (v[0].double(), v[1]) if isinstance(v, tuple) else v for k, v in more.items()}
    half = {k: (v[0].bfloat16(), v[1]) if isinstance(v, tuple) else v for k, v in more.items()}
    exact = by_torch(q.double(), key, value, held, scale, **double)  # type: ignore[arg-type]
    torchs = by_torch(q.bfloat16(), key, value, held, scale, **half)  # type: ignore[arg-type]
    assert (out - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_queries(shape: tuple[int, ...], how: KVFormat) -> None:
    batch, heads, kv_heads, d, dv, held, room = shape
    key, value = cached(how, batch, kv_heads, room, d, held=held), cached(how, batch, kv_heads, room, dv, held=held)
    q = torch.randn(batch, heads, d)
    check(q, key, value, held)
    check(q, key, value, held, bucket=max(held, room // 2))
    if batch > 1:
        check(q, key, value, held, padding=torch.tensor([0, held - 1]))


@pytest.mark.parametrize("how", FORMATS)
def test_latents(how: KVFormat) -> None:
    """All heads share one key, the latent and a rotated part, and the latent is the value too."""
    latent, shared = cached(how, 2, 1, 300, 48, held=290), cached(how, 2, 1, 300, 24, held=290)
    check(torch.randn(2, 12, 48), latent, latent, 290, more=(torch.randn(2, 12, 24), shared))


def test_what_does_not_fit_is_refused() -> None:
    key = cached(KVFormat.BF16, 1, 2, 8, 16, held=8)
    for q, length, bucket in (((1, 3, 16), 4, 8), ((1, 4, 8), 4, 8), ((1, 4, 16), 4, 9)):
        with pytest.raises(ValueError, match="fit|bucket"):
            decode_attention(torch.randn(q), key, key, torch.tensor([length], dtype=torch.int32), 1.0, bucket=bucket)
    with pytest.raises(ValueError, match="int32"):
        decode_attention(torch.randn(1, 4, 16), key, key, torch.tensor([4]), 1.0)
