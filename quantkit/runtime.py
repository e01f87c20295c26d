"""Run a checkpoint, quantised or not: on the reference, in float32, or on the kernels that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.errors import CheckpointError, ConfigError, NotFiniteError, counted
from quantkit.formats import compressed_tensors, table
from quantkit.formats.base import KV_SCALE, Format
from quantkit.formats.dtypes import DTYPES, FLOATS
from quantkit.formats.reader import CheckpointReader
from quantkit.host import pick_device, plain_arithmetic, plainly
from quantkit.kernels import dispatch, reference
from quantkit.kernels.backend import Backend, Expert, InputScalesDiffer, QuantExperts, QuantLinear
from quantkit.model.blocks import Routing
from quantkit.model.by_name import NamedSpec, spec_of
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import LayerTrace, Weights, forward, head
from quantkit.model.registry import build_spec
from quantkit.model.spec import MLP, Linear, ModelSpec, MoE
from quantkit.qtensor import QuantizedTensor
from quantkit.sampling import GREEDY, Sampling, sample
from quantkit.scheme import Scheme

__all__ = ["CheckpointWeights", "KernelWeights", "Kernels", "Model", "format_of", "load", "misfits", "schemes_of"]


Kernels = Literal["auto", "w4a8", "reference"]


def format_of(reader: CheckpointReader) -> Format:
    """The format of a checkpoint's quantised linears. Raises ConfigError."""
    quantization = reader.config.get("quantization_config")
    try:
        return table.recognise(quantization, reader.entries) if quantization else compressed_tensors.FORMAT
    except ConfigError as error:
        raise ConfigError(f"{reader.folder / 'config.json'}: {error.problem}", error.fix) from error


def schemes_of(reader: CheckpointReader) -> dict[str, Scheme | None]:
    """The scheme of every linear of a checkpoint; None where it is not quantised."""
    spec = spec_of(reader)
    keys = [ref.key for ref in spec.linears()]
    quantization, layout = reader.config.get("quantization_config"), format_of(reader)
    try:
        return layout.parse(quantization, keys, reader.entries) if quantization else dict.fromkeys(keys)
    except ConfigError as error:
        raise ConfigError(f"{reader.folder / 'config.json'}: {error.problem}", error.fix) from error


def misfits(reader: CheckpointReader, spec: ModelSpec | NamedSpec, schemes: dict[str, Scheme | None]) -> list[str]:
    """What is missing, unexpected, or of another dtype or shape than the architecture and the schemes say."""
    layout, problems, optional = format_of(reader), list[str](), {key for key in reader.entries if KV_SCALE.match(key)}
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
    allowed = FLOATS if isinstance(spec, ModelSpec) else tuple(DTYPES)
    expected = {key: (allowed, shape) for key, shape in spec.tensors().items()}
    if isinstance(spec, ModelSpec) and "lm_head.weight" in reader.entries:  # a tied head may be stored once more
        expected["lm_head.weight"] = expected[spec.embedding]
    for ref in spec.linears():
        scheme = schemes[ref.key]
        if scheme is not None:
            if problem := scheme.misfit(ref.out_features, ref.in_features):
                problems.append(f"'{ref.key}' cannot be {scheme.name}: {problem}")
            del expected[ref.weight]
            planned = layout.planned(ref, scheme)
            expected.update({t.name: (t.dtypes, t.shape) for t in planned})
            optional |= {t.name for t in planned if t.optional}
    problems += [f"tensor '{key}' is missing" for key in sorted(expected.keys() - reader.entries.keys() - optional)]
    problems += [f"tensor '{key}' is unexpected" for key in sorted(reader.entries.keys() - expected.keys() - optional)]
    for key, (dtypes, shape) in expected.items():
        entry = reader.entries.get(key)
        one = entry is not None and {entry.shape, shape} == {(), (1,)}  # a single scale has either shape
        if entry and (not (entry.shape == shape or one) or entry.dtype not in dtypes):
            seen = f"{entry.shard}: tensor '{key}' is {entry.dtype} {entry.shape}"
            problems.append(f"{seen}, expected {' or '.join(dtypes)} {shape}")
    return problems


class CheckpointWeights(Weights):
    """Weights read from disk. Activations are rounded as each linear's scheme says; arithmetic is float32.

    hold: keep what has been read, in its stored (compressed) form. Without it memory is bounded by one linear.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, hold: bool) -> None:
        self.reader, self.device, self.hold = reader, device, hold
        self.schemes, self.format = schemes_of(reader), format_of(reader)
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
        return self.format.decode(ref, scheme, self.reader.tensors(self.device))

    def tensor(self, key: str) -> Tensor:
        if key in self._plain:
            return self._plain[key]
        value = self.reader.tensor(key).to(self.device)
        if self.hold:
            self._plain[key] = value
        return value


class KernelWeights(CheckpointWeights):
    """The same on the kernels that `kernels.dispatch` chooses. No BF16 copy of a quantised weight is ever made.

    Weights are packed when first used (`pack` does it for all) and kept in that form alone. Experts of one scheme and shape
    go into one call, the shared expert among them when it is alike. Linears that are not quantised are multiplied in the
    dtype they are stored in.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, backends: tuple[Backend, ...]) -> None:
        super().__init__(reader, device, hold=True)
        self.backends = backends
        self._linears: dict[str, QuantLinear | None] = {}
        self._fused: dict[tuple[str, int], QuantExperts | None] = {}

    def choice(self, ref: Linear) -> dispatch.Choice:
        """What serves a linear here."""
        return dispatch.choose(self.schemes.get(ref.key), (ref.out_features, ref.in_features), self.device, self.backends)

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        scheme = self.schemes.get(ref.key)
        if scheme is None:
            weight = self.tensor(ref.weight)
            return F.linear(x.to(weight.dtype), weight).to(x.dtype)
        kernel = self._linear(ref, scheme)
        return kernel(x) if kernel else super().linear(ref, x)

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

    def pack(self, spec: ModelSpec, progress: Callable[[int, int], None] | None = None) -> None:
        """Pack every weight now; progress is called with (layers done, layers in all). Raises CheckpointError."""
        for layer in spec.layers:
            for ref in layer.attention.linears():
                self._linear(ref, self.schemes[ref.key])
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
        """Its kernel, packed; None when it is not quantised or the reference serves it."""
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
            f"{key} cannot be packed: {error}", "quantise again, or load with kernels='reference'"
        ) from error


class Model:
    """A loaded checkpoint. `spec` says what it is, `weights` where its numbers come from.

    hold: keep weights once read. kernels: see `load`.
    """

    def __init__(self, folder: Path, device: torch.device, hold: bool = True, kernels: Kernels = "reference") -> None:
        reader = CheckpointReader(folder)
        self.folder, self.device, self.config = folder, device, reader.config
        self.spec = build_spec(reader.config, str(folder / "config.json"))
        self.weights = (
            CheckpointWeights(reader, device, hold)
            if kernels == "reference"
            else KernelWeights(reader, device, dispatch.OPTIONS[kernels])
        )
        if problems := misfits(reader, self.spec, self.weights.schemes):
            raise CheckpointError(
                f"{folder}: {counted(len(problems), 'tensor')} not as config.json says: {problems[0]}",
                "check config.json, or fetch both again",
            )

    def layers(self, input_ids: Tensor, cache: Cache | None = None) -> Iterator[LayerTrace]:
        """Layer after layer over int64 [batch, time]; hidden states float32 [batch, time, hidden], and routing."""
        self._check(input_ids)
        return plainly(forward(self.spec, self.weights, input_ids.to(self.device), cache))

    @plain_arithmetic()
    def head(self, hidden: Tensor) -> Tensor:
        """float32 [..., hidden] after the last layer -> float32 logits [..., vocab]."""
        return head(self.spec, self.weights, hidden)

    @torch.inference_mode()
    @plain_arithmetic()
    def logits(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """int64 [batch, time] -> float32 [batch, time, vocab]. With a cache, the ids continue what it holds.

        Raises ConfigError for ids of another dtype or shape, or outside the vocabulary.
        """
        hidden = torch.empty(0)
        for trace in self.layers(input_ids, cache):
            hidden = trace.hidden
        return self.head(hidden)

    def stream(
        self,
        input_ids: Tensor,
        sampling: Sampling = GREEDY,
        kv_format: KVFormat = KVFormat.BF16,
        padding: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Continue int64 [batch, time] without end, yielding int64 [batch, 1]: prefill once, then a token at a time.

        The cache holds one K and one V per CLA group, in kv_format. padding: int64 [batch], how many ids at the start of
        each row only fill it up, where prompts are of different lengths. Raises NotFiniteError: of logits that are not
        finite no token is the likeliest.
        """
        if padding is not None and (padding.shape != input_ids.shape[:1] or bool((padding >= input_ids.shape[1]).any())):
            seen = f"padding {padding.tolist()} of input_ids {tuple(input_ids.shape)}"
            raise ConfigError(seen, "give a number for each row that leaves it at least one token")
        at = None if padding is None else padding.to(self.device)
        cache, generator = Cache(kv_format, at), torch.Generator().manual_seed(sampling.seed)
        following = input_ids
        for drawn in count(1):
            logits = self.logits(following, cache)[:, -1]
            if not torch.isfinite(logits).all():
                raise NotFiniteError(self.folder, f"the logits of new token {drawn} are not finite")
            following = sample(logits, sampling, generator)
            yield following

    def generate(
        self,
        input_ids: Tensor,
        new_tokens: int,
        sampling: Sampling = GREEDY,
        kv_format: KVFormat = KVFormat.BF16,
    ) -> Tensor:
        """int64 [batch, time] -> int64 [batch, time + new_tokens], as `stream` gives them."""
        self._check(input_ids)
        self.check_room(input_ids.shape[1], new_tokens)
        new = islice(self.stream(input_ids, sampling, kv_format), new_tokens)
        return torch.cat([input_ids.to(self.device), *new], dim=1)

    def explain(self) -> list[dict[str, str | int]]:
        """Which kernel serves which role, why, and what would on other hardware (`kernels.dispatch.explain`)."""
        linears = (
            (ref.role.value, self.weights.schemes[ref.key], (ref.out_features, ref.in_features))
            for ref in self.spec.linears()
        )
        asked = self.weights.backends if isinstance(self.weights, KernelWeights) else ()
        return dispatch.explain(linears, self.device, asked)

    def check_room(self, prompt: int, new_tokens: int) -> None:
        """Raises ConfigError where a prompt of that many tokens and the new ones are more than the config's positions."""
        limit = self.spec.positions
        if limit and prompt + new_tokens > limit:
            seen = f"{prompt} tokens of prompt and {new_tokens} new ones are more than {self.folder} reads"
            left = limit - prompt
            fix = f"ask for {left} new tokens or fewer" if left > 0 else f"give a prompt of fewer than {limit} tokens"
            raise ConfigError(f"{seen}: its max_position_embeddings is {limit}", fix)

    def _check(self, input_ids: Tensor) -> None:
        if not isinstance(input_ids, Tensor):
            raise ConfigError(f"input_ids are a {type(input_ids).__name__}", "give a tensor, int64 [batch, time]")
        if input_ids.dtype is not torch.int64 or input_ids.ndim != 2 or 0 in input_ids.shape:
            seen = f"{input_ids.dtype} {tuple(input_ids.shape)}"
            raise ConfigError(f"input_ids are {seen}", "give int64 [batch, time] with at least one token")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.spec.vocab:
            raise ConfigError(f"input_ids span {low}..{high}", f"the vocabulary is 0..{self.spec.vocab - 1}")


@plain_arithmetic()
def load(
    path: str | Path,
    device: str = "cpu",
    kernels: Kernels = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A quantised or unquantised checkpoint folder, ready for `logits`, `stream` and `generate`.

    device: auto, cpu, cuda or cuda:N. kernels: "auto" packs quantised linears for this machine's kernels (`Model.explain`
    says which; the first use may build them); "w4a8" does so too and rounds the inputs of INT4 weights to INT8, faster on a
    CPU; "reference" dequantises and multiplies in float32. progress is called with (layers packed, layers in all). Raises
    QuantkitError when the checkpoint is not sound.
    """
    if kernels not in ("reference", *dispatch.OPTIONS):
        raise ConfigError(f"kernels is {kernels!r}", f"choose reference, {', '.join(dispatch.OPTIONS)}")
    model = Model(Path(path), pick_device(device), kernels=kernels)
    if isinstance(model.weights, KernelWeights):
        model.weights.pack(model.spec, progress)
    return model
