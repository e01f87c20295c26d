"""Measuring sensitivities: which variants, in how many readings of the weights; each is committed when it is done."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import quantkit
from quantkit.allocate.groups import BANDS, Group, assigned, groups_of, label, nbytes
from quantkit.allocate.passing import Anchor, Loss, Texts, Variant, run_pass
from quantkit.allocate.sensitivity import Anchored, Lost, Sensitivity, exponent_of
from quantkit.calib import tokens
from quantkit.calib.documents import read_documents
from quantkit.calib.mixture import read_mixture
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import ConfigError
from quantkit.host import arithmetic, code_digest, pick_device, plain_arithmetic
from quantkit.job.forecast import windows_for
from quantkit.job.journal import Journal
from quantkit.job.methods import needs_tokens
from quantkit.job.partial import WORK, partial_of
from quantkit.model.registry import build_spec
from quantkit.model.spec import Linear, ModelSpec, Role
from quantkit.quant.method import Method
from quantkit.recipe import Recipe
from quantkit.scheme import Scheme

__all__ = ["SCHEMES", "Extent", "Measuring", "measure", "measuring_of"]

SCHEMES = ("W4A16", "W4A16:32", "W8A16")  # which vLLM, SGLang and transformers mix in one model
_TAPES = 40_000_000_000  # bytes of hidden states in one reading of the weights
# Modules whose code decides the numbers.
_DECISIVE = ("allocate", "calib", "checkpoint", "job", "kernels.reference", "measure.divergence", "model", "quant", "scheme")
Progress = Callable[[int, int, int, int], None]  # readings done, in all; layers done in this one, in all


@dataclass(frozen=True)
class Extent:
    """schemes: those that are compared. text: what losses are measured on; None: windows of the calibration text that the
    calibration leaves. windows: how many. bands: see `groups_of`. tapes: bytes of hidden states in one reading, at most."""

    schemes: tuple[Scheme | None, ...]
    text: str | None = None
    windows: int = 16
    bands: int = BANDS
    tapes: int = _TAPES


@dataclass(frozen=True)
class Measuring:
    """What will be measured, known from headers alone. passes: the variants of each reading; anchors pass in the first."""

    spec: ModelSpec
    recipe: Recipe
    extent: Extent
    groups: tuple[Group, ...]
    anchors: tuple[tuple[str, dict[str, Scheme | None]], ...]
    passes: tuple[tuple[Variant, ...], ...]
    source_bytes: int

    @property
    def variants(self) -> int:
        return sum(map(len, self.passes))

    def summary(self) -> dict[str, Any]:
        """What it will cost, for people and programs."""
        per_track = _track_bytes(self.spec, self.recipe, self.extent)
        # A variant runs from its group's first layer on; an anchor, and the BF16 model, through all.
        layers = sum(len(self.spec.layers) - min(v.group.layers) for batch in self.passes for v in batch)
        tracks = layers / len(self.spec.layers) + len(self.anchors) + len(self.passes)
        return {
            "groups": len(self.groups),
            "variants": self.variants,
            "schemes": [label(s) for s in self.extent.schemes],
            "readings": len(self.passes),
            "read_bytes": len(self.passes) * self.source_bytes,
            "tape_bytes": max(map(len, self.passes)) * per_track,
            "tokens": self.extent.windows * self.recipe.seq_len,
            "forward_tokens": round(tracks * self.extent.windows * self.recipe.seq_len),
        }


def method_of(recipe: Recipe, ref: Linear, scheme: Scheme) -> Method:
    """As a recipe with that scheme for all says."""
    method = recipe.model_copy(
        update={"scheme": scheme.name, "rules": (), "group_size": scheme.weight.group_size}
        | dict.fromkeys(("experts", "shared_experts", "attention", "mlp"))
    ).method_of(ref)
    assert method
    return method


def measuring_of(reader: CheckpointReader, recipe: Recipe, extent: Extent) -> Measuring:
    """From headers alone. Raises ConfigError for schemes that do not fit, or that leave nothing to choose."""
    if recipe.linears:
        raise ConfigError("sensitivities need an architecture that quantkit knows", "leave out --linears")
    spec = build_spec(reader.config, str(reader.folder / "config.json"))
    recipe = recipe.model_copy(update={"samples": recipe.samples or windows_for(spec, recipe.seq_len)})
    groups = groups_of(spec, recipe, extent.schemes, extent.bands)
    if all(len(group.choices) < 2 for group in groups):
        raise ConfigError("each group of linears has but one scheme, which leaves no choice", "give two --schemes or more")
    variants = [Variant(g, s) for g in groups for s in g.choices if s]
    room = max(1, extent.tapes // _track_bytes(spec, recipe, extent))
    passes = tuple(tuple(variants[start : start + room]) for start in range(0, len(variants), room))
    size = sum(entry.nbytes for entry in reader.entries.values())
    return Measuring(spec, recipe, extent, groups, tuple(_anchors(reader, groups)), passes, size)


def _track_bytes(spec: ModelSpec, recipe: Recipe, extent: Extent) -> int:
    """Hidden states and what MLPs read, float32, and K and V, of one variant."""
    return extent.windows * recipe.seq_len * (2 * spec.hidden + spec.layers[0].attention.kv_width) * 4


def _anchors(reader: CheckpointReader, groups: Sequence[Group]) -> Iterator[tuple[str, dict[str, Scheme | None]]]:
    """The model in the schemes with the fewest bytes; and the role with most weights so, the others in the widest."""
    weights: dict[Role, int] = {}
    for group in groups:
        weights[group.role] = weights.get(group.role, 0) + group.weights
    heaviest = max(weights, key=lambda role: weights[role])

    def by_size(group: Group) -> list[Scheme | None]:
        return sorted((s for s in group.choices if s), key=lambda s: nbytes(reader, group, s)) or [None]

    least = {group.name: by_size(group)[0] for group in groups}
    mixed = {group.name: by_size(group)[0 if group.role is heaviest else -1] for group in groups}
    yield "fewest bytes", least
    if mixed != least:
        yield f"fewest bytes in {heaviest.value}, most elsewhere", mixed


@plain_arithmetic()
def measure(
    reader: CheckpointReader,
    measuring: Measuring,
    out: Path,
    device: str = "auto",
    progress: Progress = lambda *numbers: None,
) -> Sensitivity:
    """Measure, and write the file `out`. Interrupted, the same call goes on after the last reading of the weights that was
    finished. Raises QuantkitError."""
    begun, place = time.monotonic(), pick_device(device)
    texts, name = _texts(reader, measuring)
    work = partial_of(out) / WORK
    journal = Journal(work, _key(reader, measuring, texts, place))
    try:
        for number, variants in enumerate(measuring.passes):
            if number not in journal.units:
                anchors = [Anchor(n, assigned(measuring.groups, c)) for n, c in measuring.anchors] if number == 0 else []
                with TemporaryDirectory(dir=work, prefix="tapes-") as scratch:
                    losses = run_pass(
                        reader,
                        measuring.spec,
                        lambda ref, scheme: method_of(measuring.recipe, ref, scheme),
                        texts,
                        variants,
                        anchors,
                        place,
                        Path(scratch),
                        lambda done, total, at=number: progress(at, len(measuring.passes), done, total),  # type: ignore[misc]
                    )
                journal.commit(number, {"losses": {_name(what): [x.kl, x.error] for what, x in losses.items()}})
        by_name = {key: Loss(*pair) for unit in journal.units.values() for key, pair in unit["losses"].items()}
        result = _result(reader, measuring, texts, name, by_name, time.monotonic() - begun)
        result.write(out)
    finally:
        journal.close()
    shutil.rmtree(partial_of(out))
    return result


def _name(what: Variant | str) -> str:
    return what if isinstance(what, str) else f"{what.group.name} {label(what.scheme)}"


def _texts(reader: CheckpointReader, measuring: Measuring) -> tuple[Texts, str]:
    """The texts, and what the sample is."""
    recipe, extent = measuring.recipe, measuring.extent
    tokenizer, pairs = load_text_tokenizer(reader.folder, recipe.add_bos), _pairs(measuring)
    calibrated = any(needs_tokens(scheme, method_of(recipe, ref, scheme)) for ref, scheme in pairs)
    mixture, samples = read_mixture(recipe.calibration) if calibrated or not extent.text else None, recipe.samples or 0
    calibration = mixture.windows(tokenizer, samples, recipe.seq_len, recipe.seed) if mixture and calibrated else None
    if extent.text:
        data = tokens.evaluation_set(tokenizer, read_documents(extent.text), recipe.seq_len, extent.windows, extent.text)
        return Texts(calibration, data.ids, data.lengths), extent.text
    assert mixture is not None
    spare = mixture.spare(tokenizer, samples, extent.windows, recipe.seq_len, recipe.seed)
    lengths = torch.full((len(spare),), spare.shape[1])
    return Texts(calibration, spare, lengths), f"{recipe.calibration}, beside the calibration's windows"


def _pairs(measuring: Measuring) -> list[tuple[Linear, Scheme]]:
    return [(group.linears[0], scheme) for group in measuring.groups for scheme in group.choices if scheme]


def _digest(sample: Tensor, lengths: Tensor) -> str:
    return tokens.digest(torch.cat((sample.flatten(), lengths)))


def _key(reader: CheckpointReader, measuring: Measuring, texts: Texts, device: torch.device) -> dict[str, str]:
    """All that decides the numbers."""
    groups = [[g.name, [label(s) for s in g.choices]] for g in measuring.groups]
    methods = [str(method_of(measuring.recipe, ref, scheme)) for ref, scheme in _pairs(measuring)]
    return {
        "source": reader.fingerprint(),
        "calibration": tokens.digest(texts.calibration) if texts.calibration is not None else "",
        "sample": _digest(texts.sample, texts.lengths),
        "groups": json.dumps(groups),
        "methods": json.dumps(methods),
        "readings": str(len(measuring.passes)),
        "quantkit": f"{quantkit.__version__} {code_digest(_DECISIVE)[:16]}",
        **arithmetic(device),
    }


def _result(
    reader: CheckpointReader, measuring: Measuring, texts: Texts, text: str, losses: dict[str, Loss], seconds: float
) -> Sensitivity:
    def of(group: Group, scheme: Scheme | None) -> Loss:
        return losses[f"{group.name} {label(scheme)}"] if scheme else Loss(0.0, 0.0)

    lost = [
        Lost(
            name=group.name,
            linears=tuple(ref.key for ref in group.linears),
            kl={label(s): of(group, s).kl for s in group.choices},
            error={label(s): of(group, s).error for s in group.choices},
        )
        for group in measuring.groups
    ]
    sums = [([of(g, chosen[g.name]).kl for g in measuring.groups], losses[name].kl) for name, chosen in measuring.anchors]
    return Sensitivity(
        quantkit=quantkit.__version__,
        source=reader.fingerprint(),
        recipe=measuring.recipe.model_dump(mode="json"),
        text=text,
        text_digest=_digest(texts.sample, texts.lengths),
        tokens=int((texts.lengths - 1).sum()),
        schemes=tuple(label(s) for s in measuring.extent.schemes),
        bands=measuring.extent.bands,
        groups=tuple(lost),
        anchors=tuple(
            Anchored(
                name=name,
                schemes={group: label(s) for group, s in chosen.items()},
                kl=losses[name].kl,
                error=losses[name].error,
            )
            for name, chosen in measuring.anchors
        ),
        exponent=exponent_of(sums),
        passes=len(measuring.passes),
        seconds=round(seconds, 2),
    )
