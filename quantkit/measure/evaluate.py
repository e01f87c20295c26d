"""`measure`: a quantized model beside its baseline on held-out text, as a `Report`; `evaluate`: its main figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calib import tokens
from quantkit.calib.documents import read_documents
from quantkit.calib.profile import Profile, profile_of, unlike
from quantkit.calib.tokenizer import TextTokenizer, end_tokens, has_tokenizer, load_text_tokenizer
from quantkit.calib.tokens import EvalSet
from quantkit.checkpoint.contents import Contents, contents
from quantkit.checkpoint.folder import find_model
from quantkit.checkpoint.sets import weight_sets
from quantkit.checkpoint.verify import SUMS
from quantkit.errors import CheckpointError, ConfigError, NotFiniteError
from quantkit.host import pick_device, plain_arithmetic
from quantkit.measure.cache import BaselineCache
from quantkit.measure.context import LongContext
from quantkit.measure.provenance import Said, linear_rows, overlap, provenance, run_record, size
from quantkit.measure.run import BATCH_TOKENS, Evaluation
from quantkit.measure.samples import generations, worst_tokens
from quantkit.measure.sections import divergence, kv_cache, layer_rows, moe, probe
from quantkit.measure.sides import side_by_side
from quantkit.model.cache import KVFormat
from quantkit.model.spec import ModelSpec
from quantkit.report.allocation_schema import allocation_in
from quantkit.report.schema import Context, Finite, Overlap, Report, SpeedRow, Verdict
from quantkit.report.text_schema import TextTokens
from quantkit.run.bench import bench, matrices_of
from quantkit.run.model import Model

__all__ = ["Extent", "HeldOut", "evaluate", "evaluation_of", "figures", "measure", "read_text", "without_tasks"]

_KEEP_BYTES = 4_000_000_000  # generation keeps the weights of both models; beyond this it is left out, and said so
_CONTEXT_WINDOWS = 8
_SEEN = 0.05  # of its runs of tokens; what all code or all chats begin with is less


@dataclass(frozen=True)
class Extent:
    """What to measure. cache: folder for the baseline's results. kv_cache: the quantized model keeps K and V so (None: not
    rounded). context: length of the long windows, 0 for none. samples: prompts to continue. speed: time the kernels.
    add_bos: whether raw text begins with the beginning-of-text token (None: as the model was trained)."""

    seq_len: int = 512
    windows: int = 64
    cache: Path | None = None
    kv_cache: KVFormat | None = None
    context: int = 0
    samples: int = 3
    speed: bool = False
    add_bos: bool | None = None


@plain_arithmetic()
def measure(
    quantized: str | Path,
    baseline: str | Path,
    text: str = "stdlib-held-out",
    extent: Extent = Extent(),
    *,
    device: str = "cpu",
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = lambda line: None,
    ran: Evaluation | None = None,
) -> Report:
    """Everything that report.json holds but gates and tasks, in float32, activations rounded as the schemes say.

    text: a file or named corpus (see `calib.documents`); its documents are cut into windows of `seq_len` tokens, at
    most `windows` of them. progress is called with (layers done, layers in all), warn with each note that is known before
    the models run. ran: an evaluation of the same text and extent that
    has run already, beside the quantization of this very model: no weight is read for it again. Raises QuantkitError.
    """
    begun = time.monotonic()
    job = _prepare(quantized, baseline, text, extent, pick_device(device))
    for note in job.notes():
        warn(note)
    models, data, record, kv = job.models, job.data, job.record, extent.kv_cache
    run, far = ran, None
    if run is None or not run.ran or run.data.digest() != data.digest():
        step, long_ids = _step(data), job.read.long_ids
        store = BaselineCache(extent.cache, job.on_disk[0].digest, data.digest(), step, job.place) if extent.cache else None
        run = Evaluation(models[0].spec, data, step, models[0].folder, store, kv)
        far = None if long_ids is None else LongContext(models, long_ids, kv or KVFormat.FLOAT32)
        side_by_side(models, [run, far] if far else [run], progress)
    linears = linear_rows(models, record, run.weight_errors)
    scored = len(run.scores) + run.broken
    request = Said(str(baseline), str(quantized), text, extent.seq_len, kv.value if kv else None, command, job.read.began)
    samples, notes, unwritten = _generate(models, data, job.read.tokenizer, extent, run.broken > 0)
    context = far.context if far else None
    finite, where = _finite(run, context, scored, unwritten)
    return Report(
        verdict=Verdict(status="undecided", reasons=["no gate has been applied"]),
        gates=[],
        provenance=provenance(models, job.on_disk, record, data, job.overlap, request, scored),
        finite=finite,
        divergence=divergence(run) if len(run.scores) else None,
        probe=probe(run),
        kv=kv_cache(run),
        context=context,
        tasks=[],
        layers=layer_rows(run, linears),
        linears=linears,
        moe=moe(run, linears),
        worst_tokens=worst_tokens(run.worst, data, job.read.tokenizer),
        samples=samples,
        notes=[*job.notes(), *notes, *where],
        allocation=allocation_in(record),
        size=size(models[0].folder, models[1].folder, record, round(time.monotonic() - begun, 2)).model_copy(
            update={"speed": _speed(models[1], device) if extent.speed else []}
        ),
    )


def _step(data: EvalSet) -> int:
    return max(1, BATCH_TOKENS // data.ids.shape[1])


def evaluation_of(spec: ModelSpec, data: EvalSet, baseline: Path) -> Evaluation:
    """One to pass through the layers while they are quantized; see `measure`'s `ran`."""
    return Evaluation(spec, data, _step(data), baseline)


@dataclass(frozen=True)
class _Job:
    """What is known before the models run. held, record, overlap: see `provenance`."""

    models: list[Model]
    read: HeldOut
    on_disk: list[Contents]
    record: dict[str, Any]
    overlap: Overlap
    place: torch.device

    @property
    def data(self) -> EvalSet:
        return self.read.data

    def notes(self) -> list[str]:
        """That a folder holds two sets of weights, that files are not what they were written as (the figures are of what is
        there now), that the baseline has lost something itself, and that the text is not unseen."""
        pairs = zip(self.models, self.on_disk, strict=True)
        changed = [
            f"{m.folder}: {name} does not have the hash that {SUMS} states" for m, files in pairs for name in files.changed
        ]
        base = self.models[0]
        schemes = sorted({scheme.name for scheme in base.weights.schemes.values() if scheme})
        base_note = (
            f"the baseline {base.folder} is itself quantized ({', '.join(schemes)}): what it lost is in no figure here"
        )
        share = self.overlap.share or 0.0
        overlap_note = (
            f"{share:.1%} of the evaluation text stands in the calibration text: the figures are better than on other text"
        )
        sets = [note for model in self.models for note in weight_sets(model.folder)]
        doubtful = [*([base_note] if schemes else []), *([overlap_note] if share >= _SEEN else [])]
        return [*sets, *changed, *self.read.notes, *doubtful, *self._unlike()]

    def _unlike(self) -> list[str]:
        """What the text is, and the calibration text was not."""
        calibrated = Profile.of((self.record.get("calibration_text") or {}).get("profile"))
        return unlike(calibrated, self.read.profile) if calibrated else []


def _prepare(quantized: str | Path, baseline: str | Path, text: str, extent: Extent, place: torch.device) -> _Job:
    """Everything that can be refused is refused here, before the work."""
    models = [Model(find_model(path), place) for path in (baseline, quantized)]
    read = read_text(models[0].folder, models[0].config, text, extent)
    _check_pair(models, read.tokenizer)
    if int(read.data.ids.max()) >= models[0].spec.vocab:
        problem = f"the tokenizer in {models[0].folder} gives id {int(read.data.ids.max())}, the vocabulary ends before"
        raise ConfigError(problem, "use the tokenizer that belongs to this model")
    record = run_record(models[1].folder)
    shared = overlap(record, models[0].folder, read.data)
    on_disk = [contents(model.folder) for model in models]
    return _Job(models, read, on_disk, record, shared, place)


@dataclass(frozen=True)
class HeldOut:
    """Text as an evaluation reads it. long_ids: int64 [windows, extent.context], None where none are asked for. notes: what
    to tell of it."""

    tokenizer: TextTokenizer
    data: EvalSet
    long_ids: Tensor | None
    began: TextTokens
    profile: Profile
    notes: tuple[str, ...]


def read_text(folder: Path, config: dict[str, Any], text: str, extent: Extent) -> HeldOut:
    """Cut text into windows by the tokenizer of the model in `folder`, whose config.json `config` is. Raises QuantkitError,
    also where a window is longer than the model's positions."""
    tokenizer, texts = load_text_tokenizer(folder, extent.add_bos), read_documents(text)
    data = tokens.evaluation_set(tokenizer, texts, extent.seq_len, extent.windows, text)
    limit = config.get("max_position_embeddings")
    for option, length in (("--seq-len", data.ids.shape[1]), ("--context", extent.context)):
        if isinstance(limit, int) and length > limit:
            problem = f"windows of {length} tokens are longer than {folder} reads: its max_position_embeddings is {limit}"
            raise ConfigError(f"{option}: {problem}", f"give {option} {limit} or less")
    long_ids = None
    if extent.context:
        each, purpose = 2 * _CONTEXT_WINDOWS * extent.context, ("evaluation", "lower --context")
        long_ids = tokens.calibration_windows(tokenizer, texts, _CONTEXT_WINDOWS, extent.context, 0, text, each, purpose)
    note = texts.note(text)
    began = TextTokens.model_validate(tokens.beginning(tokenizer, texts))
    return HeldOut(tokenizer, data, long_ids, began, profile_of(texts), (note,) if note else ())


def _finite(run: Evaluation, context: Context | None, scored: int, unwritten: int) -> tuple[Finite, list[str]]:
    """Tokens without finite logits, of all that were scored; and notes that say where, but for the windows of the text.
    unwritten: tokens of the samples that could not be drawn."""
    far, needles = (context.not_finite, context.needles) if context else (0, [])
    elsewhere = {"needles": sum(needle.not_finite for needle in needles), "samples": unwritten}
    layers = [layer for layer in (run.broken_at, context.not_finite_layer if context else None) if layer is not None]
    varied = sum(run.varied_broken.values())
    places = (
        (far, "of the long windows"),
        (elsewhere["needles"], "of the needles' answers"),
        (varied, "of the probe's variants (floor, forced routing, KV cache)"),
    )
    notes = [f"{count:,} tokens {where} have logits that are not finite" for count, where in places if count]
    return Finite(
        tokens=run.broken + far + varied + sum(elsewhere.values()),
        of=scored + run.varied + (context.tokens if context else 0) + sum(3 * needle.n for needle in needles) + unwritten,
        layer=min(layers, default=None),
        head=run.broken + far > 0 and not layers,
        probe=run.varied_broken,
        elsewhere=elsewhere,
    ), notes


def without_tasks(report: Report, problem: str) -> Report:
    """The report of a model that could not answer a benchmark item: what was measured, and a token that is not finite."""
    before = report.finite
    places = {**before.elsewhere, "benchmark tasks": 1}
    finite = before.model_copy(update={"tokens": before.tokens + 1, "of": before.of + 1, "elsewhere": places})
    return report.model_copy(update={"finite": finite, "notes": [*report.notes, f"no benchmark was finished: {problem}"]})


def evaluate(
    quantized: str | Path,
    baseline: str | Path,
    text: str = "stdlib-held-out",
    *,
    seq_len: int = 512,
    windows: int = 64,
    device: str = "cpu",
    add_bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """KL(baseline || quantized) in nats, perplexity of both, agreement of top-1 and of router choices, error by layer.

    As `measure`, whose report `figures` abridges. add_bos: see `Extent`. Raises QuantkitError.
    """
    extent = Extent(seq_len=seq_len, windows=windows, samples=0, add_bos=add_bos)
    return figures(measure(quantized, baseline, text, extent, device=device, progress=progress))


def figures(report: Report) -> dict[str, Any]:
    """The main figures under the keys that `quantkit eval --json` documents. Raises CheckpointError where no token of the
    quantized model has finite logits."""
    measured, origin = report.divergence, report.provenance
    if measured is None:
        problem = f"no logits of {origin.quantized} are finite, from layer {report.finite.layer} on"
        raise CheckpointError(problem, "see its report; quantize again")
    named = {
        **{f"perplexity.{key}": figure for key, figure in measured.perplexity.items()},
        **{f"kl.{key}": figure for key, figure in measured.kl.items()},
        "top1_agreement": measured.top1_agreement,
        **({"router_agreement": measured.router_agreement} if measured.router_agreement else {}),
    }
    router = measured.router_agreement.value if measured.router_agreement else 1.0
    keys = ("layer", "hidden_error", "router_agreement")
    return {
        "perplexity": {key: figure.value for key, figure in measured.perplexity.items()},
        "kl": {key: figure.value for key, figure in measured.kl.items()},
        "top1_agreement": measured.top1_agreement.value,
        "router_agreement": router,
        "noise_floor": report.probe.floor.value if report.probe else None,
        "ci95": {name: [f.low, f.high] for name, f in named.items() if f.low is not None},
        "layers": [{key: getattr(row, key) for key in keys} for row in report.layers],
        "tokens": origin.tokens,
        "windows": origin.windows,
        "seq_len": origin.seq_len,
        "bootstrap_unit": origin.unit,
        "units": origin.units,
        "text": origin.text,
        "text_digest": origin.text_digest,
        "baseline": origin.baseline,
        "quantized": origin.quantized,
        "seconds": report.size.evaluate_seconds,
    }


def _check_pair(models: list[Model], tokenizer: TextTokenizer) -> None:
    base, quant = (model.spec for model in models)
    fix = "give the BF16 model that the checkpoint was made from as --baseline"
    folders = f"{models[0].folder} and {models[1].folder}"
    if base.vocab != quant.vocab:
        raise ConfigError(f"{folders} have different vocabularies: {base.vocab} and {quant.vocab} tokens", fix)
    if base != quant:
        raise ConfigError(f"{folders} are not the same model: their architecture or sizes differ", fix)
    if not has_tokenizer(models[1].folder):
        return  # it came without a tokenizer: the baseline's serves
    if load_text_tokenizer(models[1].folder).vocabulary() != tokenizer.vocabulary():
        raise ConfigError(f"{folders} have different vocabularies: their tokenizers differ", fix)


def _generate(
    models: list[Model], data: EvalSet, tokenizer: TextTokenizer, extent: Extent, broken: bool
) -> tuple[list[Any], list[str], int]:
    """Samples; a note where there are none although they were asked for; and how many tokens had no finite logits."""
    if not extent.samples or broken:
        return [], ["no text was generated: logits are not finite"] if broken and extent.samples else [], 0
    nbytes = sum(entry.nbytes for model in models for entry in model.weights.reader.entries.values())
    if nbytes > _KEEP_BYTES:
        return [], [f"no text was generated: it would keep {nbytes:,} bytes of weights in memory"], 0
    loaded = [Model(model.folder, model.device) for model in models]
    try:
        ends = end_tokens(models[0].folder, models[0].config)
        return generations(loaded, data, tokenizer, extent.samples, extent.kv_cache, ends), [], 0
    except NotFiniteError as error:
        if error.folder == models[0].folder:
            raise
        return [], [f"no text was generated: {error.problem}"], 1


def _speed(model: Model, device: str) -> list[SpeedRow]:
    rows = bench(matrices_of(model), [1, 16, 256], 10, device, "auto")
    return [
        SpeedRow(
            matrix=row["matrix"],
            tokens=row["tokens"],
            kernel=row["kernel"],
            microseconds=row["microseconds"]["median"],
            of_roofline=row["of_roofline"],
            of_bf16=row["of_bf16"],
        )
        for row in rows
    ]
