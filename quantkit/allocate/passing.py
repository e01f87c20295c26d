"""One pass of the text through many variants of a model: what each loses, every weight being read once.

A variant is the BF16 model with one group in one scheme, a branch of the BF16 model's track from the group's first layer on;
its codes are made as `quantize` makes them, from what the calibration text gives the linears of the BF16 model. An anchor is
the whole model quantized: calibrated on its own hidden states, as `quantize` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.allocate.groups import Group
from quantkit.calib.lockstep import Lockstep, Observer, Pair, Track
from quantkit.calib.replay import Applied, Listening, gather
from quantkit.calib.streams import Part
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.job.group import GroupJob
from quantkit.job.methods import needs_tokens
from quantkit.measure.divergence import chunks, score
from quantkit.model.forward import head
from quantkit.model.spec import Layer, Linear, ModelSpec
from quantkit.model.weights import PlainWeights, Weights
from quantkit.quant.method import Method
from quantkit.scheme import Scheme
from quantkit.stats import LinearStats

__all__ = ["Anchor", "Loss", "Texts", "Variant", "run_pass"]

_MEMORY = 2_000_000_000  # bytes of tapes that are kept in memory, of all tracks together
MethodOf = Callable[[Linear, Scheme], Method]


@dataclass(frozen=True)
class Variant:
    """The BF16 model with one group in one scheme."""

    group: Group
    scheme: Scheme


@dataclass(frozen=True)
class Anchor:
    """The model with a scheme for each linear, None to keep it."""

    name: str
    schemes: Mapping[str, Scheme | None]


@dataclass(frozen=True)
class Loss:
    """Mean KL(BF16 || variant) in nats a token, and its standard error over windows."""

    kl: float
    error: float


@dataclass(frozen=True)
class Texts:
    """calibration: int64 [windows, length], None where nothing asks for it. sample: what losses are measured on, int64
    [windows, length], of which the first `lengths`, int64 [windows], are text."""

    calibration: Tensor | None
    sample: Tensor
    lengths: Tensor


class _Varied(Weights):
    """Plain weights but for some, which are as `made` has them while their part is passed."""

    def __init__(self, plain: Weights, variant: Variant, codes: Mapping[tuple[str, Scheme], Applied]) -> None:
        self.plain, self.scheme, self.made = plain, variant.scheme, codes
        self.keys = frozenset(ref.key for ref in variant.group.linears)

    def tensor(self, key: str) -> Tensor:
        return self.plain.tensor(key)

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        if ref.key not in self.keys:
            return self.plain.linear(ref, x)
        applied = self.made[ref.key, self.scheme]
        return F.linear(applied.read(x), applied.weight)

    def matrix(self, ref: Linear) -> Tensor:
        return self.made[ref.key, self.scheme].weight if ref.key in self.keys else self.plain.matrix(ref)

    def absorbs(self, ref: Linear) -> bool:
        return ref.key not in self.keys

    def is_plain(self, ref: Linear) -> bool:
        return ref.key not in self.keys

    def read(self, ref: Linear, x: Tensor) -> Tensor:
        return self.made[ref.key, self.scheme].read(x).to(x.dtype) if ref.key in self.keys else x


@dataclass
class _Line:
    """Calibration text through the model with one assignment of schemes. calibration: its track, None where no method asks
    for tokens. extra: by linear, further schemes to make codes for, from the same statistics."""

    schemes: Mapping[str, Scheme | None]
    weights: Listening
    calibration: Track | None
    extra: Mapping[str, Sequence[Scheme]] = field(default_factory=dict)


class _Sensing(Observer):
    """See the module. losses: by variant and by anchor's name, once the tracks have passed."""

    def __init__(
        self,
        reader: CheckpointReader,
        spec: ModelSpec,
        method_of: MethodOf,
        texts: Texts,
        variants: Sequence[Variant],
        anchors: Sequence[Anchor],
        device: torch.device,
    ) -> None:
        self.reader, self.spec, self.method_of, self.texts, self.device = reader, spec, method_of, texts, device
        self.variants, self.anchors = variants, anchors
        self.plain = PlainWeights(self.tensor)
        self.made: dict[tuple[str, Scheme], Applied] = {}
        self.losses: dict[Variant | str, Loss] = {}
        self._read: dict[str, Tensor] = {}
        self._others: dict[Variant | str, Track] = {}
        self.tracks: list[Track] = []

    def tensor(self, key: str) -> Tensor:
        """Of the source, on the device; read once for all that passes a part."""
        if key not in self._read:
            self._read[key] = self.reader.tensor(key)
        return self._read[key].to(self.device)

    def release(self) -> None:
        self._read.clear()
        self.made.clear()
        for line in self._lines:
            line.weights.forget()

    # Before the pass

    def prepare(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        extra: dict[str, list[Scheme]] = {}
        for variant in self.variants:
            for ref in variant.group.linears:
                extra.setdefault(ref.key, []).append(variant.scheme)
        plain = _Line(dict.fromkeys((ref.key for ref in self.spec.linears()), None), Listening(self.tensor), None, extra)
        self._lines = [plain, *(_Line(anchor.schemes, Listening(self.tensor), None) for anchor in self.anchors)]
        for line in self._lines:
            if self.texts.calibration is not None and self._asks(line):
                line.calibration = self._track(line.weights, self.texts.calibration)
                self.tracks.append(line.calibration)
        self._base = self._track(self.plain, self.texts.sample)
        self.tracks.append(self._base)
        for anchor, line in zip(self.anchors, self._lines[1:], strict=True):
            self._add(anchor.name, self._track(line.weights, self.texts.sample))
        for variant in self._beginning(0):
            self._add(variant, self._track(_Varied(self.plain, variant, self.made), self.texts.sample))

    def _asks(self, line: _Line) -> bool:
        pairs = ((ref, s) for ref in self.spec.linears() for s in (line.schemes[ref.key], *line.extra.get(ref.key, ())))
        return any(s and needs_tokens(s, self.method_of(ref, s)) for ref, s in pairs)

    def _track(self, weights: Weights, ids: Tensor) -> Track:
        return Track(self._lockstep.stream(weights, ids), ids)

    def _add(self, what: Variant | str, track: Track) -> None:
        self._others[what] = track
        self.tracks.append(track)

    def _beginning(self, layer: int) -> list[Variant]:
        return [variant for variant in self.variants if min(variant.group.layers) == layer]

    # While the tracks pass

    def before(self, parts: Sequence[Part]) -> None:
        own = {id(part.stream): part for part in parts}
        for line in self._lines:
            part = own[id(line.calibration.stream)] if line.calibration else None
            for wave in (part or parts[0]).waves:
                self._solve(line, part, wave)

    def _solve(self, line: _Line, part: Part | None, wave: Sequence[tuple[Linear, ...]]) -> None:
        statistics = {group: self._statistics(line, group) if part else None for group in wave}
        if part is not None:
            gather(part, line.weights, statistics)
        for group in wave:
            stats, own = statistics.pop(group), line.schemes[group[0].key]
            for scheme in line.extra.get(group[0].key, ()):
                self.made.update(
                    {(ref.key, scheme): x for ref, x in zip(group, self._make(group, scheme, stats), strict=True)}
                )
            plain = [Applied(self.tensor(ref.weight).float()) for ref in group] if own is None else []
            line.weights.apply(group, plain if own is None else self._make(group, own, stats))

    def _statistics(self, line: _Line, group: Sequence[Linear]) -> LinearStats | None:
        """Empty ones of what the schemes of these linears need."""
        first = group[0]
        schemes = [s for s in (line.schemes[first.key], *line.extra.get(first.key, ())) if s]
        methods = [self.method_of(first, s) for s in schemes if needs_tokens(s, self.method_of(first, s))]
        if not methods:
            return None
        return LinearStats.empty(first.in_features, self.device, any(method.hessian for method in methods))

    def _make(self, group: Sequence[Linear], scheme: Scheme, stats: LinearStats | None) -> list[Applied]:
        if stats is not None and not math.isfinite(max(stats.amax, stats.lent_amax)):
            problem = f"the input of '{group[0].key}' is not finite on the calibration text"
            raise CalibrationError(problem, "check the source model: its hidden states overflow before this layer")
        method = self.method_of(group[0], scheme)
        job = GroupJob(
            tuple(self.tensor(ref.weight) for ref in group), stats if needs_tokens(scheme, method) else None, scheme, method
        )
        made = (one.quantized for one in job.run(self.device))
        return [Applied(q.dequantize(), scheme, q.input_scale) for q in made]

    def done(self, layer: Layer) -> None:
        """Variants that begin with the next layer branch off."""
        for variant in self._beginning(layer.index + 1):
            self._add(variant, self._lockstep.fork(self._base, _Varied(self.plain, variant, self.made)))

    # After the pass

    def finish(self) -> None:
        windows = range(len(self.texts.sample))
        rows: dict[Variant | str, list[float]] = {what: [] for what in self._others}
        for window in windows:
            one, stop = slice(window, window + 1), int(self.texts.lengths[window])
            base = self._base.hidden(one)[0, : stop - 1]
            targets = self.texts.sample[window, 1:stop].to(base.device)
            for what, track in self._others.items():
                other, kl = track.hidden(one)[0, : stop - 1], 0.0
                for part in chunks(len(base), self.spec.vocab):
                    p, q = (head(self.spec, self.plain, x[part]) for x in (base, other))
                    kl += float(score(p, q, targets[part]).kl.sum())
                rows[what].append(kl)
        self.losses = {what: self._loss(what, torch.tensor(sums, dtype=torch.float64)) for what, sums in rows.items()}

    def _loss(self, what: Variant | str, sums: Tensor) -> Loss:
        """From the KL of each window, summed over its tokens, float64 [windows]."""
        if not torch.isfinite(sums).all():
            name = what if isinstance(what, str) else f"{what.group.name} in {what.scheme.name}"
            raise CheckpointError(f"{self.reader.folder}: logits with {name} are not finite", "leave that scheme out")
        tokens = (self.texts.lengths - 1).double()
        mean, count = float(sums.sum() / tokens.sum()), len(sums)
        spread = (sums - mean * tokens).square().sum() * count / max(1, count - 1)
        return Loss(mean, float(spread.sqrt() / tokens.sum()))


@torch.inference_mode()
def run_pass(
    reader: CheckpointReader,
    spec: ModelSpec,
    method_of: MethodOf,
    texts: Texts,
    variants: Sequence[Variant],
    anchors: Sequence[Anchor],
    device: torch.device,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Variant | str, Loss]:
    """The losses of some variants and anchors (by name). scratch: a folder for tapes. progress: (layers done, in all).

    Raises CalibrationError, CheckpointError where numbers are not finite.
    """
    sensing = _Sensing(reader, spec, method_of, texts, variants, anchors, device)
    unquantized = dict.fromkeys((ref.key for ref in spec.linears()), None)
    pair = Pair(spec, sensing.plain, sensing.plain, unquantized, device, sensing.release)
    # A track has three tapes at once: hidden states, what its MLPs read, and K and V.
    loop = Lockstep(pair, scratch, [sensing], _MEMORY // (3 * (len(variants) + 2 * len(anchors) + 2)))
    loop.embed()
    for layers in spec.groups():
        loop.run(layers, done=partial(_tell, progress, len(spec.layers)))
    loop.finish()
    return sensing.losses


def _tell(progress: Callable[[int, int], None], total: int, layer: Layer) -> None:
    progress(layer.index + 1, total)
