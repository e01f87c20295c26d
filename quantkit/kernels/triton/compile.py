"""What each kernel compiles to for a GPU that need not be present: registers, local and shared memory, MMA instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.kernels.triton import activation, attention, lang, repair, routing, tiles, w8a8, weight_only
from quantkit.kernels.triton.tiles import Tile

__all__ = ["Case", "Loop", "Usage", "cases", "compile_case", "cuobjdump", "loops", "product", "resources", "step_bytes"]

POINTERS = {
    "x": "*bf16", "words": "*i16", "scale": "*i32", "zero": "*i32", "out": "*bf16", "slots": "*i32", "owners": "*i32",
    "places": "*i32", "router": "*fp32", "x_scale": "*fp32", "scales": "*fp32", "input_scales": "*fp32", "codes": "*fp8e4nv",
    "ids": "*i64",
}  # fmt: skip
UNEVEN = (
    "SLOTS",
    "TOPK",
    "SPANS",
    "STEPS",
    "PER_PART",
    "KINDS",
    "ALIKE",
    "TOTAL",
    "EXPERTS",
    "BLOCKS",
    "ROWS",
    "KV",
)  # not multiples of 16
ROLES: dict[str, dict[str, object]] = {
    "linear": {"GATED": False, "GROUPED": 0, "ROUTED": False},
    "gate_up": {"GATED": True, "GROUPED": routing.SORTED, "ROUTED": False},
    "down": {"GATED": False, "GROUPED": routing.SORTED, "ROUTED": True, "TOPK": 1},
}


@dataclass(frozen=True)
class Case:
    """A kernel at one tile. types: pointer types that differ from POINTERS. constants: its tl.constexpr parameters, and
    arguments equal to 1, which Triton makes constant."""

    name: str
    kernel: Any
    constants: Mapping[str, object]
    warps: int = 4
    stages: int = 3
    types: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """The longest loop of a function: its instructions as SASS, without their addresses; none where there is no loop."""

    code: tuple[str, ...]

    @property
    def length(self) -> int:
        return len(self.code)

    def count(self, operation: str) -> int:
        """How many instructions are of that kind, such as LDG (a load that waits for a register) or LDGSTS (one that does
        not)."""
        return sum(bool(re.match(rf"(@!?U?P\d+ )?{operation}\b", line)) for line in self.code)


@dataclass(frozen=True)
class Usage:
    """Registers a thread; local and stack memory a thread and shared memory a block in bytes; instructions in the code.

    loop: the longest one. inline: the blocks of inline assembly, as PTX.
    """

    registers: int
    local: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    async_copies: int
    volatile: int
    loop: Loop = field(repr=False)
    inline: tuple[str, ...] = field(repr=False)


def product(kind: str, tile: Tile, role: str, *, codes: str = "fp8e4nv", **changes: object) -> Case:
    """The product kernel for a kind of weight (a key of tiles.TABLE) in a role (a key of ROLES). codes: of 8-bit inputs."""
    flags = {**ROLES[role], "BM": tile.bm, "BN": tile.bn, "EVEN": True, "SIM": False, **changes}
    label = " ".join([kind, *([codes] if kind == "row8" else []), role, f"{tile.bm}x{tile.bn}", *changes])
    types = {"out": "*fp32"} if role == "down" else {}
    if kind in ("row8", "block8"):
        acc = lang.tl.int32 if codes == "i8" else lang.tl.float32
        flags |= {"BLOCKED": kind == "block8", "ACC": acc}
        types |= {"x": f"*{codes}", "codes": f"*{codes}", "scale": "*fp32"}
        return Case(label, w8a8.kernel, flags, tile.warps, tile.stages, types)
    bits, run = int(kind.removeprefix("int")), flags.pop("RUN", 64)
    assert isinstance(run, int)
    shared = flags.pop("SHARED", 2)
    assert isinstance(shared, int)
    flags |= {"BITS": bits, "RUN": run, "SHARED": shared, "EARLY": weight_only.early(tile.bm, run, shared)}
    flags = {"ASYM": False, "ALIKE": 1, **flags, "STAGES": tile.stages}
    return Case(label, weight_only.kernel, flags, tile.warps, tile.stages, types)


def step_bytes(kind: str, tile: Tile) -> int:
    """Shared memory that a stage takes at most, as the wrappers reckon it, in groups of 64 or more."""
    if kind in ("row8", "block8"):
        return w8a8.step_bytes(tile)
    return weight_only.step_bytes(tile, 64, 16 // int(kind.removeprefix("int")))


def _products() -> Iterator[Case]:
    """Each kind at each tile of the table as gate_up, at the largest as down, at the smallest as a linear."""
    for kind, rows in tiles.TABLE.items():
        for number, (_, tile) in enumerate(rows):
            for codes in ("fp8e4nv", "i8") if kind == "row8" else ("fp8e4nv",):
                yield product(kind, tile, "gate_up", codes=codes)
                if number == len(rows) - 1:
                    yield product(kind, tile, "down", codes=codes)
            if number == 0:
                yield product(kind, tile, "linear")
            if kind == "int4" and number == 0:
                yield product(kind, tile, "gate_up", ASYM=True)


def _edges() -> Iterator[Case]:
    """What a launch makes of sizes equal to 1 (Triton turns them into constants), other groups and padded columns."""
    small = tiles.TABLE["int4"][0][1]
    yield product("int4", small, "linear", SPANS=1, TOPK=1)
    yield product("int4", small, "linear", SHARED=1, ASYM=True)
    yield product("int4", small, "linear", SHARED=4, KINDS=1, ALIKE=25)
    yield product("int4", small, "linear", RUN=32, SHARED=1)
    yield product("int4", small, "linear", RUN=16, SHARED=1)
    yield product("int4", small, "down", EVEN=False)
    yield product("int8", small, "linear", SHARED=1)
    yield product("row8", small, "linear", EVEN=False)
    yield product("block8", small, "gate_up", TOPK=1)
    yield product("int4", small, "gate_up", GROUPED=routing.ALONE)


def _helpers() -> Iterator[Case]:
    float8 = {"REACH": 448.0, "FLOAT": True, "STATIC": False, "SIM": False, "TOPK": 1}
    int8 = {"REACH": 127.0, "FLOAT": False, "STATIC": False, "SIM": False, "TOPK": 1, "BK": 1024}
    yield Case("quantize fp8 token", activation.quantize_kernel, float8 | {"BK": 1024})
    yield Case("quantize fp8 group", activation.quantize_kernel, float8 | {"BK": 128}, 1)
    yield Case("quantize fp8 static", activation.quantize_kernel, float8 | {"BK": 1024, "STATIC": True})
    yield Case("quantize int8 token", activation.quantize_kernel, int8, types={"codes": "*i8"})
    for bits in (4, 8):
        flags = {"BN": 32, "RUN": 64, "BITS": bits, "SHARED": 2, "ALIKE": 1, "ASYM": False, "SIM": False}
        yield Case(f"widen int{bits}", weight_only.widen_kernel, flags)
    grid = {"BN": repair.ROWS, "BK": repair.MOST, "ASYM": False}
    floats = dict.fromkeys(("left", "weight", "ratios", "squares", "step", "offset", "errors", "lost"), "*fp32")
    ints = {**grid, "LOW": -8.0, "HIGH": 7.0, "FLOAT": False}
    yield Case("gptq int4", repair.repair_kernel, {**ints, "ASYM": True}, types={**floats, "codes": "*i8"})
    yield Case("gptq fp8", repair.repair_kernel, {**grid, "LOW": -448.0, "HIGH": 448.0, "FLOAT": True}, types=floats)
    for experts, slots in ((16, 64), (256, 4096)):
        yield Case(f"sort {slots} by {experts}", routing.sort_kernel, {"BLOCK": 16, "E": experts, "T": slots})


def _attention() -> Iterator[Case]:
    """Decoding: heads of 128 and of 80, and DeepSeek-V2's latents, each in BF16 and FP8."""
    for name, d, dv, dm in (("heads of 128", 128, 128, 0), ("heads of 80", 80, 80, 0), ("latents", 512, 512, 64)):
        blocks = {
            "D": d,
            "DV": dv,
            "DM": dm,
            "BD": 128 if d < 512 else 512,
            "BV": 128 if d < 512 else 512,
            "BM": max(dm, 16),
        }
        for dtype, scaled in (("bf16", False), ("fp8e4nv", True)):
            flags = {**blocks, "BR": 16, "BN": 32, "LONG": attention.SPAN, "SCALED": scaled, "PADDED": False, "SIM": False}
            codes = dict.fromkeys(("key", "value", "key_more"), f"*{dtype}")
            scales = dict.fromkeys(("key_scale", "value_scale", "more_scale"), "*bf16")
            rest = {"q": "*bf16", "q_more": "*bf16", "padding": "*i64", "length": "*i32"}
            left = dict.fromkeys(("sums", "tops", "totals"), "*fp32")
            types = {**codes, **scales, **rest, **left}
            wide = attention.warps(blocks["BV"])
            yield Case(f"attention {name} {dtype}", attention.span_kernel, flags, wide, types=types)
        flags = {"DV": dv, "BV": blocks["BV"], "LONG": attention.SPAN}
        merged = dict.fromkeys(("sums", "tops", "totals", "out"), "*fp32") | {"length": "*i32"}
        yield Case(f"attention {name} merged", attention.merge_kernel, flags, types=merged)


def cases() -> tuple[Case, ...]:
    """Every kernel at the tiles of the table. Needs Triton."""
    return (*_products(), *_edges(), *_helpers(), *_attention())


def cuobjdump() -> str | None:
    """NVIDIA's disassembler: Triton's own copy, or the toolkit's; None where neither is."""
    if lang.available():
        import triton

        own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if own.exists():
            return str(own)
    return shutil.which("cuobjdump")


def _dump(cubin: Path, what: str) -> str:
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump is not installed\nFix: install Triton or the CUDA toolkit")
    return subprocess.run([tool, what, str(cubin)], check=True, capture_output=True, text=True).stdout


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Per function of a cubin: registers, local, stack and (static) shared. Raises FileNotFoundError without cuobjdump."""
    text = _dump(cubin, "-res-usage")
    rows = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: {"registers": int(reg), "stack": int(stack), "shared": int(shared), "local": int(local)}
        for name, reg, stack, shared, local in rows
    }


def loops(cubin: Path) -> dict[str, Loop]:
    """Per function of a cubin its longest loop."""
    by_function = {}
    for part in _dump(cubin, "-sass").split("Function : ")[1:]:
        code = {int(at, 16): line.strip() for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", part)}
        jumps = [
            (int(to[1], 16), at) for at, line in code.items() if (to := re.search(r"\bBRA (?:`\()?0x([0-9a-f]+)", line))
        ]
        first, last = max(jumps, key=lambda jump: jump[1] - jump[0], default=(1, 0))
        by_function[part.split()[0]] = Loop(tuple(line for at, line in code.items() if first <= at <= last))
    return by_function


def compile_case(case: Case, capability: int = 90) -> Usage:
    """Compiles a kernel as a launch with 16-byte aligned pointers and sizes divisible by 16 would. Needs no GPU, but Triton
    and its interpreter off. Raises whatever Triton's compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types.get(n, POINTERS.get(n, "i32")) for n in names}
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in (*UNEVEN, *case.constants)}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages, **lang.OPTIONS}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        (used,), (loop,) = resources(cubin).values(), loops(cubin).values()
    ptx = built.asm["ptx"]
    return Usage(
        registers=used["registers"], local=used["local"], stack=used["stack"], shared=int(built.metadata.shared),
        wgmma=ptx.count("wgmma.mma_async"), mma=ptx.count("mma.sync"), async_copies=ptx.count("cp.async.c"),
        volatile=ptx.count("ld.volatile"), loop=loop,
        inline=tuple(re.findall(r"// begin inline asm\n(.*?)// end inline asm", ptx, re.S)),
    )  # fmt: skip


if __name__ == "__main__":
    for each in cases():
        used = compile_case(each)
        print(f"{each.name:44} {used} loop {used.loop.length}, {used.loop.count('LDG')} synchronous loads")
