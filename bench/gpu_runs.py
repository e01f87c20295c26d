"""What is timed on a GPU: linears and layers of known models, on random weights, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import gpu_dense
import torch
import torch.nn.functional as F
from gpu_report import Peaks
from torch import Tensor

from quantkit.kernels.cuda import decode
from quantkit.kernels.cuda.build import Library
from quantkit.kernels.triton import ops, serve
from quantkit.kernels.triton.backend import lacks
from quantkit.kernels.triton.layout import Packed, Packed8, PackedInt, misfit, pack_scales
from quantkit.kernels.triton.tiles import SCRATCH_FROM
from quantkit.scheme import PRESETS, Kind, Scheme, Strategy

__all__ = ["MODELS", "Model", "Run", "layers", "linears", "measure", "peaks", "random_packed"]

DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Model:
    """The routed experts of a layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int


MODELS = {
    "hunyuan-large": Model(6400, 18304, 16, 1),
    "hunyuan-a13b": Model(4096, 3072, 64, 8),
    "mixtral-8x22b": Model(6144, 16384, 8, 2),
    "deepseek-v2": Model(5120, 1536, 160, 6),
}


@dataclass(frozen=True)
class Run:
    """A kernel on one number of tokens. moved: bytes of weights and activations; operations: of the type `kind`.

    waits: the call waits for the GPU in between.
    """

    kernel: str
    tokens: int
    call: Callable[[], Tensor]
    moved: float
    operations: float
    kind: str
    waits: bool = False


def random_packed(scheme: Scheme, experts: int, rows: int, columns: int) -> Packed:
    """Random weights in the kernels' layout: time does not depend on them."""
    grid = scheme.weight
    if scheme.activation is None:
        per_word, group = 16 // grid.bits, grid.group_size or columns
        padded = -(-columns // (64 * per_word)) * 64 * per_word
        words = torch.randint(-(2**15), 2**15, (experts, rows, padded // per_word), dtype=torch.int16, device=DEVICE)
        shape = experts, -(-padded // group), rows
        zero = None if grid.symmetric else torch.randint(-8, 8, shape, dtype=torch.int8, device=DEVICE)
        scale = torch.full(shape, 0.01, dtype=torch.bfloat16, device=DEVICE)
        pairs, zeros = pack_scales(scale, zero, padded, per_word, 64, group)
        return PackedInt(words, pairs, zeros, grid.bits, columns, group, 64)
    codes = torch.randint(-100, 100, (experts, rows, columns), dtype=torch.int8, device=DEVICE)
    if grid.kind is Kind.FLOAT:
        codes = torch.stack([part.to(torch.float8_e4m3fn) for part in codes])
    blocked = grid.strategy is Strategy.BLOCK
    shape8 = (experts, -(-rows // 128), columns // 128) if blocked else (experts, rows)
    static = None if scheme.activation.dynamic else torch.full((experts,), 0.02, device=DEVICE)
    return Packed8(codes, torch.full(shape8, 1e-3, device=DEVICE), static, scheme.activation)


def _kind(scheme: Scheme) -> str:
    if scheme.activation is None:
        return "bf16"
    return "fp8" if scheme.activation.kind is Kind.FLOAT else "int8"


def _able(names: tuple[str, ...]) -> Iterator[tuple[str, Scheme]]:
    for name in names:
        if misfit(PRESETS[name], (128, 128)) is None and lacks(PRESETS[name], DEVICE) is None:
            yield name, PRESETS[name]


def linears(model: Model, tokens: tuple[int, ...], names: tuple[str, ...], library: Library | None) -> Iterator[Run]:
    """A linear [inner, hidden] for each number of tokens, the bfloat16 one first."""
    rows, columns = model.inner, model.hidden
    inputs = {count: torch.randn(count, columns, device=DEVICE).bfloat16() for count in tokens}

    def runs(kernel: str, call: Callable[[Tensor], Tensor], size: int, kind: str, most: int | None = None) -> Iterator[Run]:
        for count, x in inputs.items():
            if most is None or count <= most:
                moved = size + 2 * count * (rows + columns)
                yield Run(kernel, count, partial(call, x), moved, 2 * count * rows * columns, kind)

    dense = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    yield from runs("bf16", partial(F.linear, weight=dense), dense.nbytes, "bf16")
    for name, scheme in _able(names):
        weight = random_packed(scheme, 1, rows, columns)
        yield from runs(
            name, serve.Linear(weight, library if name.startswith("W4A16") else None), weight.nbytes, _kind(scheme)
        )
        if name == "W4A16" and isinstance(weight, PackedInt):
            yield from runs("W4A16 triton", partial(ops.linear, weight=weight), weight.nbytes, "bf16")
            yield from runs("W4A16 scratch", partial(ops.linear_by_scratch, weight=weight), weight.nbytes, "bf16")
            if library:
                cuda = partial(decode.linear, weight=weight, library=library)
                yield from runs("W4A16 cuda", cuda, weight.nbytes, "bf16", decode.MOST)


def dense_moe(x: Tensor, ids: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The bfloat16 layer on torch's grouped product, some 15 launches."""
    order = ids.flatten().argsort(stable=True)
    count = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=x.device)
    ends = count.scatter_add_(0, ids.flatten(), torch.ones_like(order, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends).chunk(2, 1)
    rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends) * router.flatten()[order, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // ids.shape[1], rows.float()).to(x.dtype)


def layers(model: Model, tokens: tuple[int, ...], names: tuple[str, ...], library: Library | None) -> Iterator[Run]:
    """The routed experts of a layer for each number of tokens, the bfloat16 ones first. Routing is uniform."""
    hidden, inner, experts = model.hidden, model.inner, model.experts
    inputs = {}
    for count in tokens:
        x, router = torch.randn(count, hidden, device=DEVICE).bfloat16(), torch.rand(count, model.top_k, device=DEVICE)
        inputs[count] = x, torch.rand(count, experts, device=DEVICE).topk(model.top_k).indices, router

    def runs(
        kernel: str, call: Callable[[Tensor, Tensor, Tensor], Tensor], size: int, kind: str, most: float | None = None
    ) -> Iterator[Run]:
        for count, (x, ids, router) in inputs.items():
            if most is None or ids.numel() <= most * experts:
                moved = size * ids.unique().numel() / experts + 4 * count * hidden
                many = kernel in ("W4A16", "W4A16_ASYM", "W8A16") and ids.numel() >= SCRATCH_FROM * experts
                call_it, operations = partial(call, x, ids, router), 6 * ids.numel() * hidden * inner
                yield Run(kernel, count, call_it, moved, operations, kind, waits=many or kernel.endswith("scratch"))

    wide = torch.randn(experts, 2 * inner, hidden, device=DEVICE, dtype=torch.bfloat16)
    back = torch.randn(experts, hidden, inner, device=DEVICE, dtype=torch.bfloat16)
    yield from runs("bf16", partial(gpu_dense.moe, gate_up=wide, down=back), wide.nbytes + back.nbytes, "bf16")
    yield from runs("bf16 torch", partial(dense_moe, gate_up=wide, down=back), wide.nbytes + back.nbytes, "bf16")
    del wide, back  # timed by now: room for the others
    for name, scheme in _able(names):
        pair = random_packed(scheme, experts, 2 * inner, hidden), random_packed(scheme, experts, hidden, inner)
        size = pair[0].nbytes + pair[1].nbytes
        yield from runs(name, serve.Experts(*pair, library if name.startswith("W4A16") else None), size, _kind(scheme))
        if name == "W4A16" and isinstance(pair[0], PackedInt) and isinstance(pair[1], PackedInt):
            yield from runs("W4A16 triton", _on(ops.moe, pair), size, "bf16")
            yield from runs("W4A16 scratch", _on(ops.moe_by_scratch, pair), size, "bf16")
            if library:
                yield from runs("W4A16 cuda", _on(partial(decode.moe, library=library), pair), size, "bf16", decode.MOST)
        del pair


def _on(moe: Callable[..., Tensor], pair: tuple[Packed, Packed]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, ids, router: moe(x, *pair, ids, router)


def measure(call: Callable[[], object], rounds: int, waits: bool = False) -> tuple[list[float], float]:
    """(seconds of each round on the GPU alone, median seconds as Python calls it).

    The first is the call captured in a CUDA graph, as engines decode; one that waits for the GPU cannot be captured, and is
    timed as Python calls it. A buffer larger than the second-level cache is read before each round.
    """
    for _ in range(3):
        call()  # compiles
    torch.cuda.synchronize()
    flush = torch.zeros(2**26, dtype=torch.int32, device=DEVICE)
    plain = sorted(_timed(call, flush, idle=True) for _ in range(rounds))
    if waits:
        return plain, plain[rounds // 2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return [_timed(graph.replay, flush) for _ in range(rounds)], plain[rounds // 2]


def _timed(call: Callable[[], object], flush: Tensor, idle: bool = False) -> float:
    """Seconds of a call that finds nothing of its own in the cache. Reading leaves no lines behind that must be written back
    while it runs. idle: the GPU waits for Python, whose launches would otherwise hide behind the flush."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.sum()
    if idle:
        torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def peaks(rounds: int) -> Peaks:
    """The most this GPU reaches now: reading and copying 4 GiB, and square products of 8192."""
    buffer, n = torch.empty(2**30, dtype=torch.float32, device=DEVICE).zero_(), 8192
    read, copy = min(measure(buffer.sum, rounds)[0]), min(measure(lambda: buffer[: 2**29].copy_(buffer[2**29 :]), rounds)[0])
    bandwidth = max(buffer.nbytes / read, buffer.nbytes / copy)
    wide = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    products: dict[str, Callable[[], object]] = {"bf16": lambda: wide @ wide.T}
    narrow = wide.clamp(-1, 1).mul(100).to(torch.int8)
    products["int8"] = lambda: torch._int_mm(narrow, narrow.T)
    if lacks(PRESETS["FP8_DYNAMIC"], DEVICE) is None:
        small, one = wide.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)
        products["fp8"] = lambda: torch._scaled_mm(small, small.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return Peaks(bandwidth, {name: 2 * n**3 / min(measure(call, rounds)[0]) for name, call in products.items()})
