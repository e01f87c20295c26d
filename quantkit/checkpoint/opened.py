"""A checkpoint as it was found: the layout and the scheme of its linears, and what does not fit its architecture."""

from __future__ import annotations

from quantkit.checkpoint.by_name import NamedSpec, spec_of
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.stored import HEAD_FIX, head_problem
from quantkit.dtypes import FLOATS, ITEMSIZE
from quantkit.errors import ConfigError
from quantkit.formats import compressed_tensors, table
from quantkit.formats.base import KV_SCALE, Format
from quantkit.model.spec import HEAD, ModelSpec
from quantkit.scheme import Scheme

__all__ = ["format_of", "misfits", "schemes_of"]


def format_of(reader: CheckpointReader) -> Format:
    """The format of a checkpoint's quantized linears. Raises ConfigError."""
    quantization = reader.config.get("quantization_config")
    try:
        return table.recognise(quantization, reader.entries) if quantization else compressed_tensors.FORMAT
    except ConfigError as error:
        raise ConfigError(f"{reader.folder / 'config.json'}: {error.problem}", error.fix) from error


def schemes_of(reader: CheckpointReader) -> dict[str, Scheme | None]:
    """The scheme of every linear of a checkpoint; None where it is not quantized."""
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
    allowed = FLOATS if isinstance(spec, ModelSpec) else tuple(ITEMSIZE)
    expected = {key: (allowed, shape) for key, shape in spec.tensors().items()}
    if isinstance(spec, ModelSpec) and HEAD in reader.entries:  # a tied head may be stored once more
        expected[HEAD] = expected[spec.embedding]
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
            actual = f"{entry.shard}: tensor '{key}' is {entry.dtype} {entry.shape}"
            problems.append(f"{actual}, expected {' or '.join(dtypes)} {shape}")
    if isinstance(spec, ModelSpec) and not problems and (differing := head_problem(reader, spec)):
        problems.append(f"{differing}; {HEAD_FIX}")
    return problems
