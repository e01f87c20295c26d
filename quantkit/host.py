"""The machine: which device to compute on, what of it decides the last bits of a sum, how much memory has been used."""

from __future__ import annotations

import ast
import hashlib
import platform
import resource
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

import quantkit
from quantkit.errors import ConfigError

__all__ = [
    "arithmetic",
    "code_digest",
    "every",
    "instructions",
    "peak_memory",
    "pick_device",
    "plain_arithmetic",
    "plainly",
    "using_threads",
]

T = TypeVar("T")
Given = TypeVar("Given")
Made = TypeVar("Made")
_DEVICES = ("cpu", "cuda")
_DECISIVE = ("avx", "fma", "amx", "sse4")  # processor flags by which libraries choose their code


def peak_memory() -> int:
    """Peak resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises ConfigError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}'", "use auto, cpu, cuda or cuda:N") from error
    if device.type not in _DEVICES or (device.type == "cpu" and device.index is not None):
        raise ConfigError(f"device '{name}' is not supported", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{name}' is not there: {torch.cuda.device_count()} CUDA devices", "use --device cpu")
    return device


def arithmetic(device: torch.device) -> dict[str, str]:
    """What decides the last bits of a sum on this device, beside the number of threads: two machines where all of it is
    equal compute the same."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"torch": torch.__version__, "device": f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"}
    chosen = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "device": f"cpu {chosen} {instructions()}".strip()}


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The vendor of the processor and its vector instructions, as far as libraries choose by them; '' if nobody says."""
    try:
        text = cpuinfo.read_text("utf-8", errors="replace")
    except OSError:
        return ""
    first = dict(line.partition(":")[::2] for line in text.partition("\n\n")[0].splitlines())
    fields = {name.strip(): value.split() for name, value in first.items()}
    flags = sorted(flag for flag in fields.get("flags", fields.get("Features", [])) if flag.startswith(_DECISIVE))
    return " ".join([*fields.get("vendor_id", []), *flags])


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """So many threads for torch's sums, whose last bits depend on how they are divided; then as many as before."""
    before = torch.get_num_threads()
    if number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def every(work: Callable[[Given], Made], items: Iterable[Given], most: int | None = None) -> list[Made]:
    """Of each item, in order; as many at once as torch has threads, `most` where each takes much memory, with one of torch's
    in each of them. Reading, hashing, torch's arithmetic and writing leave Python's lock. When one fails, what was not begun
    is not."""
    number = min(torch.get_num_threads(), most or torch.get_num_threads())
    if number == 1:
        return [work(item) for item in items]
    with using_threads(1), ThreadPoolExecutor(number) as pool:
        try:
            return [future.result() for future in [pool.submit(work, item) for item in items]]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """float32 by default, on the CPU, in full precision, without autocast, whatever the caller has set; then that again."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype is not torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        _full_precision(stack)
        yield


def _full_precision(stack: ExitStack) -> None:
    """float32 products as they are, until the stack is left."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has set it backend by backend, and torch lets nobody mix the two ways
        for products in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul):  # type: ignore[attr-defined]
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"
        return
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, precision)


def plainly(steps: Iterator[T]) -> Iterator[T]:
    """The same items, each made in `plain_arithmetic`; what the caller does between them is not."""
    while True:
        with plain_arithmetic():
            try:
                item = next(steps)
            except StopIteration:
                return
        yield item


def code_digest(parts: tuple[str, ...]) -> str:
    """sha256 over what the code of these modules and packages of quantkit does: comments and docstrings do not count.

    Another version may round differently, so it is another job.
    """
    root, digest = Path(quantkit.__file__).parent, hashlib.sha256()
    for part in sorted(parts):
        whole = root / part.replace(".", "/")
        for path in sorted(whole.rglob("*.py")) if whole.is_dir() else [whole.with_suffix(".py")]:
            digest.update(f"{path.relative_to(root)}\n{_code(path.read_bytes())}\n".encode())
    return digest.hexdigest()


@cache
def _code(source: bytes) -> str:
    """A module's syntax tree without docstrings; parsed once, however many jobs a process runs."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
