"""What a run will do, from headers alone: every linear its scheme, every tensor its shard, every byte counted.

All that can be refused is refused here, before any work: unknown names, shapes that do not fit, groups that an engine
would not load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from quantkit.calib.extent import fisher_windows
from quantkit.calib.mixture import short_name
from quantkit.checkpoint.by_name import NamedSpec, is_known, spec_by_name
from quantkit.checkpoint.coverage import Coverage, Fate, account, bystanders
from quantkit.checkpoint.folder import without_tokenizer
from quantkit.checkpoint.published import published_notes
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.sets import weight_sets
from quantkit.checkpoint.share import share
from quantkit.checkpoint.stored import HEAD, HEAD_FIX, head_problem
from quantkit.dtypes import FLOATS
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats import compressed_tensors
from quantkit.job.assigned import assign, unused
from quantkit.job.chosen import choose
from quantkit.job.forecast import Forecast, forecast, windows_for
from quantkit.job.kept import check_meant
from quantkit.job.learning_plan import learning, learning_notes, tape_bytes, tuning
from quantkit.job.methods import methods_of, needs_tokens
from quantkit.job.placement import Unit, place
from quantkit.model.registry import build_spec
from quantkit.model.spec import OPTION_ROLES, ModelSpec, Role
from quantkit.quant.method import DAMPING, FISHER_TOKENS, STEPS, Method
from quantkit.recipe import Recipe
from quantkit.scheme import Scheme, Strategy, labels

__all__ = ["Plan", "make_plan", "summary"]

_TEXT = {
    "calibration",
    "samples",
    "seq_len",
    "seed",
    "add_bos",
    "cover",
}  # what of a recipe decides nothing without calibration


@dataclass(frozen=True)
class Plan:
    """The whole run. schemes: by linear, None where it is kept. methods: by linear that is quantized. coverage: what becomes
    of every tensor of the source."""

    spec: ModelSpec | NamedSpec
    recipe: Recipe
    schemes: dict[str, Scheme | None]
    methods: dict[str, Method]
    units: tuple[Unit, ...]
    coverage: Coverage
    source_bytes: int
    output_bytes: int
    kept_share: dict[str, float]
    notes: tuple[str, ...]

    @property
    def quantization_config(self) -> dict[str, Any]:
        """For config.json. Made when it is wanted: importing the library that checks it takes seconds and 180 MB."""
        return compressed_tensors.config(self.schemes, self._routers)

    @property
    def written(self) -> dict[str, Any]:
        """All of it that decides, without that library."""
        return compressed_tensors.written(self.schemes, self._routers)

    @property
    def _routers(self) -> list[str]:
        return [moe.router.key for moe in self.spec.moes()]

    @property
    def model(self) -> ModelSpec:
        """The architecture, which a calibrated run has."""
        assert isinstance(self.spec, ModelSpec)
        return self.spec

    @cached_property
    def calibrated(self) -> bool:
        """Whether any linear needs tokens."""
        return self.recipe.tune or any(needs_tokens(self.schemes[key], method) for key, method in self.methods.items())

    @cached_property
    def learned(self) -> bool:
        """Whether any linear's rounding is learned."""
        return any(method.name == "learned" for method in self.methods.values())

    @property
    def fisher_tokens(self) -> int:
        """At most so many are read for the metric of learning; 0: plain squared error."""
        tokens = self.recipe.fisher_tokens
        return 0 if not self.learned else FISHER_TOKENS if tokens is None else tokens

    @property
    def resolved(self) -> dict[str, Any]:
        """The recipe with each role's scheme, and without what decides nothing here; a file of text by its name alone."""
        fields = self.recipe.model_dump(mode="json")
        fields |= {role.value: fields[role.value] or self.recipe.scheme for role in OPTION_ROLES}
        # Fields that recipes had not always: those that decide nothing are left out, as in what was made before.
        usual = {
            "mlp": (self.recipe.scheme,),
            "damping": (None, DAMPING[0]),
            "cover": (False,),
            "steps": (None, STEPS),
            "fisher_tokens": (None,),
            "effort": (None, "fast"),
            "tune": (False,),
        }
        fields = {name: value for name, value in fields.items() if value not in usual.get(name, ())}
        if not self.calibrated:
            return {name: value for name, value in fields.items() if name not in _TEXT}
        return {**fields, "calibration": short_name(self.recipe.calibration)}

    @property
    def samples(self) -> int:
        """Calibration windows, which a calibrated run has."""
        assert self.recipe.samples
        return self.recipe.samples

    @cached_property
    def forecast(self) -> Forecast | None:
        """How many tokens its experts will get, where any of them needs tokens."""
        experts = (ref.key for ref in self.spec.linears() if ref.role is Role.EXPERTS and ref.key in self.methods)
        if not any(needs_tokens(self.schemes[key], self.methods[key]) for key in experts):
            return None
        return forecast(self.model, self.samples * self.recipe.seq_len)

    @property
    def tape_bytes(self) -> int:
        """Scratch disk: hidden states in and out, K/V, and the widest stage input, float32 per calibration token."""
        if not self.calibrated:
            return 0
        a, hidden = self.model.layers[0].attention, self.model.hidden
        width = 3 * hidden + a.kv_width + max(hidden, a.o.in_features)
        tokens = self.samples * self.recipe.seq_len
        learning = tape_bytes(self.model, tokens, self.fisher_windows * self.recipe.seq_len) if self.learned else 0
        unit = max(sum(shard.nbytes for shard in unit.shards) for unit in self.units)  # is written once more, tuned
        return tokens * width * 4 + learning + (tokens * hidden * 4 + unit if self.recipe.tune else 0)

    @property
    def fisher_windows(self) -> int:
        return fisher_windows(self.samples, self.recipe.seq_len, self.fisher_tokens) if self.fisher_tokens else 0

    def by_role(self) -> dict[str, dict[str, Any]]:
        """Per role: the schemes, how many linears and weights, and bits per weight on disk."""
        table: dict[str, dict[str, Any]] = {}
        names = labels(self.schemes.values())
        for ref in self.spec.linears():
            scheme, count = self.schemes[ref.key], ref.out_features * ref.in_features
            row = table.setdefault(ref.role.value, {"schemes": [], "linears": 0, "weights": 0, "bits": 0.0})
            if names[scheme] not in row["schemes"]:
                row["schemes"].append(names[scheme])
            row["linears"] += 1
            row["weights"] += count
            row["bits"] += count * (scheme.bits_per_weight(ref.out_features, ref.in_features) if scheme else 16)
        for row in table.values():
            row["bits_per_weight"] = round(row.pop("bits") / row["weights"], 3)
        return table


def make_plan(reader: CheckpointReader, recipe: Recipe) -> Plan:
    """Check the checkpoint against its architecture and the recipe against both. Raises CheckpointError, ConfigError."""
    where = str(reader.folder / "config.json")
    if reader.config.get("quantization_config"):
        raise ConfigError(
            f"{where} says the model is already quantized", "start from the BF16 model, or use 'quantkit convert --to bf16'"
        )
    spec = _by_name(reader, recipe) if recipe.linears else build_spec(reader.config, where)
    recipe, chosen = recipe.settled({ref.role for ref in spec.linears()}), None
    if isinstance(spec, ModelSpec):
        recipe = recipe.model_copy(update={"samples": recipe.samples or windows_for(spec, recipe.seq_len)})
        _check_names(reader, spec)
    else:
        chosen = choose(reader, spec, recipe)
    schemes = assign(reader, spec, recipe, chosen)
    methods = methods_of(spec, recipe, schemes)
    check_meant(reader, spec, recipe, schemes)
    units = place(reader, spec, schemes)
    plan = Plan(
        spec=spec,
        recipe=recipe,
        schemes=schemes,
        methods=methods,
        units=units,
        coverage=_covered(reader, spec, schemes, units),
        source_bytes=sum(entry.nbytes for entry in reader.entries.values()),
        output_bytes=sum(shard.nbytes for unit in units for shard in unit.shards),
        kept_share=share(reader, spec, schemes),
        notes=(
            *weight_sets(reader.folder),
            *(chosen.notes if chosen else ()),
            *unused(recipe, schemes, methods),
            *learning_notes(recipe, methods),
            *published_notes(reader.folder, reader.config),
        )
        + (_engine_notes(reader, spec, schemes) if isinstance(spec, ModelSpec) else ()),
    )
    if isinstance(spec, NamedSpec):
        _check_by_name(plan)
    elif plan.calibrated and spec.positions and recipe.seq_len > spec.positions:
        problem = f"seq_len {recipe.seq_len} is longer than the model reads: max_position_embeddings in {where}"
        raise ConfigError(f"{problem} is {spec.positions}", f"give --seq-len {spec.positions} or less")
    if plan.forecast and (note := plan.forecast.note()):
        plan = replace(plan, notes=(*plan.notes, note))
    if problems := compressed_tensors.inexact(plan.written, schemes, *bystanders(spec)):
        raise ConfigError(
            f"the config for engines would not be exact: {problems[0]}", "choose patterns that keep them apart"
        )
    return plan


def summary(plan: Plan) -> dict[str, Any]:
    """The plan as people and programs read it."""
    return {
        "architecture": plan.spec.architecture,
        "layers": len(plan.spec.layers),
        "parameters": plan.spec.parameters,
        "roles": plan.by_role(),
        "coverage": plan.coverage.as_dict(),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "tape_bytes": plan.tape_bytes,
        "shards": sum(len(unit.shards) for unit in plan.units),
        "calibrated": plan.calibrated,
        "calibration_tokens": plan.samples * plan.recipe.seq_len if plan.calibrated else 0,
        "coverage_forecast": plan.forecast.as_dict() if plan.forecast else None,
        "bf16_share": plan.kept_share,
        "notes": list(plan.notes),
        "recipe": plan.recipe.model_dump(),
        **({"learning": learning(plan.recipe, plan.methods, plan.fisher_windows)} if plan.learned else {}),
        **({"tuning": tuning(plan.recipe, plan.output_bytes)} if plan.recipe.tune else {}),
    }


def _covered(
    reader: CheckpointReader, spec: ModelSpec | NamedSpec, schemes: dict[str, Scheme | None], units: tuple[Unit, ...]
) -> Coverage:
    """Every tensor's fate. Raises CheckpointError when one has none, or the shards would not hold exactly the outputs."""
    coverage = account(reader.entries, spec, schemes)
    if refused := coverage.of(Fate.REFUSED):
        raise CheckpointError(f"{reader.folder}: tensor '{refused[0]}' is not understood", "check config.json")
    placed = [tensor.name for unit in units for shard in unit.shards for tensor in shard.tensors]
    outputs = coverage.output_bytes()
    if len(placed) != len(outputs) or set(placed) != outputs.keys():
        differing = sorted(set(placed) ^ outputs.keys())
        raise CheckpointError(f"{reader.folder}: the plan does not cover {differing[:3]}", "check config.json")
    return coverage


def _by_name(reader: CheckpointReader, recipe: Recipe) -> NamedSpec:
    if is_known(reader.config):
        raise ConfigError(
            f"'linears' is for architectures that quantkit does not know, and it knows {reader.config['model_type']}",
            "name linears by role (--experts, --attention, ...) or by 'rules' in a recipe",
        )
    spec = spec_by_name(reader)
    for ref in spec.linears():
        if ref.weight not in reader.entries or reader.entries[ref.weight].dtype not in FLOATS:
            raise ConfigError(f"'{ref.key}' in {reader.folder} is already quantized", "start from the BF16 model")
    return spec


def _check_by_name(plan: Plan) -> None:
    """Refuse what cannot be done without knowing the architecture."""
    if plan.recipe.tune:
        raise ConfigError("tuning needs an architecture that quantkit knows", "leave out --tune or --linears")
    for key, method in plan.methods.items():
        scheme = plan.schemes[key]
        if scheme and needs_tokens(scheme, method):
            raise ConfigError(
                f"'{key}' in {scheme.name} needs calibration, and so an architecture that quantkit knows",
                "add --method rtn, or choose FP8_DYNAMIC, FP8_BLOCK, W8A8 or W8A16",
            )
    parsed = compressed_tensors.parse(plan.written, plan.schemes)
    for key, scheme in plan.schemes.items():
        if parsed[key] != scheme:
            raise ConfigError(
                f"the name '{key}' ends as another linear's does that is treated differently; engines would mix them up",
                "choose patterns that treat both alike",
            )


def _check_names(reader: CheckpointReader, spec: ModelSpec) -> None:
    expected = spec.tensors()
    if HEAD in reader.entries:  # a tied head may be stored once more; it is carried over
        expected[HEAD] = expected[spec.embedding]
    missing = sorted(expected.keys() - reader.entries.keys())
    extra = sorted(reader.entries.keys() - expected.keys())
    if missing == [HEAD] and not extra:
        raise CheckpointError(
            f"{reader.folder} has no '{HEAD}', and config.json does not tie the head: tie_word_embeddings is "
            f"{reader.config.get('tie_word_embeddings', 'not given, which means false')}",
            "say tie_word_embeddings: true in config.json if the head is the embedding, or fetch the missing shard",
        )
    if missing or extra:
        raise CheckpointError(
            f"{reader.folder}: tensors do not match architecture {spec.architecture}: {len(missing)} missing "
            f"{missing[:3]}, {len(extra)} unexpected {extra[:3]}",
            "check config.json against the weights (layers, experts, cross-layer attention, tied head)",
        )
    for key, shape in expected.items():
        entry = reader.entries[key]
        if entry.shape != shape or entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{reader.folder / entry.shard}: tensor '{key}' is {entry.dtype} {entry.shape}, expected "
                f"{' or '.join(FLOATS)} {shape}",
                "check config.json against the weights",
            )
    if problem := head_problem(reader, spec):
        raise CheckpointError(f"{reader.folder}: {problem}", HEAD_FIX)


def _engine_notes(reader: CheckpointReader, spec: ModelSpec, schemes: dict[str, Scheme | None]) -> tuple[str, ...]:
    """What engines lack to serve the result, and where tensor parallelism would cut a group or block, which they refuse."""
    missing = without_tokenizer(reader.folder)
    notes: dict[str, None] = {missing: None} if missing else {}
    for ref in (ref for layer in spec.layers for ref in (layer.attention.o, *(mlp.down for mlp in layer.mlps()))):
        scheme = schemes[ref.key]
        if scheme is None:
            continue
        unit = {Strategy.GROUP: scheme.weight.group_size, Strategy.BLOCK: (scheme.weight.block or (0, 0))[1]}.get(
            scheme.weight.strategy
        )
        if unit:
            degree = max(tp for tp in (1, 2, 4, 8, 16) if ref.in_features % (tp * unit) == 0)
            if degree < 16:
                other = " or expert parallel" if ref.role is Role.EXPERTS else ""
                notes[f"{ref.role.value} {ref.key.rsplit('.', 1)[-1]}: tensor parallel up to {degree}{other}"] = None
    return tuple(notes)
