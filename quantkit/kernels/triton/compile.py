"""What each kernel compiles to for a GPU that need not be present: registers, local and shared memory, MMA instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.kernels.triton import activation, lang, moe_w4a16, moe_w8a8, w4a16, w8a8

__all__ = ["Case", "Usage", "cases", "compile_case", "cuobjdump", "resources"]

POINTERS = {
    "x": "*bf16", "words": "*u8", "scale": "*bf16", "zero": "*i8", "out": "*bf16", "slots": "*i32", "owners": "*i32",
    "router": "*fp32", "x_scale": "*fp32", "scales": "*fp32", "given": "*fp32", "codes": "*fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel at one tile. types: pointer types that differ from POINTERS. constants: its tl.constexpr parameters."""

    name: str
    kernel: Any
    constants: Mapping[str, object]
    warps: int = 4
    types: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """Registers a thread; local and stack memory a thread and shared memory a block in bytes; instructions in the code."""

    registers: int
    local: int
    stack: int
    shared: int
    wgmma: int = 0
    mma: int = 0
    async_copies: int = 0


def _w4(name: str, kernel: Any, sizes: Callable[[int], tuple[int, int, int]], out: str) -> list[Case]:
    found = []
    for tokens in (1, 64, 4096):
        bm, bn, warps = sizes(tokens)
        for asym in (False, True):
            flags = {"BM": bm, "BN": bn, "RUN": 64, "EVEN": True, "ASYM": asym, "SIM": False}
            found.append(Case(f"{name} BM={bm} BN={bn}{' asym' if asym else ''}", kernel, flags, warps, {"out": out}))
    return found


def _edges() -> list[Case]:
    """What a launch makes of sizes equal to 1 (Triton turns them into constants), short groups and padded columns."""
    tile = {"BM": 16, "BN": 64, "RUN": 64, "EVEN": True, "ASYM": True, "SIM": False}
    one = {"M": 1, "PER_SPLIT": 1, "SPANS": 1}
    slot = {"SLOTS": 1, "GROUPS": 1}
    eight = {"BM": 16, "BN": 64, "EVEN": True, "BLOCKED": True, "ACC": lang.tl.float32, "SIM": False, "SLOTS": 1}
    fp8 = {"x": "*fp8e4nv", "scale": "*fp32"}
    return [
        Case("w4a16 linear one token", w4a16.linear_kernel, tile | one),
        Case("w4a16 linear group 32", w4a16.linear_kernel, tile | {"RUN": 32}),
        Case("w4a16 linear group 16", w4a16.linear_kernel, tile | {"RUN": 16}),
        Case("w4a16 linear padded", w4a16.linear_kernel, tile | {"EVEN": False}),
        Case("w4a16 moe gate_up one token", moe_w4a16.gate_up_kernel, tile | slot | {"TOPK": 1}),
        Case("w4a16 moe down one token", moe_w4a16.grouped_kernel, tile | slot),
        Case("fp8 block moe gate_up one token", moe_w8a8.gate_up_kernel, eight | {"TOPK": 1}, 4, fp8),
        Case("fp8 block moe down one token", moe_w8a8.grouped_kernel, eight, 4, fp8),
    ]


def _w8() -> list[Case]:
    found, fp8 = [], {"x": "*fp8e4nv", "scale": "*fp32"}
    for tokens in (1, 64, 4096):
        bm, bn, warps = w8a8.block_sizes(tokens, True)
        tile = {"BM": bm, "BN": bn, "SIM": False}
        found.append(Case(f"fp8 block linear BM={bm} BN={bn}", w8a8.block_kernel, tile, warps, fp8))
        bm, bn, warps = w8a8.block_sizes(tokens, False)
        row = {"BM": bm, "BN": bn, "SIM": False, "BK": 128, "EVEN": True}
        found.append(Case(f"fp8 linear BM={bm} BN={bn}", w8a8.row_kernel, row | {"INT8": False}, warps, fp8))
        ints = {"x": "*i8", "codes": "*i8", "scale": "*fp32"}
        found.append(Case(f"int8 linear BM={bm} BN={bn}", w8a8.row_kernel, row | {"INT8": True}, warps, ints))
    return found


def _w8_moe() -> list[Case]:
    found = []
    for tokens in (1, 64, 4096):
        bm, bn, warps = moe_w8a8.block_sizes(tokens)
        for label, kind in (("fp8", "*fp8e4nv"), ("fp8 block", "*fp8e4nv"), ("int8", "*i8")):
            flags = {"BM": bm, "BN": bn, "EVEN": True, "BLOCKED": "block" in label, "SIM": False}
            flags["ACC"] = lang.tl.int32 if kind == "*i8" else lang.tl.float32
            types = {"x": kind, "codes": kind, "scale": "*fp32"}
            found.append(Case(f"{label} moe gate_up BM={bm} BN={bn}", moe_w8a8.gate_up_kernel, flags, warps, types))
            found.append(
                Case(f"{label} moe down BM={bm} BN={bn}", moe_w8a8.grouped_kernel, flags, warps, types | {"out": "*fp32"})
            )
    return found


def _activations() -> list[Case]:
    float8 = {"REACH": 448.0, "FLOAT": True, "STATIC": False, "SIM": False}
    return [
        Case("quantise fp8 token", activation.quantise_kernel, float8 | {"BK": 1024}),
        Case("quantise fp8 group", activation.quantise_kernel, float8 | {"BK": 128}, 1),
        Case("quantise fp8 static", activation.quantise_kernel, float8 | {"BK": 1024, "STATIC": True}),
        Case("quantise int8 token", activation.quantise_kernel,
             {"REACH": 127.0, "FLOAT": False, "STATIC": False, "SIM": False, "BK": 1024}, 4, {"codes": "*i8"}),
    ]  # fmt: skip


def cases() -> tuple[Case, ...]:
    """Every kernel at the tiles that its wrapper picks. Needs Triton."""
    return (
        *_w4("w4a16 linear", w4a16.linear_kernel, w4a16.block_sizes, "*bf16"),
        *_w4("w4a16 moe gate_up", moe_w4a16.gate_up_kernel, moe_w4a16.block_sizes, "*bf16"),
        *_w4("w4a16 moe down", moe_w4a16.grouped_kernel, moe_w4a16.block_sizes, "*fp32"),
        *_edges(),
        *_w8(),
        *_w8_moe(),
        *_activations(),
    )


def cuobjdump() -> str | None:
    """NVIDIA's disassembler: Triton's own copy, or the toolkit's; None where neither is."""
    if lang.available():
        import triton

        own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if own.exists():
            return str(own)
    return shutil.which("cuobjdump")


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Per function of a cubin: registers, local, stack and (static) shared. Raises FileNotFoundError without cuobjdump."""
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump is not installed\nFix: install Triton or the CUDA toolkit")
    text = subprocess.run([tool, "-res-usage", str(cubin)], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: {"registers": int(reg), "stack": int(stack), "shared": int(shared), "local": int(local)}
        for name, reg, stack, shared, local in found
    }


def compile_case(case: Case, capability: int = 90, stages: int = 3) -> Usage:
    """Compiles a kernel as a launch with 16-byte aligned pointers and sizes divisible by 16 would. Needs no GPU, but Triton
    and its interpreter off. Raises whatever Triton's compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types.get(n, POINTERS.get(n, "i32")) for n in names}
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    uneven = {"M", "SLOTS", "SPANS", "PER_SPLIT", "GROUPS", "TOPK", *case.constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in uneven}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        (used,) = resources(cubin).values()
    ptx = built.asm["ptx"]
    return Usage(
        registers=used["registers"], local=used["local"], stack=used["stack"], shared=int(built.metadata.shared),
        wgmma=ptx.count("wgmma.mma_async"), mma=ptx.count("mma.sync"), async_copies=ptx.count("cp.async.c"),
    )  # fmt: skip


if __name__ == "__main__":
    for each in cases():
        print(f"{each.name:36}", compile_case(each))
