"""What work costs, counted: it grows with layers, experts, tensors and rules as they do; bytes are hashed and products
launched as often as is said. How often weights are read: tests/calib/test_streams.py."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import quantkit
from quantkit.checkpoint.inspect import inspect
from quantkit.checkpoint.origin import SUMS, DigestingReader
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.verify import stated, verify
from quantkit.engines.assess import assess
from quantkit.engines.held import Deployment
from quantkit.engines.registry import ENGINES
from quantkit.host import using_threads
from quantkit.job.plan import Plan, make_plan, summary
from quantkit.kernels.cpu import backend, build
from quantkit.kernels.cpu import steps as cpu_steps
from quantkit.model.cache import Cache
from quantkit.model.forward import forward
from quantkit.model.registry import build_spec
from quantkit.model.spec import MLP, Linear, MoE
from quantkit.model.weights import Weights
from quantkit.recipe import Recipe
from tests.conftest import CONFIG, SMALL, random_weights, write_checkpoint
from tests.helpers.architectures import TINY
from tests.helpers.counting import steps
from tests.helpers.sparse import write_sparse

RTN = {"scheme": "W8A16", "group_size": 32}
SMALLEST = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
Work = Callable[[], object]


def sparse(
    folder: Path, layers: int, experts: int, rules: int = 0, schemes: tuple[str, ...] = ("FP8_DYNAMIC", "W4A16")
) -> tuple[CheckpointReader, Recipe]:
    """A checkpoint of headers alone. rules: a rule for each of the last layers, of these schemes in turn."""
    write_sparse(folder, {**TINY["mixtral"], "num_hidden_layers": layers, "num_local_experts": experts})
    last = range(layers - 1, layers - 1 - rules, -1)
    matched = [{"match": f"*.layers.{i}.self_attn.*", "scheme": schemes[i % len(schemes)]} for i in last]
    return CheckpointReader(folder), Recipe.of({**RTN, "method": "rtn", "rules": matched})


def planning(folder: Path, layers: int, experts: int, *rules: Any) -> Work:
    reader, recipe = sparse(folder, layers, experts, *rules)
    return lambda: summary(make_plan(reader, recipe))


def asking(folder: Path, layers: int, engine: str) -> Work:
    """Of four devices, on which groups are cut and every weight has something said of it."""
    reader, recipe = sparse(folder, layers, 4)
    plan: Plan = make_plan(reader, recipe)
    how = Deployment(tp=4)
    return lambda: assess(ENGINES[engine], plan.model, reader.config, plan.schemes, plan.written, how)


def real(folder: Path, layers: int, experts: int) -> Path:
    config = {**TINY["mixtral"], **SMALLEST, "num_hidden_layers": layers, "num_local_experts": experts}
    return write_checkpoint(folder / "model", config, random_weights(config))


def quantizing(folder: Path, layers: int, experts: int, **recipe: Any) -> Work:
    model = real(folder, layers, experts)
    return lambda: quantkit.quantize(model, folder / "out", Recipe(**(recipe or RTN)))


def of_output(folder: Path, layers: int, experts: int, work: Callable[[Path, Path], object]) -> Work:
    model, out = real(folder, layers, experts), folder / "out"
    quantkit.quantize(model, out, Recipe(**RTN))  # type: ignore[arg-type]
    return lambda: work(out, model)


GPTQ = {"group_size": 32, "samples": 4, "seq_len": 32}
GROWS: dict[str, Callable[[Path, int], Work]] = {
    "plan, layers": lambda at, n: planning(at, 2 * n, 4),
    "plan, experts": lambda at, n: planning(at, 2, 2 * n),
    "plan, layers of two kinds": lambda at, n: planning(at, 2 * n, 4, 4),
    "vllm, layers": lambda at, n: asking(at, 4 * n, "vllm"),
    "sglang, layers": lambda at, n: asking(at, 4 * n, "sglang"),
    "quantize, layers": lambda at, n: quantizing(at, n, 2),
    "quantize, experts": lambda at, n: quantizing(at, 1, n),
    "quantize with GPTQ, layers": lambda at, n: quantizing(at, n, 2, **GPTQ),
    "verify, layers": lambda at, n: of_output(at, n, 2, lambda out, model: verify(out, model)),
    "verify, experts": lambda at, n: of_output(at, 1, n, lambda out, model: verify(out, model)),
    "inspect, layers": lambda at, n: of_output(at, n, 2, lambda out, model: inspect(out)),
    "convert, layers": lambda at, n: of_output(at, n, 2, lambda out, model: quantkit.convert(out, at / "to", "gptq-v2")),
}


@pytest.mark.parametrize("what", GROWS)
def test_work_grows_with_a_model_as_the_model_does(what: str, tmp_path: Path) -> None:
    """Twice as much added costs twice as much more: lines of Python, each turn of a loop counted."""
    with using_threads(1):  # those of other threads are not counted
        GROWS[what](tmp_path / "first", 2)()  # what is done once in a process
        small, middle, large = (steps(GROWS[what](tmp_path / str(n), n)) for n in (2, 4, 8))
    assert 0 < large - middle <= 2.004 * (middle - small)


@pytest.mark.parametrize("schemes", [("W8A16",), ("FP8_DYNAMIC", "W4A16")], ids=["alike", "in turn"])
def test_work_grows_with_rules_as_they_do(schemes: tuple[str, ...], tmp_path: Path) -> None:
    """On one model; each linear is asked of the rules until one matches, so that rules and linears multiply. Schemes that
    differ make the config that engines read longer, by its patterns and no more than that."""
    planning(tmp_path / "first", 24, 4, 16, schemes)()
    none, few, some, many = (steps(planning(tmp_path / str(n), 24, 4, n, schemes)) for n in (0, 4, 8, 16))
    assert many - none <= 4 * (few - none)
    if len(schemes) == 1:
        assert 0 < many - some <= 2 * (some - few)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each file is hashed from end to end, by the name of its folder and its own."""
    counted, real_digest = Counter[tuple[str, str]](), hashlib.file_digest

    def file_digest(file: Any, *arguments: Any) -> Any:
        path = Path(file.name)
        counted[path.parent.name, path.name] += 1
        return real_digest(file, *arguments)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    return counted


def test_a_run_hashes_each_byte_of_its_output_twice_and_of_its_source_once(
    make_model: Callable[..., Path], tmp_path: Path, hashed: Counter[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is written, and by verify from the disk. Of the source, what is carried over and used too (norms, routers) is
    hashed whenever it is read. Hidden states once between units, so that they can be resumed."""
    model, seen = make_model("source"), Counter[str]()
    for name in ("tensor", "rows"):
        read = getattr(DigestingReader, name)

        def reading(self: DigestingReader, key: str, *at_once: int, read: Any = read) -> Any:
            seen[key] += 1
            return read(self, key, *at_once)

        monkeypatch.setattr(DigestingReader, name, reading)
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", **SMALL))  # type: ignore[arg-type]
    written = {name for (folder, name) in hashed if folder == "out.partial"}
    assert written == stated(tmp_path / "out").keys() == {p.name for p in (tmp_path / "out").iterdir()} - {SUMS, "run.json"}
    assert {hashed["out.partial", name] for name in written} == {2}
    tapes = {name: count for (folder, name), count in hashed.items() if name.startswith("tape-")}
    assert tapes == {"tape-1.f32": 1, "tape-2.f32": 1}  # two pairs of layers, the embedding before them
    linears = {ref.weight for ref in build_spec(CONFIG, "test").linears()}
    assert seen.keys() == CheckpointReader(model).entries.keys() and {seen[key] for key in linears} == {1}
    assert not any(name.endswith(".safetensors") for (folder, name) in hashed if folder == "source")


def test_verify_hashes_each_byte_once(model: Path, tmp_path: Path, hashed: Counter[tuple[str, str]]) -> None:
    quantkit.quantize(model, tmp_path / "out", Recipe(**RTN))  # type: ignore[arg-type]
    hashed.clear()
    verify(tmp_path / "out", model)
    assert {count for (folder, _), count in hashed.items() if folder == "out"} == {1}
    assert not any(name.endswith(".safetensors") for (folder, name) in hashed if folder == model.name)


class Counting(Weights):
    """How often each linear is multiplied."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.products = {key: tensor.float() for key, tensor in tensors.items()}, Counter[str]()

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        self.products[ref.key] += 1
        return F.linear(x, self.tensors[ref.weight])

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]


@pytest.mark.parametrize("name", ["hunyuan", *TINY])
def test_a_forward_multiplies_by_each_linear_once(name: str) -> None:
    """Of the experts those that a token is routed to, however many tokens there are."""
    config = CONFIG if name == "hunyuan" else TINY[name]
    spec, weights = build_spec(config, name), Counting(random_weights(config))
    cache = Cache()
    for ids, absorbs in ((torch.randint(1, 257, (2, 40)), False), (torch.randint(1, 257, (2, 1)), True)):
        weights.products.clear()
        traces = list(forward(spec, weights, ids, cache))
        expected = set()
        for layer, trace in zip(spec.layers, traces, strict=True):
            absorbed = layer.attention.absorbed() if absorbs else ()  # multiplied by its halves, as plain matrices
            parts = [layer.mlp] if isinstance(layer.mlp, MLP) else [layer.mlp.shared] if layer.mlp.shared else []
            if isinstance(layer.mlp, MoE):
                assert trace.routing is not None
                parts += [layer.mlp.experts[i] for i in set(trace.routing.experts.flatten().tolist())]
            expected |= {ref.key for ref in layer.attention.linears() if ref not in absorbed}
            expected |= {ref.key for part in parts for ref in part.linears()}
        assert weights.products == dict.fromkeys(expected, 1)


@pytest.mark.skipif(isinstance(build.load(), str), reason="no CPU kernels here")
@pytest.mark.parametrize(("name", "calls"), [("hunyuan", [1] * 4), ("mixtral", [1] * 3), ("deepseek_v2", [1, 2, 2])])
def test_the_kernels_of_a_processor_are_called_once_for_all_experts(
    name: str, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """calls: by layer; the shared expert goes along where it has the shape of the others. And once for each linear of
    attention: neither experts nor tokens add a launch. Few tokens go by halves of layers."""
    config, launched = CONFIG if name == "hunyuan" else TINY[name], Counter[str]()

    def counted(kernel: str) -> Callable[..., Any]:
        function = getattr(backend, kernel)

        def call(*arguments: Any) -> Any:
            launched[kernel] += 1
            return function(*arguments)

        return call

    for kernel in ("matmul", "experts"):
        monkeypatch.setattr(backend, kernel, counted(kernel))
    entries = cpu_steps.call

    def entered(entry: Any, *given: Any) -> None:
        launched[entry.__name__] += 1
        entries(entry, *given)

    monkeypatch.setattr(cpu_steps, "call", entered)
    folder = write_checkpoint(tmp_path / "model", config, random_weights(config))
    quantkit.quantize(folder, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32))
    loaded = quantkit.load(tmp_path / "out")
    linears = sum(len(layer.attention.linears()) for layer in loaded.spec.layers)
    halves = {"quantkit_attention_half": len(calls), "quantkit_mlp_half": len(calls), "matmul": 1}  # and the head
    if name == "deepseek_v2":  # latent attention and group-limited routing have no step
        halves = {"quantkit_mlp_half": 1, "matmul": linears + 1, "experts": sum(calls) - 1}
    for tokens, expected in ((1, halves), (50, {"experts": sum(calls), "matmul": linears})):
        launched.clear()
        loaded.logits(torch.randint(1, 257, (1, tokens)), Cache())
        assert launched == expected
