"""Run a checkpoint, quantised or not: on the reference, in float32, or on the kernels that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats import compressed_tensors
from quantkit.formats.dtypes import FLOATS
from quantkit.formats.reader import CheckpointReader
from quantkit.kernels import dispatch, reference
from quantkit.kernels.cpu.linear import PackedLinear, matmul, pack
from quantkit.kernels.reference import quantize_activation, round_activation
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import LayerTrace, forward, head
from quantkit.model.registry import build_spec
from quantkit.model.spec import Linear, ModelSpec
from quantkit.qtensor import QuantizedTensor
from quantkit.sampling import GREEDY, Sampling, sample
from quantkit.scheme import Scheme, Strategy

__all__ = ["CheckpointWeights", "KernelWeights", "Kernels", "Model", "load", "misfits", "schemes_of"]


Kernels = Literal["auto", "reference"]


def schemes_of(reader: CheckpointReader) -> dict[str, Scheme | None]:
    """The scheme of every linear of a checkpoint; None where it is not quantised."""
    spec = build_spec(reader.config, str(reader.folder / "config.json"))
    keys = [ref.key for ref in spec.linears()]
    quantization = reader.config.get("quantization_config")
    try:
        return compressed_tensors.parse(quantization, keys) if quantization else dict.fromkeys(keys)
    except ConfigError as error:
        raise ConfigError(f"{reader.folder / 'config.json'}: {error.problem}", error.fix) from error


def misfits(reader: CheckpointReader, spec: ModelSpec, schemes: dict[str, Scheme | None]) -> list[str]:
    """What is missing, unexpected, or of another dtype or shape than the architecture and the schemes say."""
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
    expected = {key: (FLOATS, shape) for key, shape in spec.tensors().items()}
    if "lm_head.weight" in reader.entries:  # a tied head may be stored once more
        expected["lm_head.weight"] = expected[spec.embedding]
    for ref in spec.linears():
        scheme = schemes[ref.key]
        if scheme is not None:
            del expected[ref.weight]
            expected.update({t.name: ((t.dtype,), t.shape) for t in compressed_tensors.planned(ref, scheme)})
    problems = [f"tensor '{key}' is missing" for key in sorted(expected.keys() - reader.entries.keys())]
    problems += [f"tensor '{key}' is unexpected" for key in sorted(reader.entries.keys() - expected.keys())]
    for key, (dtypes, shape) in expected.items():
        entry = reader.entries.get(key)
        if entry and (entry.shape != shape or entry.dtype not in dtypes):
            seen = f"{entry.shard}: tensor '{key}' is {entry.dtype} {entry.shape}"
            problems.append(f"{seen}, expected {' or '.join(dtypes)} {shape}")
    return problems


class CheckpointWeights:
    """`forward.Weights` read from disk. Activations are rounded as each linear's scheme says; arithmetic is float32.

    hold: keep what has been read, in its stored (compressed) form. Without it memory is bounded by one linear.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, hold: bool) -> None:
        self.reader, self.device, self.hold = reader, device, hold
        self.schemes = schemes_of(reader)
        self._plain: dict[str, Tensor] = {}
        self._quantized: dict[str, QuantizedTensor] = {}

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        scheme = self.schemes.get(ref.key)
        if scheme is None:
            return F.linear(x, self.tensor(ref.weight).to(x.dtype))
        return reference.linear(x, self.quantized(ref, scheme), scheme.activation)

    def quantized(self, ref: Linear, scheme: Scheme) -> QuantizedTensor:
        if ref.key in self._quantized:
            return self._quantized[ref.key]
        q = self._decode(ref, scheme)
        if self.hold:
            self._quantized[ref.key] = q
        return q

    def _decode(self, ref: Linear, scheme: Scheme) -> QuantizedTensor:
        return compressed_tensors.decode(ref, scheme, lambda key: self.reader.tensor(key).to(self.device))

    def tensor(self, key: str) -> Tensor:
        if key in self._plain:
            return self._plain[key]
        value = self.reader.tensor(key).to(self.device)
        if self.hold:
            self._plain[key] = value
        return value


class KernelWeights(CheckpointWeights):
    """The same on the kernels that `kernels.dispatch` chooses: bfloat16 products of packed weights, summed in float32.

    A weight is packed when it is first used and kept in that form alone; no BF16 copy of it is ever made. Linears that
    are not quantised are multiplied in the dtype they are stored in.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device) -> None:
        super().__init__(reader, device, hold=True)
        self._packed: dict[str, tuple[PackedLinear, Tensor | None]] = {}
        self._served = {
            scheme
            for scheme in set(self.schemes.values()) - {None}
            if dispatch.choose(scheme, device).kernel == dispatch.CPU
        }

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        scheme = self.schemes.get(ref.key)
        if scheme is None:
            weight = self.tensor(ref.weight)
            return F.linear(x.to(weight.dtype), weight).to(x.dtype)
        if scheme not in self._served:
            return super().linear(ref, x)
        if ref.key not in self._packed:
            q = self._decode(ref, scheme)
            self._packed[ref.key] = (pack(q), q.input_scale)
        packed, input_scale = self._packed[ref.key]
        if scheme.activation is None:
            return matmul(x, packed).to(x.dtype)
        if scheme.activation.strategy is Strategy.GROUP:
            return matmul(round_activation(x, scheme.activation, input_scale), packed).to(x.dtype)
        # Codes of 8 bits are exact in bfloat16, codes times a scale are not: the scale goes onto the product.
        codes, scale = quantize_activation(x, scheme.activation, input_scale)
        return (matmul(codes, packed) * scale).to(x.dtype)


class Model:
    """A loaded checkpoint. `spec` says what it is, `weights` where its numbers come from.

    hold: keep weights once read. kernels: "auto" for the fastest this machine has, "reference" for float32.
    """

    def __init__(self, folder: Path, device: torch.device, hold: bool = True, kernels: Kernels = "reference") -> None:
        reader = CheckpointReader(folder)
        self.folder, self.device, self.config = folder, device, reader.config
        self.spec = build_spec(reader.config, str(folder / "config.json"))
        self.weights = KernelWeights(reader, device) if kernels == "auto" else CheckpointWeights(reader, device, hold)
        if problems := misfits(reader, self.spec, self.weights.schemes):
            raise CheckpointError(
                f"{folder}: {len(problems)} tensors do not match config.json: {problems[0]}",
                "check config.json, or fetch both again",
            )

    def layers(self, input_ids: Tensor, cache: Cache | None = None) -> Iterator[LayerTrace]:
        """Layer after layer over int64 [batch, time]; hidden states float32 [batch, time, hidden], and routing."""
        self._check(input_ids)
        return forward(self.spec, self.weights, input_ids.to(self.device), cache)

    def head(self, hidden: Tensor) -> Tensor:
        """float32 [..., hidden] after the last layer -> float32 logits [..., vocab]."""
        return head(self.spec, self.weights, hidden)

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """int64 [batch, time] -> float32 [batch, time, vocab]. With a cache, the ids continue what it holds.

        Raises ConfigError for ids of another dtype or shape, or outside the vocabulary.
        """
        hidden = torch.empty(0)
        for trace in self.layers(input_ids, cache):
            hidden = trace.hidden
        return self.head(hidden)

    def stream(
        self, input_ids: Tensor, sampling: Sampling = GREEDY, kv_format: KVFormat = KVFormat.BF16
    ) -> Iterator[Tensor]:
        """Continue int64 [batch, time] without end, yielding int64 [batch, 1]: prefill once, then a token at a time.

        The cache holds one K and one V per CLA group, in kv_format.
        """
        cache, generator = Cache(kv_format), torch.Generator().manual_seed(sampling.seed)
        following = input_ids
        while True:
            following = sample(self.logits(following, cache)[:, -1], sampling, generator)
            yield following

    def generate(
        self,
        input_ids: Tensor,
        new_tokens: int,
        sampling: Sampling = GREEDY,
        kv_format: KVFormat = KVFormat.BF16,
    ) -> Tensor:
        """int64 [batch, time] -> int64 [batch, time + new_tokens], as `stream` gives them."""
        new = islice(self.stream(input_ids, sampling, kv_format), new_tokens)
        return torch.cat([input_ids.to(self.device), *new], dim=1)

    def explain(self) -> list[dict[str, str | int]]:
        """Which kernel serves which role, why, and what would on other hardware (`kernels.dispatch.explain`)."""
        linears = ((ref.role.value, self.weights.schemes[ref.key]) for ref in self.spec.linears())
        return dispatch.explain(linears, self.device)

    def _check(self, input_ids: Tensor) -> None:
        if input_ids.dtype is not torch.int64 or input_ids.ndim != 2 or 0 in input_ids.shape:
            seen = f"{input_ids.dtype} {tuple(input_ids.shape)}"
            raise ConfigError(f"input_ids are {seen}", "give int64 [batch, time] with at least one token")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.spec.vocab:
            raise ConfigError(f"input_ids span {low}..{high}", f"the vocabulary is 0..{self.spec.vocab - 1}")


def load(path: str | Path, device: str = "cpu", kernels: Kernels = "auto") -> Model:
    """A quantised or unquantised checkpoint folder, ready for `logits`, `stream` and `generate`.

    kernels: "auto" runs quantised linears on this machine's kernels (`Model.explain` says which; the first use may build
    them), "reference" dequantises and multiplies in float32. Raises QuantkitError when the checkpoint is not sound.
    """
    return Model(Path(path), torch.device(device), kernels=kernels)
