"""The compressed-tensors checkpoint format: names, dtypes and shapes on disk, and the `quantization_config` of config.json.

Schema and presets are those of the compressed-tensors library (Apache-2.0), whose classes write the config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.dtypes import FLOATS, TensorPlan, torch_dtype
from quantkit.errors import ConfigError, shown
from quantkit.formats.base import Entries, Format, Schemes, Tensors, scale_dtype
from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.model.spec import Linear
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import FP8_TENSOR, PRESETS, Packing, Scheme, fp8_block, scheme_named, weight_only

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    *("FORMAT", "config", "decode", "encode", "encode_rows", "groups", "inexact", "matrices", "parse", "planned", "written"),
]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or expert, within a name
_ANY = r"\d+"
_AGAIN = "fetch config.json again"
_ROUTED = re.compile(r"\.experts\.\d+\.")
_TENSORS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")


def planned(ref: Linear, scheme: Scheme) -> list[TensorPlan]:
    """The tensors that one quantized linear becomes."""
    out, inputs, grid = ref.out_features, ref.in_features, scheme.weight
    scale = TensorPlan(f"{ref.key}.weight_scale", grid.scale_dtype, grid.scale_shape(out, inputs))
    if scheme.packing is Packing.WORDS:
        plans = [
            TensorPlan(f"{ref.key}.weight_packed", "I32", (out, inputs * grid.bits // 32)),
            scale,
            TensorPlan(f"{ref.key}.weight_shape", "I64", (2,)),
        ]
        if not grid.symmetric:
            plans.append(TensorPlan(f"{ref.key}.weight_zero_point", "I32", (out * grid.bits // 32, scale.shape[1])))
        return plans
    plans = [TensorPlan(f"{ref.key}.weight", grid.codes.dtype, (out, inputs)), scale]
    if scheme.static and scheme.activation:
        plans.append(TensorPlan(f"{ref.key}.input_scale", scheme.activation.scale_dtype, (1,)))
    return plans


def encode(ref: Linear, scheme: Scheme, q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors to write for one quantized linear; the same names, dtypes and shapes as `planned`. Raises ConfigError
    for a shape that does not fill whole words."""
    if scheme.packing is Packing.WORDS and (problem := scheme.misfit(ref.out_features, ref.in_features)):
        raise ConfigError(f"'{ref.key}' cannot be {scheme.name}: {problem}", "keep it as it is, or use --to bf16")
    tensors = encode_rows(ref.key, scheme, q)
    if scheme.packing is Packing.WORDS:
        tensors[f"{ref.key}.weight_shape"] = q.codes.new_tensor(q.shape, dtype=torch_dtype("I64"))
    if q.input_scale is not None:
        tensors[f"{ref.key}.input_scale"] = q.input_scale
    return tensors


def encode_rows(key: str, scheme: Scheme, q: QuantizedTensor) -> dict[str, Tensor]:
    """Of some rows of a linear: the rows of those tensors whose first dimension is the linear's. Zero points lie several to
    a word along it, so that 32 / bits rows, or a multiple, go together."""
    tensors = {f"{key}.weight_scale": q.scale}
    if scheme.packing is Packing.WORDS:
        tensors[f"{key}.weight_packed"] = pack_rows(q.codes, scheme.weight.bits)
    else:
        tensors[f"{key}.weight"] = q.codes
    if q.zero is not None:
        tensors[f"{key}.weight_zero_point"] = pack_rows(q.zero.T.contiguous(), scheme.weight.bits).T.contiguous()
    return tensors


def decode(ref: Linear, scheme: Scheme, tensors: Tensors) -> QuantizedTensor:
    """One quantized linear, from the tensors that `planned` names."""
    bits, zero, out, inputs = scheme.weight.bits, None, ref.out_features, ref.in_features
    if scheme.packing is Packing.WORDS:
        codes = unpack_rows(tensors[f"{ref.key}.weight_packed"], bits)
        if not scheme.weight.symmetric:
            zero = unpack_rows(tensors[f"{ref.key}.weight_zero_point"].T.contiguous(), bits).T.contiguous()
    else:
        codes = tensors[f"{ref.key}.weight"]
    input_scale = tensors[f"{ref.key}.input_scale"].reshape(1) if scheme.static else None
    scale = tensors[f"{ref.key}.weight_scale"].reshape(scheme.weight.scale_shape(out, inputs))
    return QuantizedTensor(codes, scale, zero, scheme.weight, input_scale)


def matrices(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """[out, in] of every matrix, quantized or not, by key, and the tensors that belong to none.

    entries: dtype and shape of each tensor. read: a tensor by name, for the shapes of packed ones.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, (dtype, shape) in entries.items():
        key, _, last = name.rpartition(".")
        if last == "weight_packed" and f"{key}.weight_shape" in entries:
            out, inputs = read(f"{key}.weight_shape").tolist()
            shapes[key] = (out, inputs)
        elif last == "weight" and len(shape) == 2 and (dtype in FLOATS or f"{key}.weight_scale" in entries):
            shapes[key] = (shape[0], shape[1])
    parts = (name.rpartition(".") for name in entries)
    return shapes, [f"{key}{dot}{last}" for key, dot, last in parts if key not in shapes or last not in _TENSORS]


def _template(key: str) -> str:
    """A regular expression, anchored at both ends, for the linears that differ from this one in layer or expert only."""
    return _pattern(key, (_ANY,) * len(_NUMBER.findall(key)))


def _targets(keys: Iterable[str], everything: Mapping[str, Scheme | None], scheme: Scheme | None) -> list[str]:
    """Patterns for a group of linears and none of the others, by sets of layers and experts; one alone by its name."""
    group = set(keys)
    families: dict[str, list[str]] = {}
    for key in everything:
        families.setdefault(_NUMBER.sub("0", key), []).append(key)
    patterns: list[str] = []
    for members in families.values():
        numbers = {key: tuple(_NUMBER.findall(key)) for key in members}
        chosen = {numbers[key] for key in members if key in group}
        for pieces in _cover(chosen, set(numbers.values())) if chosen else ():
            patterns.append(_pattern(members[0], pieces))
    return sorted(patterns)


def _cover(chosen: set[tuple[str, ...]], every: set[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """What the numbers of a name may be, so that the chosen of every are caught: an expression for each number. First
    numbers that take the same of what follows go together."""
    if chosen == every:
        return ((_ANY,) * len(next(iter(every))),)
    tails: dict[str, tuple[set[tuple[str, ...]], set[tuple[str, ...]]]] = {}
    for first, *tail in every:
        chosen_tails, all_tails = tails.setdefault(first, (set(), set()))
        all_tails.add(tuple(tail))
        if (first, *tail) in chosen:
            chosen_tails.add(tuple(tail))
    alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for first, (chosen_tails, all_tails) in tails.items():
        if chosen_tails:
            alike.setdefault(_cover(chosen_tails, all_tails), []).append(first)
    expressions: list[tuple[str, ...]] = []
    for covers, firsts in alike.items():
        numbers = _ANY if len(firsts) == len(tails) else "|".join(sorted(firsts, key=lambda n: (len(n), n)))
        expressions += [(numbers, *rest) for rest in covers]
    return tuple(sorted(expressions))


def _pattern(key: str, pieces: tuple[str, ...]) -> str:
    """The name of key with its numbers changed for `pieces`: plain where each is one number, else an expression."""
    if pieces and all(piece.isdecimal() for piece in pieces):
        numbers = iter(pieces)
        return _NUMBER.sub(lambda _: next(numbers), key)
    grouped = iter(f"(?:{piece})" if "|" in piece else piece for piece in pieces)
    words = (re.escape(word).replace(r"\-", "-") for word in _NUMBER.split(key))
    return "re:^" + "".join(word + next(grouped, "") for word in words) + "$"


def config(assigned: Mapping[str, Scheme | None], routers: Iterable[str]) -> dict[str, Any]:
    """The quantization_config for linears assigned to schemes (None: kept). Routers are ignored, and the head if kept.

    What `written` says, checked and completed by the compressed-tensors library, which takes seconds and 180 MB to import.
    """
    from compressed_tensors.quantization import QuantizationConfig

    checked = QuantizationConfig.model_validate(written(assigned, routers))
    result: dict[str, Any] = checked.model_dump(mode="json")
    return result


def written(assigned: Mapping[str, Scheme | None], routers: Iterable[str]) -> dict[str, Any]:
    """All that decides in the quantization_config: groups with their targets, format and arguments, and what is ignored."""
    schemes = sorted({s for s in assigned.values() if s is not None}, key=lambda s: (s.name, s.weight.group_size or 0))
    # Of the groups with "experts" in a name, shared ones included, transformers takes the first for all routed experts.
    routed = {scheme for key, scheme in assigned.items() if _ROUTED.search(key)}
    schemes.sort(key=lambda scheme: scheme not in routed)
    unquantized = [key for key, scheme in assigned.items() if scheme is None]
    uniform = len(schemes) == 1 and not unquantized
    groups = {
        f"group_{i}": {
            "targets": ["Linear"]
            if uniform
            else _targets([k for k, s in assigned.items() if s == scheme], assigned, scheme),
            "format": scheme.packing.value,
            **_arguments(scheme),
        }
        for i, scheme in enumerate(schemes)
    }
    formats = {scheme.packing.value for scheme in schemes}
    head = [] if assigned.get("lm_head") else ["lm_head"]
    ignore = [*head, *sorted({_template(router) for router in routers}), *_targets(unquantized, assigned, None)]
    return {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignore,
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    grid, activation = scheme.weight, scheme.activation
    weights = {
        "num_bits": grid.bits,
        "type": grid.kind.value,
        "symmetric": grid.symmetric,
        "strategy": grid.strategy.value,
        "group_size": grid.group_size,
        "block_structure": list(grid.block) if grid.block else None,
        "dynamic": False,
    }
    if activation is None:
        return {"weights": weights, "input_activations": None}
    inputs = {
        "num_bits": 8,
        "type": activation.kind.value,
        "symmetric": True,
        "strategy": activation.strategy.value,
        "group_size": activation.group_size,
        "dynamic": activation.dynamic,
    }
    return {"weights": weights, "input_activations": inputs}


def _agrees(arguments: dict[str, Any] | None, expected: dict[str, Any] | None) -> bool:
    """Whether a config's arguments are the expected ones; a missing key, None and False mean the same there."""
    if arguments is None or expected is None:
        return arguments is expected
    return all((arguments.get(key) or None) == (value or None) for key, value in expected.items())


def _filled(arguments: dict[str, Any]) -> dict[str, Any]:
    """With the library's defaults: the strategy follows from group_size, whose -1 is a row."""
    size = arguments.get("group_size")
    strategy = arguments.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    return {"num_bits": 8, "type": "int", "symmetric": True, **arguments, "strategy": strategy}


def _candidates(size: int | None, block: list[int] | None) -> Iterator[Scheme]:
    """What quantkit reads: the presets, with any group size or block, and what other formats hold beside those."""
    for preset in PRESETS:
        scheme = scheme_named(preset, size)
        assert scheme is not None
        yield scheme
    yield from (weight_only(bits, symmetric, size) for bits in (4, 8) for symmetric in (True, False))
    yield from ([fp8_block(*block)] if block else [])
    yield FP8_TENSOR


def _scheme_of_group(name: str, group: dict[str, Any]) -> Scheme:
    """The scheme (with its group size) that a config group describes. Raises ConfigError."""
    weights, inputs = _filled(group.get("weights") or {}), group.get("input_activations")
    if outputs := group.get("output_activations"):
        raise ConfigError(
            f"quantization_config group '{shown(name)}' rounds outputs ({str(outputs)[:80]}), which quantkit does not",
            "use another",
        )
    size, block = weights.get("group_size"), weights.get("block_structure")
    if size == -1:
        size = weights["group_size"] = None
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ConfigError(f"quantization_config group '{shown(name)}' has group_size {size!r}", "requantize the model")
    if block and not (len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block)):
        raise ConfigError(f"quantization_config group '{shown(name)}' has block_structure {block!r}", "requantize the model")
    for scheme in _candidates(size, block):
        expected = _arguments(scheme)
        if _agrees(weights, expected["weights"]) and _agrees(inputs and _filled(inputs), expected["input_activations"]):
            return scheme
    raise ConfigError(
        f"quantization_config group '{shown(name)}' is none of the schemes {[*PRESETS]}", "requantize the model"
    )


def groups(quantization_config: Mapping[str, Any]) -> dict[str, Scheme]:
    """The scheme of each config group, by its name. Raises ConfigError for one that is none of the presets, or lies on disk
    otherwise than its numbers do in any format that engines read."""
    schemes = {}
    for name, group in quantization_config.get("config_groups", {}).items():
        scheme = _scheme_of_group(name, group)
        usual, overall = scheme.packing.value, quantization_config.get("format")
        packing = group.get("format") or (None if overall == "mixed-precision" else overall)
        if packing not in (None, usual, *(() if scheme.packing is Packing.WORDS else ("naive-quantized",))):
            raise ConfigError(
                f"quantization_config: '{name}' has format {packing!r}, and its numbers are of {usual}", _AGAIN
            )
        schemes[name] = scheme
    return schemes


class _Names:
    """Targets or ignored names, as engines match them: a name as a whole, an expression from a name's start."""

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        self.names = frozenset(name for name in names if not name.startswith("re:"))
        self.patterns = [re.compile(name[3:]) for name in names if name.startswith("re:")]

    def catch(self, key: str) -> bool:
        return key in self.names or any(pattern.match(key) for pattern in self.patterns)


def inexact(
    quantization_config: Mapping[str, Any],
    assigned: Mapping[str, Scheme | None],
    unquantized: Iterable[str],
    modules: Iterable[str],
) -> list[str]:
    """Where the config's names, read as engines read them, do not say exactly what is meant.

    assigned: what is meant, by linear. unquantized: linears that are never quantized (routers, head). modules: names of
    anything else, which no entry may match. What scales are stored in the config does not say. Raises ConfigError for one
    that cannot be read.
    """
    unquantized, modules = list(unquantized), list(modules)
    read = parse(quantization_config, [*assigned, *unquantized])
    stored = {key: scheme and scheme.stored(scheme.weight.codes.scale_dtype) for key, scheme in assigned.items()}
    meant = {**dict.fromkeys(unquantized), **stored}
    problems = [
        f"'{key}' is {_label(meant[key])} but config.json says {_label(read[key])}"
        for key in meant
        if read[key] != meant[key]
    ]
    by_name, raw = groups(quantization_config), quantization_config.get("config_groups", {})
    entries: list[tuple[str, Scheme | None]] = [(target, None) for target in quantization_config.get("ignore") or []]
    entries += [(t, by_name[n]) for n, g in raw.items() for t in g["targets"] if t != "Linear"]
    everything = dict.fromkeys([*meant, *modules])
    for entry, scheme in entries:
        one = _Names([entry])
        hits = [key for key in (everything if one.patterns else one.names & everything.keys()) if one.catch(key)]
        wrong = [key for key in hits if key not in meant or meant[key] != scheme]
        if wrong:
            problems.append(f"'{shown(entry)}' also catches {len(wrong)} that it should not, such as '{wrong[0]}'")
        if not hits:
            problems.append(f"'{shown(entry)}' matches nothing")
    return problems


def _label(scheme: Scheme | None) -> str:
    return scheme.name if scheme else "kept"


def parse(quantization_config: Mapping[str, Any], keys: Iterable[str], entries: Entries | None = None) -> Schemes:
    """The scheme of every linear named in `keys`, as an engine would read the config. Raises ConfigError.

    Scales have the dtype that `entries` say, or what quantkit makes of such codes.
    """
    try:
        schemes = _parse(quantization_config, keys)
    except (AttributeError, KeyError, TypeError, re.error) as error:
        raise ConfigError(f"quantization_config is malformed: {error!r}", _AGAIN) from error
    for key, scheme in schemes.items():
        if scheme is not None and entries:
            names, usual = (f"{key}.weight_scale", f"{key}.input_scale"), scheme.weight.codes.scale_dtype
            schemes[key] = scheme.stored(*(scale_dtype(entries, name, usual) for name in names))
    return schemes


def _parse(quantization_config: Mapping[str, Any], keys: Iterable[str]) -> Schemes:
    if quantization_config.get("quant_method") != "compressed-tensors":
        raise ConfigError(
            f"quantization_config has quant_method {quantization_config.get('quant_method')!r}", "it is another format"
        )
    for key in ("transform_config", "sparsity_config"):
        if setting := quantization_config.get(key):
            raise ConfigError(
                f"quantization_config has {key} {str(setting)[:80]}, which quantkit does not compute", "use another"
            )
    raw = quantization_config.get("config_groups", {})
    by_name = [(scheme, _Names(raw[name]["targets"])) for name, scheme in groups(quantization_config).items()]
    ignored = _Names(quantization_config.get("ignore") or [])
    general = next((scheme for scheme, targets in by_name if "Linear" in targets.names), None)
    exact: Schemes = {name: scheme for scheme, targets in reversed(by_name) for name in targets.names}

    def scheme_of(key: str) -> Scheme | None:
        if ignored.catch(key):
            return None
        return exact[key] if key in exact else next((s for s, targets in by_name if targets.catch(key)), general)

    return {key: scheme_of(key) for key in keys}


FORMAT = Format(
    name="compressed-tensors",
    parse=parse,
    planned=planned,
    decode=decode,
    target=lambda scheme: scheme,  # every scheme is one of its own, and scales keep their dtype
    encode=encode,
    config=config,
)
