"""Weights of a checkpoint on disk: on the reference in float32, or on the kernels that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.checkpoint.opened import format_of, schemes_of
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.choices import Kernels
from quantkit.errors import CheckpointError
from quantkit.kernels import dispatch, reference
from quantkit.kernels.backend import Backend, Expert, InputScalesDiffer, QuantExperts, QuantLinear
from quantkit.model.attend import FEW
from quantkit.model.attention import Positions
from quantkit.model.blocks import Routing
from quantkit.model.cache import KVStore
from quantkit.model.spec import MLP, Layer, Linear, ModelSpec, MoE
from quantkit.model.weights import Weights
from quantkit.qtensor import QuantizedTensor
from quantkit.run.fused import FusedHalves
from quantkit.scheme import Scheme

__all__ = ["CheckpointWeights", "KernelWeights", "Kernels"]


class CheckpointWeights(Weights):
    """Weights read from disk. Activations are rounded as each linear's scheme says; arithmetic is float32.

    hold: keep what has been read, in its stored (compressed) form, until `release`. Without it memory is bounded by one
    linear.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, hold: bool) -> None:
        self.reader, self.device, self.hold = reader, device, hold
        self.schemes, self.format = schemes_of(reader), format_of(reader)
        self._plain: dict[str, Tensor] = {}
        self._quantized: dict[str, QuantizedTensor] = {}
        self._input_scales: dict[str, Tensor | None] = {}

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        scheme = self.schemes.get(ref.key)
        if scheme is None:
            return F.linear(x, self.tensor(ref.weight).to(x.dtype))
        return reference.linear(x, self.quantized(ref, scheme), scheme.activation)

    def matrix(self, ref: Linear) -> Tensor:
        scheme = self.schemes.get(ref.key)
        return self.tensor(ref.weight) if scheme is None else self.quantized(ref, scheme).dequantize().to(self.device)

    def is_plain(self, ref: Linear) -> bool:
        return self.schemes.get(ref.key) is None

    def read(self, ref: Linear, x: Tensor) -> Tensor:
        scheme = self.schemes.get(ref.key)
        if scheme is None or scheme.activation is None:
            return x
        if scheme.static and ref.key not in self._input_scales:
            self._input_scales[ref.key] = self._decode(ref, scheme).input_scale
        return reference.round_activation(x, scheme.activation, self._input_scales.get(ref.key)).to(x.dtype)

    def release(self) -> None:
        """Let go of what was read; it is read again when it is needed again."""
        self._plain.clear()
        self._quantized.clear()
        self._input_scales.clear()

    def quantized(self, ref: Linear, scheme: Scheme) -> QuantizedTensor:
        if ref.key in self._quantized:
            return self._quantized[ref.key]
        q = self._decode(ref, scheme)
        if self.hold:
            self._quantized[ref.key] = q
        return q

    def _decode(self, ref: Linear, scheme: Scheme) -> QuantizedTensor:
        return self.format.decode(ref, scheme, self.reader.tensors(self.device))

    def tensor(self, key: str) -> Tensor:
        if key in self._plain:
            return self._plain[key]
        value = self.reader.tensor(key).to(self.device)
        if self.hold:
            self._plain[key] = value
        return value


class KernelWeights(CheckpointWeights):
    """The same on the kernels that `kernels.dispatch` chooses. No BF16 copy of a quantized weight is ever made, but for
    latent attention's kv_b, which decoding multiplies by its halves, one of them transposed (DeepSeek-V2: 34 MB a layer).

    Weights are packed when first used (`pack` does it for all) and kept in that form alone. Experts of one scheme and shape
    go into one call, the shared expert among them when it is alike. Linears that are not quantized are multiplied in the
    dtype they are stored in.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, backends: tuple[Backend, ...]) -> None:
        super().__init__(reader, device, hold=True)
        self.backends = backends
        self._linears: dict[str, QuantLinear | None] = {}
        self._matrices: dict[str, Tensor] = {}
        self._fused: dict[tuple[str, int], QuantExperts | None] = {}
        self._rows: dict[str, QuantLinear | None] = {}
        self.halves = FusedHalves(dispatch.steps(device, backends), self)

    def choice(self, ref: Linear) -> dispatch.Choice:
        """What serves a linear here."""
        return dispatch.choose(self.schemes.get(ref.key), (ref.out_features, ref.in_features), self.device, self.backends)

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        scheme = self.schemes.get(ref.key)
        if scheme is None:
            if x.shape[:-1].numel() <= FEW and (rows := self.few(ref)):
                return rows(x)
            weight = self.tensor(ref.weight)
            return F.linear(x.to(weight.dtype), weight).to(x.dtype)
        kernel = self._linear(ref, scheme)
        return kernel(x) if kernel else super().linear(ref, x)

    def matrix(self, ref: Linear) -> Tensor:
        scheme = self.schemes.get(ref.key)
        if scheme is None:
            return self.tensor(ref.weight)
        if ref.key not in self._matrices:
            self._matrices[ref.key] = self._decode(ref, scheme).dequantize().bfloat16()
        return self._matrices[ref.key]

    def mlp(self, spec: MLP, x: Tensor) -> Tensor:
        kernel = self._experts((spec,))
        if kernel is None:
            return super().mlp(spec, x)
        ids = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        return kernel(x, ids, torch.ones(len(x), 1, device=x.device))

    def experts(self, spec: MoE, x: Tensor, routing: Routing) -> Tensor:
        ids, weights = routing.experts, routing.weights
        if spec.shared and (kernel := self._experts((*spec.experts, spec.shared))):
            ids = torch.cat([ids, torch.full_like(ids[:, :1], len(spec.experts))], dim=1)
            return kernel(x, ids, torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1))
        if not (kernel := self._experts(spec.experts)):
            return super().experts(spec, x, routing)
        routed = kernel(x, ids, weights)
        return routed + self.mlp(spec.shared, x) if spec.shared else routed

    def attention_half(self, layer: Layer, h: Tensor, at: Positions, store: KVStore) -> Tensor | None:
        return self.halves.attention_half(layer, h, at, store)

    def mlp_half(self, layer: Layer, h: Tensor) -> tuple[Tensor, Routing | None] | None:
        return self.halves.mlp_half(layer, h)

    def few(self, ref: Linear) -> QuantLinear | None:
        """A linear's kernel for few tokens, packed, quantized or not; None where torch or the reference serves it."""
        if (scheme := self.schemes.get(ref.key)) is not None:
            return self._linear(ref, scheme)
        if ref.key not in self._rows:
            weight, steps = self.tensor(ref.weight), self.halves.steps
            plain = weight.dtype is torch.bfloat16 and not isinstance(steps, str)
            self._rows[ref.key] = steps.plain(weight) if plain and not isinstance(steps, str) else None
        return self._rows[ref.key]

    def has_few(self, ref: Linear) -> bool:
        if self.schemes.get(ref.key) is not None:
            return self.choice(ref).backend is not None
        return self.reader.entry(ref.weight).dtype == "BF16"

    def together(self, parts: tuple[MLP, ...]) -> QuantExperts | None:
        return self._experts(parts)

    def has_together(self, parts: tuple[MLP, ...]) -> bool:
        return self._alike(parts) is not None

    def pack(self, spec: ModelSpec, progress: Callable[[int, int], None] | None = None) -> None:
        """Pack every weight now; progress is called with (layers done, layers in all). Raises CheckpointError."""
        for layer in spec.layers:
            for ref in layer.attention.linears():
                self._linear(ref, self.schemes[ref.key])
            for ref in layer.attention.absorbed():
                self.matrix(ref)
            if isinstance(mlp := layer.mlp, MLP):
                self._pack((mlp,))
            elif not (mlp.shared and self._experts((*mlp.experts, mlp.shared))):
                self._pack(mlp.experts)
                if mlp.shared:
                    self._pack((mlp.shared,))
            if progress:
                progress(layer.index + 1, len(spec.layers))

    def _pack(self, parts: tuple[MLP, ...]) -> None:
        """Together, else each alone, else linear by linear."""
        if self._experts(parts) is not None:
            return
        for part in parts if len(parts) > 1 else ():
            self._pack((part,))
        for ref in parts[0].linears() if len(parts) == 1 else ():
            self._linear(ref, self.schemes[ref.key])

    def _linear(self, ref: Linear, scheme: Scheme | None) -> QuantLinear | None:
        """Its kernel, packed; None when it is not quantized or the reference serves it."""
        if ref.key not in self._linears:
            backend = self.choice(ref).backend
            kernel = None
            if scheme and backend:
                with _named(ref.key):
                    kernel = backend.linear(self._decode(ref, scheme), scheme)
            self._linears[ref.key] = kernel
        return self._linears[ref.key]

    def _experts(self, parts: tuple[MLP, ...]) -> QuantExperts | None:
        """One kernel for all these MLPs, packed; None when they are not alike or the reference serves them."""
        key = parts[0].gate.key, len(parts)
        if key not in self._fused:
            alike = self._alike(parts)
            kernel = None
            if alike:
                scheme, backend = alike
                loaded = (Expert(*(self._decode(ref, scheme) for ref in part.linears())) for part in parts)
                with (
                    suppress(InputScalesDiffer),  # gate and up then go apart
                    _named(parts[0].gate.key if len(parts) == 1 else f"{parts[0].gate.key}, or another expert there,"),
                ):
                    kernel = backend.experts(loaded, len(parts), scheme)
            self._fused[key] = kernel
        return self._fused[key]

    def _alike(self, parts: tuple[MLP, ...]) -> tuple[Scheme, Backend] | None:
        """The scheme and backend that all linears of these MLPs have in common, if they have their shapes too."""
        refs = [ref for part in parts for ref in part.linears()]
        shapes = {tuple((ref.out_features, ref.in_features) for ref in part.linears()) for part in parts}
        schemes = {self.schemes[ref.key] for ref in refs}
        backends = {self.choice(ref).backend for ref in parts[0].linears()}
        scheme, backend = next(iter(schemes)), next(iter(backends))
        if len(shapes) > 1 or len(schemes) > 1 or len(backends) > 1 or scheme is None or backend is None:
            return None
        return scheme, backend


@contextmanager
def _named(key: str) -> Iterator[None]:
    """A weight that a kernel cannot pack is an error of the checkpoint, and has a name."""
    try:
        yield
    except InputScalesDiffer:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{key} cannot be packed: {error}", "quantize again, or load with kernels='reference'"
        ) from error
