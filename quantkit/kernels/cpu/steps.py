"""Halves of a decoder layer in one call of the library, for few tokens: what `model.layer` defines, on packed weights and on
the cache as it lies there. csrc/steps.h and csrc/mlp.h are the other side."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.backend import AttentionParts, MlpParts, Routed
from quantkit.kernels.cpu.build import load
from quantkit.kernels.cpu.linear import Packed, found

__all__ = ["AttentionHalf", "MlpHalf", "call"]

STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _AttentionLayer(ctypes.Structure):
    """`AttentionLayer` of csrc/steps.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "o", "norm", "q_norm", "k_norm")),
        *((name, _SIZE) for name in ("hidden", "heads", "kv_heads", "head_dim")),
        *((name, _FLOAT) for name in ("eps", "scale")),
        ("head_norm", _INT),
    )


class _Place(ctypes.Structure):
    """`Place` of csrc/steps.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("cos", "sin", "padding")),
        *(
            (f"{side}_{name}", kind)
            for side in ("key", "value")
            for name, kind in (("codes", _POINTER), ("scale", _POINTER), ("room", _SIZE))
        ),
        *((name, _SIZE) for name in ("batch", "time", "length")),
        *((name, _INT) for name in ("stored", "own_tables")),
    )


class _MlpLayer(ctypes.Structure):
    """`MlpLayer` of csrc/mlp.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("gate_up", "down", "shared_gate_up", "shared_down", "norm", "router")),
        *((name, _SIZE) for name in ("hidden", "routed", "top_k")),
        *((name, _FLOAT) for name in ("eps", "router_scale")),
        *((name, _INT) for name in ("shared", "renormalise")),
    )


def _address(weight: Packed | None) -> int | None:
    return None if weight is None else ctypes.addressof(weight.matrix)


def _row(weight: Tensor | None) -> Tensor | None:
    """A norm's weight as the library reads it."""
    return None if weight is None else weight.float().contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _held(parts: Sequence[Tensor]) -> tuple[int, int | None, int]:
    """`Held` of csrc/cache.h."""
    return parts[0].data_ptr(), parts[1].data_ptr() if len(parts) > 1 else None, parts[0].shape[2]


def call(entry: Any, *arguments: Any) -> None:
    """An entry of the library on all threads. Raises MemoryError."""
    if entry(*arguments, torch.get_num_threads()):
        raise MemoryError("no memory for the activations of a layer")


class AttentionHalf:
    """h + attention(norm(h)) of a layer with grouped-query attention."""

    def __init__(self, parts: AttentionParts, packed: Sequence[Packed | None]) -> None:
        """packed: of q, k, v and o."""
        q_norm, k_norm = _row(parts.q_norm), _row(parts.k_norm)
        head_norm = 0 if q_norm is None or k_norm is None else 1 if parts.norm_first else 2
        if head_norm == 2 and q_norm is not None and k_norm is not None:  # the key's weight is folded into the query
            q_norm, k_norm = q_norm * k_norm, None
        self._holds = packed, (norms := (_row(parts.norm), q_norm, k_norm))
        sizes = parts.norm.numel(), parts.heads, parts.kv_heads, parts.head_dim
        pointers = *map(_address, packed), *map(_pointer, norms)
        self._layer = _AttentionLayer(*pointers, *sizes, parts.eps, parts.head_dim**-0.5, head_norm)
        self._at, self._entry = ctypes.addressof(self._layer), found(load()).quantkit_attention_half

    def __call__(
        self,
        h: Tensor,
        tables: tuple[Tensor, Tensor],
        padding: Tensor | None,
        key: Sequence[Tensor],
        value: Sequence[Tensor],
        length: int,
    ) -> Tensor:
        """As `kernels.backend.AttentionStep`."""
        h = h.contiguous()
        out = torch.empty_like(h)
        cos, sin = tables[0].contiguous(), tables[1].contiguous()
        padding = padding if padding is None else padding.contiguous()
        pointers = cos.data_ptr(), sin.data_ptr(), _pointer(padding), *_held(key), *_held(value)
        place = _Place(*pointers, h.shape[0], h.shape[1], length, STORED[key[0].dtype], int(cos.dim() > 2))
        call(self._entry, self._at, ctypes.addressof(place), h.data_ptr(), out.data_ptr())
        return out


class MlpHalf:
    """h + mlp(norm(h)) of a layer, dense or with experts."""

    def __init__(self, parts: MlpParts, packed: Sequence[Packed | None]) -> None:
        """packed: gate_up and down of the experts, then of a shared one that goes apart, or None."""
        norm, router = _row(parts.norm), None if parts.router is None else parts.router.contiguous()
        self._holds = packed, norm, router
        self.routed = 0 if router is None else len(router)
        sizes = parts.norm.numel(), self.routed, parts.top_k
        flags = int(parts.shared), int(parts.renormalise)
        pointers = *map(_address, packed), _pointer(norm), _pointer(router)
        self._layer = _MlpLayer(*pointers, *sizes, parts.eps, parts.router_scale, *flags)
        self._at, self._top_k = ctypes.addressof(self._layer), parts.top_k
        self._entry = found(load()).quantkit_mlp_half

    def __call__(self, h: Tensor) -> tuple[Tensor, Routed | None]:
        """As `kernels.backend.MlpStep`."""
        h = h.contiguous()
        out, tokens = torch.empty_like(h), h.shape[:-1].numel()
        routed = None
        if self.routed:
            chosen = torch.empty(tokens, self._top_k, dtype=torch.int64), torch.empty(tokens, self._top_k)
            routed = (*chosen, torch.empty(tokens, self.routed))
        ids, weights, logits = (None, None, None) if routed is None else (part.data_ptr() for part in routed)
        call(self._entry, self._at, h.data_ptr(), out.data_ptr(), logits, ids, weights, tokens)
        return out, routed
