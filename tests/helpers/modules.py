"""The package's modules and which of them import which, read from their source."""

from __future__ import annotations

import ast
from pathlib import Path

import quantkit

PACKAGE = Path(quantkit.__file__).parent
MODULES = sorted(
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"
)


def imports(module: str) -> set[str]:
    """Modules of the package that this one imports, anywhere in it: at its top, in a function, relative, or by name."""
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = (
                ".".join(["quantkit", *above, *([node.module] if node.module else [])]) if node.level else node.module or ""
            )
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and "import_module" in ast.unparse(node.func)
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value))
    own = [name.removeprefix("quantkit.") for name in names if name.startswith("quantkit.")]
    return {found for name in own if (found := next((m for m in (name, name.rpartition(".")[0]) if m in MODULES), ""))}


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")
